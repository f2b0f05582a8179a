"""What replaces good texts in malformed inputs: in recipes, overrides, arguments and data files."""


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


METHOD = "{name: pera, r: 2, target_modules: [q_proj, v_proj], normalization: rms, init_weights: false}"
LONG_NAME, LONG_PATH = "a" * 300, "a/" * 3000 + "x"
RECIPE = {
    METHOD: [
        *lines(
            r"""
{name: pera, r: 2, r: 3, target_modules: [q_proj]}
{name: pera, r: !!int foo, target_modules: [q_proj]}
{name: pera, r: 2024-99-99, target_modules: [q_proj]}
{name: pera, r: !!timestamp x, target_modules: [q_proj]}
{name: pera, r: !!float x, target_modules: [q_proj]}
{name: pera, r: !!bool x, target_modules: [q_proj]}
{name: pera, r: !!binary x, target_modules: [q_proj]}
{name: pera, r: !!set {a, b}, target_modules: [q_proj]}
{name: pera, r: !!omap [a], target_modules: [q_proj]}
{name: pera, r: !!pairs [a], target_modules: [q_proj]}
{name: pera, r: !!null x, target_modules: [q_proj]}
{name: pera, r: !unknown 2, target_modules: [q_proj]}
{name: pera, r: 20000, target_modules: [q_proj]}
{name: pera, r: 17, target_modules: [q_proj]}
{name: pera, target_modules: '(.*)*(.*)*(.*)*(.*)*x'}
{name: pera, target_modules: '((a|[a-z._0-9]+)+)+$$'}
{name: pera, target_modules: '('}
{name: pera, target_modules: '[q_proj'}
{name: pera, target_modules: [lm_head, embed_tokens]}
{name: pera, target_modules: all-linear, rank_pattern: {'(.*)*(.*)*(.*)*x': 2}}
{name: pera, target_modules: [q_proj], rank_pattern: {k_proj: 2}}
{name: pera, target_modules: [q_proj], alpha_pattern: {q_proj: 1e400}}
{name: pera, target_modules: [q_proj], terms: none, normalization: rms}
{name: pera, target_modules: [q_proj], modules_to_save: [q_proj]}
{name: pera, target_modules: [q_proj], layers_to_transform: [99]}
{name: pera, target_modules: [q_proj], exclude_modules: '(a+)+$'}
{name: pera, target_modules: [q_proj], init_coefficients: 1e308}
{name: pera, target_modules: [q_proj], init_coefficients: -.inf}
{name: pera, target_modules: [q_proj], alpha: 1e308}
{name: pera, target_modules: [q_proj], dropout: 1}
{name: lora, r: 2, target_modules: [q_proj], init_lora_weights: pissa}
{name: lora, r: 2, target_modules: [q_proj], init_lora_weights: [x]}
{name: lora, r: 2, target_modules: [q_proj], use_dora: 3}
{name: dora, r: 99999999, target_modules: [q_proj]}
{name: hira, r: 2, target_modules: [q_proj], r: 0}
{name: full, r: 2}
{name: '../pera'}
&x {name: pera, r: *x}
{name: pera, ? [a, b] : c}
{name: pera, 1: 2, null: 3, 1.5: 2, true: x}
{<<: 3}
{<<: [1, 2]}
"""
        ),
        f"{{name: pera, r: {'1' * 5000}, target_modules: [q_proj]}}",
        f"{{name: pera, r: 0o{'7' * 5000}, target_modules: [q_proj]}}",
    ],
    "learning_rate: 1.0e-3": lines(
        r"""
learning_rate: 1e400
learning_rate: 1e30
learning_rate: 1.0e-3, keep: best
learning_rate: 1.0e-3, keep: best, eval_steps: 1
learning_rate: 1.0e-3, report_to: [nothing]
learning_rate: 1.0e-3, report_to: [all]
learning_rate: 1.0e-3, lr_ratio: {h: 1e308}
learning_rate: 1.0e-3, weight_decay: {A: .nan}
learning_rate: 1.0e-3, gradient_accumulation_steps: 99999999999999999999
learning_rate: 1.0e-3, warmup_steps: 99999999999999999999
learning_rate: 1.0e-3, seed: 4294967296
"""
    ),
    "max_steps: 2": lines(
        r"""
max_steps: 0
epochs: 1e308
epochs: 1.0e-300
"""
    ),
    "max_length: 96": lines(
        r"""
max_length: 1
max_length: 999999999999999999999
"""
    ),
    "batch_size: 2": lines(
        r"""
batch_size: 999999999999999999999
"""
    ),
    "test_size: 4": lines(
        r"""
test_size: 16
test_size: 4, validation_size: 99999999999999999999
test_size: 4, train_size: 99999999999999999999, seed: 99999999999999999999
test_size: 4, columns: {prompt: "\ud800"}
"""
    ),
    "data: rows.jsonl": [
        *lines(
            r"""
data: "rows\0.jsonl"
data: "\ud800.jsonl"
data: ~nobody/rows.jsonl
data: user/[red]name[/red]
data: ''
data: .
"""
        ),
        f"data: {LONG_NAME}.jsonl",
        f"data: {LONG_PATH}.jsonl",
    ],
    "name: base": [
        *lines(
            r"""
name: "base\0"
name: "\ud800"
name: ''
name: /
name: rows.jsonl
name: http://example.com/model
name: base, revision: main
name: org/model, revision: ../x
name: lora
name: run
name: encoder
name: base.gguf
name: gguf/adapter.gguf
"""
        ),
        f"name: {LONG_NAME}",
        f"name: {LONG_PATH}",
    ],
    "max_new_tokens: 2": lines(
        r"""
max_new_tokens: 99999999999999999999
scorer: likelihood
scorer: [x]
"""
    ),
    "model:": [
        "by_task: {own: {method: 3}}\nmodel:",
        "by_task: {own: {task: {name: own}}, '': {}}\nmodel:",
        "by_task: [own]\nmodel:",
        "name: ../../x\nmodel:",
        "%TAG ! x\n---\nmodel:",
        "%YAML 9.9\n---\nmodel:",
        "? model\n? x\nmodel:",
    ],
}
"""What replaces a text of the recipe, by that text."""

