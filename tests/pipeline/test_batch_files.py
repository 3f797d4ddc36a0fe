"""Labels from batch files: they contain the requests a server would get; answers are read as if it had sent them."""

from __future__ import annotations

import json

import pytest
from helpers.labeling import LABEL_ALONE, make_pairs
from helpers.recipes import run_cli, tiny_recipe, write_rows
from helpers.server import batch_answers, scripted_server

from trl_rlaif.errors import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.batch_files import describe, export_batch, import_batch
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins

PAIRS = [row | {"response_1": "good " * i + "fox"} for i, row in enumerate(make_pairs(6))]


@pytest.fixture(scope="module")
def server():
    with scripted_server() as one:
        yield one


@pytest.fixture(scope="module")
def plugins():
    return installed_plugins()


@pytest.fixture(autouse=True)
def unasked(server, only_local_servers):
    server.forget()


@pytest.fixture
def recipe(tiny_model, tmp_path, server):
    """A function that makes a recipe with given settings of its judge and keys of its label section."""
    write_rows(tmp_path / "pairs.jsonl", PAIRS)

    def recipe(judge=(), **label):
        judge = {"backend": "openai", "path": "scripted", "prefill": False, "base_url": server.base_url} | dict(judge)
        data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}
        return tiny_recipe(tmp_path, tiny_model, data=data, **LABEL_ALONE, label={"judge": judge, **label})

    return recipe


def labels(folder):
    return {row["id"]: row for row in read_lines(folder / "labels.jsonl")}


@pytest.mark.parametrize(
    ("judge", "label"),
    [
        ({}, {}),
        ({"prefill": True, "top_logprobs": 5, "extra_body": {"guided": "1"}}, {}),
        ({"api": "completions", "prefill": "auto"}, {}),
        ({"price": {"input": 2.0, "output": 7.0}}, {"labeler": "direct"}),
        ({}, {"criteria": {"polite": 1.0, "true": 2.0}}),
    ],
    ids=str,
)
def test_labels_are_those_of_the_server(recipe, plugins, server, tmp_path, judge, label):
    made = recipe(judge, **label)
    whole = run_recipe(made, plugins, tmp_path / "online")
    online = labels(whole)
    sent = [(r["path"], r["body"]) for r in server.requests]
    offline = run_recipe(made, plugins, tmp_path / "offline", only=["sample"])
    assert export_batch(made, plugins, offline.path, tmp_path / "ask.jsonl")[0] == len(PAIRS)
    lines = [json.loads(line) for line in (tmp_path / "ask.jsonl").read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    asked = {json.dumps((line["url"], line["body"]), sort_keys=True) for line in lines}
    assert len(asked) == len(lines) and asked == {json.dumps(one, sort_keys=True) for one in sent}
    write_rows(tmp_path / "answers.jsonl", batch_answers(server, tmp_path / "ask.jsonl"))
    server.forget()
    found = import_batch(made, plugins, offline.path, [tmp_path / "answers.jsonl"])
    assert (found.labeled, found.known, found.missing, found.foreign) == (len(PAIRS), 0, [], 0) and not found.failed
    assert labels(offline) == online and all(row["p"] is not None for row in online.values())
    assert import_batch(made, plugins, offline.path, [tmp_path / "answers.jsonl"]).tokens == 0  # counted once
    results = run_recipe(made, plugins, offline.path, resume=True).results()["label"]
    assert (results["labeled"], results["made"]) == (len(PAIRS), 0) and not server.requests
    used = results["usage"]
    assert (
        used == whole.results()["label"]["usage"] and found.tokens == used["input_tokens"] + used["output_tokens"] > 0
    )


def test_errors_and_missing_answers_are_counted_and_named(recipe, plugins, server, tmp_path):
    made, ask, told = recipe(), tmp_path / "ask.jsonl", tmp_path / "answers.jsonl"
    folder = run_recipe(made, plugins, tmp_path / "out", only=["sample"])
    assert export_batch(made, plugins, folder.path, ask) == (6, 12)
    ids = [json.loads(line)["custom_id"] for line in ask.read_text().splitlines()]  # two per pair, in order
    rows = {row["custom_id"]: row for row in batch_answers(server, ask)}
    whole = list(rows.values())
    failed = {"status_code": 400, "body": {"error": {"message": "the context is too long"}}}
    rows[ids[0]] = {"custom_id": ids[0], "response": failed, "error": None}
    rows[ids[2]] = {"custom_id": ids[2], "response": None, "error": {"code": "batch_expired", "message": "too late"}}
    del rows[ids[5]]
    strange = {"custom_id": "of-another-recipe", "response": rows[ids[3]]["response"], "note": "no line\u2028ends here"}
    told.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in [strange, *rows.values()]), "utf-8")
    found = import_batch(made, plugins, folder.path, [told])
    assert (found.labeled, found.known, found.missing, found.foreign) == (3, 0, ["p2"], 1)
    assert found.failed == {"400: the context is too long (batch)": 1, "too late (batch)": 1}
    text = describe(found)
    assert "Pairs labeled: 3 (by" in text and "not be judged: 1 (400: the context is too long" in text
    assert "Pairs that lack an answer: 1 (p2)." in text and "this recipe does not make: 1." in text
    assert labels(folder)["p0"]["p"] is None and "too long" in labels(folder)["p0"]["skipped"]

    before = (folder / "labels.jsonl").read_bytes()
    again = import_batch(made, plugins, folder.path, [told])
    assert (again.labeled, again.known, again.failed, again.tokens) == (0, 3, found.failed, 0) and found.tokens > 0
    assert (folder / "labels.jsonl").read_bytes() == before
    assert export_batch(made, plugins, folder.path, ask) == (3, 6)  # for the pairs that still lack a label
    assert {json.loads(line)["custom_id"] for line in ask.read_text().splitlines()} == set(ids[:4]) | set(ids[4:6])

    write_rows(told, whole[:4])  # in several files, with a good and a failed answer to one request
    write_rows(tmp_path / "more.jsonl", [rows[ids[0]], *whole[4:]])
    last = import_batch(made, plugins, folder.path, [told, tmp_path / "more.jsonl"])
    assert (last.labeled, last.known, last.missing) == (3, 3, []) and not last.failed
    assert all(row["p"] is not None for row in labels(folder).values())


