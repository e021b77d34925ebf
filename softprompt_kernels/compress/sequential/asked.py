"""The evaluated queries of a segment, with the answers and the last hidden states of the model that had read it.

They are kept until the last segment is read: the final prompt is then measured on the queries of all segments, against
the teacher of each. In a segment's folder: `asked.json`, and `asked.safetensors` with the states by set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.evaluate.distance import TokenDistances, measure_tokens
from softprompt_kernels.compress.report.table import SETS
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.queries import Query, write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teaching import Taught
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import Prefix

NAME = "asked"


@dataclass(frozen=True, eq=False)
class Asked:
    """What was asked about a segment, by set: "train" (a sample), "heldout" and "test".

    Args:
        queries: as they were asked.
        examples: the same with their answers.
        states: the teacher's hidden states, `[n, d]` for all n tokens of the answers of a set, on the CPU.
    """

    queries: dict[str, list[Query]]
    examples: dict[str, list[Example]]
    states: dict[str, Tensor]

    @classmethod
    def of(cls, taught: Taught, keep: Callable[[Query], bool]) -> Asked:
        """The evaluated queries that the teacher leaves, as far as they are to be kept. Sets without any are left out.

        Args:
            taught: what the teacher leaves.
            keep: says whether to keep a query.
        """
        queries, examples, states = {}, {}, {}
        for name, of_set in taught.queries.items():
            chosen = [index for index, query in enumerate(of_set) if keep(query)]
            if chosen:
                queries[name] = [of_set[index] for index in chosen]
                examples[name] = [taught.evaluated[name][index] for index in chosen]
                states[name] = torch.cat([taught.states[name][index].cpu() for index in chosen])
        return cls(queries, examples, states)

    def measure(
        self, model: PreTrainedModel, name: str, students: Mapping[str, Prefix | None], reporter: Reporter
    ) -> dict[str, TokenDistances]:
        """The distances of students from the teacher on one set; nothing if the set is empty.

        Args:
            model: prepared.
            name: of the set.
            students: by key, as in `measure_tokens`.
            reporter: receives the progress.
        """
        if name not in self.examples:
            return {}
        teacher = [self.states[name].to(model.device)]
        return measure_tokens(model, None, students, self.examples[name], reporter, dict(SETS)[name], teacher=teacher)

    def save(self, folder: Path) -> None:
        """Write both files; the states first."""
        temporary = folder / f"{NAME}.part"
        save_file(self.states, temporary)
        temporary.replace(folder / f"{NAME}.safetensors")
        record = {
            name: [[asdict(query), example.input_ids, example.output_ids] for query, example in zip(*pair, strict=True)]
            for name, pair in ((name, (self.queries[name], self.examples[name])) for name in self.queries)
        }
        write_text(folder / f"{NAME}.json", json.dumps(record))

    @classmethod
    def read(cls, folder: Path) -> Asked:
        """What `save` wrote.

        Raises:
            SoftPromptError: it cannot be read.
        """
        try:
            record = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
            queries, examples = {}, {}
            for name, of_set in record.items():
                queries[name] = [Query(**{**q, "references": tuple(q["references"])}) for q, _, _ in of_set]
                examples[name] = [Example(tuple(x), tuple(y)) for _, x, y in of_set]
            with safe_open(folder / f"{NAME}.safetensors", framework="pt") as file:
                states = {name: file.get_tensor(name) for name in queries}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise SoftPromptError(
                f"output: what was asked in {folder} cannot be read ({error}); delete {folder.parent} to read the text "
                "again from the start"
            ) from error
        return cls(queries, examples, states)


def delete_asked(folder: Path) -> None:
    """Delete both files."""
    for name in (f"{NAME}.json", f"{NAME}.safetensors"):
        (folder / name).unlink(missing_ok=True)
