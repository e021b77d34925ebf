"""The report in a headless Chromium, started once: no message on its console, no request to a network, marks in every
chart, the colours of the dark theme, tokens that show their figures, and no sideways scrolling at 390 pixels.

The page stands in two frames, of a desktop's and of a phone's width. The page around them looks into them and writes
what it finds into itself, and Chromium prints that.
"""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, compress
from softprompt_kernels.compress.evaluate.diagnosis import Diagnosis
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.report.html.page import report_page
from softprompt_kernels.compress.report.html.run_data import read_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
AROUND = """<!DOCTYPE html><body>
<iframe id="desktop" style="width: 1000px; height: 900px" srcdoc="{page}"></iframe>
<iframe id="phone" style="width: 390px; height: 900px" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
    const charts = {{}};
    for (const chart of page.querySelectorAll(".chart")) {{
      const dotted = chart.data.filter((trace) => trace.type === "bar" || /markers/.test(trace.mode));
      const boxes = (paths) => [...chart.querySelectorAll(paths)].map((path) => path.getBBox());
      const values = (trace) => (trace.orientation === "h" ? trace.x : trace.y).filter((value) => value !== null);
      charts[chart.id] = {{
        traces: chart.data.map((trace) => trace.type + " " + (trace.mode || "")),
        values: dotted.map((trace) => values(trace).length),
        lines: boxes(".scatterlayer path.js-line").filter((box) => box.width + box.height > 0).length,
        points: boxes(".scatterlayer path.point, .barlayer .point > path")
          .filter((box) => box.width * box.height > 0).length,
        images: chart.querySelectorAll(".hm image").length,
        width: chart.querySelector(".main-svg").getBoundingClientRect().width,
        colour: view.getComputedStyle(chart.querySelector(".xtick text")).fill,
      }};
    }}
    const answer = page.querySelector(".tokens"), first = answer.children[0], tip = page.getElementById("tip");
    first.click();
    const clicked = tip.textContent;
    answer.dispatchEvent(new view.KeyboardEvent("keydown", {{ key: "ArrowRight", bubbles: true }}));
    const moved = tip.textContent;
    const before = [...answer.children].map((span) => span.className.replace(" at", ""));
    const chosen = page.getElementById("student");
    chosen.value = "none";
    chosen.dispatchEvent(new view.Event("change"));
    found[frame.id] = {{
      charts, clicked, moved, before,
      after: [...answer.children].map((span) => span.className.replace(" at", "")),
      kl: [...answer.children].map((span) => span.dataset.kl),
      loaded: view.performance.getEntriesByType("resource").map((entry) => entry.name),
      wider: root.scrollWidth - root.clientWidth,
      text: view.getComputedStyle(page.body).color,
    }};
  }}
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}});
</script>"""


@pytest.fixture
def browser() -> str:
    """The command of a Chromium: $CHROMIUM, or one of the usual names."""
    named = os.environ.get("CHROMIUM")
    found = next(filter(None, map(shutil.which, [named] if named else NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: set CHROMIUM to its command, or install it")
    return found


def look(browser: str, folder: Path, page: str) -> tuple[dict[str, Any], str]:
    """What the page around the frames finds, and the log of the browser."""
    (folder / "around.html").write_text(AROUND.format(page=html.escape(page)), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--blink-settings=preferredColorScheme=0", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--dump-dom", (folder / "around.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    dumped = re.search(r"FOUND(.*)END", done.stdout, re.DOTALL)
    assert dumped is not None, done.stderr[-2000:]
    return json.loads(html.unescape(dumped.group(1))), done.stderr


def test_the_page_of_a_run_works_in_a_browser(
    browser: str, make_config: Callable[..., CompressConfig], test_file: Path, diagnosis: Diagnosis, no_plot: None
) -> None:
    config = make_config(test=test_file, selfstudy=4)
    compress(config)
    folder = RunFolder(config.output)
    folder.diagnosis.write_text(diagnosis.model_dump_json())
    run = read_run(folder.path)
    found, log = look(browser, config.output.parent, report_page(run))

    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    assert set(found) == {"desktop", "phone"}
    for frame, seen in found.items():
        assert seen["charts"].keys() == {
            *("stages", "matching", "training", "steps"),
            *("position", "family", "heads", "capacity", "rate"),
        }
        for key, chart in seen["charts"].items():
            lines = sum("lines" in trace for trace in chart["traces"])
            bars = sum(trace.startswith("bar") for trace in chart["traces"])
            maps = sum(trace.startswith("heatmap") for trace in chart["traces"])
            assert lines + bars + maps > 0
            assert (chart["lines"], chart["images"]) == (lines, maps), (frame, key)
            assert 0 not in chart["values"], (frame, key)
            assert chart["points"] == sum(chart["values"]), (frame, key)
            assert chart["colour"] == seen["text"], "the axes have the text's colour"
            assert 250 < chart["width"] <= (390 if frame == "phone" else 1000)
        assert seen["loaded"] == []
        assert seen["wider"] == 0, f"the page scrolls sideways in the {frame} frame"
        red, green, blue = map(int, re.findall(r"\d+", seen["text"])[:3])
        assert min(red, green, blue) > 200, "light text on a dark page"

        assert f"KL {float(seen['kl'][0].split()[-1]):.3f} nats with soft prompt" in seen["clicked"]
        assert f"KL {float(seen['kl'][1].split()[-1]):.3f} nats with soft prompt" in seen["moved"]
        for index, name in enumerate(("before", "after")):
            values = [float(kl.split()[1 - index]) for kl in seen["kl"]]  # students of the test set: none, prompt
            levels = [sum(value >= limit for limit in (0.05, 0.2, 0.5, 1, 2)) for value in values]
            assert [int(part[1]) for part in seen[name]] == levels
