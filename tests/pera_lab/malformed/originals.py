"""Well-formed inputs, as small as they can be: bases, data, recipes, runs, adapters, exports and a study.

Each malformed input is a copy of this folder with one thing changed.
"""

import json
from pathlib import Path

RECIPE = """\
model: {name: base, dtype: float32}
method: {name: pera, r: 2, target_modules: [q_proj, v_proj], normalization: rms, init_weights: false}
task: {name: own, data: rows.jsonl, test_size: 4}
training: {learning_rate: 1.0e-3, max_steps: 2, batch_size: 2, save_steps: 1, logging_steps: 1, max_length: 96}
evaluation: {max_new_tokens: 2, batch_size: 4}
"""
CLASSIFY = """\
model: {name: encoder, dtype: float32}
method: {name: pera, r: 2, target_modules: [query, value]}
task: {name: sst2, data: glue}
training: {learning_rate: 1.0e-3, max_steps: 1, batch_size: 4, logging_steps: 1, max_length: 32}
"""
STUDY = """\
base: recipe.yaml
settings: {training: {max_steps: 1, save_steps: 100}}
grid: {task: own, method: [lora, pera-rms-0.3], r: [2]}
choose: {learning_rate: [1.0e-3], seeds: [1], rows: 4}
report: {seeds: [42]}
"""
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_texts(folder: Path):
    """Write recipes, data, prompts and a study."""
    rows = [{"prompt": f"say {i}", "completion": f"word {i % 3}"} for i in range(16)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    talk = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "ok"}]} for r in rows
    ]
    (folder / "glue" / "sst2").mkdir(parents=True)
    sentences = [{"sentence": f"a {'dull' if i % 2 else 'fine'} film {i}", "label": i % 2} for i in range(12)]
    texts = {
        "recipe.yaml": RECIPE,
        "classify.yaml": CLASSIFY,
        "study.yaml": STUDY,
        "rows.jsonl": lines,
        "rows.json": json.dumps(rows),
        "rows.csv": "prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}"\n' for r in rows),
        "talk.jsonl": "".join(json.dumps(row) + "\n" for row in talk),
        "prompts.txt": "say 1\nsay 2\n",
        "questions.jsonl": "".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(3)),
        "sentences.jsonl": "".join(json.dumps({"sentence": s["sentence"]}) + "\n" for s in sentences[:3]),
        **{
            f"glue/sst2/{split}.jsonl": "".join(json.dumps(s) + "\n" for s in sentences)
            for split in ("train", "validation")
        },
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


def write_models(folder: Path):
    """Write the tokenizer, the bases, a LoRA, data as Parquet, and a base as GGUF."""
    import pyarrow
    import torch
    from peft import LoraConfig, get_peft_model
    from pyarrow import parquet
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["say word user assistant film"] * 3, trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, padding_side="left", **names)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **ids, num_key_value_heads=1, max_position_embeddings=128))
    llama.save_pretrained(folder / "base")
    llama.save_pretrained(folder / "sharded", max_shard_size="20kB")
    BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=2)).save_pretrained(folder / "encoder")
    for name in ("base", "sharded", "encoder"):
        tokenizer.save_pretrained(folder / name)
    write_gguf(llama, tokenizer, folder / "base.gguf")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    lora = get_peft_model(llama, config)
    lora.peft_config["default"].base_model_name_or_path = str(folder / "base")
    lora.save_pretrained(folder / "lora")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")


def write_gguf(model, tokenizer, file: Path):
    """Write a LLaMA and its tokenizer as a GGUF file."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if (theta := config.rope_parameters["rope_theta"]) != 10000:  # the value that llama.cpp assumes
        writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in key:  # GGUF keeps the two halves of each head interleaved
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


COMMANDS = (
    "train recipe.yaml --output run",
    "evaluate run",
    "evaluate run --base",
    "report run",
    "train classify.yaml --output classifier",
    "evaluate classifier",
    "merge run --output merged",
    "export run --to lora --output exported",
    "export run --to gguf --output gguf",
    "study run study.yaml --output study",
)
"""The commands that write the other originals, in order."""
