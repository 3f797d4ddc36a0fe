"""The page of a comparison, built from plain JSON: numbers in the right place, hostile text as text, gaps tolerated."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ET

import pytest
import yaml

from trl_rlaif.evaluation import all_against_all
from trl_rlaif.report.build import write_report

pytestmark = pytest.mark.usefixtures("drawn")

NAMES = ["start", "plain", "stable", "dpo"]
HOSTILE = "</script><script>alert(1)</script><b>bold</b>\x00"


def sample(set_, index, variant):
    return {
        "set": set_, "id": f"p{index}", "prompt": f"question {index} {HOSTILE}",
        "category": ("code", "chat")[index % 2],
        "start": f"start says {index}", "trained": f"{variant} says {index} {HOSTILE}",
    }  # fmt: skip


def compare_numbers(prompts=12):
    rng = random.Random(0)
    better = {"start": 0.3, "plain": 0.5, "stable": 0.7, "dpo": 0.45}
    p = {
        (a, b): [min(max(rng.gauss(0.5 + better[a] - better[b], 0.3), 0), 1) for _ in range(prompts)]
        for i, a in enumerate(NAMES)
        for b in NAMES[i + 1 :]
    }
    contestants = {
        name: {"tokens": {"mean": 20.5}, "ended": 0.75, "length_controlled": None if name == "start" else {
            "win_rate": 0.61, "interval": [0.5, 0.7]}} for name in NAMES
    }  # fmt: skip
    variants = {name: {"kl": 1.5, "reward_accuracy": 0.6, "seconds": 100.0} for name in NAMES[1:]}
    found = {"prompts": prompts, **all_against_all(NAMES, p), "contestants": contestants}
    return {"judge": "some/judge", "sets": {"test": found}, "variants": variants}


@pytest.fixture
def folder(tmp_path):
    recipe = {
        "run": {"name": "mine"},
        "model": {"path": "a/b"},
        "compare": [{"plain": {}}],
        "command": "trl-rlaif run x",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "results.json").write_text(json.dumps({"compare": compare_numbers()}))
    for variant in NAMES[1:]:
        (tmp_path / "variants" / variant).mkdir(parents=True)
        lines = [json.dumps(sample("test", index, variant)) + "\n" for index in range(12)]
        (tmp_path / "variants" / variant / "samples.jsonl").write_text("".join(lines))
    return tmp_path


def page(folder):
    return write_report(folder).read_text(encoding="utf-8")


def test_every_two_arms_stand_in_the_table(folder):
    text = page(folder)
    numbers = json.loads((folder / "results.json").read_text())["compare"]["sets"]["test"]
    for name in NAMES:
        shown = "initial policy" if name == "start" else name
        assert f'<th scope="row">{shown}</th>' in text
        for other, pair in numbers["pairs"][name].items():
            assert f"{100 * pair['win_rate']:.1f}%" in text, (name, other)
    assert "stable has the highest win rate" in text and 'href="variants/stable/report.html"' in text
    assert text.count("<article") == 12 and text.count("<h4>dpo</h4>") == 12
    assert "trl-rlaif run x" in text and "some/judge" in text


def test_hostile_text_stays_text(folder):
    text = page(folder)
    assert "alert(1)" in text and "<script>alert" not in text and "<b>bold" not in text and "\x00" not in text
    assert text.count("<script>") == 1


def test_its_plots_lie_beside_it(folder):
    page(folder)
    names = {path.stem for path in (folder / "report").iterdir()}
    assert names == {"win-rate-over-all-others", "win-rate-versus-kl"}
    for name in names:
        ET.fromstring((folder / "report" / f"{name}.svg").read_bytes())


@pytest.mark.parametrize("results", [{}, {"compare": 3}, {"compare": {"sets": {"test": {"overall": {"start": None}}}}}])
def test_what_is_missing_is_no_error(folder, results):
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "variants" / "dpo" / "samples.jsonl").write_text("[]\n{not json\n")
    assert "trl-rlaif comparison" in page(folder)


def test_an_arm_that_is_no_folder_name_is_not_followed(folder):
    numbers = compare_numbers()
    numbers["variants"]["../../etc"] = {"kl": 1.0}
    (folder / "results.json").write_text(json.dumps({"compare": numbers}))
    assert "../../etc" not in page(folder)