ROWS = [
    *lines(
        r"""
{"prompt": "a"}
{"completion": "a"}
{"prompt": null, "completion": "a"}
{"prompt": "", "completion": ""}
3
{"prompt": ["a"], "completion": "a"}
{"prompt": "a", "completion": 3}
[]
{}
"text"
null
NaN
{
x
{"prompt": "\ud800", "completion": "a"}
{"prompt": "a", "completion": "\ud800"}
{"prompt": "\u0000", "completion": "a"}
{"prompt": "a", "completion": "a", "prompt": "b"}
{"prompt": "a", "completion": "a", "x": 1e400}
{"messages": []}
{"messages": [{"role": "user"}]}
{"messages": [{"role": "user", "content": "a"}]}
{"messages": {"role": "user"}}
{"messages": [{"role": "assistant", "content": "a"}]}
{"messages": [3]}
{"messages": "text"}
{"messages": [[]]}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}
{"prediction": 3, "prompt": "a"}
{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "a"}]}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}
{"messages": [{"role": "[red]", "content": "a"}, {"role": "assistant", "content": "a"}]}
{"prompt": "a" "completion": "b"}
{"prompt": "a", "completion": "a", "tools": [3]}
{'prompt': 'a', 'completion': 'b'}
{"prompt": "a", "completion": "b"},
"""
    ),
    "",
    '{"prompt": "' + "long " * 300_000 + '", "completion": "a"}',
    '{"prompt": "a", "completion": "' + "long " * 300_000 + '"}',
    '{"prompt": ' + "[" * 100_000,
    '{"prompt": "a", "completion": "b", "x": ' + '{"y":' * 50_000 + "1" + "}" * 50_000 + "}",
    '{"prompt": "a", "completion": "b", "n": ' + "1" * 5000 + "}",
    '{"prompt": "\x1b[31m", "completion": "[/red]"}',
]
"""Lines of a JSON-lines file."""

TABLES = [
    b"prompt,completion\na\n",
    b"prompt,completion\na,b,c\n",
    b"prompt,prompt\na,b\n",
    b"prompt,completion\n",
    b"",
    b"\n",
    b",\n,\n",
    b'prompt,completion\n"a,b\n',
    b"prompt;completion\na;b\n",
    b"prompt\tcompletion\na\tb\n",
    b"a,b\n1,2\n",
    b"prompt,completion\n,\n",
    b"prompt,completion\n" + b"x" * 200_000 + b",y\n",
    b"prompt,completion\n\xff,\xfe\n",
    b"prompt,completion\na\x00b,c\n",
    b"prompt,completion,\na,b,\n",
    b"prompt,completion\r\na,b\r\rc,d",
    b'"prompt","completion"\n"a"x,"b"\n',
    b"PROMPT,COMPLETION\na,b\n",
    b"\xef\xbb\xbfprompt,completion\na,b\n",
    "prompt,completion\na,b\n".encode("utf-16"),
    b"prompt, completion\na, b\n",
]
"""Contents of a CSV file."""

