"""Runs on users' data: custom columns, rendered prompts, partial answers, other formats."""

from __future__ import annotations

import json

import pytest
from datasets import load_from_disk
from helpers.recipes import WORDS, tiny_recipe
from transformers import AutoTokenizer

from trl_rlaif import UserError
from trl_rlaif.encoding import encode_prompt, encode_response
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.rl_setup import prompts as prompts_of_rl
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work import dpo
from trl_rlaif.pipeline.work.reward import tokenize_preference
from trl_rlaif.plugins import installed_plugins

NO_MORE = {"label": None, "reward": None, "rl": None, "evaluate": None, "report": None}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def context_of(base, tiny_model, **sections):
    """The context of a recipe after its sample stage."""
    recipe = tiny_recipe(base, tiny_model, **NO_MORE | sections)
    folder = run_recipe(recipe, installed_plugins(), base / "out", only=["sample"])
    return Context(recipe, folder, installed_plugins())


def test_columns_of_every_file(tiny_model, tmp_path):
    questions = [{"question": f"what is {word}?", "kind": "w"} for word in WORDS[:4]]
    data = {
        "prompts": write(tmp_path / "q.jsonl", *questions),
        "eval_prompts": write(tmp_path / "e.jsonl", *({"text": row["question"]} for row in questions)),
        "columns": {"prompt": "question", "category": "kind", "eval_prompts": {"prompt": "text", "category": "text"}},
    }
    sft = {"data": write(tmp_path / "sft.jsonl", {"q": "what?", "a": "the fox"}), "max_steps": 1}
    data["columns"]["sft"] = {"prompt": "q", "completion": "a"}
    rl = {"rewards": ["helpers.rewards:length_penalty"], "total_episodes": 4}
    sections = {"data": data, "sft": sft | {"per_device_train_batch_size": 1}, "sample": None, "rl": rl, "evaluate": {}}
    recipe = tiny_recipe(tmp_path, tiny_model, **NO_MORE | sections)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    assert folder.results()["sft"]["rows"] == 1
    assert [row["prompt"] for row in read_lines(folder / "samples.jsonl")] == [row["question"] for row in questions]


def test_a_wrong_column_ends_the_run(tiny_model, tmp_path):
    path = tmp_path / "q.jsonl"
    data = {"prompts": write(path, {"question": "a"}), "columns": {"prompt": "qustion"}}
    with pytest.raises(UserError, match="no column 'qustion'.*Did you mean 'question'") as caught:
        context_of(tmp_path, tiny_model, data=data)
    assert str(caught.value).startswith(f"{path}:1: ")


def test_pairs_of_scored_responses_and_what_was_left_out(tiny_model, tmp_path):
    rows = [{"prompt": f"{w}?", "responses": ["a", "b", "c"], "scores": [1, 2, 2]} for w in WORDS[:2]]
    data = {"prompts": None, "pairs": write(tmp_path / "s.jsonl", *rows, rows[0] | {"scores": [1, None, None]})}
    context = context_of(tmp_path, tiny_model, sample=None, data=data, label={})
    numbers = context.folder.results()["sample"]
    assert (numbers["pairs"], numbers["ties"]) == (6, 2)
    assert numbers["dropped"] == {"fewer than two responses with a score": 1}


# Rendered prompts


def rendered(tokenizer, text, answer=None):
    turns = [{"role": "user", "content": text}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)


def test_rendered_prompts_are_not_wrapped_again(tiny_model, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [rendered(tokenizer, f"what is {word}?") for word in WORDS[:3]]
    data = {"prompts": write(tmp_path / "q.jsonl", *({"prompt": prompt} for prompt in prompts))}
    context = context_of(tmp_path, tiny_model, data=data)
    assert "3 of 3 prompts begin with the control tokens of the model. They are taken as" in capsys.readouterr().err
    dataset, _ = prompts_of_rl(context, context.load_base(), 8)
    assert dataset["prompt"][:] == prompts
    assert dataset["input_ids"][:] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]


def test_one_that_looks_rendered_among_others_stays_text(tiny_model, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [rendered(tokenizer, "what is quick?"), "what is brown?"]
    data = {"prompts": write(tmp_path / "q.jsonl", *({"prompt": text} for text in texts))}
    context = context_of(tmp_path, tiny_model, data=data)
    assert "1 of 2 prompts begin with the control tokens of the model. As the others do not" in capsys.readouterr().err
    turns = [[{"role": "user", "content": text}] for text in texts]
    dataset, _ = prompts_of_rl(context, context.load_base(), 8)
    assert dataset["prompt"][:] == turns
    assert dataset["input_ids"][:] == [encode_prompt(tokenizer, prompt) for prompt in turns]


def test_rendered_pairs_reach_the_reward_model_as_conversations_do(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    row = {
        "chosen": rendered(tokenizer, "what is quick?", "the fox"),
        "rejected": rendered(tokenizer, "what is quick?", "a dog"),
    }
    data = {"prompts": None, "pairs": write(tmp_path / "p.jsonl", row), "format": "preference"}
    context = context_of(tmp_path, tiny_model, sample=None, data=data, reward={})
    dpo.preferences_of_people(context, "reward")
    found = tokenize_preference(tokenizer, load_from_disk(str(context.folder / "preferences"))[0])
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "what is quick?"}])
    assert found["chosen_ids"] == prompt + encode_response(tokenizer, "the fox")
    assert found["rejected_ids"] == prompt + encode_response(tokenizer, "a dog")


# Partial answers


BEGUN = [{"role": "user", "content": "what is quick?"}, {"role": "assistant", "content": "It is"}]


def test_an_answer_that_is_begun_is_continued(tiny_model, tmp_path, capsys):
    data = {"prompts": write(tmp_path / "q.jsonl", {"prompt": BEGUN})}
    context = context_of(tmp_path, tiny_model, data=data)
    assert "1 of 1 prompts end with an assistant turn. The responses continue it." in capsys.readouterr().err
    _, tokens, _ = context.encoded_prompts(context.recipe.data.prompts, 8, context.load_base())
    text = context.tokenizer.apply_chat_template(BEGUN, tokenize=False, continue_final_message=True)
    assert list(tokens) == [context.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert context.pairs()[0].prompt == BEGUN


def test_dpo_learns_the_whole_turn(tiny_model, tmp_path):
    says = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    row = {"prompt": BEGUN, "chosen": says(" the fox"), "rejected": says(" a dog")}
    data = {"prompts": None, "pairs": write(tmp_path / "p.jsonl", row), "format": "preference"}
    context = context_of(tmp_path, tiny_model, sample=None, data=data, rl={"algorithm": "dpo"})
    dpo.preferences_of_people(context, "rl")
    row = dpo._readable(dpo._preferences(context), soft=False)[0]
    assert row == {"prompt": BEGUN[:1], "chosen": says("It is the fox"), "rejected": says("It is a dog")}


def test_grpo_does_not_continue_a_turn(tiny_model, tmp_path):
    rl = {"algorithm": "grpo", "rewards": ["helpers.rewards:length_penalty"], "num_generations": 2}
    data = {"prompts": write(tmp_path / "q.jsonl", {"prompt": BEGUN})}
    recipe = tiny_recipe(tmp_path, tiny_model, **NO_MORE | {"sample": None, "data": data, "rl": rl})
    with pytest.raises(UserError, match="which grpo does not continue"):
        run_recipe(recipe, installed_plugins(), tmp_path / "out")
