"""The header of a GGUF file is checked before gguf or llama.cpp trusts its counts."""

import struct

import gguf
import numpy as np
import pytest

from pera.errors import UserError
from pera_lab.convert.gguf import open_gguf
from pera_lab.convert.llamacpp import serving
from pera_lab.embedded import gguf_folder
from pera_lab.gguf_header import check_header

U64 = 2**64 - 1


def header(version=3, tensors=0, *entries, magic=b"GGUF"):
    """The bytes of a header; each entry is a type and the bytes of its value."""
    pairs = b"".join(struct.pack("<Q1sI", 1, b"k", kind) + value for kind, value in entries)
    return magic + struct.pack("<IQQ", version, tensors, len(entries)) + pairs


BROKEN = {
    "magic": (header(magic=b"GGML"), "does not begin with 'GGUF'"),
    "version": (header(9), "version 9 is unknown"),
    "tensors": (header(3, U64), "claims 18446744073709551615 tensors"),
    "entries": (header()[:-8] + struct.pack("<Q", U64), "ends within its header"),
    "long string": (header(3, 0, (8, struct.pack("<Q", U64))), "ends within its header"),
    "long array": (header(3, 0, (9, struct.pack("<IQ", 0, U64))), "arrays claim 18446744073709551615 values"),
    "empty arrays in an array": (header(3, 0, (9, struct.pack("<IQ", 9, 3))), "unknown type 9"),
    "type": (header(3, 0, (99, b"")), "unknown type 99"),
    "dimensions": (header(3, 1) + struct.pack("<Q1sI", 1, b"t", 2**31), "has 2147483648 dimensions"),
    "side": (header(3, 1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**62, 0, 0), "larger than any file"),
    "alignment": (
        header()[:-8] + struct.pack("<QQ17sII", 1, 17, b"general.alignment", 4, 0), "alignment"),
    "empty": (b"", "empty"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_headers_are_rejected_by_all_that_read_a_gguf_file(content, words, tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"a.gguf' is not a complete GGUF file: .*{words}"):
        open_gguf(file)
    if words != "alignment":  # the libraries check it themselves
        with pytest.raises(UserError, match=words):
            gguf_folder(file)
        with pytest.raises(UserError, match=words), serving(file):
            pass


@pytest.fixture
def complete(tmp_path):
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_tensor("t", np.ones((2, 3), np.float32))
    writer.write_header_to_file(tmp_path / "a.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def test_a_complete_file_passes(complete):
    check_header(complete)
    assert [tensor.name for tensor in open_gguf(complete).tensors] == ["t"]


@pytest.mark.parametrize("flipped", [0x01, 0x80, 0xFF])
def test_any_flipped_byte_ends_in_a_sentence_or_is_read(complete, flipped, tmp_path):
    content, file, refused = complete.read_bytes(), tmp_path / "flipped.gguf", 0
    for at in range(len(content) - 24):
        file.write_bytes(content[:at] + bytes([content[at] ^ flipped]) + content[at + 1 :])
        try:
            open_gguf(file)
        except UserError:
            refused += 1
    assert refused > 50