KEYS = [
    *lines(
        """
method.r
method.alpha
method.target_modules
method.terms
method.init_coefficients
method.dropout
method
method.name
model
model.name
model.dtype
model.revision
model.trust_remote_code
task
task.data
task.test_size
task.train_size
task.columns
task.template
task.seed
training
training.learning_rate
training.max_steps
training.epochs
training.batch_size
training.seed
training.warmup_ratio
training.max_grad_norm
training.lr_ratio
training.weight_decay
evaluation
training.report_to
training.eval_steps
training.save_steps
training.keep
training.train_share
evaluation.max_new_tokens
evaluation.batch_size
evaluation.scorer
name
.
a..b
method.
.r
method.r.x
training.lr_ratio.h
training.lr_ratio.x
task.columns.prompt
__class__
by_task
learning_rate
method.rank_pattern
method.layers_to_transform
method.modules_to_save
method.normalization
method.bias
"""
    ),
    "",
]
"""Keys of overrides."""

OVERRIDES = [
    *lines(
        r"""
1e400
-1
0
.nan
.inf
-.inf
null
~
true
yes
''
text
[
]
{
{a: 1}
[a
&a [*a]
*a
!!int foo
!!python/object/apply:os.system [ls]
2024-99-99
1:2:3
0x
1_0
1e-4
1e308
99999999999999999999
0.5
../../outside
[red]x[/red]
(a+)+$
(
[q_proj, 1]
[[]]
{r: {r: {r: 1}}}
#
a # b
a: b
@
%
`
|
>
- a
? a
'
"
"\ud800"
"\0"
=
==1
é
😀
"""
    ),
    *("", " ", "\udcff", "\x1b[31m", "\n", "a\nb: c", "\t", LONG_NAME, LONG_PATH),
    *("1" * 5000, "[" * 5000, "{a: " * 3000, "x" * 100_000),
]
"""Values of overrides."""

PATHS = [
    *lines(
        r"""
.
/
..
nothing
recipe.yaml
rows.jsonl
base
encoder
lora
run
unfinished
study
pipe
loop
dangling
empty
file/below
~nobody
[red]x[/red]
[/]
é 😀
-
--
-x
http://example.com/x
org/name
org/name/more
base.gguf
*
gguf/adapter.gguf
gguf
merged
exported
classifier
glue
rows.parquet
run/adapter
run/recipe.yaml
/dev/zero
/proc/self/mem
smollm2-135
gone/
link
rows.jsonl/
x:y
x#y@z
$HOME
%s
"""
    ),
    *("", "\udcff", "\x1b[31mred", "a\nb", "\u202eevil", LONG_NAME, LONG_PATH),
]
"""Paths and names in arguments. Some are made by ``odd_files``."""

NUMBERS = [
    *lines("0\n-1\n1e400\nnan\ninf\n-inf\n1e308\n0.5\nx\n99999999999999999999\n1e-320\n0x10\n1_0\n"),
    *("1" * 400, ""),
]
"""Numbers of options."""

WITH_PATH = lines(
    r"""
train P --output out
train recipe.yaml --output P
train P --resume
train recipe.yaml --resume --output P
evaluate P
evaluate run --include-path P --lm-eval x
predict P --input questions.jsonl --output out.jsonl
predict run --input P --output out.jsonl
predict run --input questions.jsonl --output P
inspect P
inspect run --plot P
merge P --output out
merge run --output P
export P --to lora --output out
export run --to lora --output P
export run --to gguf --output P
import P --from lora --output out
import lora --from lora --output P
verify P run
verify run P
verify run merged --prompts P
verify gguf/adapter.gguf run --base P
chat P
report P
report run P --output out.html
report run --output P
study run P
study run study.yaml --output P
study report P
study report study --output P
export run --for P --output out
export run --to P --output out
merge run --dtype P --output out
evaluate run --scorer P
evaluate run --lm-eval P
P
"""
)
"""Commands in which P is a path or a name."""

WITH_NUMBER = lines(
    r"""
export run --to lora --max-rank N --output out
export run --to lora --energy N --output out
predict run --input questions.jsonl --output out.jsonl --max-new-tokens N
chat run --temperature N
predict run --input questions.jsonl --output out.jsonl --batch-size N
chat run --max-new-tokens N
evaluate run --limit N --lm-eval x
study run study.yaml --plan --workers N --output out
study run study.yaml --budget N --output out
"""
)
"""Commands in which N is a number."""

ADAPTER = lines(
    r"""
inspect A
inspect A --layers
inspect A --json
inspect A --plot out.svg
merge A --output out
export A --to lora --output out
export A --to gguf --output out
export A --for vllm --output out
export A --to lora --max-rank 2 --output out
export A --to lora --energy 0.9 --output out
verify A run
verify merged A
chat A
import A --from lora --output out
merge A --dtype bfloat16 --output out
"""
)
"""Commands that open an adapter A."""

