"""All data of a recipe is read before anything is computed."""

import json
from contextlib import nullcontext

import pytest
from helpers.recipes import run_cli, tiny_recipe, write_recipe

from trl_rlaif.errors import UserError
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe.inputs import check_data, prompt_overlaps, read_prompts, read_rehearsal

ANSWERED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def test_good_data(tmp_path):
    check_data(tiny_recipe(tmp_path, "gpt2"))


def test_every_file_is_looked_at(tmp_path):
    sections = {
        "sft": {"data": write(tmp_path / "sft.jsonl", {"prompt": "a"})},
        "label": {"calibration": write(tmp_path / "judged.jsonl", {"prompt": "a", "response_1": 1, "response_2": "b"})},
        "rl": {"rehearsal": write(tmp_path / "own.jsonl", {"prompt": "a"})},
        "evaluate": {"sets": {"x": write(tmp_path / "x.jsonl", {"question": "a"}), "y": "x.jsonl"}},
    }
    recipe = tiny_recipe(tmp_path, "gpt2", **sections)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError) as caught:
        check_data(recipe)
    places = [problem.where.removeprefix(f"{tmp_path}/") for problem in caught.value.problems]
    assert places == ["sft.jsonl:1", "train.jsonl", "judged.jsonl:1", "own.jsonl:1", "x.jsonl:1"]


def test_the_first_prompts_alone(tmp_path):
    recipe = tiny_recipe(tmp_path, "gpt2", data={"max_prompts": 2})
    everything = [prompt.id for prompt in read_prompts(recipe, recipe.data.prompts, "eval_prompts").items]
    assert len(everything) > 2
    assert [prompt.id for prompt in read_prompts(recipe, recipe.data.prompts).items] == everything[:2]


def test_every_prompt_ends_with_the_instruction(tmp_path):
    recipe = tiny_recipe(tmp_path, "gpt2", data={"instruction": "Be brief."})
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why? "},
    ]
    tool = {"role": "tool", "content": "42"}
    write(tmp_path / "texts.jsonl", {"prompt": "What?\n"})
    write(tmp_path / "turns.jsonl", {"prompt": turns}, {"prompt": [*turns, tool]})
    for key in ("prompts", "eval_prompts"):
        (text,) = read_prompts(recipe, str(tmp_path / "texts.jsonl"), key).items
        asked, answered = read_prompts(recipe, str(tmp_path / "turns.jsonl"), key).items
        assert text.prompt == "What? Be brief."
        assert asked.prompt == [*turns[:2], {"role": "user", "content": "Why? Be brief."}]
        assert answered.prompt == [*asked.prompt, tool]


def test_what_no_stage_reads_is_left_alone(tmp_path):
    recipe = tiny_recipe(tmp_path, "gpt2", rl=None, evaluate=None)
    (tmp_path / "test.jsonl").write_text("")
    check_data(recipe)
    (tmp_path / "train.jsonl").unlink()  # a name that may be on the Hub
    check_data(recipe)


def test_the_command_line_checks_before_it_runs(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, "no-org/no-model")
    write(tmp_path / "test.jsonl", {"prompt": "a"}, {"prompt": 3})
    for arguments in (("check", recipe), ("run", recipe, "--output", tmp_path / "out")):
        code, stderr = run_cli(monkeypatch, capsys, *arguments)
        assert code == 2 and f"{tmp_path / 'test.jsonl'}:2: 'prompt' is a number" in stderr
    assert not (tmp_path / "out").exists()


# ---- Prompts that are held out and trained on -------------------------------------------------------------


def prompts(path, *numbers, text="What is {}?"):
    return write(path, *({"id": f"{path.stem}{i}", "prompt": text.format(i)} for i in numbers))


