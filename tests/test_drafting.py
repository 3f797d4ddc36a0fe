"""Drafted rubrics: how drafts are read, the files for people to edit, and resuming after a kill."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.recipes import run_cli, tiny_recipe, write_recipe
from helpers.server import scripted_server
from helpers.tiny import make_tokenizer
from trl_rlaif_rubric import read_rubric

from trl_rlaif import JudgePrompt, UserError, drafting
from trl_rlaif.drafting import DraftOptions, draft_rubrics, dropped_of, read_draft
from trl_rlaif.files import read_lines
from trl_rlaif.judging import local, tokens
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import prompt_folder

GOOD = "3: names the {0}\n-2: is over the dog"
BAD = {
    "no idea what": "not a list of checks",
    "1. is a city\n2. is a dog": "not a list of checks",
    "3: is a city\nthat is all": "not a list of checks",
    "": "empty",
    "-1: is a dog": "no check of positive weight",
    "2: is a city\n1: Is a city": "the same check twice",
    "0: is a city": "a weight that is 0, too large or too fine",
    "1001: is a city": "a weight that is 0, too large or too fine",
}
OPTIONS = DraftOptions(tries=2, max_new_tokens=60, batch_size=4)


# ---- One draft ------------------------------------------------------------------------------------------


def test_a_draft_is_read_line_by_line():
    text = "\n5: names Canberra\n  - 1.5 : is brief: one line \n\n* -4: names Sydney\n-2: rambles\n+1: is polite\n"
    checks = [
        ("names Canberra", 5),
        ("is brief: one line", 1.5),
        ("names Sydney", -4),
        ("rambles", -2),
        ("is polite", 1),
    ]
    found = read_draft(text)
    assert [(one.text, one.weight) for one in read_rubric(found)] == checks
    assert json.loads(json.dumps(found)) == [{"criterion": text, "weight": weight} for text, weight in checks]


@pytest.mark.parametrize(("text", "reason"), BAD.items())
def test_what_is_no_draft(text, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        read_draft(text)


def test_the_examples_of_the_instructions_are_no_draft():
    instructions = JudgePrompt.load(prompt_folder("general")).parts["draft.txt"]
    examples = instructions.rpartition("\n\n")[2]
    assert len(read_draft(examples)) == 3
    with pytest.raises(ValueError, match="copied from the instructions"):
        read_draft(f"5: names Vienna\n{examples}", instructions)


# ---- Files of drafts ------------------------------------------------------------------------------------


class Script:
    """The model's texts by prompt number: one per try, with the last one repeated."""

    def __init__(self):
        self.texts, self.calls, self.tokenizer = {}, [], make_tokenizer()

    def __call__(self, model, tokenizer, prompts, *, max_new_tokens, **_):
        asked = [tokenizer.decode(ids).split("what is the ")[1].split("?")[0] for ids in prompts]
        self.calls.append(asked)
        return [[self._ids(name)[:max_new_tokens]] for name in asked]

    def _ids(self, name):
        texts = self.texts.get(int(name.split()[1]), [GOOD])
        text = texts[min(sum(name in call for call in self.calls), len(texts)) - 1]
        return [*self.tokenizer(text.format(name), add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]


@pytest.fixture
def script(monkeypatch):
    script = Script()
    monkeypatch.setattr(local, "sample_responses", script)
    return script


@pytest.fixture
def model(tiny_model, tmp_path):
    """The tiny model with a context that fits the packaged prompt, which its tokenizer splits into letters."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return str(folder)


@pytest.fixture
def draft(model, tmp_path):
    """Draft rubrics for ten prompts, in batches of 4, 4 and 2."""

    def run(name="rubrics.jsonl", options=OPTIONS, **sections):
        recipe = tiny_recipe(tmp_path, model, **sections)
        return draft_rubrics(recipe, installed_plugins(), tmp_path / name, options)

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_gets_its_rubric_and_keeps_its_columns(script, draft, tmp_path):
    found = draft()
    assert (found.drafted, found.kept, found.dropped) == (10, 0, {})
    prompts = rows(tmp_path / "train.jsonl")
    assert rows(tmp_path / "rubrics.jsonl") == [
        prompt
        | {
            "rubric": [
                {"criterion": f"names the {prompt['prompt'][12:-1]}", "weight": 3},
                {"criterion": "is over the dog", "weight": -2},
            ]
        }
        for prompt in prompts
    ]
    assert list(map(len, script.calls)) == [4, 4, 2] and not dropped_of(tmp_path / "rubrics.jsonl").exists()


def test_a_bad_draft_is_tried_again_then_dropped_and_counted(script, draft, tmp_path):
    texts = list(BAD)
    script.texts = {1: [texts[0], GOOD], 2: [texts[4], texts[3]], 5: [texts[5]], 6: [GOOD * 9], 7: [texts[5], texts[4]]}
    found = draft()
    reasons = {"empty": 1, "the same check twice": 1, "cut off": 1, "no check of positive weight": 1}
    assert (found.drafted, found.kept, found.dropped) == (6, 0, reasons)
    assert [row["id"] for row in rows(tmp_path / "rubrics.jsonl")] == ["p0", "p1", "p3", "p4", "p8", "p9"]
    dropped = read_lines(dropped_of(tmp_path / "rubrics.jsonl"))
    assert [(row["id"], row["dropped"]) for row in dropped] == [
        ("p2", "empty"), ("p5", "the same check twice"), ("p6", "cut off"), ("p7", "no check of positive weight"),
    ]  # fmt: skip
    assert dropped[1]["draft"] == texts[5]
    assert script.calls[1] == ["brown 1", "fox 2"]  # the unreadable ones of the first batch
    script.calls.clear()
    again = draft()
    assert (again.drafted, again.kept, again.dropped) == (0, 6, reasons) and not script.calls


def test_one_that_is_likeliest_is_written_once(script, draft):
    script.texts = {2: [list(BAD)[0]]}
    assert draft(options=DraftOptions(tries=3, temperature=0, max_new_tokens=60, batch_size=4)).drafted == 9
    assert len(script.calls) == 3


def test_where_no_draft_can_be_read_the_reasons_are_told(script, draft, tmp_path):
    script.texts = dict.fromkeys(range(10), ["no idea"])
    with pytest.raises(UserError, match=r"No draft could be read \(10 not a list of checks\)"):
        draft()
    assert not (tmp_path / "rubrics.jsonl").read_text()


@pytest.mark.parametrize("ending", ["", "\n"])
def test_what_people_have_edited_is_kept_byte_for_byte(script, draft, tmp_path, ending):
    draft()
    path = tmp_path / "rubrics.jsonl"
    lines = path.read_text().splitlines()
    edited = lines[3].replace("names the", "says the").replace('"weight": 3', '"weight":   7')
    mine = "\r\n".join([edited, lines[0], '{"id": "mine", "prompt": "who?", "rubric": ["is polite"]}']) + ending
    path.write_bytes(mine.encode())
    script.calls.clear()
    found = draft()
    assert (found.drafted, found.kept) == (8, 2)
    assert path.read_bytes().decode().startswith(mine)
    assert [row["id"] for row in rows(path)] == ["p3", "p0", "mine", "p1", "p2", *(f"p{i}" for i in range(4, 10))]
    assert sorted(rows(path)[3:], key=lambda row: row["id"]) == [json.loads(lines[i]) for i in (1, 2, *range(4, 10))]


def test_a_rubric_in_the_data_is_copied(script, draft, tmp_path, monkeypatch):
    write = json.dumps({"id": "own", "prompt": "what is the dog 3?", "rubric": ["is a dog"]})
    (tmp_path / "some.jsonl").write_text(write + '\n{"id": "none", "prompt": "what is the fox 4?"}\n')
    found = draft(data={"prompts": "some.jsonl"})
    assert (found.drafted, found.kept) == (1, 1) and script.calls == [["fox 4"]]
    assert [row["rubric"][0] for row in rows(tmp_path / "rubrics.jsonl")] == [
        "is a dog", {"criterion": "names the fox 4", "weight": 3},
    ]  # fmt: skip


def test_the_files_own_names_of_its_columns_are_kept(script, draft, tmp_path):
    (tmp_path / "some.jsonl").write_text(json.dumps({"question": "what is the fox 4?", "kind": "a", "n": 2}) + "\n")
    data = {"prompts": "some.jsonl", "columns": {"prompt": "question"}, "category": "kind"}
    draft(data=data)
    [row] = rows(tmp_path / "rubrics.jsonl")
    assert {key: row[key] for key in row if key != "rubric"} == {
        "id": "some-1", "question": "what is the fox 4?", "kind": "a", "n": 2,
    }  # fmt: skip
    assert draft(data=data).kept == 1


@pytest.mark.parametrize("stopped", [1, 2, 3, 4])
def test_a_killed_run_ends_with_the_same_drafts(draft, tmp_path, monkeypatch, stopped):
    """With the model's own texts, some of which count as drafts; killed between two files, or two batches."""

    def read(text, instructions):
        if len(text) % 3 == 0:
            return [{"criterion": text, "weight": 1}]
        raise ValueError("of another length")

    monkeypatch.setattr(drafting, "read_draft", read)
    options = DraftOptions(tries=2, temperature=1.0, max_new_tokens=6, batch_size=4)
    monkeypatch.setattr(tokens.ResponseReader, "read", cut_off_as_ended(tokens.ResponseReader.read))
    whole = draft("whole.jsonl", options)
    assert whole.drafted > 3 < whole.dropped.total()
    writes, written = [], {name: getattr(drafting, name) for name in ("append_lines", "write_atomically")}

    def killing(name):
        def write(path, content):
            if len(writes) == stopped:
                raise KeyboardInterrupt
            writes.append(path)
            written[name](path, content)

        return write

    with monkeypatch.context() as patch:
        for name in written:
            patch.setattr(drafting, name, killing(name))
        with pytest.raises(KeyboardInterrupt):
            draft("killed.jsonl", options)
    assert draft("killed.jsonl", options).dropped == whole.dropped
    for of in (lambda path: path, dropped_of):
        assert of(tmp_path / "killed.jsonl").read_bytes() == of(tmp_path / "whole.jsonl").read_bytes()


def cut_off_as_ended(read):
    def reading(self, ids, prompt_ids=None):
        return read(self, [*ids, self.end_id] if self.end_id not in ids else ids, prompt_ids)

    return reading


def test_another_seed_makes_other_drafts(draft, tmp_path, monkeypatch):
    monkeypatch.setattr(drafting, "read_draft", lambda text, instructions: [{"criterion": text, "weight": 1}])
    monkeypatch.setattr(tokens.ResponseReader, "read", cut_off_as_ended(tokens.ResponseReader.read))
    options = DraftOptions(max_new_tokens=6, temperature=1.0)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        draft(f"{name}.jsonl", options, run={"seed": seed})
    one, same, other = ((tmp_path / f"{name}.jsonl").read_text() for name in ("one", "same", "other"))
    assert one == same != other


def test_a_template_may_show_a_reference(script, draft, tmp_path):
    folder = tmp_path / "grounded"
    shutil.copytree(prompt_folder("general"), folder)
    (folder / "draft.jinja").write_text("{{ context }}\n\nA good answer:\n{{ reference }}")
    options = DraftOptions(prompt=str(folder), max_new_tokens=60)
    (tmp_path / "some.jsonl").write_text(json.dumps({"prompt": "what is the fox 4?", "reference": "red"}) + "\n")
    assert draft(options=options, data={"prompts": "some.jsonl"}).drafted == 1
    with pytest.raises(UserError, match="no column 'reference', which the template draft.jinja"):
        draft("others.jsonl", options)


def test_a_judge_on_a_server_drafts_where_the_recipe_has_no_label(tiny_model, tmp_path, monkeypatch, capsys):
    keys = dict.fromkeys(("sample", "label", "reward", "evaluate"))
    recipe = write_recipe(tmp_path, tiny_model, **keys, rl={"rewards": ["rubric"]})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with scripted_server() as server:
        judge = f"label={{judge: {{backend: openai, path: scripted, base_url: '{server.base_url}'}}}}"
        arguments = (
            "draft-rubrics",
            recipe,
            "--output",
            tmp_path / "rubrics.jsonl",
            "--tries",
            1,
            "--set",
            "sample={}",
        )
        code, message = run_cli(monkeypatch, capsys, *arguments, "--set", judge)
        assert len(server.requests) == 10
    assert code == 2 and "rubrics.dropped.jsonl: No draft could be read (10 cut off)." in message


def test_another_files_rubrics_are_not_mixed_up(script, draft, tmp_path):
    draft()
    (tmp_path / "some.jsonl").write_text(json.dumps({"id": "p2", "prompt": "another"}) + "\n")
    with pytest.raises(UserError, match="'p2' differs from the one in"):
        draft(data={"prompts": "some.jsonl"})


def test_the_command_drafts_and_the_run_reads_what_it_drafted(script, model, tmp_path, monkeypatch, capsys):
    keys = {"sample": None, "label": None, "reward": None, "evaluate": None, "rl": {"rewards": ["rubric"]}}
    recipe, output = write_recipe(tmp_path, model, **keys), tmp_path / "new" / "rubrics.jsonl"
    script.texts = {4: ["no idea"]}
    arguments = ("draft-rubrics", recipe, "--output", output, "--max-new-tokens", "60")
    code, _ = run_cli(monkeypatch, capsys, *arguments)
    assert code == 0 and len(rows(output)) == 9
    code, message = run_cli(monkeypatch, capsys, "check", recipe)
    assert code == 2 and "no column 'rubric'" in message
    assert run_cli(monkeypatch, capsys, "check", recipe, "--set", f"data.prompts={output}")[0] == 0
    code, message = run_cli(monkeypatch, capsys, *arguments[:3], tmp_path / "rubrics.csv")
    assert code == 2 and "Name a file ending in .jsonl" in message
    code, message = run_cli(monkeypatch, capsys, *arguments, "--prompt", "brief")
    assert code == 2 and "has no file draft" in message
