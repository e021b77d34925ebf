"""The diagnosis of a run: what limits the prompt, with the evidence, what to change, and what that may give.

    load → cheap evidence → (matched prompts of other lengths → rate range test) → findings → diagnosis.json

What is in brackets takes most of the time. It is left out where the cheap evidence tells the cause: the figures mean
nothing, or the prompt is good. A run without training has no rate to test.
"""

from __future__ import annotations

import time
from pathlib import Path

from softprompt_kernels.compress.diagnose.causes.data import families
from softprompt_kernels.compress.diagnose.collect import Collector, load_run, scratch_folder
from softprompt_kernels.compress.diagnose.decide import findings, is_good, meaningless_figures
from softprompt_kernels.compress.diagnose.evidence import Evidence, recovered
from softprompt_kernels.compress.evaluate.diagnosis import CapacityPoint, Diagnosis
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.process.lock import check_unlocked, locked
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.queries import write_text


@own_torch_modes()
def diagnose_run(path: Path, reporter: Reporter | None = None, *, full: bool = False) -> Diagnosis:
    """Find what limits the prompt of a finished run, and write it to diagnosis.json in its folder.

    A run that was refused because the context does not matter is diagnosed too. Nothing else in the folder changes.
    Relative paths in the configuration of the run start at the current folder.

    Args:
        path: the folder of the run.
        reporter: receives the progress; None reports nothing.
        full: match prompts of other lengths, and test the learning rate, also where the rest tells the cause.

    Raises:
        SoftPromptError: the folder holds no run, or one that is not finished or in use, or what the run was made from
            has moved or is another one now.
    """
    begin, reporter, folder = time.perf_counter(), reporter or SilentReporter(), RunFolder(Path(path))
    if folder.path.is_dir():
        check_unlocked(folder.path)
    inputs = load_run(folder)
    with locked(folder.path), scratch_folder(folder) as scratch:
        collector = Collector(inputs, folder, scratch, reporter)
        evidence = collector.cheap()
        if not evidence.refused and (full or not (meaningless_figures(evidence) or is_good(evidence))):
            evidence = collector.with_matching_and_rates(evidence)
        found = diagnosis(evidence, time.perf_counter() - begin)
        write_text(folder.diagnosis, found.model_dump_json(indent=1) + "\n")
    return found


def diagnosis(evidence: Evidence, seconds: float) -> Diagnosis:
    """The diagnosis that the evidence gives.

    Args:
        evidence: of a run.
        seconds: that collecting it took.
    """
    refused = evidence.refused
    return Diagnosis(
        findings=findings(evidence),
        heldout_recovered=None if refused else evidence.recovered,
        train_recovered=None if refused else evidence.train_recovered,
        capacity=tuple(
            CapacityPoint(
                tokens=one.tokens,
                heldout=recovered(evidence.heldout, one.heldout),
                train=recovered(evidence.train, one.train),
                seconds=one.seconds,
            )
            for one in evidence.matched
        ),
        prompt_tokens=evidence.config.tokens,
        rate_test=evidence.rate_test,
        families=() if refused else families(evidence),
        seconds=seconds,
    )