def leaking(base):
    """A recipe with prompts shared between files: with other spacing, with a system turn, or within a conversation."""
    pair = {"response_1": "a", "response_2": "b"}
    judged = [{"id": str(i), "prompt": f"What is {i}?", "human": 1 + i % 2} | pair for i in range(8, 30)]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6?"}]
    old = [*({"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in (1, 2, 7, 29, 50)), {"prompt": system}]
    talk = [{"role": "user", "content": f"What is {i}?"} for i in (1, 2)]
    answers = [{"role": "assistant", "content": "It is."}] * 2
    sft = {"messages": [talk[0], answers[0]]}, {"messages": [talk[1], answers[0], talk[0], answers[1]]}
    return {
        "data": {"prompts": prompts(base / "trained.jsonl", *range(10), text="what  is {}? "), "eval_prompts": None},
        "sft": {"data": write(base / "sft.jsonl", *sft), "max_steps": 1},
        "label": {"calibration": write(base / "judged.jsonl", *judged)},
        "evaluate": {
            "sets": {
                "new": prompts(base / "new.jsonl", 100, 101),
                "old": write(base / "old.jsonl", *old),
                "forget": prompts(base / "forget.jsonl", 1, 50),
            }
        },
    }


OVERLAPS = [
    ("evaluate.sets.forget", "sft.data", 2, 1),
    ("evaluate.sets.forget", "data.prompts", 2, 1),
    ("evaluate.sets.old", "label.calibration", 6, 1),
    ("evaluate.sets.old", "sft.data", 6, 2),
    ("evaluate.sets.old", "data.prompts", 6, 4),
    ("label.calibration", "data.prompts", 22, 2),
]


def as_rows(found):
    return [tuple(of[key] for key in ("held_out", "training", "prompts", "shared")) for of in found]


def test_prompts_that_are_held_out_and_trained_on_are_counted(tmp_path):
    recipe = tiny_recipe(tmp_path, "gpt2", **leaking(tmp_path))
    assert as_rows(prompt_overlaps(recipe)) == OVERLAPS
    smaller = (tmp_path / "judged.jsonl").stat().st_size - 1
    found = as_rows(prompt_overlaps(recipe, largest=smaller))
    assert found == [row for row in OVERLAPS if "label.calibration" not in row]
    assert prompt_overlaps(tiny_recipe(tmp_path, "gpt2")) == []


def test_check_warns_of_them(tmp_path, monkeypatch, tiny_model, capsys):
    recipe = write_recipe(tmp_path, tiny_model, **leaking(tmp_path))
    code, stderr = run_cli(monkeypatch, capsys, "check", recipe)
    assert code == 0 and stderr.count("Warning: ") == len(OVERLAPS)
    assert "4 of the 6 prompts of evaluate.sets.old are also in data.prompts." in stderr


@pytest.mark.trl
def test_the_run_counts_them(tmp_path, tiny_model, capsys):
    sections = {"reward": None, "report": None, "rl": {"algorithm": "dpo", "max_steps": 1}}
    recipe = tiny_recipe(tmp_path, tiny_model, **sections, **leaking(tmp_path))
    results = run_recipe(recipe, installed_plugins(), tmp_path / "out").results()
    assert as_rows(results["evaluate"]["overlaps"]) == OVERLAPS[:5]
    assert as_rows(results["label"]["overlaps"]) == OVERLAPS[5:]
    assert "2 of the 22 prompts of label.calibration are also in data.prompts." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": [[{}]], "completion": "a"}, "own.jsonl:1"),
        ({"prompt": "a", "completion": ["b"]}, "own.jsonl:1"),
        ({"text": "a"}, "answers a prompt"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}] * 2}, "row 1 is not one message"),
        ({"messages": ANSWERED * 2}, None),
        ({"messages": [*ANSWERED * 2, {"role": "assistant", "content": ""}]}, "row 1 is not one message"),
    ],
)
def test_what_cannot_be_rehearsed_is_found_before_the_run(tmp_path, row, part):
    recipe = tiny_recipe(tmp_path, "gpt2", rl={"rehearsal": write(tmp_path / "own.jsonl", row)})
    with pytest.raises(UserError, match=part) if part else nullcontext():
        check_data(recipe)


def test_what_is_rehearsed(tmp_path):
    """A pair if a row has both forms, and texts if the model has no chat template."""
    row = {"prompt": "a", "completion": "b", "messages": ANSWERED}
    recipe = tiny_recipe(tmp_path, "gpt2", rl={"rehearsal": write(tmp_path / "own.jsonl", row)})
    assert read_rehearsal(recipe) == [{"prompt": "a", "completion": "b"}]
    write(tmp_path / "own.jsonl", {"instruction": "a", "output": "b"})
    assert read_rehearsal(recipe, chat=False) == [{"prompt": "a\n\n", "completion": "b"}]
    assert read_rehearsal(recipe) == [{"prompt": ANSWERED[:1], "completion": [{"role": "assistant", "content": "b"}]}]
