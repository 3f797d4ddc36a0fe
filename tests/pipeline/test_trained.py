"""Which run a trained model is loaded from, and with which tokenizer."""

from __future__ import annotations

from datetime import date

import pytest
from helpers.tiny import CHAT_TEMPLATE, make_tokenizer, save_tiny_model
from helpers.trained import add_trained, make_run

from trl_rlaif import UserError
from trl_rlaif.encoding import chat_prompt, encode_prompt
from trl_rlaif.files import to_json, write_state
from trl_rlaif.pipeline.trained import find_trained

TEACHING = {"contrasts": ["cut_off"]}


@pytest.fixture
def runs(tmp_path):
    """A run and a second one that continues it, on a model with the date in its chat template."""
    model = save_tiny_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    first = make_run(tmp_path / "first", model, judge=TEACHING)
    for what in ("policy", "reward", "judge"):
        add_trained(first, what)
    second = make_run(tmp_path / "second", model, rounds={"previous": str(first.path)})
    (first / "results.json").write_text(to_json({"judge": {"used": True}}))
    write_state(first.state / "date", {"date": "2026-03-04"})
    write_state(second.state / "date", {"date": "2026-05-06"})
    return first, second


def test_a_judge_may_be_that_of_the_run_before_and_other_models_may_not(runs):
    first, second = runs
    assert find_trained(second.path, "judge").path == find_trained(first.path, "judge").path == first / "judge"
    with pytest.raises(UserError, match="The stage 'rl', which trains the policy, has not completed"):
        find_trained(second.path, "policy")
    add_trained(second, "policy")
    assert find_trained(second.path, "policy").path == second / "policy"


def test_prompts_are_rendered_on_the_day_of_the_first_run(runs):
    first, second = runs
    add_trained(second, "reward")
    found = find_trained(second.path, "reward")
    assert found.day == date(2026, 3, 4)
    tokenizer = found.tokenizer()
    ids = encode_prompt(tokenizer, chat_prompt("a city?", tokenizer))
    assert tokenizer.decode(ids).startswith("04 March 2026<|start|>user")


def test_a_type_that_the_machine_chose_is_kept(runs):
    first, _ = runs
    recipe = (first / "recipe.yaml").read_text()
    assert "dtype: float32" in recipe
    (first / "recipe.yaml").write_text(recipe.replace("  dtype: float32\n  quant", "  dtype: auto\n  quant", 1))
    settled = find_trained(first.path, "policy").base.dtype
    assert settled == first.recipe()["machine"]["dtype"] != "auto"
