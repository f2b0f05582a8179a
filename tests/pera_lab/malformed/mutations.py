"""Changes that make a file malformed: blind changes of its bytes, and changes of the values in it."""

import json
import os
import shutil
import struct
from pathlib import Path
from random import Random

VALUES = (
    *(None, True, False, 0, -1, 1, 0.5, 2**31, 10**18, -(10**18), 10**400, 1e308, -1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "text", "null", "1e-4", "0x1f", "12:30", "2024-99-99"),
    *("a\0b", "\ud800", "a\nb", "\x1b[31mred\x1b[0m", "[red]x[/red]", "[/]", "<script>alert(1)</script>", "&lt;"),
    *("../../outside", "/dev/zero", "~", "~nobody", "//host/share", "file:///etc/passwd", "C:\\x", "a" * 300),
    *("x" * 100_000, "ünïcödé", "\u202eevil", "(a+)+$", "(a|aa)+$", "(", "*", "%s%n", "{x}", "${HOME}", "!!int foo"),
    *([], {}, [None], [[]], ["a", 1, None], {"a": None}, {"": {"": []}}, {"name": "x"}, [1, 2, 3], [{"a": 1}]),
)
"""Values that no key expects, or that lie at the edges of what one may hold."""

DEEP = 100_000
"""Levels of nesting that exhaust a recursive parser."""


