"""Runs of the constructed recall model, and evidence without a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, compress
from softprompt_kernels.compress.diagnose.evidence import AskedQuery, Evidence, Matched, Turns
from tests.compress.distill.recall_model import RecallTask, save_recall_model

HEALTHY = Turns(
    answers=20, ended=12, running_on=0, example="", end_rendered=True, end_probability=0.02, window=512
)  # fmt: skip


@pytest.fixture(scope="session")
def recall_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_recall_model(tmp_path_factory.mktemp("recall") / "model")


@pytest.fixture
def make_run(recall_folder: Path, tmp_path: Path, no_plot: None) -> Callable[..., Path]:
    """`make_run(steps=0)`: the folder of a finished run, which compresses seven pairs into 8 tokens."""

    def make(task: RecallTask | None = None, **options: Any) -> Path:
        settings = {
            "model": str(recall_folder),
            "output": tmp_path / "run",
            "tokens": 8,
            "selfstudy": 0,
            "new_tokens": 1,
            "steps": 0,
            "device": "cpu",
            **(task or RecallTask.of()).write(tmp_path),
        }
        config = CompressConfig.model_validate(settings | options)
        compress(config)
        return config.output

    return make


@pytest.fixture
def make_evidence(tmp_path: Path) -> Callable[..., Evidence]:
    """`make_evidence(heldout=0.5)`: of a run with 10 queries of 1 nat a set, which recovers these parts of each.

    `spread` makes every second query better and the others worse by so much. `matched` gives by tokens what a matched
    prompt recovers of both sets. `config` are changes of the configuration, and the rest are fields of the evidence.
    """

    def queries(recovered: float, spread: float, agreeing: int, agreeing_share: float) -> tuple[AskedQuery, ...]:
        found = []
        for number in range(10):
            kl = 1 - recovered + (spread if number % 2 else -spread)
            found.append(AskedQuery(f"query {number}", "answer", "given", 8, 1.0, kl, agreeing, agreeing_share * kl))
        return tuple(found)

    def make(
        heldout: float = 0.5,
        train: float = 0.5,
        spread: float = 0.0,
        agreeing: int = 4,
        agreeing_share: float = 0.1,
        matched: dict[int, tuple[float, float]] | None = None,
        matched_spread: float = 0.0,
        config: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Evidence:
        settings = {"model": "m", "context": "c.txt", "output": str(tmp_path / "run"), "tokens": 8, "steps": 0}
        evidence = Evidence(
            config=CompressConfig.model_validate(settings | (config or {})),
            context_tokens=64,
            heldout=queries(heldout, spread, agreeing, agreeing_share),
            train=queries(train, spread, agreeing, agreeing_share),
            turns=HEALTHY,
            matched=tuple(
                Matched(tokens, _sums(parts[0], matched_spread), _sums(parts[1], 0.0))
                for tokens, parts in (matched or {}).items()
            ),
        )
        return replace(evidence, **fields)

    return make


def _sums(recovered: float, spread: float) -> tuple[float, ...]:
    return tuple(1 - recovered + (spread if number % 2 else -spread) for number in range(10))
