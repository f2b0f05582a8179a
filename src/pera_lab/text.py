"""Text from models and data sets, escaped for display."""

from __future__ import annotations

import re
import unicodedata


def visible(text: str, *, inline: bool = False) -> str:
    r"""The text with control, direction and line-separator characters replaced by their codes: ESC becomes \x1b.

    The joiners that some scripts need are kept, and so are newlines and tabs unless the text is ``inline``.
    """
    kept = "" if inline else "\n\t"
    return re.sub(rf"[^{kept} -~\u200c\u200d]", lambda match: _code(match[0]), text)


def _code(character: str) -> str:
    acts = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    code = ord(character)
    return (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}") if acts else character
