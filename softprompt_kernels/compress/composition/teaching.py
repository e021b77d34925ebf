"""The teacher of a composition: for each query, the model behind the document that it asks about, and behind no other.

Behind the joined prompt all the other documents are distractors, and the teacher has not seen them. So the joined
prompt learns to find the right document and to leave the others alone. There are more reasons for this teacher, and
against one that reads all documents in one context: it needs no window for all of them; its answers are those that the
run of the document has already; a small model is led astray by texts that it should not read; and "alone" and "joined"
are measured against the same.

A query that does not say which document it means has no answer here: the general requests of self-study, and what is
asked of two documents in the same words. They are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from softprompt_kernels.compress.composition.documents import Document
from softprompt_kernels.compress.diagnose.collect import link
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.self_study import GENERAL
from softprompt_kernels.compress.teaching import Taught, Teaching
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import Prefix

KEPT = ("examples.json", "targets", "states")
"""What is taken over from the cache of a run, if it is there and fits."""


def unclear_queries(documents: Sequence[Document]) -> frozenset[str]:
    """The inputs that do not say which document they mean."""
    asked = [{query.input for of_set in document.inputs.sets.values() for query in of_set} for document in documents]
    counted = Counter(chain.from_iterable(asked))
    return frozenset(GENERAL) | {text for text, documents_asked in counted.items() if documents_asked > 1}


def check_queries(documents: Sequence[Document], unclear: Collection[str]) -> int:
    """The number of queries that are left out.

    Args:
        documents: of the composition.
        unclear: from `unclear_queries`.

    Raises:
        SoftPromptError: a document has no training or no held-out query left.
    """
    left_out = 0
    for document in documents:
        for name, queries in document.inputs.sets.items():
            kept = [query for query in queries if query.input not in unclear]
            left_out += len(queries) - len(kept)
            if not kept and name != "test":
                raise SoftPromptError(
                    f"runs: {document.source.folder.path} has no {'training' if name == 'train' else 'held-out'} query "
                    "that says which document it means: all are asked of another one too, or are general requests; "
                    "accepted are runs with queries of their own"
                )
    return left_out


def teach(
    document: Document,
    objective: Objective,
    steps: int,
    folder: RunFolder,
    context: Prefix,
    unclear: Collection[str],
    reporter: Reporter,
) -> Taught:
    """What the teacher behind one document leaves, without the queries that are unclear.

    Answers, targets and hidden states come from the cache of the document's run, as far as they are there. The rest is
    made now.

    Args:
        document: the document.
        objective, steps: of the training of the joined prompt.
        folder: what is made is stored here.
        context: the captured document.
        unclear: from `unclear_queries`.
        reporter: receives the progress.
    """
    take_over(document.source.folder, folder)
    settings = {"init": "first", "steps": steps, "loss_temperature": 1.0}
    own = document.inputs.config.model_copy(update=settings)
    inputs = replace(document.inputs, config=own, objective=objective)
    return _clear(Teaching(inputs, folder, context, reporter).teach(), document, unclear)


def take_over(run: RunFolder, folder: RunFolder) -> None:
    """Link what the teacher left in the cache of a run into another folder, unless that has been done."""
    if folder.cache.exists():
        return
    partial = folder.path.with_name(folder.path.name + ".partial")
    for name in ("", "targets", "states"):
        (partial / "cache" / name).mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        source = run.cache / name
        for file in [source] if source.is_file() else sorted(source.glob("*")):
            target = partial / "cache" / file.relative_to(run.cache)
            target.unlink(missing_ok=True)
            link(file, target)
    partial.replace(folder.path)  # last: it says that all is there


def joined(parts: Sequence[Taught]) -> Taught:
    """What the teachers of all documents leave, document after document."""
    names = [name for name in ("train", "heldout", "test") if any(name in part.examples for part in parts)]

    def gathered(of_part: str) -> dict[str, list[Any]]:
        return {name: [one for part in parts for one in getattr(part, of_part).get(name, ())] for name in names}

    targets = parts[0].targets
    for part, before in zip(parts[1:], _counts(parts), strict=True):
        if targets is not None and part.targets is not None:
            targets = targets.joined(part.targets, before)
    return Taught(
        gathered("examples"), gathered("evaluated"), gathered("queries"), gathered("states"), targets, rows=None
    )


def _counts(parts: Sequence[Taught]) -> list[int]:
    """The number of training examples before each part but the first."""
    counts, total = [], 0
    for part in parts[:-1]:
        total += len(part.examples["train"])
        counts.append(total)
    return counts


def _clear(taught: Taught, document: Document, unclear: Collection[str]) -> Taught:
    """What is left of a document's queries. Those for training are renumbered."""
    sets = document.inputs.sets
    kept = {name: [i for i, query in enumerate(sets[name]) if query.input not in unclear] for name in sets}
    places = {name: [i for i, q in enumerate(taught.queries[name]) if q.input not in unclear] for name in sets}
    targets = taught.targets
    if targets is not None:
        targets = replace(targets, rows={new: targets.rows[old] for new, old in enumerate(kept["train"])})
    return Taught(
        {name: [taught.examples[name][i] for i in kept[name]] for name in sets},
        {name: [taught.evaluated[name][i] for i in places[name]] for name in sets},
        {name: [taught.queries[name][i] for i in places[name]] for name in sets},
        {name: [taught.states[name][i] for i in places[name]] for name in sets},
        targets,
        rows=None,
    )
