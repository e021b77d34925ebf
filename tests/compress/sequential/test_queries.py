"""Which segment a query belongs to, and what is held out and asked again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softprompt_kernels.compress import CompressConfig
from softprompt_kernels.compress.sequential.queries import Nearest, queries_by_segment
from softprompt_kernels.compress.sequential.replay import choose
from softprompt_kernels.compress.sequential.segments import Segment
from softprompt_kernels.errors import SoftPromptError

TEXT = "The mill grinds rye.\n\nThe baker sells bread.\n\nThe mill was sold in May."


@pytest.fixture
def segments() -> list[Segment]:
    """Three segments, each in two pieces. The ids of a piece are the number of its segment and its own."""
    found = []
    for number, text in enumerate(TEXT.split("\n\n"), 1):
        halves = (text[: text.rindex(" ")], text[text.rindex(" ") :])
        pieces = tuple(((number, piece), half) for piece, half in enumerate(halves))
        found.append(Segment(number, torch.tensor([[number]]), text, pieces))
    return found


def config(tmp_path: Path, **options: object) -> CompressConfig:
    required = {"model": "m", "context": tmp_path / "c.txt", "output": tmp_path / "run", "tokens": 4}
    return CompressConfig.model_validate({**required, "segment_tokens": 95, **options})


def write(path: Path, *inputs: str) -> Path:
    path.write_text("".join(f'{{"input": "{each}"}}\n' for each in inputs))
    return path


@pytest.mark.parametrize(
    ("query", "index"), [("What grinds the mill?", 0), ("Bread?", 1), ("SOLD when", 2), ("The mill", 2), ("Why?", 2)]
)
def test_a_query_belongs_to_the_last_segment_with_its_rarest_words(query: str, index: int) -> None:
    assert Nearest(TEXT.split("\n\n"))(query) == index


def test_files_are_divided_and_self_study_asks_about_each_segment(segments: list[Segment], tmp_path: Path) -> None:
    files = {
        "queries": write(tmp_path / "q.jsonl", "Who sells bread?", "Is rye ground?", "Sold when?"),
        "heldout": write(tmp_path / "h.jsonl", "Which baker?", "Sold when?"),
        "test": write(tmp_path / "t.jsonl", "In May?"),
    }
    found = queries_by_segment(config(tmp_path, **files, selfstudy=3), segments)
    assert [[q.input for q in own.heldout] for own in found] == [[], ["Which baker?"], ["Sold when?"]]
    assert [[q.input for q in own.test] for own in found] == [[], [], ["In May?"]]
    given = [[q.input for q in own.train if q.family is None] for own in found]
    assert given == [["Is rye ground?"], ["Who sells bread?"], []]
    assert [sum(q.family in ("general", "phrase", "sentence") for q in own.train) for own in found] == [3, 3, 3]


def test_no_held_out_input_is_trained_on_and_only_the_last_segment_holds_out_general_requests(
    segments: list[Segment], tmp_path: Path
) -> None:
    found = queries_by_segment(config(tmp_path, selfstudy=30, heldout_share=0.4), segments)
    held = {query.input for own in found for query in own.heldout}
    assert not held & {query.input for own in found for query in own.train}
    assert [any(q.family == "general" for q in own.heldout) for own in found] == [False, False, True]


def test_a_general_request_of_a_file_belongs_to_the_last_segment(segments: list[Segment], tmp_path: Path) -> None:
    segments[0] = replace(segments[0], text="How does the mill work?")
    heldout = write(tmp_path / "h.jsonl", "How does it work?")
    found = queries_by_segment(config(tmp_path, heldout=heldout, selfstudy=8), segments)
    assert [[q.input for q in own.heldout] for own in found] == [[], [], ["How does it work?"]]


def test_the_family_of_a_query_from_a_file_means_nothing(segments: list[Segment], tmp_path: Path) -> None:
    queries = write(tmp_path / "q.jsonl", "Is rye ground?", "Who sells bread?", "Sold when?")
    queries.write_text(queries.read_text().replace("}", ', "family": "general"}'))
    found = queries_by_segment(
        config(tmp_path, queries=queries, heldout=write(tmp_path / "h", "?"), selfstudy=0), segments
    )
    assert [[q.input for q in own.train if q.lead] for own in found] == [["Who sells bread?"], ["Sold when?"], []]


def test_the_next_segment_is_asked_about_behind_the_nearest_piece_of_it(
    segments: list[Segment], tmp_path: Path
) -> None:
    queries = write(tmp_path / "q.jsonl", "Who sells bread?", "Is rye ground?", "Sold when?", "In May?", "The rye?")
    found = queries_by_segment(config(tmp_path, queries=queries, selfstudy=0, heldout_share=0.2), segments)
    ahead = [[q for q in own.train if q.lead] for own in found]
    assert [[q.input for q in own] for own in ahead][:1] == [["Who sells bread?"]] and not ahead[2]
    assert ahead[0][0].lead == (2, 1), "the second piece has the bread"


def test_a_segment_that_nothing_asks_about_is_refused(segments: list[Segment], tmp_path: Path) -> None:
    queries = write(tmp_path / "q.jsonl", "Who sells bread?", "Is rye ground?")
    heldout = write(tmp_path / "h.jsonl", "Sold when?")
    with pytest.raises(SoftPromptError, match="none is about segment 3 of 3"):
        queries_by_segment(config(tmp_path, queries=queries, heldout=heldout, selfstudy=0), segments)


def test_what_is_asked_again_is_of_all_segments_equally() -> None:
    segments = [1] * 50 + [2] * 3 + [3] * 20
    chosen = choose(segments, 15, seed=1)
    counts = [sum(segments[index] == number for index in chosen) for number in (1, 2, 3)]
    assert counts == [6, 3, 6] and chosen == sorted(set(chosen))
    assert choose(segments, 100, 1) == list(range(73)) and choose(segments, 0, 1) == []
    assert len(choose(segments, 2, 1)) == 2
    assert choose(segments, 15, 1) == chosen != choose(segments, 15, 2)
