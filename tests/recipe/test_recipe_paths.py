"""Where recipes, data, models and prompts are found."""

from pathlib import Path

import pytest

from trl_rlaif.errors import UserError
from trl_rlaif.recipe import packaged_recipes, parse_recipe, paths, prompt_folder, recipes_dir

HEAD = "model: {path: gpt2}\ndata:\n"


@pytest.fixture
def packaged(folder, monkeypatch) -> Path:
    """An editable install with the recipes 'quickstart' and 'rehearsal' and the prompt 'general'."""
    monkeypatch.setattr(paths, "__file__", str(folder / "repo" / "trl_rlaif" / "recipe" / "paths.py"))
    recipes = folder / "repo" / "recipes"
    (recipes / "prompts" / "general").mkdir(parents=True)
    (recipes / "data").mkdir()
    (recipes / "data" / "some.jsonl").touch()
    for name in ("rehearsal", "quickstart"):
        (recipes / f"{name}.yaml").write_text(HEAD + "  prompts: data/some.jsonl\nsample:\n")
    return recipes


def test_real_recipes_dir_is_found():
    assert recipes_dir().name == "recipes"
    assert prompt_folder("general").is_dir()


def test_packaged_recipes(packaged, registry):
    assert recipes_dir() == packaged
    assert packaged_recipes() == {
        "quickstart": packaged / "quickstart.yaml",
        "rehearsal": packaged / "rehearsal.yaml",
    }
    recipe = parse_recipe("quickstart", registry=registry)
    assert recipe.source == packaged / "quickstart.yaml"
    assert recipe.run.name == "quickstart"
    assert recipe.data.prompts == str(packaged / "data" / "some.jsonl")
    assert recipe.line(("sample",)) == f"{packaged / 'quickstart.yaml'}:4"


def test_recipes_in_a_wheel_lie_in_the_package(packaged):
    inside = packaged.parent / "trl_rlaif" / "recipes"
    inside.mkdir(parents=True)
    assert recipes_dir() == inside


def test_a_file_goes_before_a_packaged_recipe(packaged, folder, registry):
    (folder / "quickstart").write_text(HEAD + "report:\n")
    assert parse_recipe("quickstart", registry=registry).source == folder / "quickstart"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("quickstrat", "Did you mean 'quickstart'?"),
        ("mine.yml", "Did you mean 'mine.yaml'?"),
        ("./mine.yml", "Did you mean 'mine.yaml'?"),
        ("zzz", "Packaged recipes: quickstart, rehearsal."),
        ("runs/of/last/week/zzz.yaml", "Packaged recipes: quickstart, rehearsal."),  # the folder does not count
    ],
)
def test_unknown_recipe(packaged, folder, registry, name, fix):
    (folder / "mine.yaml").touch()
    (folder / "runs/of/last/week").mkdir(parents=True)
    (folder / "runs/of/last/week/mine.yaml").touch()
    with pytest.raises(UserError, match="there is no recipe") as caught:
        parse_recipe(name, registry=registry)
    assert caught.value.problems[0].fix == fix


def test_recipe_is_a_folder(packaged, folder, registry):
    with pytest.raises(UserError, match="own_prompt: this is a folder, not a recipe"):
        parse_recipe("own_prompt", registry=registry)


def test_data_is_looked_up_beside_the_recipe_then_here_then_in_the_package(packaged, folder, registry):
    (folder / "sub").mkdir()
    (folder / "sub" / "prompts.jsonl").touch()
    recipe = folder / "sub" / "r.yaml"
    recipe.write_text(
        HEAD + "  prompts: prompts.jsonl\n  eval_prompts: eval.jsonl\n  pairs: data/some.jsonl\nreport:\n"
    )
    data = parse_recipe(recipe, registry=registry).data
    assert data.prompts == str(folder / "sub" / "prompts.jsonl")
    assert data.eval_prompts == str(folder / "eval.jsonl")
    assert data.pairs == str(packaged / "data" / "some.jsonl")


