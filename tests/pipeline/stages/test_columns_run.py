"""A judge prompt with a column of the data: every stage that asks a judge shows each row's own value."""

from __future__ import annotations

import json

import pytest
from helpers.judges import PARTS
from helpers.recipes import tiny_recipe, write_prompt_folder

from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.files import read_lines
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins


@pytest.fixture
def asked(monkeypatch):
    """The prompt and reference of every comparison."""
    found, compare = [], JudgePrompt.compare

    def recorded(self, prompt, *responses, columns=None, **options):
        found.append((prompt_key(prompt), (columns or {}).get("reference")))
        return compare(self, prompt, *responses, columns=columns, **options)

    monkeypatch.setattr(JudgePrompt, "compare", recorded)
    return found


def with_references(path, changed=()):
    """Give every row of a file its own reference; returns the references by prompt."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["reference"] = f"a city {i}{'!' if i in changed else ''}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {prompt_key(row["prompt"]): row["reference"] for row in rows}


def test_every_stage_shows_each_row_its_own(tiny_model, tmp_path, asked):
    write_prompt_folder(tmp_path / "prompt")
    template = tmp_path / "prompt" / "sample.jinja"
    template.write_text("Reference:\n{{ reference }}\n\n" + PARTS["sample.jinja"])
    sections = {"label": {"prompt": "prompt"}, "evaluate": {"track_every": 4, "judges": {"again": {"judge": "same"}}}}

    def run(changed=(), resume=False):
        recipe = tiny_recipe(tmp_path, tiny_model, **sections)
        shown = [with_references(tmp_path / "train.jsonl", changed), with_references(tmp_path / "test.jsonl")]
        asked.clear()
        folder = run_recipe(recipe, installed_plugins(), tmp_path / "out", resume=resume, confirm=lambda message: True)
        assert all({key for key, _ in asked} & of.keys() for of in shown)
        assert {(shown[0] | shown[1])[key] == reference for key, reference in asked} == {True}
        return folder

    folder = run()
    results = json.loads((folder / "results.json").read_text())
    assert results["label"]["columns"] == ["reference"]
    assert results["label"]["made"] == len(read_lines(folder / "pairs.jsonl"))
    assert f"{results['label']['labeled']} labels" in (folder / "report.html").read_text()
    assert None not in [row["p_trained_by"]["again"] for row in read_lines(folder / "samples.jsonl")]
    # With two references changed, two labels are made again.
    results = json.loads((run(changed=(2, 5), resume=True) / "results.json").read_text())
    assert results["label"]["made"] == 2