RUN = lines(
    r"""
evaluate run
evaluate run --base
report run --output out.html
inspect run --effect
predict run --input questions.jsonl --output out.jsonl
merge run --output out
inspect run --json
export run --to lora --output out
chat run
report run classifier --output out.html
"""
)
"""Commands that open a run."""

CLASSIFIER = lines(
    r"""
evaluate classifier
predict classifier --input sentences.jsonl --output out.jsonl
report classifier --output out.html
inspect classifier
export classifier --to lora --output out
"""
)
"""Commands that open a run of a classifier."""

BASE = lines(
    r"""
train recipe.yaml --output out
merge run --output out
chat base
verify base run
evaluate run --base
evaluate run
export run --to lora --output out
export run --to gguf --output out
predict run --input questions.jsonl --output out.jsonl
verify merged base
import lora --from lora --output out
"""
)
"""Commands that open a base model."""

NAN, HUGE = float("nan"), 10**400
SEEDS = list(range(2000))
ADAPTER_CONFIG = {
    "target_modules": ["(a+)+$", "(.*)*(.*)*(.*)*x", "(", ["["], {}, "all-linear", [], ["q_proj"] * 10_000],
    "rank_pattern": [{"(.*)*(.*)*(.*)*x": 2}, {"q_proj": -1}, {"q_proj": HUGE}, [], {"": 2}],
    "r": [0, -1, HUGE, 1e308, "2", None, 2.5, True, [2], 10**7],
    "lora_alpha": [NAN, 1e308, HUGE, "x", None, []],
    "peft_type": ["PERA", "LORA", "HIRA", "IA3", "X", None, 3, []],
    "base_model_name_or_path": ["", None, 3, "\0", "\ud800", LONG_NAME, "lora", "run", "/dev/zero"],
    "auto_mapping": [{"base_model_class": "X", "parent_library": "os"}, "x", 3],
}
"""Values in adapter_config.json, by their key."""

BASE_CONFIG = {
    "num_attention_heads": [0, -1, 3, 10**9, None],
    "vocab_size": [0, 1, 100, 10**12, -5],
    "hidden_size": [0, 17, 10**9],
    "num_hidden_layers": [0, 1, 3, 10**9, -1],
    "max_position_embeddings": [0, 1, 4, -1, 10**18],
    "eos_token_id": [None, -1, 10**6, [1, 2], "x", []],
    "model_type": ["gpt2", "bert", "x", "", None, "t5", "whisper", "mamba"],
    "torch_dtype": ["float8_e4m3fn", "int8", "x", 3],
    "quantization_config": [
        {},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "x"},
        {"quant_method": "gptq", "bits": 4},
    ],
    "auto_map": [{"AutoModelForCausalLM": "evil.Evil"}, {"AutoConfig": "evil.Evil"}, 3],
    "rope_parameters": [
        {"rope_type": "x"},
        {"rope_type": "yarn"},
        {"rope_theta": "x"},
        [],
        {"rope_type": "dynamic", "factor": -1},
    ],
    "hidden_act": ["x", None, 3],
    "tie_word_embeddings": [True, "x"],
    "_attn_implementation": ["flash_attention_2", "x"],
}
"""Values in the config.json of a base, by their key."""

STUDY = {
    "choose": [{"learning_rate": r} for r in ([0], [-1], [NAN], [1e308], [HUGE], ["x"], [], 3, [1e-320], [1e-3] * 500)],
    "report": [{"seeds": seeds} for seeds in ([-1], [2**32], [], "x", [1, 1], [1.5], SEEDS)],
    "grid": [
        *({"task": "own", "method": "lora", "r": r} for r in ([0], [10**30], "x", [], [2, 2], [None])),
        *({"task": "own", "method": method} for method in ("x", ["lora", "lora"], [], {"name": "pera", "r": 2}, 3)),
        {"task": "own", "method": [{"name": "lora", "label": "a/b"}]},
        *({"task": "own", "method": "lora", "placement": p} for p in ({"a/b": []}, {"": "x"}, {"a": "(a+)+$"}, [])),
        *({"task": task, "method": "lora"} for task in ("x", [{"name": "own", "training": 3}], [3])),
        {"task": [{"name": "own", "label": "\ud800"}], "method": "lora"},
    ],
    "base": ["", "x", "study.yaml", "base", "\0", 3, LONG_NAME],
    "settings": [3, {"name": "x"}, {"method": 3}, {"training": {"max_steps": HUGE}}, {"": 3}, {"model.name": "x"}],
    "against": ["x", 3, ["lora"]],
}
"""Values in a study, by their key."""
