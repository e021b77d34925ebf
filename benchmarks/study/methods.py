"""The methods of the study: each makes a KV prompt of k tokens in its own way.

| method | what it does | reads answers |
|---|---|---|
| truncated | the first k tokens of the text | no |
| strided | k of the text's keys and values, evenly spaced | no |
| snapkv, expected_attention, kvzip | k keys and values for each head, chosen by kvpress; see press.py | no |
| closed_form | attention matching in closed form | yes |
| matched | attention matching, closed form and refinement, no training | yes |
| matched_distilled | attention matching, then training end to end | yes |
| today | the recipe before attention matching: training from tokens of the text | yes |
| cartridges | the recipe of Cartridges: first tokens, KL, its learning rate | yes |
| next_token | the loss of PEFT's prefix tuning, next token of the teacher's sampled answers; first tokens | yes |

A trained recipe has the same number of steps and sequences as `today`, except for `matched_distilled`, which has fewer
steps. next_token runs on this package's trainer: with a saved prompt PEFT gives the same logits, so the loss and its
gradient are PEFT's own, and only the time of a step differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.study.corpus import Text
from softprompt_kernels.errors import SoftPromptError

Kind = Literal["tokens", "press", "run"]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: as on the command line.
        label: in tables and plots.
        kind: "tokens": tokens of the captured text. "press": a press of kvpress. "run": a run of `compress`.
        settings: of the method for a text. For a run these are fields of `CompressConfig`.
        seconds: that a cell of the demo takes here, for the time budget, until one has been measured.
        trained: whether it trains end to end. The plan has such cells at few ratios.
    """

    name: str
    label: str
    kind: Kind
    settings: Callable[[Text], Settings]
    seconds: float
    trained: bool = False

    @property
    def reads_answers(self) -> bool:
        """Whether the teacher's answers to training queries are a part of the method, and of its time."""
        return self.kind == "run"


def _today(text: Text) -> Settings:
    absolute = {"relative_learning_rate": False}  # as these recipes count it
    if text.short:  # the demo before attention matching
        return {"init": "first", "steps": 140, "batch_size": 4, "learning_rate": 1.5e-2, **absolute}
    return {"init": "strided", "steps": 200, "batch_size": 8, "learning_rate": 2e-2, **absolute}


def _cartridges(text: Text) -> Settings:
    return {**_today(text), "init": "first", "learning_rate": 2e-2}


def _next_token(text: Text) -> Settings:
    # The rate of PEFT's own examples of prefix tuning.
    return {**_today(text), "init": "first", "objective": "nll", "learning_rate": 1e-2}


def _matched(text: Text) -> Settings:
    return {"init": "matched", "steps": 0}


def _closed_form(text: Text) -> Settings:
    return {"init": "matched", "matching_steps": 0, "steps": 0}


def _matched_distilled(text: Text) -> Settings:
    return {"init": "matched", "steps": 100, "batch_size": _today(text)["batch_size"]}


def _fixed(**settings: Any) -> Callable[[Text], Settings]:
    return lambda text: settings


METHODS = {
    method.name: method
    for method in (
        Method("truncated", "truncated text", "tokens", _fixed(how="first"), 15),
        Method("strided", "strided KV", "tokens", _fixed(how="strided"), 15),
        Method("snapkv", "SnapKV", "press", _fixed(press="SnapKVPress", window_size=64), 30),
        Method("expected_attention", "Expected Attention", "press", _fixed(press="ExpectedAttentionPress"), 30),
        Method("kvzip", "KVzip", "press", _fixed(press="KVzipPress", heads="same number for each head"), 60),
        Method("closed_form", "matched, closed form", "run", _closed_form, 60),
        Method("matched", "matched", "run", _matched, 90),
        Method("matched_distilled", "matched + distilled", "run", _matched_distilled, 240, trained=True),
        Method("today", "distilled from tokens", "run", _today, 240, trained=True),
        Method("cartridges", "Cartridges' recipe", "run", _cartridges, 240, trained=True),
        Method("next_token", "next-token loss (PEFT)", "run", _next_token, 240, trained=True),
    )
}
"""All methods by name, in the order of the tables."""


def chosen_methods(names: Iterable[str]) -> list[Method]:
    """The methods of these names.

    Raises:
        SoftPromptError: a name is unknown.
    """
    chosen = []
    for name in names:
        if name not in METHODS:
            raise SoftPromptError(f"method: got {name!r}, accepted are {', '.join(METHODS)}")
        chosen.append(METHODS[name])
    return chosen
