"""Details of a run's evaluation, token by token: what details.json of a run's folder holds.

evaluation.json has means over a set of queries. A report and a diagnosis need what the means hide: which tokens, which
positions and which kinds of queries are far from the teacher, and which layers and heads were matched badly.

It takes about 10 bytes for each token and student. This module needs no torch: see `example_details.py` for the making.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from softprompt_kernels.compress.evaluate.record_file import read_record
from softprompt_kernels.compress.sources.queries import write_text

FORMAT = 1


class ExampleDetails(BaseModel):
    """One evaluated query with an answer of n tokens, which the teacher wrote or the file of queries gave.

    Args:
        query: the text of the query.
        family: the kind of query: "general", "phrase" or "sentence" of self-study; from a file the name that it gives,
            or "given".
        tokens: the n tokens of the answer as text, with the name of the token that ends it. Joined they are the answer.
            Of a character of several tokens, the last has it, and the others are empty.
        kl: for each student, by its key in evaluation.json, KL(teacher ‖ student) of each token, nats.
        agrees: for each student, whether its most likely token is the teacher's.
        entropy: the teacher's entropy at each token, nats.
        ended: whether the answer ended by itself, and not at the most tokens an answer may have. True if it was given.
        prompt_answer: the answer of the model with the soft prompt, as text; None for training queries.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    query: str
    family: str
    tokens: tuple[str, ...]
    kl: dict[str, tuple[float, ...]]
    agrees: dict[str, tuple[bool, ...]]
    entropy: tuple[float, ...]
    ended: bool
    prompt_answer: str | None = None

    @property
    def answer(self) -> str:
        """The text of the answer."""
        return "".join(self.tokens)


class Details(BaseModel):
    """The details of a run.

    Args:
        format: of the file; `FORMAT`.
        sets: the evaluated examples of each set: "train", "heldout" and "test".
        match_error: `[layers][query heads]`: mean squared error of what the attention gives with the matched prompt,
            before training, divided by the mean square of what it gives with the context. On rows that refinement held
            out, or on all rows if none were (see `matching.match.stored_error`). None without matching.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    format: int = FORMAT
    sets: dict[str, tuple[ExampleDetails, ...]]
    match_error: tuple[tuple[float, ...], ...] | None = None


def write_details(path: Path, details: Details) -> None:
    """Write details.json."""
    write_text(path, details.model_dump_json() + "\n")


def read_details(path: Path) -> Details:
    """The content of details.json.

    Raises:
        SoftPromptError: there is no such file, or it is broken or of another format.
    """
    return read_record(path, Details, FORMAT)
