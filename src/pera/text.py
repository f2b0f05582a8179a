"""Text from models and data sets, made safe to show."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """``text`` with control and direction-changing characters, line breaks and tabs apart, replaced by visible
    ones: an escape becomes ␛, others their code in angle brackets."""
    return "".join(_shown(character) for character in text.replace("\r\n", "\n"))


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co"):
        return character
    if character in "\u200c\u200d":  # joiners that ordinary words and emoji need
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"‹U+{code:04X}›"
