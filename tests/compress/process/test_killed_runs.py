"""A run that is killed again and again at random moments, and resumed each time, ends with the bits of an unbroken one.

Each life of the run is a child by `os.fork` of this process, which has imported everything and loaded the model. Its
length is drawn from a seed over the length of an unbroken run, and it ends by SIGKILL, SIGTERM or SIGINT. When a life
reaches the end, the next one starts a new run. `make kills` kills 20 times with each of three seeds.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import CompressConfig, Interrupted
from softprompt_kernels.compress.run import compress_one

Make = Callable[..., CompressConfig]
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

KILLS = int(os.environ.get("SOFTPROMPT_KILLS", "6"))
SEED = int(os.environ.get("SOFTPROMPT_KILL_SEED", "3"))
TEXTS = ("answers.md", "details.json", "queries.jsonl", "config.yaml")

pytestmark = [
    pytest.mark.usefixtures("no_plot", "default_signals", "one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]


def live(config: CompressConfig, loaded: Loaded, seconds: float | None = None, number: int = signal.SIGKILL) -> bool:
    """One life of a run, ended by a signal after so many seconds, or not; returns whether it reached the end."""
    child = os.fork()
    if not child:
        code = 1
        try:
            compress_one(config, loaded=loaded)
            code = 0
        except (KeyboardInterrupt, Interrupted):
            code = 3
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, number)  # also where it has ended: it is not waited for yet
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 3, -number), f"the run failed with {code}"
    return code == 0


def content(folder: Path) -> dict[str, Any]:
    """All results of a finished run, but for the seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = json.loads((folder / "evaluation.json").read_text())
    found: dict[str, Any] = {name: (folder / name).read_text() for name in TEXTS}
    found["config.yaml"] = found["config.yaml"].replace(folder.name, "")
    found["metrics"] = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    found["figures"] = {name: value for name, value in figures.items() if name not in ("seconds", "stages")}
    # Not the checkpoints before the newest: a signal saves at other steps.
    for path in map(
        folder.joinpath, ("checkpoint.safetensors", "best.safetensors", "prompt/adapter_model.safetensors")
    ):
        with safe_open(path, framework="pt") as file:
            found[path.name] = {name: file.get_tensor(name) for name in file.offset_keys()}
            found[f"{path.name} metadata"] = file.metadata()
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict) and any(isinstance(one, torch.Tensor) for one in value.values()):
            assert value.keys() == found[name].keys()
            assert all(torch.equal(value[key], found[name][key]) for key in value), name
        else:
            assert found[name] == value, name


def stage_of(folder: Path) -> str:
    """Where a killed run was."""
    try:
        stages = json.loads((folder / "stages.json").read_text())
    except OSError:
        return "before its first file"
    if (folder / "checkpoint.safetensors").exists() and "training" not in stages:
        return "training"
    return f"after {list(stages)[-1]}"


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(make_config: Make, loaded: Loaded) -> None:
    options = {"steps": 9, "rounds": 1, "evaluate_every": 2, "save_best": True, "patience": 3, "keep_checkpoints": 2}
    config = make_config(learning_rate=0.5, **options)  # so large that the best step is not the last

    def named(name: str) -> CompressConfig:
        return config.model_copy(update={"output": config.output.with_name(name)})

    draw, unbroken = random.Random(SEED), named("run-unbroken")
    assert live(named("run-warm"), loaded)  # the first run of a process is slower
    begin = time.perf_counter()
    assert live(unbroken, loaded)
    length = time.perf_counter() - begin
    expected = content(unbroken.output)
    assert expected["figures"]["training"]["saved_step"] < expected["figures"]["training"]["steps"]

    killed: Counter[str] = Counter()
    number = 0
    while killed.total() < KILLS or (config.output.with_name(f"run-{number}")).exists():
        run = named(f"run-{number}")
        seconds = draw.uniform(0, length) if killed.total() < KILLS else None
        if live(run, loaded, seconds, draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))):
            assert_same(content(run.output), expected)
            shutil.rmtree(run.output)
            number += 1
        else:
            killed[stage_of(run.output)] += 1
    print(f"{killed.total()} kills with seed {SEED} in {number} runs of {length:.2f} s:", dict(killed))