@pytest.mark.parametrize("name", ["org/name", "org/na.me-2:train", "trl-lib/tldr"])
def test_hub_data(parse, name):
    assert parse(HEAD + f"  prompts: {name}\nsample:\n").data.prompts == name


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("prompt.jsonl", "Did you mean 'prompts.jsonl'?"),
        ("answers.jsonl", "Write a path or a Hub id (org/name)."),  # the extension does not count
        ("nowhere/prompts.jsonl", "Write a path or a Hub id (org/name)."),
        ("imdb", "Write a path or a Hub id (org/name)."),
        ("a/b/c", "Write a path or a Hub id (org/name)."),
        ("/no/such", "Write a path or a Hub id (org/name)."),
        ("~nobody-here/x", "Write a path or a Hub id (org/name)."),
        ("x" * 5000, "Write a path or a Hub id (org/name)."),
        ('"a\\0b"', "Write a path or a Hub id (org/name)."),
    ],
)
def test_missing_data(only, name, fix):
    problem = only(HEAD + f"  prompts: {name}\nsample:\n")
    assert problem.where == "recipe.yaml:3"
    assert problem.what.startswith("'prompts' in section 'data': there is no file or folder")
    assert problem.fix == fix


def test_missing_evaluation_set_has_its_line(only):
    problem = only(HEAD + "  prompts: prompts.jsonl\nrl: {rewards: [direct]}\nevaluate:\n  sets:\n    a: evil.jsonl\n")
    assert (problem.where, problem.fix) == ("recipe.yaml:7", "Did you mean 'eval.jsonl'?")


def test_name_of_an_evaluation_set_is_checked(only):
    problem = only(
        HEAD + "  prompts: prompts.jsonl\nrl: {rewards: [direct]}\nevaluate:\n  sets:\n    a/b: eval.jsonl\n"
    )
    assert (problem.where, problem.what) == (
        "recipe.yaml:7",
        "the name 'a/b' in section 'evaluate' does not fit.",
    )


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("gpt2", "gpt2"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("own_model", "{}/own_model"),
        ("w.gguf", "{}/w.gguf"),
    ],
)
def test_models(parse, folder, name, resolved):
    (folder / "own_model").mkdir()
    (folder / "w.gguf").touch()
    recipe = parse(f"model: {{path: {name}}}\ndata:\nreport:\n")
    assert recipe.model.path == resolved.format(folder)


@pytest.mark.parametrize("name", ["./own_modell", "wieghts.gguf", "a/b/c", "org/w.gguf"])
def test_missing_model(only, folder, name):
    (folder / "weights.gguf").touch()
    problem = only(f"data:\nreport:\nmodel:\n  path: {name}\n")
    assert problem.where == "recipe.yaml:4"
    assert problem.what == f"'path' in section 'model': there is no file or folder '{name}'."
    assert problem.fix == ("Did you mean 'weights.gguf'?" if name == "wieghts.gguf" else problem.fix)


class TestPrompts:
    HEAD = HEAD + "  prompts: prompts.jsonl\nsample:\nlabel:\n"

    def test_packaged_name_stays_a_name(self, packaged, parse):
        recipe = parse(self.HEAD + "  prompt: general\n")
        assert recipe.label.prompt == "general"
        assert prompt_folder(recipe.label.prompt) == packaged / "prompts" / "general"

    def test_folder_becomes_absolute(self, packaged, parse, folder):
        recipe = parse(self.HEAD + "  prompt: ./own_prompt\n")
        assert recipe.label.prompt == str(folder / "own_prompt")
        assert prompt_folder(recipe.label.prompt) == folder / "own_prompt"

    @pytest.mark.parametrize(
        ("name", "fix"),
        [
            ("genral", "Did you mean 'general'?"),
            ("own_promt", "Did you mean 'own_prompt'?"),
            ("./own_promt", "Did you mean 'own_prompt'?"),
            ("prompts.jsonl", "Write the name of its folder."),
        ],
    )
    def test_wrong(self, packaged, only, name, fix):
        problem = only(self.HEAD + f"  prompt: {name}\n")
        assert (problem.where, problem.fix) == ("recipe.yaml:6", fix)
