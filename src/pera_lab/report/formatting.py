"""Numbers and settings in the form that a page shows."""

from __future__ import annotations

import math
from typing import Any

ABSENT = "–"


def shortened(text: str, length: int = 2000) -> str:
    """The text, or its beginning and how much is left out."""
    return text if len(text) <= length else f"{text[:length]} … ({count(len(text) - length)} more characters)"


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits: 0.2015, 1.2e-05, 12,300."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{_minus(value)}infinite"
    size = abs(value)
    return _minus(value) + (f"{size:,.0f}" if size >= 10000 else f"{size:.{digits}g}")


def chance(p: float) -> str:
    """A p with two digits: 0.031; a dash where there is none."""
    return ABSENT if math.isnan(p) else number(p, 2)


def signed(value: float) -> str:
    """A change: +0.012 or −0.003."""
    return number(value, 3) if value <= 0 or math.isnan(value) else f"+{number(value, 3)}"


def points(value: float) -> str:
    """A difference of shares in hundredths: +0.42 or −1.30."""
    return ABSENT if math.isnan(value) else f"{100 * value:+.2f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share with one decimal: 79.5 %."""
    return ABSENT if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%".replace("-", "−")


def count(value: int | None) -> str:
    """A whole number with thousands apart: 12,300."""
    return ABSENT if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """Seconds as 12.3 s, 4 min 5 s or 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(value: int | None) -> str:
    """Bytes as 12.3 MB or 1.2 GB, by powers of 1024."""
    if value is None:
        return ABSENT
    return f"{value / 2**30:.1f} GB" if value >= 2**30 else f"{value / 2**20:.1f} MB"


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"section.key": text}``."""
    if isinstance(value, dict) and value:
        return {k: v for key, below in value.items() for k, v in flat(below, f"{prefix}.{key}".lstrip(".")).items()}
    return {prefix: setting(value)}


def setting(value: Any) -> str:
    """One value of a recipe or environment."""
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(setting, value)) if isinstance(value, list) else str(value)


def _minus(value: float) -> str:
    return "−" if value < 0 else ""
