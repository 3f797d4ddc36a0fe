"""The list `compare` of a recipe: the resulting variants, the lines of their keys, and invalid input."""

from __future__ import annotations

import pytest
import yaml
from helpers.recipes import fingerprints, write_recipe

from trl_rlaif import UserError
from trl_rlaif.pipeline.stages import active_stages
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe


@pytest.fixture
def write(tmp_path):
    def write(compare, **sections):
        path = write_recipe(tmp_path, "some/model", **sections)
        path.write_text(path.read_text() + yaml.safe_dump({"compare": compare}))
        return path

    return write


def parse(path, *overrides):
    return parse_recipe(path, overrides=overrides, registry=installed_plugins().registry)


def test_an_arm_is_the_recipe_with_its_own_keys_laid_over(write):
    variants = parse(write([
        "plain",
        {"advantage": {"reward": {"transforms": [{"advantage": {"margin": 2.0}}]}, "rl": {"kl_coef": 0.2}}},
        {"direct": {"label": None, "reward": None, "rl": {"rewards": ["direct"]}}},
    ])).variants  # fmt: skip
    assert list(variants) == ["plain", "advantage", "direct"]
    advantage = variants["advantage"]
    assert advantage.reward.transforms[0].options["margin"] == 2.0 and advantage.reward.eval_fraction == 0.3
    assert advantage.rl.config["kl_coef"] == 0.2 and advantage.rl.config["learning_rate"] == 1e-3
    assert "kl_coef" not in variants["plain"].rl.config and variants["plain"].reward.transforms == []
    assert [*active_stages(variants["direct"])] == ["sample", "rl", "evaluate", "report"]


def test_equal_stages_have_equal_fingerprints(write):
    variants = parse(
        write(["plain", {"lower": {"rl": {"kl_coef": 0.2}}}, {"hot": {"sample": {"temperature": 2.0}}}])
    ).variants
    plain, lower, hot = (fingerprints(variant) for variant in variants.values())
    assert {stage for stage in plain if plain[stage] == lower[stage]} == {"sample", "label", "reward"}
    assert not {stage for stage in plain if plain[stage] == hot[stage]}


def test_the_resolved_recipe_parses_to_the_same(write, tmp_path):
    recipe = parse(write(["plain", {"direct": {"label": None, "reward": None, "rl": {"rewards": ["direct"]}}}]))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.to_dict()))
    assert parse(again) == recipe and parse(again).variants == recipe.variants


def test_an_override_reaches_the_arms(write):
    path = write(["plain", {"lower": {"rl": {"kl_coef": 0.2}}}])
    variants = parse(path, "rl.num_ppo_epochs=3", "compare.1.lower.rl.kl_coef=0.4").variants
    assert [variant.rl.config["num_ppo_epochs"] for variant in variants.values()] == [3, 3]
    assert variants["lower"].rl.config["kl_coef"] == 0.4
    assert parse(path, "compare=null").variants == {}


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (["one"], "is not a list of two or more variants"),
        ({"a": {}, "b": {}}, "is not a list of two or more variants"),
        (["a", "a"], "two variants of 'compare' are called 'a'"),
        (["a", "start"], "the starting policy's own name"),
        (["a", "../b"], "'../b' is no name for a variant"),
        (["a", 3], "has no name"),
        (["a", {"b": {"model": {"path": "other"}}}], "the variant 'b' changes 'model'"),
        (["a", {"b": {"rl": {"kl_coeff": 3}}}], "unknown key 'kl_coeff'"),
        (["a", {"b": "text"}], "has no sections"),
        (["a", {"b": {"data": {"eval_prompts": "x.jsonl"}}}], "all variants must answer the same prompts"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(write, compare, message):
    path = write(compare)
    with pytest.raises(UserError) as caught:
        parse(path)
    problem = next(p for p in caught.value.problems if message in p.what)
    line = int(problem.where.rsplit(":", 1)[1])
    assert line > path.read_text().split("\n").index("compare:") or "of two or more" in message


def test_what_only_an_arm_lacks_is_said_with_its_name(write):
    with pytest.raises(UserError, match="in the variant 'b': 'rl' uses the reward model") as caught:
        parse(write(["a", {"b": {"reward": None}}]))
    assert len(caught.value.problems) == 1


def test_an_arm_without_an_evaluation_cannot_be_compared(write):
    with pytest.raises(UserError, match="'compare' needs 'evaluate'"):
        parse(write(["a", {"b": {"rl": {"kl_coef": 0.2}}}], evaluate=None))
