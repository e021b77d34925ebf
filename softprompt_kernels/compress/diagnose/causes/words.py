"""Numbers and commands as a diagnosis writes them."""

from __future__ import annotations

MATCHED_OPTIONS = "--init matched --learning-rate 0.005"
"""The matched start. Its rate is named because the config.yaml of a run holds the rate of that run."""


def part(value: float) -> str:
    """A recovered fraction."""
    return f"{value:.2f}"


def rate(value: float) -> str:
    """A learning rate, rounded: "0.005", "30"."""
    return f"{float(f'{value:.1g}'):g}"


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 query", "3 queries"."""
    return f"{number} {one if number == 1 else many or one + 's'}"
