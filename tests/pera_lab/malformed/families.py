"""The malformed inputs, by family. Each input is a change of the originals and a command that meets it."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mutations
from mutations import VALUES, change_any, change_bytes, change_kind, change_safetensors, change_text, change_value, short

SEED = 21


@dataclass(frozen=True)
class Input:
    """One malformed input.

    Args:
        name: family and number. It also seeds the change.
        arguments: of the ``pera`` command.
        change: changes the originals in a folder and says how.
        stdin: what the command reads from the terminal.
    """

    name: str
    arguments: list[str]
    change: Callable[[Path, Random], str]
    stdin: bytes = b""

    @property
    def family(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def command(self) -> str:
        return " ".join(self.arguments[: 2 if self.arguments[:1] == ["study"] else 1]) if self.arguments else "pera"

    def prepare(self, folder: Path) -> None:
        print(self.change(folder, Random(f"{SEED} {self.name}")))


def inputs(family: str) -> list[Input]:
    """The inputs of a family, the same in every call."""
    drawn = FAMILIES[family](Random(f"{SEED} {family}"))
    return [Input(f"{family}-{number}", *rest) for number, rest in enumerate(drawn)]


Drawn = Iterator[tuple]

TRAIN = "train recipe.yaml --output out"
ADAPTER = (
    *("inspect A", "inspect A --layers", "inspect A --json", "inspect A --plot out.svg"),
    *("merge A --output out", "export A --to lora --output out", "export A --to gguf --output out"),
    *("export A --for vllm --output out", "export A --to lora --max-rank 2 --output out"),
    *("export A --to lora --energy 0.9 --output out", "verify A run", "verify merged A", "chat A"),
    *("import A --from lora --output out", "merge A --dtype bfloat16 --output out"),
)
RUN = (
    *("evaluate run", "evaluate run", "evaluate run --base", "report run --output out.html", "inspect run --effect"),
    *("predict run --input questions.jsonl --output out.jsonl", "merge run --output out", "inspect run --json"),
    *("export run --to lora --output out", "chat run", "report run classifier --output out.html"),
)
UNFINISHED = ("train unfinished --resume", "train unfinished --resume", "report unfinished --output out.html")
CLASSIFIER = (
    *("evaluate classifier", "predict classifier --input sentences.jsonl --output out.jsonl"),
    *("report classifier --output out.html", "inspect classifier", "export classifier --to lora --output out"),
)
BASE = (
    *(TRAIN, TRAIN, "merge run --output out", "chat base", "verify base run", "evaluate run --base"),
    *("evaluate run", "export run --to lora --output out", "export run --to gguf --output out"),
    *("predict run --input questions.jsonl --output out.jsonl", "verify merged base", "import lora --from lora --output out"),
)
SHARDED = ("chat sharded", "verify sharded base", "train recipe.yaml model.name=sharded --output out")
ENCODER = ("train classify.yaml --output out", "evaluate classifier", "predict classifier --input sentences.jsonl --output out.jsonl")


def on(command: str, change: Callable[[Path, Random], str], stdin: bytes = b"hello\n/quit\n"):
    return command.split(" "), change, stdin if "chat" in command else b""


def change_file(name: str, function=change_any):
    return lambda folder, random: f"{name}: {function(folder / name, random)}"


def change_one_of(pattern: str, function=change_any):
    """Change one of the files that match."""

    def change(folder: Path, random: Random) -> str:
        file = random.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        return f"{file.relative_to(folder)}: {function(file, random)}"

    return change


def unchanged(folder: Path, random: Random) -> str:
    return ""


# ---- recipes and overrides ----


def change_recipe(file: Path, random: Random) -> str:
    """Change one value. A training of 10¹⁸ steps is long, not malformed."""
    import yaml

    original = file.read_text()
    while True:
        done = mutations.change_yaml(file, random)
        try:
            steps = yaml.safe_load(file.read_text())["training"]["max_steps"]
            if not 10 < float(steps) <= 10**18:
                return done
        except (KeyError, TypeError, ValueError, OverflowError, IndexError):
            return done
        file.write_text(original)


def recipes(random: Random) -> Drawn:
    for _ in range(110):
        yield on(TRAIN, change_file("recipe.yaml", change_recipe))
    for _ in range(25):
        yield on("train classify.yaml --output out", change_file("classify.yaml", change_recipe))
    for _ in range(30):
        yield on(TRAIN, change_file("recipe.yaml", change_text))
    for _ in range(15):
        yield on(TRAIN, change_file("recipe.yaml", change_bytes))
    for _ in range(9):
        yield on(TRAIN, change_file("recipe.yaml", change_kind))
    for text in YAML:
        yield on(TRAIN, lambda folder, random, text=text: f"{replaced(folder / 'recipe.yaml', *text)}")


METHOD = "{name: pera, r: 2, target_modules: [q_proj, v_proj], normalization: rms, init_weights: false}"
YAML = (
    (METHOD, "{name: pera, r: 2, r: 3, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!int foo, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: 2024-99-99, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!timestamp x, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!float x, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!bool x, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!binary x, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!set {a, b}, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!omap [a], target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!pairs [a], target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !!null x, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: !unknown 2, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: " + "1" * 5000 + ", target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: 0o" + "7" * 5000 + ", target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: 20000, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, r: 17, target_modules: [q_proj]}"),
    (METHOD, "{name: pera, target_modules: '(.*)*(.*)*(.*)*(.*)*x'}"),
    (METHOD, "{name: pera, target_modules: '((a|[a-z._0-9]+)+)+$$'}"),
    (METHOD, "{name: pera, target_modules: '('}"),
    (METHOD, "{name: pera, target_modules: '[q_proj'}"),
    (METHOD, "{name: pera, target_modules: [lm_head, embed_tokens]}"),
    (METHOD, "{name: pera, target_modules: all-linear, rank_pattern: {'(.*)*(.*)*(.*)*x': 2}}"),
    (METHOD, "{name: pera, target_modules: [q_proj], rank_pattern: {k_proj: 2}}"),
    (METHOD, "{name: pera, target_modules: [q_proj], alpha_pattern: {q_proj: 1e400}}"),
    (METHOD, "{name: pera, target_modules: [q_proj], terms: none, normalization: rms}"),
    (METHOD, "{name: pera, target_modules: [q_proj], modules_to_save: [q_proj]}"),
    (METHOD, "{name: pera, target_modules: [q_proj], layers_to_transform: [99]}"),
    (METHOD, "{name: pera, target_modules: [q_proj], exclude_modules: '(a+)+$'}"),
    (METHOD, "{name: pera, target_modules: [q_proj], init_coefficients: 1e308}"),
    (METHOD, "{name: pera, target_modules: [q_proj], init_coefficients: -.inf}"),
    (METHOD, "{name: pera, target_modules: [q_proj], alpha: 1e308}"),
    (METHOD, "{name: pera, target_modules: [q_proj], dropout: 1}"),
    (METHOD, "{name: lora, r: 2, target_modules: [q_proj], init_lora_weights: pissa}"),
    (METHOD, "{name: lora, r: 2, target_modules: [q_proj], init_lora_weights: [x]}"),
    (METHOD, "{name: lora, r: 2, target_modules: [q_proj], use_dora: 3}"),
    (METHOD, "{name: dora, r: 99999999, target_modules: [q_proj]}"),
    (METHOD, "{name: hira, r: 2, target_modules: [q_proj], r: 0}"),
    (METHOD, "{name: full, r: 2}"),
    (METHOD, "{name: '../pera'}"),
    (METHOD, "&x {name: pera, r: *x}"),
    (METHOD, "{name: pera, ? [a, b] : c}"),
    (METHOD, "{name: pera, 1: 2, null: 3, 1.5: 2, true: x}"),
    (METHOD, "{<<: 3}"),
    (METHOD, "{<<: [1, 2]}"),
    ("learning_rate: 1.0e-3", "learning_rate: 1e400"),
    ("learning_rate: 1.0e-3", "learning_rate: 1e30"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, keep: best"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, keep: best, eval_steps: 1"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, report_to: [nothing]"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, report_to: [all]"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, lr_ratio: {h: 1e308}"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, weight_decay: {A: .nan}"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, gradient_accumulation_steps: 99999999999999999999"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, warmup_steps: 99999999999999999999"),
    ("learning_rate: 1.0e-3", "learning_rate: 1.0e-3, seed: 4294967296"),
    ("max_steps: 2", "max_steps: 0"),
    ("max_steps: 2", "epochs: 1e308"),
    ("max_steps: 2", "epochs: 1.0e-300"),
    ("max_length: 96", "max_length: 1"),
    ("max_length: 96", "max_length: 999999999999999999999"),
    ("batch_size: 2", "batch_size: 999999999999999999999"),
    ("test_size: 4", "test_size: 16"),
    ("test_size: 4", "test_size: 4, validation_size: 99999999999999999999"),
    ("test_size: 4", "test_size: 4, train_size: 99999999999999999999, seed: 99999999999999999999"),
    ("test_size: 4", 'test_size: 4, columns: {prompt: "\\ud800"}'),
    ("data: rows.jsonl", 'data: "rows\\0.jsonl"'),
    ("data: rows.jsonl", 'data: "\\ud800.jsonl"'),
    ("data: rows.jsonl", f"data: {'a' * 300}.jsonl"),
    ("data: rows.jsonl", f"data: {'a/' * 3000}x.jsonl"),
    ("data: rows.jsonl", "data: ~nobody/rows.jsonl"),
    ("data: rows.jsonl", "data: user/[red]name[/red]"),
    ("data: rows.jsonl", "data: ''"),
    ("data: rows.jsonl", "data: ."),
    ("name: base", 'name: "base\\0"'),
    ("name: base", 'name: "\\ud800"'),
    ("name: base", f"name: {'a' * 300}"),
    ("name: base", f"name: {'a/' * 3000}x"),
    ("name: base", "name: ''"),
    ("name: base", "name: /"),
    ("name: base", "name: rows.jsonl"),
    ("name: base", "name: http://example.com/model"),
    ("name: base", "name: base, revision: main"),
    ("name: base", "name: org/model, revision: ../x"),
    ("name: base", "name: lora"),
    ("name: base", "name: run"),
    ("name: base", "name: encoder"),
    ("name: base", "name: base.gguf"),
    ("name: base", "name: gguf/adapter.gguf"),
    ("max_new_tokens: 2", "max_new_tokens: 99999999999999999999"),
    ("max_new_tokens: 2", "scorer: likelihood"),
    ("max_new_tokens: 2", "scorer: [x]"),
    ("model:", "by_task: {own: {method: 3}}\nmodel:"),
    ("model:", "by_task: {own: {task: {name: own}}, '': {}}\nmodel:"),
    ("model:", "by_task: [own]\nmodel:"),
    ("model:", "name: ../../x\nmodel:"),
    ("model:", "%TAG ! x\n---\nmodel:"),
    ("model:", "%YAML 9.9\n---\nmodel:"),
    ("model:", "? model\n? x\nmodel:"),
)
"""Texts of the recipe, and what replaces them."""


def replaced(file: Path, old: str, new: str) -> str:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return short(new)


KEYS = (
    *("method.r", "method.alpha", "method.target_modules", "method.terms", "method.init_coefficients", "method.dropout"),
    *("method", "method.name", "model", "model.name", "model.dtype", "model.revision", "model.trust_remote_code", "task"),
    *("task.data", "task.test_size", "task.train_size", "task.columns", "task.template", "task.seed", "training"),
    *("training.learning_rate", "training.max_steps", "training.epochs", "training.batch_size", "training.seed"),
    *("training.warmup_ratio", "training.max_grad_norm", "training.lr_ratio", "training.weight_decay", "evaluation"),
    *("training.report_to", "training.eval_steps", "training.save_steps", "training.keep", "training.train_share"),
    *("evaluation.max_new_tokens", "evaluation.batch_size", "evaluation.scorer", "name", "", ".", "a..b", "method.", ".r"),
    *("method.r.x", "training.lr_ratio.h", "training.lr_ratio.x", "task.columns.prompt", "__class__", "by_task", "learning_rate"),
    *("method.rank_pattern", "method.layers_to_transform", "method.modules_to_save", "method.normalization", "method.bias"),
)
OVERRIDES = (
    *("1e400", "-1", "0", "1" * 5000, ".nan", ".inf", "-.inf", "null", "~", "true", "yes", "", " ", "''", "text", "[", "]", "{"),
    *("{a: 1}", "[a", "&a [*a]", "*a", "!!int foo", "!!python/object/apply:os.system [ls]", "2024-99-99", "1:2:3", "0x", "1_0"),
    *("1e-4", "1e308", "99999999999999999999", "0.5", "a" * 300, "a/" * 2000, "../../outside", "\udcff", "[red]x[/red]", "\x1b[31m"),
    *("(a+)+$", "(", "[q_proj, 1]", "[[]]", "{r: {r: {r: 1}}}", "#", "a # b", "a: b", "@", "%", "`", "|", ">", "- a", "? a", "'"),
    *('"', '"\\ud800"', '"\\0"', "[" * 5000, "{a: " * 3000, "x" * 100_000, "=", "==1", "\n", "a\nb: c", "\t", "é", "😀"),
)


def overrides(random: Random) -> Drawn:
    commands = ("train recipe.yaml X --output out", "train recipe.yaml X --output out", "study run study.yaml X --plan --output out")
    for number in range(100):
        given = f"{random.choice(KEYS)}={random.choice(OVERRIDES)}"
        given = given if "max_steps=999" not in given else "training.max_steps=0.0"
        arguments = [given if part == "X" else part for part in commands[number % 3].split()]
        yield arguments, unchanged, b""
    for given in ("method.r", "=", "=1", "--method.r=2", "-x", "method.r =2", " =", "\udcff=\udcff", "a=b=c", "[red]=1"):
        yield ["train", "recipe.yaml", given, "--output", "out"], unchanged, b""
        yield ["quickstart", given, "--output", "out"], unchanged, b""
    for given in ("task.name=nothing", "method.name=lora", "training.max_steps=-1", "model=/nowhere", "task={", "method.r=1e400"):
        yield ["quickstart", given, "--output", "out"], unchanged, b""
    for given in ("training.max_steps=99", "method.r=3", "name=x", "task.data=rows.csv", "model=sharded", "training.seed=1"):
        yield ["train", "unfinished", given, "--resume"], unchanged, b""


# ---- arguments ----

PATHS = (
    *("", ".", "/", "..", "nothing", "recipe.yaml", "rows.jsonl", "base", "encoder", "lora", "run", "unfinished", "study"),
    *("pipe", "loop", "dangling", "empty", "file/below", "a" * 300, "a/" * 2500, "~nobody", "\udcff", "[red]x[/red]", "[/]"),
    *("\x1b[31mred", "é 😀", "a\nb", "-", "--", "-x", "http://example.com/x", "org/name", "org/name/more", "base.gguf", "*"),
    *("gguf/adapter.gguf", "gguf", "merged", "exported", "classifier", "glue", "rows.parquet", "run/adapter", "run/recipe.yaml"),
    *("/dev/zero", "/proc/self/mem", "smollm2-135", "gone/", "link", "\u202eevil", "rows.jsonl/", "x:y", "x#y@z", "$HOME", "%s"),
)


def odd_files(folder: Path, random: Random) -> str:
    import os

    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "link").symlink_to("run")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    return "odd files"


WITH_PATH = (
    *("train P --output out", "train recipe.yaml --output P", "train P --resume", "train recipe.yaml --resume --output P"),
    *("evaluate P", "evaluate run --include-path P --lm-eval x", "predict P --input questions.jsonl --output out.jsonl"),
    *("predict run --input P --output out.jsonl", "predict run --input questions.jsonl --output P", "inspect P"),
    *("inspect run --plot P", "merge P --output out", "merge run --output P", "export P --to lora --output out"),
    *("export run --to lora --output P", "export run --to gguf --output P", "import P --from lora --output out"),
    *("import lora --from lora --output P", "verify P run", "verify run P", "verify run merged --prompts P"),
    *("verify gguf/adapter.gguf run --base P", "chat P", "report P", "report run P --output out.html"),
    *("report run --output P", "study run P", "study run study.yaml --output P", "study report P"),
    *("study report study --output P", "export run --for P --output out", "export run --to P --output out"),
    *("merge run --dtype P --output out", "evaluate run --scorer P", "evaluate run --lm-eval P", "P"),
)
WITH_NUMBER = (
    *("export run --to lora --max-rank N --output out", "export run --to lora --energy N --output out"),
    *("predict run --input questions.jsonl --output out.jsonl --max-new-tokens N", "chat run --temperature N"),
    *("predict run --input questions.jsonl --output out.jsonl --batch-size N", "chat run --max-new-tokens N"),
    *("evaluate run --limit N --lm-eval x", "study run study.yaml --plan --workers N --output out"),
    *("study run study.yaml --budget N --output out",),
)
NUMBERS = ("0", "-1", "1e400", "nan", "inf", "-inf", "1" * 400, "1e308", "0.5", "x", "", "99999999999999999999", "1e-320", "0x10", "1_0")
OUTPUTS = ("", ".", "/", "pipe", "loop", "recipe.yaml", "run", "file/below", "a" * 300, "a/" * 2500, "\udcff", "dangling")
"""Output paths for commands that may also write in folders that exist."""


def arguments(random: Random) -> Drawn:
    for command in WITH_PATH:
        for path in random.sample(PATHS, 5):
            if command.startswith(("report", "study report")) and path in ("/", "/dev/zero", "/proc/self/mem"):
                path = "pipe"  # the tests may run as root
            yield [path if part == "P" else part for part in command.split()], odd_files, b"hello\n"
    for command in WITH_NUMBER:
        for number in random.sample(NUMBERS, 5):
            yield [number if part == "N" else part for part in command.split()], odd_files, b"hello\n"
    for line in (b"", b"\xff\xfe\n", b"\0\n", b"x" * 100_000 + b"\n", b"/unknown\n", b"/new\n/new\n", b"\xed\xa0\x80\n", b"\x1b[A\n"):
        yield ["chat", "run"], unchanged, line
        yield ["chat", "base", "--compare"], unchanged, line
    for given in ("", "--help x", "--version --x", "train", "study", "study x", "env x", "nothing", "-h", "train --resume", "report"):
        yield given.split(), unchanged, b""


# ---- adapters ----

ADAPTERS = ("run/adapter", "lora", "exported")


def adapters(random: Random) -> Drawn:
    for number in range(150):
        adapter = ADAPTERS[number % 3]
        command = random.choice(ADAPTER).replace("A", adapter)
        if number % 2:
            file, functions = "adapter_config.json", [mutations.change_json] * 5 + [change_text, change_bytes, change_kind]
        else:
            file, functions = "adapter_model.safetensors", [change_safetensors] * 5 + [change_bytes, change_kind]
        yield on(command, change_file(f"{adapter}/{file}", random.choice(functions)))
    for key, value in (
        *(("target_modules", value) for value in ("(a+)+$", "(.*)*(.*)*(.*)*x", "(", ["["], {}, "all-linear", [], ["q_proj"] * 10_000)),
        *(("rank_pattern", value) for value in ({"(.*)*(.*)*(.*)*x": 2}, {"q_proj": -1}, {"q_proj": 10**400}, [], {"": 2})),
        *(("r", value) for value in (0, -1, 10**400, 1e308, "2", None, 2.5, True, [2], 10**7)),
        *(("lora_alpha", value) for value in (float("nan"), 1e308, 10**400, "x", None, [])),
        *(("peft_type", value) for value in ("PERA", "LORA", "HIRA", "IA3", "X", None, 3, [])),
        *(("base_model_name_or_path", value) for value in ("", None, 3, "\0", "\ud800", "a" * 300, "lora", "run", "/dev/zero")),
        *(("auto_mapping", value) for value in ({"base_model_class": "X", "parent_library": "os"}, "x", 3)),
    ):
        adapter = random.choice(ADAPTERS)
        yield on(random.choice(ADAPTER).replace("A", adapter), lambda folder, random, a=adapter, k=key, v=value: put(folder / a / "adapter_config.json", k, v))
    for adapter in ADAPTERS:
        yield on(f"inspect {adapter}", lambda folder, random, a=adapter: pickled(folder / a))
        yield on(f"merge {adapter} --output out", lambda folder, random, a=adapter: pickled(folder / a))


def put(file: Path, key: str, value) -> str:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, key: value}))
    return f"{file.name}: {key} = {short(value)}"


def pickled(folder: Path) -> str:
    """Replace the weights by a pickle that runs a command."""
    import pickle

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    return "adapter_model.bin is a pickle"


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


# ---- runs ----


def runs(random: Random) -> Drawn:
    for _ in range(100):
        yield on(random.choice(RUN), change_one_of("run/*"))
    for _ in range(20):
        yield on(random.choice(RUN), change_one_of("run/adapter/*"))
    for _ in range(40):
        yield on(random.choice(UNFINISHED), change_one_of("unfinished/checkpoints/checkpoint-1/*"))
    for _ in range(30):
        yield on(random.choice(UNFINISHED), change_one_of("unfinished/*"))
    for _ in range(30):
        yield on(random.choice(CLASSIFIER), change_one_of("classifier/**/*"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        yield on("train unfinished --resume", lambda folder, random, n=name: evil(folder / "unfinished" / "checkpoints" / "checkpoint-1" / n))
    for name in ("run", "run/adapter", "run/predictions", "unfinished/checkpoints", "unfinished/checkpoints/checkpoint-1"):
        for command in ("evaluate run", "report run", "train unfinished --resume"):
            yield on(command, change_file(name, change_kind))


def evil(file: Path) -> str:
    import pickle

    file.write_bytes(pickle.dumps(Evil()))
    return f"{file.name} is a pickle that runs a command"


# ---- bases ----


def bases(random: Random) -> Drawn:
    for number in range(140):
        file = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")[number % 6]
        functions = [change_safetensors] if file.endswith("safetensors") else [mutations.change_json] * 4 + [change_text]
        yield on(random.choice(BASE), change_file(f"base/{file}", random.choice([*functions, *functions, change_bytes, change_kind])))
    for _ in range(24):
        yield on(random.choice(SHARDED), change_one_of("sharded/model*"))
    for _ in range(30):
        yield on(random.choice(ENCODER), change_one_of("encoder/*"))
    for key, value in (
        *(("num_attention_heads", value) for value in (0, -1, 3, 10**9, None)),
        *(("vocab_size", value) for value in (0, 1, 100, 10**12, -5)),
        *(("hidden_size", value) for value in (0, 17, 10**9)),
        *(("num_hidden_layers", value) for value in (0, 1, 3, 10**9, -1)),
        *(("max_position_embeddings", value) for value in (0, 1, 4, -1, 10**18)),
        *(("eos_token_id", value) for value in (None, -1, 10**6, [1, 2], "x", [])),
        *(("model_type", value) for value in ("gpt2", "bert", "x", "", None, "t5", "whisper", "mamba")),
        *(("torch_dtype", value) for value in ("float8_e4m3fn", "int8", "x", 3)),
        *(("quantization_config", value) for value in ({}, {"quant_method": "bitsandbytes"}, {"quant_method": "x"}, {"quant_method": "gptq", "bits": 4})),
        *(("auto_map", value) for value in ({"AutoModelForCausalLM": "evil.Evil"}, {"AutoConfig": "evil.Evil"}, 3)),
        *(("rope_parameters", value) for value in ({"rope_type": "x"}, {"rope_type": "yarn"}, {"rope_theta": "x"}, [], {"rope_type": "dynamic", "factor": -1})),
        *(("hidden_act", value) for value in ("x", None, 3)),
        *(("tie_word_embeddings", value) for value in (True, "x")),
        *(("_attn_implementation", value) for value in ("flash_attention_2", "x")),
    ):
        yield on(random.choice(BASE), lambda folder, random, k=key, v=value: put(folder / "base" / "config.json", k, v))
    for files in (("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json"), ("config.json",), ("model.safetensors",)):
        for command in ("chat base", TRAIN, "export run --to lora --output out", "merge run --output out"):
            yield on(command, lambda folder, random, files=files: removed(folder / "base", files))


def removed(folder: Path, files) -> str:
    for file in files:
        (folder / file).unlink()
    return f"without {' and '.join(files)}"


# ---- data ----

ROWS = (
    *('{"prompt": "a"}', '{"completion": "a"}', '{"prompt": null, "completion": "a"}', '{"prompt": "", "completion": ""}', "3"),
    *('{"prompt": ["a"], "completion": "a"}', '{"prompt": "a", "completion": 3}', "[]", "{}", '"text"', "null", "NaN", "{", "x", ""),
    *('{"prompt": "\\ud800", "completion": "a"}', '{"prompt": "a", "completion": "\\ud800"}', '{"prompt": "\\u0000", "completion": "a"}'),
    *('{"prompt": "a", "completion": "a", "prompt": "b"}', '{"prompt": "a", "completion": "a", "x": 1e400}', '{"messages": []}'),
    *('{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": "a"}]}', '{"messages": {"role": "user"}}'),
    *('{"messages": [{"role": "assistant", "content": "a"}]}', '{"messages": [3]}', '{"messages": "text"}', '{"messages": [[]]}'),
    *('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', '{"prediction": 3, "prompt": "a"}'),
    *('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "a"}]}',),
    *('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}',),
    *('{"messages": [{"role": "[red]", "content": "a"}, {"role": "assistant", "content": "a"}]}', '{"prompt": "a" "completion": "b"}'),
    *('{"prompt": "a", "completion": "a", "tools": [3]}', "{'prompt': 'a', 'completion': 'b'}", '{"prompt": "a", "completion": "b"},'),
    *('{"prompt": "' + "long " * 300_000 + '", "completion": "a"}', '{"prompt": "a", "completion": "' + "long " * 300_000 + '"}'),
    *('{"prompt": ' + "[" * 100_000, '{"prompt": "a", "completion": "b", "x": ' + '{"y":' * 50_000 + "1" + "}" * 50_000 + "}"),
    *('{"prompt": "a", "completion": "b", "n": ' + "1" * 5000 + "}", '{"prompt": "\x1b[31m", "completion": "[/red]"}'),
)
TABLES = (
    *(b"prompt,completion\na\n", b"prompt,completion\na,b,c\n", b"prompt,prompt\na,b\n", b"prompt,completion\n", b"", b"\n", b",\n,\n"),
    *(b'prompt,completion\n"a,b\n', b"prompt;completion\na;b\n", b"prompt\tcompletion\na\tb\n", b"a,b\n1,2\n", b"prompt,completion\n,\n"),
    *(b"prompt,completion\n" + b"x" * 200_000 + b",y\n", b"prompt,completion\n\xff,\xfe\n", b"prompt,completion\na\0b,c\n"),
    *(b"prompt,completion,\na,b,\n", b"prompt,completion\r\na,b\r\rc,d", b'"prompt","completion"\n"a"x,"b"\n', b"PROMPT,COMPLETION\na,b\n"),
    *(b"\xef\xbb\xbfprompt,completion\na,b\n", "prompt,completion\na,b\n".encode("utf-16"), b"prompt, completion\na, b\n"),
)


def data(random: Random) -> Drawn:
    predict = "predict run --input questions.jsonl --output out.jsonl"
    for row in ROWS:
        yield on(TRAIN, lambda folder, random, row=row: line(folder / "rows.jsonl", row, random))
        yield on(predict, lambda folder, random, row=row: line(folder / "questions.jsonl", row, random))
        if len(row) < 100:
            yield on("train recipe.yaml task.data=rows.json --output out", lambda folder, random, row=row: written(folder / "rows.json", f"[{row}]".encode()))
    for table in TABLES:
        yield on("train recipe.yaml task.data=rows.csv task.test_size=1 --output out", lambda folder, random, t=table: written(folder / "rows.csv", t))
        yield on("predict run --input rows.csv --output out.jsonl", lambda folder, random, t=table: written(folder / "rows.csv", t))
    for _ in range(20):
        yield on("train recipe.yaml task.data=rows.parquet --output out", change_file("rows.parquet", random.choice([change_bytes, change_bytes, change_kind])))
    for kind in ("nested", "binary", "numbers", "times", "nulls", "no rows", "no columns", "surrogates"):
        for command in ("train recipe.yaml task.data=rows.parquet --output out", "predict run --input rows.parquet --output out.jsonl"):
            yield on(command, lambda folder, random, kind=kind: parquet(folder / "rows.parquet", kind))
    for _ in range(15):
        yield on(random.choice([TRAIN, predict]), lambda folder, random: change_one_of(random.choice(["rows.jsonl", "questions.jsonl"]))(folder, random))
    for _ in range(15):
        yield on("evaluate run", change_file("rows.jsonl"))
    for _ in range(25):
        yield on("train classify.yaml --output out", change_one_of("glue/sst2/*"))
    for row in ('{"sentence": 3}', '{"sentence": ""}', '{"sentence": "\\ud800"}', '{"sentence": "' + "long " * 100_000 + '"}', "[]", '{"text": "a"}'):
        yield on("predict classifier --input sentences.jsonl --output out.jsonl", lambda folder, random, row=row: line(folder / "sentences.jsonl", row, random))
    for label in ("2", "-1", '"0"', "null", "1.5", "true", "1e400", "[0]"):
        yield on("train classify.yaml --output out", lambda folder, random, label=label: line(folder / "glue/sst2/train.jsonl", f'{{"sentence": "a", "label": {label}}}', random))
    for command in (TRAIN.replace(" --", " task.data=rows.json --"), TRAIN.replace(" --", " task.data=folder --"), TRAIN.replace(" --", " task.data=talk.jsonl --")):
        for _ in range(8):
            yield on(command, lambda folder, random: in_folder(folder, random))


def in_folder(folder: Path, random: Random) -> str:
    (folder / "folder").mkdir()
    shutil.copy(folder / "rows.jsonl", folder / "folder" / "train.jsonl")
    shutil.copy(folder / "rows.csv", folder / "folder" / "test.csv")
    name = random.choice(["folder/train.jsonl", "folder/test.csv", "rows.json", "talk.jsonl"])
    return f"{name}: {change_any(folder / name, random)}"


def line(file: Path, row: str, random: Random) -> str:
    """Insert a line."""
    lines = file.read_text().splitlines()
    lines.insert(random.randrange(len(lines) + 1), row)
    file.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    return f"{file.name}: {short(row)}"


def written(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return f"{file.name}: {short(content)}"


def parquet(file: Path, kind: str) -> str:
    import datetime

    import pyarrow
    from pyarrow import parquet as writer

    texts = ["a"] * 8
    columns = {
        "nested": {"prompt": [{"a": [1]}] * 8, "completion": texts},
        "binary": {"prompt": [b"\xff\xfe"] * 8, "completion": texts},
        "numbers": {"prompt": [1.5] * 8, "completion": [3] * 8},
        "times": {"prompt": texts, "completion": texts, "when": [datetime.datetime(2024, 1, 1)] * 8},
        "nulls": {"prompt": [None] * 8, "completion": texts},
        "no rows": {"prompt": pyarrow.array([], pyarrow.string()), "completion": pyarrow.array([], pyarrow.string())},
        "no columns": {},
        "surrogates": {"prompt": pyarrow.array([b"\xed\xa0\x80"] * 8).view(pyarrow.string()), "completion": texts},
    }
    writer.write_table(pyarrow.table(columns[kind]), file)
    return kind


# ---- GGUF ----


def gguf(random: Random) -> Drawn:
    adapter = ("verify gguf/adapter.gguf run", "verify run gguf/adapter.gguf", "verify gguf/adapter.gguf run --base base.gguf", "verify gguf/adapter.gguf base --base base")
    base = ("chat base.gguf", "verify base.gguf base", "train recipe.yaml model.name=base.gguf --output out", "verify gguf/adapter.gguf run --base base.gguf")
    for _ in range(40):
        yield on(random.choice(adapter), change_file("gguf/adapter.gguf", change_bytes))
    for _ in range(40):
        yield on(random.choice(base), change_file("base.gguf", change_bytes))
    for _ in range(60):
        file = random.choice(["gguf/adapter.gguf", "base.gguf"])
        yield on(random.choice(adapter if "adapter" in file else base), change_file(file, flip_header))
    for _ in range(12):
        file = random.choice(["gguf/adapter.gguf", "base.gguf"])
        yield on(random.choice(adapter if "adapter" in file else base), change_file(file, change_kind))


def flip_header(file: Path, random: Random) -> str:
    """Change the counts, the lengths or the types in the first bytes of a GGUF file."""
    content = bytearray(file.read_bytes())
    at = random.choice([*range(0, 32), *range(32, 400)])
    value = random.choice([0, 1, 0x7F, 0xFF])
    size = random.choice([1, 4, 8])
    content[at : at + size] = bytes([value]) * size
    file.write_bytes(content)
    return f"{size} bytes of {value} at {at}"


# ---- studies ----


def studies(random: Random) -> Drawn:
    plan, run = "study run study.yaml --plan --output out", "study run study.yaml --output out"
    for _ in range(70):
        yield on(plan, change_file("study.yaml", random.choice([mutations.change_yaml] * 4 + [change_text, change_bytes, change_kind])))
    for _ in range(12):
        yield on(run, change_file("study.yaml", mutations.change_yaml))
    for _ in range(10):
        yield on(plan, change_file("recipe.yaml"))
    for _ in range(50):
        yield on(random.choice(["study report study", "study report study", "study run study.yaml --output study"]), change_one_of("study/runs/*/*"))
    for _ in range(15):
        yield on(random.choice(["study report study", "study run study.yaml --output study"]), change_one_of("study/*"))
    for _ in range(8):
        yield on("study report study", change_file(random.choice(["study", "study/runs", "study/locks"]), change_kind))
    for key, value in (
        *(("choose", {"learning_rate": value}) for value in ([0], [-1], [float("nan")], [1e308], [10**400], ["x"], [], 3, [1e-320], [1e-3] * 500)),
        *(("report", {"seeds": value}) for value in ([-1], [2**32], [], "x", [1, 1], [1.5], list(range(2000)))),
        *(("grid", {"task": "own", "method": "lora", "r": value}) for value in ([0], [10**30], "x", [], [2, 2], [None])),
        *(("grid", {"task": "own", "method": value}) for value in ("x", ["lora", "lora"], [{"name": "lora", "label": "a/b"}], [], {"name": "pera", "r": 2}, 3)),
        *(("grid", {"task": "own", "method": "lora", "placement": value}) for value in ({"a/b": []}, {"": "x"}, {"a": "(a+)+$"}, [])),
        *(("grid", {"task": value, "method": "lora"}) for value in ("x", [{"name": "own", "training": 3}], [3], [{"name": "own", "label": "\ud800"}])),
        *(("base", value) for value in ("", "x", "study.yaml", "base", "\0", 3, "a" * 300)),
        *(("settings", value) for value in (3, {"name": "x"}, {"method": 3}, {"training": {"max_steps": 10**400}}, {"": 3}, {"model.name": "x"})),
        *(("against", value) for value in ("x", 3, ["lora"])),
    ):
        yield on(plan, lambda folder, random, k=key, v=value: put_yaml(folder / "study.yaml", k, v))


def put_yaml(file: Path, key: str, value) -> str:
    import yaml

    content = yaml.safe_load(file.read_text())
    file.write_text(json.dumps({**content, key: value}))
    return f"{key} = {short(value)}"


FAMILIES: dict[str, Callable[[Random], Drawn]] = {
    "recipes": recipes,
    "overrides": overrides,
    "arguments": arguments,
    "adapters": adapters,
    "runs": runs,
    "bases": bases,
    "data": data,
    "gguf": gguf,
    "studies": studies,
}
