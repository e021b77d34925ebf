"""Numbers of bytes in words."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes as "640 B" or "3.2 MB"; 1 MB is 10⁶ bytes."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
