"""Problems for the training loops, and their loss as plain transformers and F.kl_div compute it."""

import copy
import faulthandler
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

ROOT = Path(__file__).parents[2]
RANK_SECONDS = 150
LENGTHS = (9, 5, 12, 8, 14, 6, 11, 15)  # of the sequences: padding in every batch


class Problem(NamedTuple):
    """A frozen model, the ids `[1, C]` of a text, training sequences, and a copy of the model that stays as it is."""

    model: PreTrainedModel
    text: Tensor
    sequences: list[Tensor]
    plain: PreTrainedModel


def make_problem(model: PreTrainedModel, context: int, lengths: Sequence[int]) -> Problem:
    """The same in every process."""
    model = model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (context + sum(lengths),), generator=generator)
    return Problem(model, ids[None, :context], list(ids[context:].split(list(lengths))), copy.deepcopy(model))


def read_problem(folder: Path | str) -> Problem:
    """A tiny one."""
    return make_problem(AutoModelForCausalLM.from_pretrained(folder), 60, LENGTHS)


class PlainLoss:
    """`plain_loop.loss_sum` in plain transformers: F.kl_div of all logits, the prompt in a cache for each sequence.

    The teacher runs over text and sequence together, once. Its log-probabilities of all tokens are kept. As in the
    recipes, a step has no teacher to run.
    """

    def __init__(self, problem: Problem) -> None:
        self.model = problem.plain
        with torch.no_grad():
            runs = [(torch.cat((problem.text[0], ids)), len(ids)) for ids in problem.sequences]
            self.teacher = torch.cat([self.model(ids[None]).logits[0, -size:] for ids, size in runs]).log_softmax(-1)

    def __call__(self, _model: Any, prompt: Any, _moments: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, rows = batch
        real, cache, size = rows >= 0, DynamicCache(), len(ids)
        for layer, (key, value) in enumerate(zip(*prompt.stacked(), strict=True)):
            cache.update(key.expand(size, -1, -1, -1), value.expand(size, -1, -1, -1), layer)
        mask = torch.cat((real.new_ones(size, prompt.length), real), dim=1).long()
        student = self.model(ids, past_key_values=cache, attention_mask=mask).logits[real].float().log_softmax(-1)
        return F.kl_div(student, self.teacher[rows[real]], reduction="sum", log_target=True)


def start(script: Path, *arguments: object, ranks: int = 2) -> None:
    """Run a script on ranks of the CPU, at a port that the system chooses. It must call `end_if_stuck` first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def end_if_stuck() -> None:
    """Ends this rank after a time, with a traceback. torchrun then ends the others, and itself."""
    faulthandler.dump_traceback_later(RANK_SECONDS, exit=True)
