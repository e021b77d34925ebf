"""The settings of a composition: the runs, and how the joined prompt is trained.

The training is that of `compress`, so its settings are fields of a `CompressConfig`. What the runs decide is taken from
the first of them, with which all others agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softprompt_kernels.compress.composition.documents import Source, sources_of
from softprompt_kernels.compress.composition.join import joined_tokens
from softprompt_kernels.compress.composition.options import DECIDING, DEFAULTS, OPTIONS
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.errors import SoftPromptError


@dataclass(frozen=True, eq=False)
class Composition:
    """What is to be composed, checked as far as it can be without the model.

    Args:
        sources: the runs, in the order of their prompts.
        config: of the training of the joined prompt. Its context is that of the first run.
    """

    sources: tuple[Source, ...]
    config: CompressConfig

    @property
    def kept(self) -> list[int]:
        """How many tokens of the joined prompt come from each run."""
        return joined_tokens([source.tokens for source in self.sources], [source.frozen for source in self.sources])

    def to_yaml(self) -> str:
        """The settings as YAML, for people to read."""
        chosen = {name: getattr(self.config, name) for name in OPTIONS}
        runs = [str(source.folder.path) for source in self.sources]
        return yaml.safe_dump(
            {"runs": runs, "output": str(self.config.output), **chosen}, sort_keys=False, allow_unicode=True
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, JSON-able. Runs count by their content, wherever they lie."""
        deciding = {name: getattr(self.config, name) for name in DECIDING}
        return {"runs": [source.digest for source in self.sources], **deciding}


def composition_of(runs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> Composition:
    """The composition of these runs, with the options that are given.

    Args:
        runs: as in `sources_of`.
        output: folder of the composition.
        options: by the names in `OPTIONS`.

    Raises:
        SoftPromptError: a run cannot be composed, or an option is unknown or out of range.
    """
    if unknown := next((name for name in options if name not in OPTIONS), None):
        raise SoftPromptError(f"{unknown}: unknown, accepted are {', '.join(OPTIONS)}")
    sources = sources_of(runs, device=options.get("device"))
    first = sources[0]
    values = first.config.model_dump(
        include={"model", "context", "template_arguments", "dtype", "device", "kind", "sample_batch"}
    )
    values["sample_temperature"] = first.config.sample_temperature
    values["new_tokens"] = max(source.config.new_tokens for source in sources)  # answers of all of them have to fit
    tokens = sum(joined_tokens([source.tokens for source in sources], [source.frozen for source in sources]))
    init = "matched" if first.config.kind == "kv" else "strided"  # it decides the default of the learning rate
    given = {"output": output, "tokens": tokens, "init": init, "frozen_tokens": min(first.frozen, tokens - 1)}
    return Composition(sources, load_config(None, {**values, **given, **DEFAULTS, **options}))