def test_answers_to_other_settings_are_not_taken(recipe, plugins, server, tmp_path):
    ask, told = tmp_path / "ask.jsonl", tmp_path / "answers.jsonl"
    folder = run_recipe(recipe(), plugins, tmp_path / "out", only=["sample"])
    export_batch(recipe(), plugins, folder.path, ask)
    write_rows(told, batch_answers(server, ask))
    found = import_batch(recipe({"path": "another"}), plugins, folder.path, [told])
    assert (found.labeled, len(found.missing), found.foreign) == (0, 6, 12)
    assert not (folder / "labels.jsonl").exists()


@pytest.mark.parametrize(
    ("judge", "label", "said"),
    [
        ({"prefill": "auto"}, {}, "Set judge.prefill: false"),
        ({"votes": 3}, {}, "Set judge.votes: 0"),
        ({}, {"labeler": {"distilled": {"thinking": True}}}, "Set thinking: false"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_at_once_is_refused(recipe, plugins, tmp_path, judge, label, said):
    with pytest.raises(UserError, match=said):
        export_batch(recipe(judge, **label), plugins, tmp_path / "out", tmp_path / "ask.jsonl")


def test_a_run_without_pairs_and_a_broken_line_are_named(recipe, plugins, tmp_path):
    with pytest.raises(UserError, match="no pairs yet.*--only sample"):
        export_batch(recipe(), plugins, tmp_path / "out", tmp_path / "ask.jsonl")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="There is no folder"):
        export_batch(recipe(), plugins, tmp_path / "out", tmp_path / "nowhere" / "ask.jsonl")
    (tmp_path / "answers.jsonl").write_text('{"custom_id": "a", "response": null}\n[1]\n')
    with pytest.raises(UserError, match=r"answers.jsonl:2: the line is not an answer"):
        import_batch(recipe(), plugins, tmp_path / "out", [tmp_path / "answers.jsonl"])


def test_the_command(recipe, server, tmp_path, monkeypatch, capsys):
    recipe()
    file, ask, told = tmp_path / "recipe.yaml", tmp_path / "ask.jsonl", tmp_path / "answers.jsonl"
    label = ("label", file, "--output", tmp_path / "out")
    code, said = run_cli(monkeypatch, capsys, *label)
    assert code == 2 and "Give either --export-batch or --import-batch." in said and "--only label" in said
    assert run_cli(monkeypatch, capsys, "run", file, "--output", tmp_path / "out", "--only", "sample")[0] == 0
    assert run_cli(monkeypatch, capsys, *label, "--export-batch", ask) == (0, "")
    rows = batch_answers(server, ask)
    write_rows(told, rows[:5])
    write_rows(tmp_path / "more.jsonl", rows[5:])
    assert (
        run_cli(monkeypatch, capsys, *label, "--import-batch", told, "--import-batch", tmp_path / "more.jsonl")[0] == 0
    )
    assert len(labels(tmp_path / "out")) == 6
