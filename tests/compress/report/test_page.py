"""The report as HTML, without a browser: what it says, what it escapes, what it does without, and what it refuses."""

import json
import re
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from softprompt_kernels.compress.evaluate.details import Details
from softprompt_kernels.compress.evaluate.diagnosis import Diagnosis
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.report.html import page as module
from softprompt_kernels.compress.report.html.answers import LEVELS, answer_set
from softprompt_kernels.compress.report.html.chart import ROLES, Chart, log_axis, new_figure
from softprompt_kernels.compress.report.html.page import report_page, save_report
from softprompt_kernels.compress.report.html.run_data import read_run
from softprompt_kernels.errors import SoftPromptError

MakeRun = Callable[..., RunFolder]


class Page(HTMLParser):
    """The text, the open tags and the attributes of a page, without its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.addresses: list[str | None] = []
        self.ids: list[str | None] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.text += data


@pytest.fixture(autouse=True)
def _small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is tested in a browser; here it would only be parsed."""
    monkeypatch.setattr(module, "get_plotlyjs", lambda: "/* plotly */")


def page_of(folder: RunFolder) -> tuple[str, Page]:
    html = report_page(read_run(folder.path))
    return html, Page(html)


def chart_keys(html: str) -> list[str]:
    keys = re.findall(r'class="chart" id="(\w+)"', html)
    assert keys == [key.removesuffix("-data") for key in re.findall(r'json" id="([\w-]+)"', html)]
    return keys


def test_everything_is_there(make_run: MakeRun, diagnosis: Diagnosis) -> None:
    html, page = page_of(make_run(diagnosis=diagnosis))
    assert chart_keys(html) == [
        *("stages", "matching", "training", "steps"),
        *("position", "family", "heads", "capacity", "rate"),
    ]
    for sentence in (
        "8 tokens stand in for the 80 of mill.txt. They recover 80% on held-out queries and 80% on test queries",
        "1 min 15 s",
        "The prompt is <short>.",
        "--tokens 16",
        "Who & <i>why</i>?",
        "a <fast> one",
        "# <note>",
        "c" * 64,
        "model weights float16",
        "softprompt compress --config",
        "most in layer 1, head 0: 0.4",
    ):
        assert sentence in page.text, sentence
    assert "untrained strided KV" in page.text
    assert "softprompt diagnose" not in page.text


def test_nothing_is_loaded_and_nothing_given_becomes_markup(make_run: MakeRun, diagnosis: Diagnosis) -> None:
    html, page = page_of(make_run(diagnosis=diagnosis))
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"i", "b", "short", "fast", "note", "img", "link", "iframe"} & set(page.tags)
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html)
    assert page.tags.count("h1") == 1
    assert page.tags.count("figcaption") == html.count('role="img" aria-label=') == len(chart_keys(html))


def test_a_chart_cannot_end_its_script() -> None:
    chart = Chart("key", "title", "summary", new_figure("</script><script>alert(1)</script>", "<!--"))
    assert "<" not in chart.data
    assert json.loads(chart.data)["layout"]["yaxis"]["title"]["text"] == "<!--"


def test_a_family_is_not_markup_for_plotly(make_run: MakeRun, details: Details) -> None:
    family = "</script><script>alert(1)</script>"
    bad = details.sets["heldout"][0].model_copy(update={"family": family})
    html, _ = page_of(make_run(details=details.model_copy(update={"sets": {"heldout": (bad,)}})))
    assert "alert(1)</script>" not in html
    data = re.search(r'id="family-data">(.*?)</script>', html)
    assert data is not None
    figure = json.loads(data.group(1))
    assert figure["data"][0]["x"][0] == f"held-out<br>{escape(family)}", "Plotly makes no link of it"
    assert figure["layout"]["xaxis"]["ticktext"] == [f"held-out<br>{escape(family[:13])}…"]


