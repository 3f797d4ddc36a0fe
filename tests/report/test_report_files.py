"""The plots as files next to the page, and the page in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ET

import pytest
from helpers.report_pages import HOSTILE, make_run
from rating.conftest import Chromium

from trl_rlaif.errors import RunError
from trl_rlaif.report.build import write_report
from trl_rlaif.report.drawing import COLOURS, Drawing
from trl_rlaif.report.figures import Figure
from trl_rlaif.report.files import named_plots, slug

SVG = "{http://www.w3.org/2000/svg}"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_plot_is_a_file_that_stands_alone(tmp_path, drawn):
    folder = make_run(tmp_path / "run", text=HOSTILE, category="</svg><script>")
    page = write_report(folder).read_text(encoding="utf-8")
    files = contents(folder / "report")
    names = {name.rpartition(".")[0] for name in files}
    assert page.count('class="plot"') == len(names) and len(files) == 2 * len(names)
    assert {"score", "score-versus-kl", "label-confidence"} <= names
    for name, content in files.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            continue
        root = ET.fromstring(content)
        assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title").text
        text = content.decode()
        assert "var(--" not in text and "currentColor" not in text, "there is no page that says what these are"
        assert "fill: #ffffff" in text, "a ground of its own"
        assert "DejaVu Sans" in text and not list(root.iter(f"{SVG}script"))
    assert 'href="report' not in page and 'src="' not in page


def test_series_have_the_pages_colours(tmp_path):
    style = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert all(f"--series-{number}: {colour};" in style for number, colour in enumerate(COLOURS, 1))


def test_same_folder_gives_same_files_and_stale_ones_go(tmp_path, drawn):
    folder = make_run(tmp_path / "run")
    page = write_report(folder).read_bytes()
    first = contents(folder / "report")
    (folder / "report" / "stale.svg").write_text("old")
    assert write_report(folder).read_bytes() == page
    assert contents(folder / "report") == first
    for name in ("labels", "metrics", "samples"):
        (folder / f"{name}.jsonl").unlink()
    write_report(folder)
    assert not (folder / "report").exists(), "nothing is left to draw"


def test_failed_plots_leave_the_old_ones(tmp_path, monkeypatch, drawn):
    folder = make_run(tmp_path / "run")
    write_report(folder)
    old = contents(folder / "report")

    def refuse(self, heading):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Drawing, "titled_png", refuse)
    with pytest.raises(RunError, match="No space left"):
        write_report(folder)
    assert contents(folder / "report") == old
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_names_are_unique_and_never_leave_the_folder():
    def figure(heading):
        return Figure(heading, Drawing("", b"", heading), "")

    page = {
        "sets": [{"name": "a/b", "figures": [figure("Reward")]}, {"name": "../..", "figures": [figure("Reward")]}],
        "more": [figure("Über  KL/../x"), figure("奖励"), figure("奖励"), figure("Reward!")],
        "none": None,
    }
    names = list(named_plots(page))
    assert names == ["a-b-reward", "reward", "uber-kl-x", "plot", "plot-2", "reward-2"]
    assert len(slug("x" * 500)) <= 60


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium"):
        pytest.skip("there is no chromium here")
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def test_a_browser_shows_it_from_disk_without_complaint(tmp_path, browser, drawn):
    folder = make_run(tmp_path / "run", text=HOSTILE, category=HOSTILE)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows[3]["trained"] = "needle"
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    address = write_report(folder).as_uri()
    for width, dark in ((390, True), (1280, False)):
        with browser.tab() as tab:
            features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            tab.call("Emulation.setEmulatedMedia", features=features)
            tab.call("Page.navigate", url=address)
            tab.wait("document.getElementById('sample-count')?.textContent")
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert tab.evaluate("performance.getEntriesByType('resource').length") == 0
            tab.evaluate(
                "(() => { const field = document.querySelector('[name=search]'); field.value = 'NEEDLE';"
                " field.dispatchEvent(new Event('input', {bubbles: true})); })()"
            )
            assert tab.text("sample-count") == "1 of 10 shown"
            assert not tab.complaints
