"""Token ids of stored examples, which are made once and then read from the cache of the library ``datasets``."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import pera
from pera_lab import inference
from pera_lab.files import read_object, write_json
from pera_lab.progress import ProgressBar
from pera_lab.tasks.base import Task
from pera_lab.tasks.encoding import Encoded
from pera_lab.tasks.examples import StoredExamples
from pera_lab.tasks.storage import cached, damaged, open_arrow

_CHUNK = 1000
"""Examples in memory at a time."""


def encode_stored(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: StoredExamples,
    max_length: int,
) -> Encoded:
    """What ``task.encode`` returns for stored examples, with rows that stay on the disk.

    The rows are read from the cache if it has them. The first process that needs them makes them, and others wait for
    it. A folder in the cache is complete, because it is moved there at the end.

    Args:
        task: the task of the examples.
        tokenizer: the tokenizer of the model.
        examples: the examples.
        max_length: as for ``task.encode``.

    Raises:
        UserError: as for ``task.encode``, or the cache cannot be written or is damaged.
    """
    key = json.dumps([_code(task), _settings(task, tokenizer), examples.identity, max_length], default=str)
    digest = hashlib.sha256(key.encode() + memoryview(examples.rows)).hexdigest()

    def write(folder: Path) -> None:
        with ProgressBar("tokenizing") as bar:
            bar.update(0, len(examples))
            _write(folder, _chunks(task, tokenizer, examples, max_length, bar))

    return _read(cached(digest, write))


def _chunks(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: StoredExamples, max_length: int, bar: ProgressBar
) -> Iterator[Encoded]:
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        yield task.encode(tokenizer, chunk, max_length)
        bar.update(start + len(chunk))


def _write(folder: Path, chunks: Iterable[Encoded]) -> None:
    import pyarrow

    record = {"rows": 0, "left_out": 0, "shortened": 0, "largest": 0}
    writer: Any = None
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file:
        for rows, left_out, shortened, _ in chunks:
            record["rows"] += len(rows)
            record["left_out"] += left_out
            record["shortened"] += shortened
            if rows:
                record["largest"] = max(record["largest"], *(max(row["input_ids"]) for row in rows))
                table = _compact(pyarrow.Table.from_pylist(list(rows)))
                writer = writer or pyarrow.ipc.new_stream(file, table.schema)
                writer.write_table(table)
        if writer is not None:
            writer.close()
    write_json(folder / "record.json", record)


def _compact(table: Any) -> Any:
    """The table with lists of small integers: one byte for masks, otherwise four."""
    import pyarrow

    fields = []
    for field in table.schema:
        if field.type == pyarrow.list_(pyarrow.int64()):
            small = pyarrow.int8() if field.name in ("attention_mask", "token_type_ids") else pyarrow.int32()
            field = field.with_type(pyarrow.list_(small))
        fields.append(field)
    return table.cast(pyarrow.schema(fields))


def _read(folder: Path) -> Encoded:
    record = read_object(folder / "record.json")
    if not record["rows"]:
        return Encoded([], record["left_out"], record["shortened"])
    rows = open_arrow(folder / "rows.arrow")
    if len(rows) != record["rows"]:
        raise damaged(folder, f"it has {len(rows)} of {record['rows']} rows")
    return Encoded(rows, record["left_out"], record["shortened"], record["largest"])


def lengths(rows: Any) -> list[int]:
    """The number of tokens in each row of :class:`Encoded`."""
    if isinstance(rows, list):
        return [len(row["input_ids"]) for row in rows]
    from pyarrow import compute

    found: list[int] = compute.list_value_length(rows.data.column("input_ids")).to_pylist()
    return found


def _code(task: Task) -> list[str]:
    """Digests of the code that makes rows, and versions of the libraries that it calls."""
    files = {*Path(__file__).parent.glob("*.py"), Path(inference.__file__), Path(inspect.getfile(type(task)))}
    libraries = (f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2"))
    return [pera.__version__, *libraries, *(_digest(file) for file in sorted(files))]


def _settings(task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides how an example becomes a row."""
    tokenizer("")  # resets the truncation that an earlier call asked for
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        files = {str(file.relative_to(name)): _digest(file) for file in Path(name).rglob("*") if file.is_file()}
    today = "strftime_now" in str(tokenizer.chat_template)  # the template writes the date
    return {
        "task": task.model_dump(mode="json", exclude={"data"}),
        "tokenizer": [str(type(tokenizer)), files],
        "date": str(date.today()) if today else None,
    }


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
