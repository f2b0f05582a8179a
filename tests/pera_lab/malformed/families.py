"""The malformed inputs, by family. Each input is a change of the originals and a command that meets it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import texts
from mutations import (
    change_any,
    change_bytes,
    change_json,
    change_kind,
    change_safetensors,
    change_text,
    change_yaml,
    short,
)

SEED = 21
Change = Callable[[Path, Random], str]
"""Changes a file, or the originals in a folder, and says how."""

Drawn = Iterator[tuple[list[str], Change, bytes]]
"""The arguments of the ``pera`` command, the change, and what the command reads from the terminal."""


@dataclass(frozen=True)
class Input:
    """One malformed input. ``name`` is the family and a number; it also seeds the change."""

    name: str
    arguments: list[str]
    change: Change
    stdin: bytes

    @property
    def family(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def command(self) -> str:
        first = self.arguments[0] if self.arguments else ""
        if first not in COMMANDS:
            return "others"
        if first == "study":
            return " ".join(self.arguments[:2]) if self.arguments[1] in ("run", "report") else "others"
        return first

    def prepare(self, folder: Path) -> None:
        """Change the originals in a folder and print how."""
        print(self.change(folder, Random(f"{SEED} {self.name}")))


COMMANDS = [
    "quickstart",
    "train",
    "evaluate",
    "predict",
    "inspect",
    "merge",
    "export",
    "import",
    "verify",
    "chat",
    "report",
    "study",
]


def inputs(family: str) -> list[Input]:
    """The inputs of a family, the same in every call."""
    drawn = FAMILIES[family](Random(f"{SEED} {family}"))
    return [Input(f"{family}-{number}", *rest) for number, rest in enumerate(drawn)]


TRAIN, CLASSIFY = "train recipe.yaml --output out", "train classify.yaml --output out"
PREDICT = "predict run --input questions.jsonl --output out.jsonl"
PREDICT_CLASSES = "predict classifier --input sentences.jsonl --output out.jsonl"
RESUME = "train unfinished --resume"
PLAN, STUDY = "study run study.yaml --plan --output out", "study run study.yaml --output out"


def on(command: str, change: Change, stdin: bytes = b"hello\n/quit\n") -> tuple[list[str], Change, bytes]:
    return command.split(" "), change, stdin if "chat" in command else b""


def within(command: str, placeholder: str, value: str) -> list[str]:
    """The arguments of a command, with a letter replaced by a value."""
    return [value if part == placeholder else part for part in command.split()]


def file(name: str, *changes: Change) -> Change:
    """One of the changes, to one file."""
    return lambda folder, random: f"{name}: {random.choice(changes or (change_any,))(folder / name, random)}"


def one_of(pattern: str) -> Change:
    """A change of one of the files that match."""

    def change(folder: Path, random: Random) -> str:
        chosen = random.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        return f"{chosen.relative_to(folder)}: {change_any(chosen, random)}"

    return change


def replaced(name: str, old: str, new: str) -> Change:
    """A file in which one text is replaced by another."""

    def change(folder: Path, random: Random) -> str:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        return short(new)

    return change


def with_line(name: str, line: str) -> Change:
    """A file with one more line."""

    def change(folder: Path, random: Random) -> str:
        lines = (folder / name).read_text().splitlines()
        lines.insert(random.randrange(len(lines) + 1), line)
        (folder / name).write_text("\n".join(lines) + "\n")
        return f"{name}: {short(line)}"

    return change


def with_content(name: str, content: bytes) -> Change:
    """A file with another content."""

    def change(folder: Path, random: Random) -> str:
        (folder / name).write_bytes(content)
        return f"{name}: {short(content)}"

    return change


def with_value(name: str, key: str, value: object) -> Change:
    """A JSON or YAML file with another value of one key."""

    def change(folder: Path, random: Random) -> str:
        import yaml

        content = yaml.safe_load((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: value}))
        return f"{name}: {key} = {short(value)}"

    return change


def without(folder: str, *names: str) -> Change:
    """A folder without some files."""

    def change(work: Path, random: Random) -> str:
        for name in names:
            (work / folder / name).unlink()
        return f"{folder} without {' and '.join(names)}"

    return change


def unchanged(folder: Path, random: Random) -> str:
    return ""


# ---- recipes, overrides and arguments ----


def change_recipe(file: Path, random: Random) -> str:
    """Change one value. A training of 10¹⁸ steps is long, not malformed."""
    import yaml

    original = file.read_text()
    while True:
        done = change_yaml(file, random)
        try:
            if not 10 < float(yaml.safe_load(file.read_text())["training"]["max_steps"]) <= 10**18:
                return done
        except (KeyError, TypeError, ValueError, OverflowError, IndexError):
            return done
        file.write_text(original)


def recipes(random: Random) -> Drawn:
    for _ in range(110):
        yield on(TRAIN, file("recipe.yaml", change_recipe))
    for _ in range(25):
        yield on(CLASSIFY, file("classify.yaml", change_recipe))
    for change, count in ((change_text, 30), (change_bytes, 15), (change_kind, 9)):
        for _ in range(count):
            yield on(TRAIN, file("recipe.yaml", change))
    for old, news in texts.RECIPE.items():
        for new in news:
            yield on(TRAIN, replaced("recipe.yaml", old, new))


def overrides(random: Random) -> Drawn:
    for number in range(120):
        key, value = random.choice(texts.KEYS), random.choice(texts.OVERRIDES)
        given = f"{key}={value}" if key != "training.max_steps" else f"{key}=0.{number}"
        yield within([PLAN, TRAIN, TRAIN][number % 3].replace(" --", " X --", 1), "X", given), unchanged, b""
    for given in (
        "method.r",
        "=",
        "=1",
        "--method.r=2",
        "-x",
        "method.r =2",
        " =",
        "\udcff=\udcff",
        "a=b=c",
        "[red]=1",
    ):
        for command in (TRAIN.replace(" --", " X --"), "quickstart X --output out"):
            yield within(command, "X", given), unchanged, b""
    for given in ("task.name=nothing", "method.name=lora", "training.max_steps=-1", "model=/nowhere", "task={"):
        yield ["quickstart", given, "--output", "out"], unchanged, b""
    for given in ("training.max_steps=99", "method.r=3", "task.data=rows.csv", "model=sharded", "training.seed=1"):
        yield ["train", "unfinished", given, "--resume"], unchanged, b""


def odd_files(folder: Path, random: Random) -> str:
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "link").symlink_to("run")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    return "odd files"


def arguments(random: Random) -> Drawn:
    for command in texts.WITH_PATH:
        for path in ("pipe", *random.sample(texts.PATHS, 5)):
            if "report" in command and path.startswith("/"):  # the tests may run as root
                path = "pipe"
            yield within(command, "P", path), odd_files, b"hello\n"
    for command in texts.WITH_NUMBER:
        for number in random.sample(texts.NUMBERS, 5):
            yield within(command, "N", number), odd_files, b"hello\n"
    for text in (
        b"",
        b"\xff\xfe\n",
        b"\0\n",
        b"x" * 100_000 + b"\n",
        b"/unknown\n",
        b"/new\n/new\n",
        b"\xed\xa0\x80\n",
    ):
        yield ["chat", "run"], unchanged, text
        yield ["chat", "run", "--compare"], unchanged, text
    for given in ("--help x", "--version --x", "train", "study x", "env x", "nothing", "train --resume", "report"):
        yield given.split(), unchanged, b""


# ---- adapters and runs ----

ADAPTERS = ("run/adapter", "lora", "exported")


def adapters(random: Random) -> Drawn:
    for number in range(150):
        adapter, command = ADAPTERS[number % 3], random.choice(texts.ADAPTER)
        if number % 2:
            change = file(f"{adapter}/adapter_config.json", *[change_json] * 5, change_text, change_bytes, change_kind)
        else:
            change = file(f"{adapter}/adapter_model.safetensors", *[change_safetensors] * 5, change_bytes, change_kind)
        yield on(command.replace("A", adapter), change)
    for key, values in texts.ADAPTER_CONFIG.items():
        for value in values:
            adapter, command = random.choice(ADAPTERS), random.choice(texts.ADAPTER)
            yield on(command.replace("A", adapter), with_value(f"{adapter}/adapter_config.json", key, value))
    for adapter in ADAPTERS:
        for command in (f"inspect {adapter}", f"merge {adapter} --output out"):
            yield on(command, lambda folder, random, adapter=adapter: pickled_weights(folder / adapter))


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def pickled_weights(folder: Path) -> str:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    return "adapter_model.bin is a pickle"


def runs(random: Random) -> Drawn:
    checkpoint = "unfinished/checkpoints/checkpoint-1"
    for count, commands, pattern in (
        (100, texts.RUN, "run/*"),
        (20, texts.RUN, "run/adapter/*"),
        (40, [RESUME], f"{checkpoint}/*"),
        (30, [RESUME, RESUME, "report unfinished --output out.html"], "unfinished/*"),
        (30, texts.CLASSIFIER, "classifier/**/*"),
    ):
        for _ in range(count):
            yield on(random.choice(commands), one_of(pattern))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        yield on(RESUME, with_content(f"{checkpoint}/{name}", pickle.dumps(Evil())))
    for command, names in (("evaluate run", ["run", "run/adapter"]), ("report run", ["run", "run/predictions"])):
        for name in names * 3:
            yield on(command, file(name, change_kind))
    for name in ["unfinished", "unfinished/checkpoints", checkpoint] * 3:
        yield on(RESUME, file(name, change_kind))


# ---- bases, data, GGUF ----

SHARDED = ("chat sharded", "verify sharded base", "train recipe.yaml model.name=sharded --output out")
BASE_FILES = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def bases(random: Random) -> Drawn:
    for number in range(120):
        change = file(f"base/{BASE_FILES[number % 5]}", *[change_json] * 4, change_text, change_bytes, change_kind)
        yield on(random.choice(texts.BASE), change)
    for _ in range(30):
        change = file("base/model.safetensors", change_safetensors, change_safetensors, change_bytes, change_kind)
        yield on(random.choice(texts.BASE), change)
    for _ in range(24):
        yield on(random.choice(SHARDED), one_of("sharded/model*"))
    for _ in range(30):
        yield on(random.choice([CLASSIFY, "evaluate classifier", PREDICT_CLASSES]), one_of("encoder/*"))
    for key, values in texts.BASE_CONFIG.items():
        for value in values:
            yield on(random.choice(texts.BASE), with_value("base/config.json", key, value))
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    for names in (["tokenizer.json"], tokenizer, ["config.json"], ["model.safetensors"]):
        for command in ("chat base", TRAIN, "export run --to lora --output out", "merge run --output out"):
            yield on(command, without("base", *names))


LABELS = ("2", "-1", '"0"', "null", "1.5", "true", "1e400", "[0]")
TEXTS = ('{"sentence": 3}', '{"sentence": ""}', '{"sentence": "\\ud800"}', "[]", '{"text": "a"}', "3")
"""Rows for a classifier."""


def data(random: Random) -> Drawn:
    for row in texts.ROWS:
        yield on(TRAIN, with_line("rows.jsonl", row))
        yield on(PREDICT, with_line("questions.jsonl", row))
        if len(row) < 100:
            yield on(TRAIN.replace(" --", " task.data=rows.json --"), with_content("rows.json", f"[{row}]".encode()))
    for table in texts.TABLES:
        yield on(TRAIN.replace(" --", " task.data=rows.csv task.test_size=1 --"), with_content("rows.csv", table))
        yield on("predict run --input rows.csv --output out.jsonl", with_content("rows.csv", table))
    parquet = (
        TRAIN.replace(" --", " task.data=rows.parquet --"),
        "predict run --input rows.parquet --output out.jsonl",
    )
    for number in range(20):
        yield on(parquet[number % 2], file("rows.parquet", change_bytes, change_bytes, change_kind))
    for kind in ("nested", "binary", "numbers", "times", "nulls", "no rows", "no columns", "surrogates"):
        for command in parquet:
            yield on(command, lambda folder, random, kind=kind: parquet_of(folder / "rows.parquet", kind))
    for _ in range(12):
        yield on(TRAIN, file("rows.jsonl"))
        yield on(PREDICT, file("questions.jsonl"))
        yield on("evaluate run", file("rows.jsonl"))
    for _ in range(25):
        yield on(CLASSIFY, one_of("glue/sst2/*"))
    for row in (*TEXTS, '{"sentence": "' + "long " * 100_000 + '"}'):
        yield on(PREDICT_CLASSES, with_line("sentences.jsonl", row))
    for label in LABELS:
        yield on(CLASSIFY, with_line("glue/sst2/train.jsonl", f'{{"sentence": "a", "label": {label}}}'))
    for name in ("rows.json", "talk.jsonl", "folder"):
        for _ in range(8):
            changed = random.choice(["folder/train.jsonl", "folder/test.csv"]) if name == "folder" else name
            yield on(TRAIN.replace(" --", f" task.data={name} --"), in_folder(changed))


def in_folder(name: str) -> Change:
    """A change of one file, where data may also lie in a folder."""

    def change(folder: Path, random: Random) -> str:
        (folder / "folder").mkdir()
        shutil.copy(folder / "rows.jsonl", folder / "folder" / "train.jsonl")
        shutil.copy(folder / "rows.csv", folder / "folder" / "test.csv")
        return file(name)(folder, random)

    return change


def parquet_of(file: Path, kind: str) -> str:
    """Write a Parquet file with unusual columns."""
    import datetime

    import pyarrow
    from pyarrow import parquet

    texts, none = ["a"] * 8, pyarrow.array([], pyarrow.string())
    columns = {
        "nested": {"prompt": [{"a": [1]}] * 8, "completion": texts},
        "binary": {"prompt": [b"\xff\xfe"] * 8, "completion": texts},
        "numbers": {"prompt": [1.5] * 8, "completion": [3] * 8},
        "times": {"prompt": texts, "completion": texts, "when": [datetime.datetime(2024, 1, 1)] * 8},
        "nulls": {"prompt": [None] * 8, "completion": texts},
        "no rows": {"prompt": none, "completion": none},
        "no columns": {},
        "surrogates": {"prompt": pyarrow.array([b"\xed\xa0\x80"] * 8).view(pyarrow.string()), "completion": texts},
    }
    parquet.write_table(pyarrow.table(columns[kind]), file)
    return kind


GGUF_ADAPTER = (
    *("verify gguf/adapter.gguf run", "verify run gguf/adapter.gguf", "verify gguf/adapter.gguf base --base base"),
    "verify gguf/adapter.gguf run --base base.gguf",
)
GGUF_BASE = (
    *("chat base.gguf", "verify base.gguf base", "train recipe.yaml model.name=base.gguf --output out"),
    "verify gguf/adapter.gguf run --base base.gguf",
)


def gguf(random: Random) -> Drawn:
    for count, change in ((80, change_bytes), (60, change_header), (12, change_kind)):
        for number in range(count):
            name, commands = [("gguf/adapter.gguf", GGUF_ADAPTER), ("base.gguf", GGUF_BASE)][number % 2]
            yield on(random.choice(commands), file(name, change))


def change_header(file: Path, random: Random) -> str:
    """Change counts, lengths and types in the first bytes of a GGUF file."""
    content = bytearray(file.read_bytes())
    at = random.choice([*range(32)] * 4 + [*range(32, 400)])
    value, size = random.choice([0, 1, 0x7F, 0xFF]), random.choice([1, 4, 8])
    content[at : at + size] = bytes([value]) * size
    file.write_bytes(content)
    return f"{size} bytes of {value} at {at}"


# ---- studies ----


def studies(random: Random) -> Drawn:
    read, resume = "study report study", "study run study.yaml --output study"
    for _ in range(70):
        yield on(PLAN, file("study.yaml", *[change_yaml] * 4, change_text, change_bytes, change_kind))
    for _ in range(12):
        yield on(STUDY, file("study.yaml", change_yaml))
    for _ in range(10):
        yield on(PLAN, file("recipe.yaml"))
    for pattern, count in (("study/runs/*/*", 50), ("study/*", 15)):
        for _ in range(count):
            yield on(random.choice([read, read, resume]), one_of(pattern))
    for name in ("study", "study/runs", "study/locks"):
        for command in (read, read, resume):
            yield on(command, file(name, change_kind))
    for key, values in texts.STUDY.items():
        for value in values:
            yield on(PLAN, with_value("study.yaml", key, value))


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
