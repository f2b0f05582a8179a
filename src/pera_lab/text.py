"""Text from models and data sets, escaped for display."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path


def visible(text: str, *, inline: bool = False) -> str:
    r"""The text with control, direction and line-separator characters replaced by their codes: ESC becomes \x1b.

    The joiners that some scripts need are kept, and so are newlines and tabs unless the text is ``inline``.
    """
    kept = "" if inline else "\n\t"
    return re.sub(rf"[^{kept} -~\u200c\u200d]", lambda match: _code(match[0]), text)


def quoted(path: Path | str) -> str:
    """The path as a word of a shell command, so that a printed command can be copied."""
    return shlex.quote(str(path))


def markdown(text: str) -> str:
    r"""The text for a line or a table cell of Markdown: shown as it is, without markup, HTML, links or maths.

    Examples:
        >>> markdown("[a](b) | <i>")
        '\\[a](b) \\| \\<i\\>'
    """
    text = _ACTIVE.sub(r"\\\g<0>", " ".join(visible(text).split()))
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)  # else a list


_ACTIVE = re.compile(r"[\\`*_\[\]<>|~&$#]|:(?=//|\w+:)|(?<=www)\.|^[-+=](?=[-=\s]|$)", re.IGNORECASE)
"""Characters that begin markup, and those that turn an address or the start of a line into markup."""


def _code(character: str) -> str:
    acts = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    code = ord(character)
    return (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}") if acts else character
