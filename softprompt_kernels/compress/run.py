"""A compression from beginning to end, and the evaluation of a prompt that exists.

    set up → claim the folder → context's prefix → teacher's answers → baselines → teacher's targets → train → evaluate

Each part is kept in the run's folder as soon as it is there, so the same call goes on after an interruption.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.distill.trainer import Schedule, StepReport, Trainer
from softprompt_kernels.compress.evaluate.distance import check_context_matters, distance, measure, summary
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.initial_prompt import baselines, cut, initial_prompt, nothing, start_row
from softprompt_kernels.compress.inputs import Setup, check_fits, identity, read_text, set_up, sha256
from softprompt_kernels.compress.report.curves import save_curves
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import load_model
from softprompt_kernels.compress.sources.queries import Query, load_queries, save_queries, write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer, hidden_states
from softprompt_kernels.compress.teacher.moments_cache import Targets, cached_targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, head_of, prefix_of
from softprompt_kernels.prompts import Prefix, check_destination, load, save
from softprompt_kernels.prompts.fingerprint import model_fingerprint

CAPTURE_TOKENS = 1024
"""Tokens of a context that go through the model at once."""


class Interrupted(Exception):
    """Training was stopped by the user; its state is saved, and the same call goes on from there."""

    def __init__(self, step: int, steps: int, output: Path) -> None:
        super().__init__(f"Stopped at step {step} of {steps}; saved in {output}")
        self.step, self.steps, self.output = step, steps, output


def compress(config: CompressConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Compress a context into a soft prompt.

    Args:
        config: what, into what, how, where to.
        reporter: told of the progress; None: nobody.

    Returns:
        The content of evaluation.json. KL in nats per token.

    Raises:
        SoftPromptError: input that cannot be served, before any work or with the last good state kept.
        Interrupted: Ctrl-C during training, after the state was saved.
    """
    begin = time.perf_counter()
    reporter = reporter or SilentReporter()
    setup = set_up(config)
    folder = RunFolder(config.output)
    folder.claim(identity(setup), config.to_yaml())
    finished = folder.read_evaluation()
    if finished is not None:
        reporter.message(f"{folder.path} holds this run, finished.")
        return finished
    check_destination(folder.prompt)
    context = capture(setup.model, setup.context_ids, CAPTURE_TOKENS)
    prompt = initial_prompt(setup, context)
    students = baselines(setup, context, prompt)
    train, heldout = _examples(setup, folder, context, reporter)
    sampled = random.Random(config.seed).sample(train, min(config.evaluation_sequences, len(train)))
    measured = {
        "train": measure(setup.model, context, students, sampled, reporter, "training"),
        "heldout": measure(setup.model, context, students, heldout, reporter, "held-out"),
    }
    for distances in measured.values():
        check_context_matters(distances["none"].kl)
    targets = _targets(setup, folder, context, train, reporter)
    trainer = Trainer(
        setup.model,
        prompt,
        train,
        targets,
        setup.objective,
        Schedule(config.steps, config.learning_rate, config.warmup_steps),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
    )
    before = _train(trainer, setup, folder, context, heldout, reporter)
    figures: dict[str, Any] = {
        "context_tokens": setup.context_tokens,
        "prompt_tokens": config.tokens,
        "ratio": setup.context_tokens / config.tokens,
        "start": start_row(config),
        "seconds": 0.0,
    }
    trained = prefix_of(setup.model, prompt).detach()
    for name, examples in (("train", sampled), ("heldout", heldout)):
        label = "training" if name == "train" else "held-out"
        measured[name] |= measure(setup.model, context, {"prompt": trained}, examples, reporter, label)
        figures[name] = summary(measured[name])
    figures["seconds"] = time.perf_counter() - begin + before
    save(
        folder.prompt,
        prompt,
        model=setup.model,
        tokenizer=setup.tokenizer,
        context={"sha256": sha256(setup.text), "tokens": setup.context_tokens},
        objective={"name": config.objective, "nll_weight": config.nll_weight, "steps": config.steps},
        figures=figures["heldout"],
    )
    save_curves(folder.metrics, figures, folder.curves)
    write_text(folder.evaluation, json.dumps(figures, indent=1) + "\n")
    return figures


