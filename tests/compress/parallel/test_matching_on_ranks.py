"""Matching on more ranks than layers: ranks of a team share the rows of a layer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.compress.matching import match as module
from softprompt_kernels.compress.matching.match import Matching, match, stored_error, stored_match
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.parallel.shares import shares
from softprompt_kernels.prompts import Prefix

# Layers from their formulas, and their files.
from tests.compress.matching.conftest import make_layer, stored  # noqa: F401


def test_a_team_that_shares_rows_matches_as_one_process(
    make_layer: Callable[..., Any],  # noqa: F811
    stored: Callable[..., Any],  # noqa: F811
    on_ranks: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FEWEST_OF_A_RANK", 8)
    monkeypatch.setattr(module, "ROWS_PER_STEP", 71)  # not a multiple of the ranks
    kinds = {"plain": {}, "softcap": {"softcap": 5.0, "sinks": True}, "window": {"window": 12}, "two layers": {}}
    problems = {}
    for name, kind in kinds.items():
        layers = [make_layer(context=20, count=301, seed=seed, **kind) for seed in range(1 + (name == "two layers"))]
        context, rows = stored(layers)
        problems[name] = context, replace(rows, files=(rows.files[0].rename(tmp_path / f"{name}.safetensors"),))

    def run(where: str) -> None:
        for name, (context, rows) in problems.items():
            for steps in (0, 30):
                records: list[dict[str, Any]] = []
                folder = tmp_path / f"{where} {name} {steps}"
                folder.mkdir(exist_ok=True)
                settings = Matching(tokens=5, steps=steps, frozen_tokens=1)
                match(context, rows, settings, reporter=SilentReporter(), folder=folder, record=records.append)
                if ranks.is_first():
                    (folder / "records.json").write_text(json.dumps(records))

    def on_rank(rank: int) -> int:
        with ranks.started():
            run("two")
            return len(ranks.gather(rank))

    run("one")
    for end in on_ranks(2, on_rank):
        assert end.value == 2, end.error

    def of(where: str, name: str, steps: int) -> tuple[Prefix, torch.Tensor, list[dict[str, Any]]]:
        folder = tmp_path / f"{where} {name} {steps}"
        found, error = (read(problems[name][0], folder, "") for read in (stored_match, stored_error))
        assert found is not None and error is not None
        return found, error, json.loads((folder / "records.json").read_text())

    for name in kinds:
        for steps, tolerance in ((0, 1e-5), (30, 1e-4)):
            if name == "two layers":  # one for each rank, with all rows
                tolerance = 1e-6 if steps else 0.0
            (one, error, records), (two, error_two, records_two) = (of(where, name, steps) for where in ("one", "two"))
            torch.testing.assert_close(error_two, error, rtol=1e-3, atol=1e-6)
            for pair, pair_two in zip(one.layers, two.layers, strict=True):
                for tensor, other in zip(pair, pair_two, strict=True):
                    assert (tensor - other).norm() <= tolerance * tensor.norm(), (name, steps)
            if name == "two layers":
                assert [record["first_layer"] for record in records_two] == [0] * steps + [1] * steps
                continue
            assert len(records_two) == len(records)
            for record, other in zip(records, records_two, strict=True):
                assert other["error"] == pytest.approx(record["error"], rel=1e-3)


def test_shares_cover_all_work_and_are_even() -> None:
    costs = [5, 1, 1, 9, 3, 3, 2, 8]
    found = shares(costs, 3)
    assert sorted(index for own in found for index in own) == list(range(len(costs)))
    assert max(sum(costs[i] for i in own) for own in found) == 11
    assert shares([1, 1], 4) == [[0], [1], [], []]
    assert shares([1, 1, 1, 1], 2, ["a", "b", "a", "b"]) == [[0, 2], [1, 3]]
    assert shares([1, 1, 1], 2, ["a", "a", "a"]) == [[0, 2], [1]]
