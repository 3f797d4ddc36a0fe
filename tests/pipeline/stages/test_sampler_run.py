"""A pair sampler in the sample stage, on a tiny model: its pairs, resuming after a kill, and redoing the stage."""

from __future__ import annotations

import json

import pytest
from helpers.recipes import fingerprints, run_cli, tiny_recipe, write_recipe
from markupsafe import escape

from trl_rlaif import UserError
from trl_rlaif.data import load_finetuning
from trl_rlaif.files import read_lines
from trl_rlaif.generation import sample_responses
from trl_rlaif.pipeline import pair_sampling
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work import sample as work
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.report.build import write_report
from trl_rlaif.report.formatting import clean

ONLY = dict.fromkeys(("label", "reward", "rl", "evaluate", "report"))
PRINCIPLES = [
    {"name": "short", "critique": "is it over?", "revision": "the quick fox"},
    {"name": "polite", "critique": "is it lazy?", "revision": "please judge"},
]


@pytest.fixture
def revised(tiny_model, tmp_path):
    """A function that runs the sample stage with the sampler revise, and returns the run folder."""
    (tmp_path / "principles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PRINCIPLES))

    def run(output="out", **sample):
        keys = {"sampler": {"revise": {"principles": "principles.jsonl"}}, "batch_size": 4, **sample}
        recipe = tiny_recipe(tmp_path, tiny_model, **ONLY, sample=keys)
        return run_recipe(recipe, installed_plugins(), tmp_path / output, resume=True)

    return run


def files(folder):
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in ("pairs", "revisions")}


def test_pairs_are_responses_with_their_revisions(revised):
    folder = revised()
    pairs, numbers = read_lines(folder / "pairs.jsonl"), folder.results()["sample"]
    assert 5 < len(pairs) == numbers["pairs"] == numbers["revisions"] == 10 - sum(numbers["dropped"].values())
    assert {pair["principle"] for pair in pairs} == {"short", "polite"} and all(pair["critique"] for pair in pairs)
    assert all(pair["response_1"] != pair["response_2"] and pair["human"] is None for pair in pairs)
    assert {pair["category"] for pair in pairs} == {"a", "b"}
    assert 0 <= numbers["ended"] <= 1
    rows = load_finetuning(folder / "revisions.jsonl")
    assert [row["completion"] for row in rows] == [[{"role": "assistant", "content": p["response_2"]}] for p in pairs]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": pair["prompt"]}] for pair in pairs]


def test_the_model_is_asked_in_one_conversation(revised, monkeypatch):
    asked = []

    def watch(model, tokenizer, prompts, **settings):
        asked.append([tokenizer.decode(ids) for ids in prompts])
        return sample_responses(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(pair_sampling, "sample_responses", watch)
    pair = read_lines(revised() / "pairs.jsonl")[0]
    principle = next(of for of in PRINCIPLES if of["name"] == pair["principle"])
    said = [pair["prompt"], pair["response_1"], principle["critique"], pair["critique"], principle["revision"]]
    [whole] = [text for batch in asked for text in batch if pair["prompt"] in text and principle["revision"] in text]
    places = [whole.find(text) for text in said]
    assert -1 not in places and places == sorted(places)
    assert max(map(len, asked)) == 4 and sum(map(len, asked)) == 30


@pytest.mark.parametrize("written", [0, 1, 3])
def test_a_killed_run_ends_with_the_same_pairs(revised, monkeypatch, written):
    """Killed in the second batch, with some of its rows already stored."""
    expected, append, batches = files(revised("whole")), work.append_lines, []

    def killed(path, rows):
        batches.append(rows)
        append(path, rows if len(batches) == 1 else rows[:written])
        if len(batches) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "append_lines", killed)
        with pytest.raises(KeyboardInterrupt):
            revised("killed")
    assert files(revised("killed")) == expected


def test_the_report_shows_pairs_with_their_critiques(revised):
    folder = revised()
    write_report(folder.path)
    page, numbers = (folder / "report.html").read_text(), folder.results()["sample"]
    assert "Pairs made by revise" in page and f"<dt>pairs</dt><dd>{numbers['pairs']}</dd>" in page
    assert page.count("<h4>principle</h4>") == page.count("<h4>critique</h4>") == numbers["pairs"]
    for pair in read_lines(folder / "pairs.jsonl"):
        assert str(escape(clean(pair["critique"]))) in page and f'dir="auto">{pair["principle"]}<' in page


def test_another_seed_makes_other_pairs(revised):
    assert files(revised("one")) != files(revised("other", seed=3))


def test_changed_principles_redo_the_stage_and_moved_ones_do_not(tiny_model, tmp_path):
    def fingerprint(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        sampler = {"revise": {"principles": name}}
        return fingerprints(tiny_recipe(tmp_path, tiny_model, **ONLY, sample={"sampler": sampler}))["sample"]

    first = fingerprint("principles.jsonl", PRINCIPLES)
    assert fingerprint("moved.jsonl", PRINCIPLES) == first
    assert fingerprint("principles.jsonl", PRINCIPLES[:1]) != first
    assert fingerprints(tiny_recipe(tmp_path, tiny_model, **ONLY))["sample"] != first


def test_where_no_prompt_gives_a_pair_the_reasons_are_told(revised, monkeypatch):
    monkeypatch.setattr(pair_sampling, "sample_responses", lambda model, tokenizer, tokens, **_: [[[]]] * len(tokens))
    with pytest.raises(UserError, match=r"'revise' made no pair \(10 empty response\)"):
        revised()


def test_check_tells_the_lines_of_wrong_principles(tiny_model, tmp_path, monkeypatch, capsys):
    rows = [PRINCIPLES[0], {"name": "short", "critique": " "}, {**PRINCIPLES[1], "weight": 2}]
    (tmp_path / "principles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampler = {"revise": {"principles": "principles.jsonl"}}
    recipe = write_recipe(tmp_path, tiny_model, **ONLY, sample={"sampler": sampler})
    code, said = run_cli(monkeypatch, capsys, "check", recipe)
    assert code == 2
    place = tmp_path / "principles.jsonl"
    assert f"{place}:2: The column 'critique' does not fit" in said
    assert f"{place}:2: The column 'revision' is missing. Columns: name, critique, revision." in said
    assert f"{place}:3: The column 'weight' is not known." in said