def evaluate_prompt(
    model_name: str,
    context: Path,
    prompt_dir: Path,
    queries: Path,
    *,
    new_tokens: int = 48,
    sample_temperature: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """How far a saved prompt is from the full context on given queries.

    Args:
        model_name: folder or name of the model that the prompt was made for.
        context: the text that was compressed.
        prompt_dir: the saved prompt.
        queries: JSON lines; outputs that are missing are sampled from the teacher.
        new_tokens, sample_temperature, seed: of that sampling.
        dtype, device: as in `load_model`.
        reporter: told of the progress; None: nobody.

    Returns:
        `{"context_tokens", "prompt_tokens", "ratio", "queries": {...}}`, the last as a set of evaluation.json.

    Raises:
        SoftPromptError: input that cannot be served.
    """
    reporter = reporter or SilentReporter()
    text, asked = read_text(context, "context"), load_queries(queries)
    model, tokenizer = load_model(model_name, dtype, device)
    chat = ChatFormat(tokenizer)
    prompt, record = load(prompt_dir, model, tokenizer)
    made_from = (record or {}).get("context") or {}
    if made_from.get("sha256") not in (None, sha256(text)):
        reporter.message(f"The prompt in {prompt_dir} was made from another text than {context}.")
    ids = chat.context_ids(text).to(model.device)
    check_fits(model, chat, ids.shape[1], asked, new_tokens)
    prefix = capture(model, ids, CAPTURE_TOKENS)
    examples = answer(
        model,
        chat,
        prefix,
        asked,
        new_tokens=new_tokens,
        temperature=sample_temperature,
        batch_size=64,
        seed=seed,
        reporter=reporter,
    )
    students = {"none": nothing(model, chat), "prompt": prefix_of(model, prompt).detach()}
    if prompt.length < prefix.length:
        students["truncated"] = cut(model, prefix, prompt.length, "first")
        with suppress(SoftPromptError):
            students["untrained"] = cut(model, prefix, prompt.length, "strided")
    distances = measure(model, prefix, students, examples, reporter, "given")
    return {
        "context_tokens": prefix.length,
        "prompt_tokens": prompt.length,
        "ratio": prefix.length / prompt.length,
        "queries": summary(distances),
    }


def _examples(
    setup: Setup, folder: RunFolder, context: Prefix, reporter: Reporter
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: from the folder, or asked of the teacher and put there."""
    parts = {"train": setup.train, "heldout": setup.heldout}
    with suppress(OSError, ValueError):  # not there yet, or cut off by a crash: the teacher is asked again
        saved = json.loads(folder.examples.read_text(encoding="utf-8"))
        train, heldout = ([Example(tuple(x), tuple(y)) for x, y in saved[part]] for part in parts)
        return train, heldout
    config, examples = setup.config, {}
    for offset, (part, queries) in enumerate(parts.items()):
        examples[part] = answer(
            setup.model,
            setup.chat,
            context,
            queries,
            new_tokens=config.new_tokens,
            temperature=config.sample_temperature,
            batch_size=config.sample_batch,
            seed=config.seed + offset,
            reporter=reporter,
        )
    folder.cache.mkdir(exist_ok=True)
    save_queries(folder.queries, {part: _as_text(setup, parts[part], examples[part]) for part in parts})
    write_text(folder.examples, json.dumps({p: [(e.input_ids, e.output_ids) for e in examples[p]] for p in parts}))
    return examples["train"], examples["heldout"]


def _as_text(setup: Setup, queries: Sequence[Query], examples: Sequence[Example]) -> list[Query]:
    """What was asked and answered, for people to read."""
    decode = setup.tokenizer.decode
    return [
        Query(query.input, str(decode(list(example.output_ids), skip_special_tokens=True)))
        for query, example in zip(queries, examples, strict=True)
    ]


def _targets(
    setup: Setup, folder: RunFolder, context: Prefix, examples: Sequence[Example], reporter: Reporter
) -> Targets | None:
    form = setup.objective.form
    if form is None:
        return None
    return cached_targets(
        folder.cache,
        {
            "model": model_fingerprint(setup.model),
            "dtype": str(setup.model.dtype),
            "context": setup.context_ids.tolist(),
        },
        setup.model,
        setup.objective.head,
        context,
        examples,
        form=form,
        temperature=setup.config.loss_temperature,
        reporter=reporter,
    )


def _train(
    trainer: Trainer,
    setup: Setup,
    folder: RunFolder,
    context: Prefix,
    heldout: Sequence[Example],
    reporter: Reporter,
) -> float:
    """Train to the end, from the checkpoint if there is one; seconds that were spent on steps before this call."""
    config = setup.config
    key = sha256(json.dumps(identity(setup), sort_keys=True))
    if folder.checkpoint.exists():
        trainer.load(folder.checkpoint, key)
        reporter.message(f"Going on from step {trainer.step}.")
    before = folder.cut_metrics(trainer.step)
    head, teacher = head_of(setup.model), None
    if config.evaluate_every:
        teacher = hidden_states(setup.model, context, heldout, reporter, "Full context on held-out queries")

    with (
        folder.metrics.open("a", encoding="utf-8") as metrics,
        reporter.progress("Training", config.steps, "step") as advance,
    ):
        advance(trainer.step)

        def after_step(report: StepReport) -> None:
            record = asdict(report)
            if teacher is not None and report.step % config.evaluate_every == 0:
                prefix = prefix_of(setup.model, trainer.prompt).detach()
                student = hidden_states(setup.model, prefix, heldout, SilentReporter(), "")
                record["heldout_kl"] = distance(head, student, teacher).kl
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            figures = {"loss": report.loss}
            if "heldout_kl" in record:
                figures["heldout_kl"] = record["heldout_kl"]
            advance(1, **figures)
            if report.step % config.checkpoint_every == 0:
                trainer.save(folder.checkpoint, key)

        try:
            trainer.run(after_step)
        except KeyboardInterrupt:
            trainer.save(folder.checkpoint, key)
            raise Interrupted(trainer.saved, config.steps, folder.path) from None
    trainer.save(folder.checkpoint, key)
    return before