def places(content, path=()):
    """The path of every key and item in nested dictionaries and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def change_value(content, random: Random, values=VALUES):
    """Drop, rename, repeat or replace one key or item of ``content`` in place. Returns what was done."""
    path = random.choice(list(places(content)))
    *parents, key = path
    parent = content
    for step in parents:
        parent = parent[step]
    kind = random.choice(["replace"] * 6 + ["drop", "rename", "add", "wrap"])
    where = ".".join(map(str, path))[:60]
    if kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[random.choice([f"{key}s", str(key).upper(), "", "__class__", "\0", "[red]"])] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent[random.choice(["unknown", "", "name", "r", "__proto__", "[red]"])] = random.choice(values)
    elif kind == "wrap":
        parent[key] = random.choice([[parent[key]], {"x": parent[key]}, [parent[key]] * 3, str(parent[key])])
    else:
        kind, value = "replace", random.choice(values)
        parent[key] = value
        return f"{where} = {short(value)}"
    return f"{kind} {where}"


def short(value) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:30]}… ({len(text)} characters)"


def change_json(file: Path, random: Random):
    """Change one value in a JSON file, or in one line of a JSON-lines file."""
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        number = random.randrange(len(lines))
        content = json.loads(lines[number])
        done = change_value(content, random)
        lines[number] = json.dumps(content)
        file.write_text("\n".join(lines) + "\n")
        return f"line {number + 1}: {done}"
    content = json.loads(file.read_text())
    done = change_value(content, random)
    file.write_text(json.dumps(content, indent=1))
    return done


def change_yaml(file: Path, random: Random):
    """Change one value in a YAML file. JSON is YAML."""
    import yaml

    content = yaml.safe_load(file.read_text())
    done = change_value(content, random)
    file.write_text(json.dumps(content, indent=1))
    return done


def change_text(file: Path, random: Random):
    """Change the text of a JSON or YAML file in a way that no value can hold."""
    text = file.read_text()
    deep_json = '{"a":' * DEEP + "1" + "}" * DEEP
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    changes = {
        "UTF-16": text.encode("utf-16"),
        "latin-1": ("# é\n" + text + '\n"é": 1').encode("latin-1", "replace"),
        "byte-order mark": b"\xef\xbb\xbf" + text.encode(),
        "NUL at the end": text.encode() + b"\0",
        "twice": (text + text).encode(),
        "deep": deep_json.encode(),
        "deep list": b"[" * DEEP,
        "anchors that multiply": (bomb + text).encode(),
        "tabs": text.replace(" ", "\t").encode(),
        "carriage returns": text.replace("\n", "\r").encode(),
        "only white space": b" \n\t\n",
        "a list": b"[1, 2]",
        "a text": b'"text"',
        "a number": b"1" * 5000,
        "null": b"null",
        "HTML": b"<html><body>404 not found</body></html>",
        "python tag": b"!!python/object/apply:os.system ['touch executed']\n" + text.encode(),
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        "half": text.encode()[: len(text) // 2],
        "unknown anchor": b"x: *nothing\n" + text.encode(),
        "several documents": b"---\n" + text.encode() + b"\n---\n" + text.encode(),
        "quotes": text.replace('"', "'").encode(),
        "trailing comma": text.rstrip().rstrip("}]").encode() + b",}",
    }
    name = random.choice(list(changes))
    file.write_bytes(changes[name])
    return name


def change_bytes(file: Path, random: Random):
    """Change bytes without regard to the format."""
    content = bytearray(file.read_bytes())
    size = len(content)
    at = random.randrange(size + 1)
    kind = random.choice(
        ["flip", "flip", "flip many", "truncate", "insert", "zeros", "remove", "swap halves", "append"]
    )
    if kind == "flip" and size:
        content[min(at, size - 1)] ^= 1 << random.randrange(8)
    elif kind == "flip many":
        for _ in range(min(50, size)):
            content[random.randrange(size)] = random.randrange(256)
    elif kind == "truncate":
        del content[at:]
    elif kind == "insert":
        content[at:at] = random.randbytes(random.choice([1, 8, 1000]))
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "remove":
        del content[at : at + random.choice([1, 8, 100])]
    elif kind == "swap halves":
        content = content[size // 2 :] + content[: size // 2]
    else:
        content += random.randbytes(100)
    file.write_bytes(content)
    return f"{kind} at {at}"


def change_kind(file: Path, random: Random):
    """Replace a file by something else."""
    kind = random.choice(
        ["missing", "empty", "folder", "pipe", "link to itself", "dangling link", "noise", "zeros", "device"]
    )
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink()
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "dangling link":
        file.symlink_to("/nowhere/at/all")
    elif kind == "noise":
        file.write_bytes(random.randbytes(500))
    elif kind == "zeros":
        file.write_bytes(bytes(500))
    elif kind == "device":
        file.symlink_to("/dev/null")
    return kind


def replace_by_other(file: Path, random: Random):
    """Replace a file by another one of the working folder."""
    root = next(parent for parent in file.parents if (parent / "classify.yaml").is_file())
    others = sorted(other for other in root.rglob("*") if other.is_file() and other.suffix == file.suffix)
    other = random.choice([other for other in others if other.read_bytes() != file.read_bytes()] or others)
    shutil.copyfile(other, file) if other != file else None
    return f"by {other.relative_to(root)}"


TENSOR_CHANGES = (
    *("dtype", "dtype", "shape", "shape", "transpose", "offsets", "rename", "drop", "only", "numbers", "numbers"),
    *("empty", "length", "metadata", "swap", "escapes", "extra", "huge", "scalar", "all dtypes", "cast"),
)


def change_safetensors(file: Path, random: Random):
    """Change the header of a safetensors file, or its numbers."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry, other = header[name], header[random.choice(names)]
    kind = random.choice(TENSOR_CHANGES)
    done = kind
    if kind == "dtype":
        entry["dtype"] = random.choice(
            ["F64", "F16", "BF16", "I8", "U8", "BOOL", "I64", "I32", "F8_E4M3", "F4", "X9", 3]
        )
        done = f"dtype {entry['dtype']} of {name}"
    elif kind == "all dtypes":
        for each in names:
            header[each]["dtype"] = random.choice(["I32", "U32"])
    elif kind == "cast":  # every number in fewer bits, consistently
        data, at, kept = bytearray(), 0, bytes(data)
        dtype, size = random.choice(
            [("F16", 2), ("BF16", 2), ("I8", 1), ("BOOL", 1), ("U8", 1), ("F8_E4M3", 1), ("I64", 8), ("F64", 8)]
        )
        for each in names:
            begin, end = header[each]["data_offsets"]
            count = (end - begin) // 4
            data += kept[begin : begin + min(size, 4) * count] if size <= 4 else kept[begin:end] * 2
            header[each] |= {"dtype": dtype, "data_offsets": [at, at + size * count]}
            at += size * count
        data = bytes(byte & 1 for byte in data) if dtype == "BOOL" else data
        done = f"cast to {dtype}"
    elif kind == "shape":
        entry["shape"] = random.choice(
            [[0], [1], [2**62, 4], [-1], [], entry["shape"][::-1], [*entry["shape"], 1], "x", None]
        )
        done = f"shape {entry['shape']} of {name}"
    elif kind == "transpose":
        for each in names:
            header[each]["shape"] = header[each]["shape"][::-1]
    elif kind == "offsets":
        entry["data_offsets"] = random.choice([[0, 0], [8, 4], [0, 10**12], [-4, 4], [0], other["data_offsets"]])
    elif kind == "rename":
        header[name.replace("weight", "wieght") + random.choice(["", ".x", "\0"])] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "only":
        header = {"__metadata__": {"format": "pt"}}
    elif kind == "empty":
        header, data = {}, b""
    elif kind == "numbers":
        begin, end = entry["data_offsets"]
        pattern = random.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, 0.0, 1e20])
        data[begin:end] = struct.pack("<f", pattern) * ((end - begin) // 4)
        done = f"{pattern} in {name}"
    elif kind == "length":
        length = random.choice([0, 2**63, 2**64 - 1, length + 1, length - 1, 10**9])
        file.write_bytes(struct.pack("<Q", length) + content[8:])
        return f"length {length}"
    elif kind == "metadata":
        header["__metadata__"] = random.choice(
            [{}, {"format": "tf"}, {"format": 3}, [], "x", {"total_parameters": "-1"}]
        )
    elif kind == "swap":
        other["data_offsets"], entry["data_offsets"] = entry["data_offsets"], other["data_offsets"]
    elif kind == "escapes":
        header["base_model.model.\x1b[31m[red]<b>.lora_A.weight"] = header.pop(name)
    elif kind == "extra":
        header["base_model.model.model.layers.99.self_attn.q_proj.pera_A"] = dict(entry)
    elif kind == "huge":
        header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
        data = b""
    elif kind == "scalar":
        header[name] = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return done


def change_any(file: Path, random: Random):
    """A change that fits the kind of file, or a blind one."""
    fitting = {
        ".json": [change_json, change_json, change_json, change_text],
        ".jsonl": [change_json, change_json, change_text],
    }
    fitting |= {".yaml": [change_yaml, change_yaml, change_yaml, change_text], ".safetensors": [change_safetensors] * 3}
    function = random.choice([*fitting.get(file.suffix, []), change_bytes, change_kind, replace_by_other])
    if file.is_dir():
        function = change_kind
    try:
        return f"{function.__name__.removeprefix('change_')}: {function(file, random)}"
    except (ValueError, IndexError, UnicodeDecodeError):  # an empty or a binary file
        return f"kind: {change_kind(file, random)}"
