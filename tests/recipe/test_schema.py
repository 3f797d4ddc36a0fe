"""The JSON Schema of recipes, and the explanation of a key by ``trl-rlaif explain``."""

import json

import pytest
import yaml
from helpers.recipes import run_cli
from jsonschema import Draft202012Validator

from trl_rlaif.errors import UserError
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import packaged_recipes, parse_recipe
from trl_rlaif.recipe.explaining import explain
from trl_rlaif.recipe.schema import recipe_schema
from trl_rlaif.recipe.sections import SECTIONS

TEXT = "{model: {path: gpt2}, data: {prompts: prompts.jsonl, eval_prompts: eval.jsonl}, %s}"


@pytest.fixture(scope="module")
def schema():
    return recipe_schema(installed_plugins().registry, {name: stage.defaults for name, stage in STAGES.items()})


@pytest.fixture
def checked(folder):
    """Parses a text with the installed plugins."""

    def checked(text):
        (folder / "recipe.yaml").write_text(text)
        return parse_recipe("recipe.yaml", registry=installed_plugins().registry)

    return checked


def test_it_is_a_schema_that_refers_to_nothing_outside(schema):
    Draft202012Validator.check_schema(schema)
    references = {text for text in json.dumps(schema).split('"') if text.startswith("#/$defs/")}
    assert {text.removeprefix("#/$defs/") for text in references} <= schema["$defs"].keys()


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_valid(schema, name):
    recipe = yaml.safe_load(packaged_recipes()[name].read_text(encoding="utf-8"))
    assert not [error.message for error in Draft202012Validator(schema).iter_errors(recipe)]


@pytest.mark.parametrize(
    "text",
    [
        "sample: {}, label: {}, reward: {}, rl: {}, rounds: 3",
        "sample: {}, label: {}, reward: {}, rl: {rewards: [{reward: 1.0}, {direct: 0.5}]}",
        "sample: {}, label: {}, reward: {transforms: [{advantage: {margin: 2.0}}]}, rl: {transforms: [advantage]}",
        "sample: {}, label: {criteria: {helpful: {weight: 2.0}, harmless: 1}}",
        "sample: {}, label: {labeler: {distilled: {orders: '12'}}, compare: {other: {labeler: direct}}}",
        "sample: {}, label: {judge: {backend: vllm, path: a, max_model_len: 9}}",
        "sample: {}, label: {judge: {backend: openai, path: a, base_url: [http://a/v1, http://b/v1]}}",
        "sample: {}, label: {}, reward: {}, rl: {}, evaluate: {}, compare: [one, {two: {rl: {kl_coef: 0.1}}}]",
        "sample: null, label: null, reward: null, rl: {rewards: [direct]}",
    ],
)
def test_what_check_takes(schema, checked, text):
    checked(TEXT % text)
    recipe = yaml.safe_load(TEXT % text)
    assert not [error.message for error in Draft202012Validator(schema).iter_errors(recipe)]


@pytest.mark.parametrize(
    "text",
    [
        "rl: {klcoef: 0.1}",
        "rl: {kl_coef: much}",
        "rl: {gamma: 1.5}",
        "rl: {transforms: [{advantage: {margin: 0}}]}",
        "rl: {transforms: [no_such_transform]}",
        "rl: {seed: 3}",
        "judge: {eval_steps: 3}",
        "sample: {temperature: 0}",
        "label: {labeler: advantage}",
        "section: {}",
        "compare: [{one: {evaluate: {}}}, two]",
    ],
)
def test_what_check_refuses(schema, checked, text):
    with pytest.raises(UserError):
        checked(TEXT % text)
    assert [*Draft202012Validator(schema).iter_errors(yaml.safe_load(TEXT % text))]


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("sample.temperature", "sample.temperature: number above 0, default 1.0"),
        ("rl.kl_coef", "rl.kl_coef: number at least 0, default 0.05"),
        ("judge.learning_rate", "judge.learning_rate: number at least 0, default 0.0005"),  # the stage's own default
        ("label.judge.quantization", "label.judge.quantization: 'none' or 'nf4', default \"none\""),
        ("label.judge.backend", "label.judge.backend: 'transformers' or 'vllm' or 'openai', default \"transformers\""),
        ("rl.transforms.advantage.margin", "rl.transforms.advantage.margin: number above 0, default 4.0"),
        ("rounds", "rounds: keys or null or integer at least 1"),
    ],
)
def test_a_key_is_explained(schema, key, first):
    said = explain(schema, key).splitlines()
    assert said[0] == first and said[1].strip()


def test_every_key_of_every_section_can_be_explained(schema):
    for section in SECTIONS:
        (keys, *_) = schema["properties"][section]["anyOf"]
        listed = explain(schema, section)
        for key in keys["properties"]:
            said = explain(schema, f"{section}.{key}")
            assert said.startswith(f"{section}.{key}: ") and f"\n  {key}: " in listed


def test_an_unknown_key(schema, monkeypatch, capsys):
    with pytest.raises(UserError, match="there is no key 'kl_coe' in 'rl.kl_coe'. Did you mean 'kl_coef'?"):
        explain(schema, "rl.kl_coe")
    code, stderr = run_cli(monkeypatch, capsys, "explain", "model.path.x")
    assert code == 2 and "It has no keys below it." in stderr
