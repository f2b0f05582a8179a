"""How numbers and settings are written, in pages and in the terminal."""

from __future__ import annotations

import math
from typing import Any

ABSENT = "–"


def shortened(text: str, length: int = 2000) -> str:
    """Return the text, or its first ``length`` characters and how many more there are."""
    return text if len(text) <= length else f"{text[:length]} … ({count(len(text) - length)} more characters)"


def number(value: float | None, digits: int = 4) -> str:
    """Format with four significant digits: 0.2015, 1.2e-05, 12,300."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{_minus(value)}infinite"
    magnitude = abs(value)
    return _minus(value) + (f"{magnitude:,.0f}" if 1e4 <= magnitude < 1e15 else f"{magnitude:.{digits}g}")


def p_value(p: float) -> str:
    """Format a p-value with two significant digits: 0.031."""
    return ABSENT if math.isnan(p) else number(p, 2)


def signed(value: float) -> str:
    """Format a change: +0.012 or −0.003."""
    return number(value, 3) if value <= 0 or math.isnan(value) else f"+{number(value, 3)}"


def points(value: float) -> str:
    """Format a difference of two shares in percentage points: +0.42 or −1.30."""
    if math.isnan(value):
        return ABSENT
    return f"{100 * value:+.2f}".replace("-", "−") if abs(value) < 1e9 else number(100 * value)


def percent(value: float | None, unit: str = "\N{NO-BREAK SPACE}%") -> str:
    """Format a share with one decimal: 79.5 %."""
    if value is None or math.isnan(value):
        return ABSENT
    return (f"{100 * value:.1f}".replace("-", "−") if abs(value) < 1e9 else number(100 * value)) + unit


def count(value: int | None) -> str:
    """Format a whole number: 12,300."""
    return ABSENT if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """Format seconds: 12.3 s, 4 min 5 s or 2 h 10 min."""
    if seconds is None or not abs(seconds) < 1e9:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(value: int | None) -> str:
    """Format bytes in powers of 1024: 12.3 MB or 1.2 GB."""
    if value is None:
        return ABSENT
    return f"{value / 2**30:.1f} GB" if value >= 2**30 else f"{value / 2**20:.1f} MB"


LEVELS = 20
"""Deepest nesting of settings that is written out."""


def flatten(value: Any, prefix: str = "", levels: int = LEVELS) -> dict[str, str]:
    """Return nested settings as ``{"section.key": text}``."""
    if isinstance(value, dict) and value and levels:
        below = ((f"{prefix}.{key}".lstrip("."), content) for key, content in value.items())
        return {k: v for path, content in below for k, v in flatten(content, path, levels - 1).items()}
    return {prefix: setting(value, levels)}


def setting(value: Any, levels: int = LEVELS) -> str:
    """Format one value of a recipe or an environment."""
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict) and not levels:
        return "…"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {setting(content, levels - 1)}' for key, content in value.items())}}}"
    return ", ".join(setting(x, levels - 1) for x in value) if isinstance(value, list) else str(value)


def _minus(value: float) -> str:
    return "−" if value < 0 else ""