def test_every_trace_has_a_colour_of_the_theme(make_run: MakeRun, diagnosis: Diagnosis) -> None:
    html, _ = page_of(make_run(diagnosis=diagnosis))
    for text in re.findall(r'-data">(.*?)</script>', html):
        for trace in json.loads(text)["data"]:
            assert trace["type"] == "heatmap" or trace["meta"]["role"] in ROLES
    for role in ROLES:
        assert html.count(f"--chart-{role}: #") == 3, "light, dark and print"


def test_without_a_diagnosis_the_page_says_how_to_get_one(make_run: MakeRun) -> None:
    html, page = page_of(make_run())
    assert "capacity" not in chart_keys(html)
    assert "softprompt diagnose " in page.text
    assert "softprompt report " in page.text


def test_a_run_without_matching_and_training_has_no_charts_of_them(make_run: MakeRun, details: Details) -> None:
    html, _ = page_of(make_run(details=details.model_copy(update={"match_error": None}), steps=0))
    assert chart_keys(html) == ["stages", "position", "family"]


def test_tokens_are_coloured_by_their_kl(details: Details) -> None:
    shown = answer_set("held-out", details.sets["heldout"]).answers[0]
    assert [piece.text for piece in shown.pieces] == [
        "The",
        " mill",
        " is",
        "猫",
        ".↵\n",
        "<b>\N{REPLACEMENT CHARACTER}",
        "<|im_end|>",
    ]
    kl = details.sets["heldout"][0].kl["prompt"]
    prompt = [piece.kl[-1] for piece in shown.pieces]
    assert prompt[3] == pytest.approx(kl[3] + kl[4], abs=1e-3), "a character has the KL of all its tokens"
    assert sum(prompt) == pytest.approx(sum(kl), abs=1e-2)
    assert [piece.level(4) for piece in shown.pieces] == [sum(value >= limit for limit in LEVELS) for value in prompt]
    assert {piece.level(4) for piece in shown.pieces} >= {2, 3, 4, 5}
    assert shown.pieces[3].agrees[-1] is False


def test_many_answers_are_cut(make_run: MakeRun, details: Details, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt_kernels.compress.report.html.answers.MOST_ANSWERS", 1)
    _, page = page_of(make_run())
    assert "The first 1 of 2." in page.text
    assert "Where?" not in page.text


def test_ticks_of_a_logarithmic_axis() -> None:
    assert log_axis([0.2, None, 3.0])["ticktext"] == ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50"]
    assert log_axis([0.2, 0.3]) == log_axis([0.0, float("inf")]) == {"type": "log"}


def test_a_report_replaces_the_one_before(make_run: MakeRun, diagnosis: Diagnosis) -> None:
    folder = make_run()
    save_report(read_run(folder.path), folder.report)
    assert "rate range" not in folder.report.read_text().lower()
    folder.diagnosis.write_text(diagnosis.model_dump_json())
    save_report(read_run(folder.path), folder.report)
    assert "rate range" in folder.report.read_text().lower()
    assert [path.name for path in folder.path.glob("*.partial")] == []


def test_runs_without_the_data_of_a_report_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match="is not a folder; accepted is the --output of"):
        read_run(tmp_path / "missing")
    with pytest.raises(SoftPromptError, match=r"is not the folder of a run"):
        read_run(tmp_path)
    folder = make_run(details=None)
    figures = folder.evaluation.read_text()
    for damaged in ("[1]", "{}", '{"heldout": 3}', figures.replace('"recovered": 0.8', '"recovered": "much"')):
        folder.evaluation.write_text(damaged)
        with pytest.raises(SoftPromptError, match=r"evaluation.json lacks figures of an evaluation"):
            read_run(folder.path)
    folder.evaluation.write_text(figures)
    with pytest.raises(SoftPromptError, match=r"no details.json, because an older version finished it. Delete .*eval"):
        read_run(folder.path)
    folder.details.write_text("{")
    with pytest.raises(SoftPromptError, match=r"details.json cannot be read"):
        read_run(folder.path)
    folder.evaluation.unlink()
    with pytest.raises(SoftPromptError, match="is not finished; run its `softprompt compress` again"):
        read_run(folder.path)
