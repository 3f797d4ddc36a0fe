"""Labelers that give rewards: which ones a recipe may name, and their options."""

from __future__ import annotations

from trl_rlaif.recipe import ComponentRef

HEAD = "model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\nrl:\n  rewards: [direct]\n  labelers: "


def test_options_of_a_labeler_that_gives_rewards(parse, only):
    recipe = parse(HEAD + "[direct]\n")
    assert recipe.rl.labelers == [ComponentRef("direct")] and [*recipe.reward_labelers] == ["direct"]
    assert only(HEAD + "[direct, direct]\n").what == "the options of 'direct' are listed twice."
    problem = only(HEAD + "[distilled]\n")
    assert problem.what == "'labelers' has options of 'distilled', which is not in rl.rewards."
    assert problem.where == "recipe.yaml:5"


def test_a_labeler_of_pairs_alone_is_no_reward(only):
    text = HEAD.replace("[direct]", "[distilled]").replace("  labelers: ", "")
    assert only(text).what.endswith("'distilled' is not a reward.")
