"""Reading a recipe's YAML: input that is refused before its contents are checked, and the lines of keys."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_rlaif.errors import Problem
from trl_rlaif.recipe import parse_recipe

GOOD = """\
model: {path: gpt2}
data: {prompts: prompts.jsonl}
sample:
"""


def test_python_object_tag_is_refused_and_not_run(problems, folder):
    marker = folder / "ran"
    found = problems(GOOD + f"  seed: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert found == [
        Problem(
            "the YAML tag '!!python/object/apply:os.mkdir' is not allowed.",
            "recipe.yaml:4",
            "Write a plain value.",
        )
    ]
    assert not marker.exists()


@pytest.mark.parametrize("value", ["!!python/name:os.system ''", "!!binary aGk=", "!!set {a}", "!mine 3"])
def test_other_tags_are_refused(only, value):
    problem = only(GOOD + f"  seed: {value}\n")
    assert problem.where == "recipe.yaml:4"
    assert "is not allowed" in problem.what


def test_alias_bomb_is_refused(only):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for previous, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{previous}'] * 10)}]")
    problem = only("\n".join(lines))
    assert problem.where == "recipe.yaml:5"  # the first list with more than 100,000 values
    assert "100,000" in problem.what


def test_merge_key_bomb_is_refused(only):
    lines = ["a: &a {k0: 1, k1: 2}"]
    for previous, name in zip("abcdefghijklmnopq", "bcdefghijklmnopqr", strict=True):
        lines.append(f"{name}: &{name} {{<<: [*{previous}, *{previous}]}}")
    assert "100,000" in only("\n".join(lines)).what


def test_alias_that_contains_itself(only):
    assert only("a: &a\n  b: *a\n") == Problem("an alias contains itself.", "recipe.yaml:1")


def test_anchors_and_merge_keys_work_and_keep_their_lines(parse):
    recipe = parse(
        """\
model: {path: gpt2}
data: {prompts: prompts.jsonl}
sample: &sizes
  batch_size: 4
evaluate:
  <<: *sizes
  sets: {a: eval.jsonl}
rl: {rewards: [direct]}
"""
    )
    assert recipe.evaluate.batch_size == 4
    assert recipe.line(("evaluate", "batch_size")) == "recipe.yaml:4"
    assert recipe.line(("evaluate", "sets", "a")) == "recipe.yaml:7"


def test_override_of_an_alias_changes_one_place_only(parse):
    text = "model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\nsample: &s {batch_size: 4}\n"
    text += "evaluate: {sets: {a: eval.jsonl}, judge: {path: gpt2}}\nrl: {rewards: [direct]}\n"
    recipe = parse(text.replace("evaluate: {", "evaluate: {<<: *s, "), "sample.batch_size=2")
    assert (recipe.sample.batch_size, recipe.evaluate.batch_size) == (2, 4)


def test_duplicate_key(only):
    problem = only("model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\nsample:\n  top_p: 0.5\n  top_p: 0.6\n")
    assert problem == Problem(
        "the key 'top_p' is written twice; the first is in line 4.", "recipe.yaml:5", "Remove one of them."
    )


def test_invalid_yaml_has_line_and_column(only):
    problem = only("model: {path: gpt2}\ndata: a: b\n")
    assert problem.where == "recipe.yaml:2:8"
    assert problem.what.startswith("this is not valid YAML: mapping values are not allowed here")


def test_tab_is_named(only):
    problem = only("model:\n\tpath: gpt2\n")
    assert problem.where == "recipe.yaml:2:1"
    assert problem.fix == "Indent with spaces, not with tabs."


def test_two_documents(only):
    problem = only(GOOD + "---\nb: 1\n")
    assert problem.where == "recipe.yaml:4:1"
    assert "single document" in problem.what


@pytest.mark.parametrize("text", ["", "# only a comment\n", "~\n", "---\n"])
def test_empty(only, text):
    problem = only(text)
    assert (problem.where, problem.what) == ("recipe.yaml:1", "the recipe is empty.")


@pytest.mark.parametrize(("text", "kind"), [("\n- a\n", "a list"), ("\nhello\n", "a single value")])
def test_top_level_is_no_mapping(only, text, kind):
    problem = only(text)
    assert (problem.where, problem.what) == ("recipe.yaml:2", f"the recipe is {kind}.")


def test_not_utf8(only):
    problem = only(b"model: {path: gpt2}\n# caf\xe9\n")
    assert problem == Problem("this line is not UTF-8.", "recipe.yaml:2", "Save as UTF-8.")


def test_control_character(only):
    assert only("model: {path: gpt2}\n# \x07\n").where == "recipe.yaml:2"


def test_byte_order_mark_is_fine(parse):
    assert parse(b"\xef\xbb\xbf" + GOOD.encode()).model.path == "gpt2"


def test_too_large(only):
    problem = only("# " + "x" * 1_000_000)
    assert (problem.where, problem.what) == ("recipe.yaml", "the recipe is larger than 1,000,000 bytes.")


def test_too_deep(only):
    assert only("a: " + "[" * 20_000).what == "the YAML is nested too deeply."


@pytest.mark.parametrize("value", ["!!int x", "!!bool maybe", "9" * 5000, "2024-13-45", "!!timestamp x"])
def test_unreadable_scalar(only, value):
    problem = only(GOOD + f"  seed: {value}\n")
    assert (problem.where, problem.what) == ("recipe.yaml:4", "this value cannot be read.")


def test_mapping_as_a_key(only):
    assert only(GOOD + "? {a: 1}\n: 2\n") == Problem(
        "a list or mapping is used as a key.", "recipe.yaml:4", "Use a name as the key."
    )


def test_merge_of_a_scalar(only):
    problem = only(GOOD + "  <<: 3\n")
    assert (problem.where, problem.fix) == ("recipe.yaml:4", "Write '<<: *name'.")


def test_lines_are_found_for_keys_and_for_what_is_around_them(parse, folder):
    recipe = parse("# first\n\nmodel:\n  path: gpt2\ndata: {prompts: prompts.jsonl}\nsample:\n  top_p: 0.5\n")
    assert recipe.line(("model", "path")) == "recipe.yaml:4"
    assert recipe.line(("model", "lora", "r")) == "recipe.yaml:3"
    assert recipe.line(("report",)) == "recipe.yaml:3"
    assert recipe.source == folder / "recipe.yaml"


HEAVY = "[m for m in ('torch', 'trl', 'transformers') if m in sys.modules]"


def _printed(code: str) -> str:
    """The output of a fresh Python that runs the code in the current folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_torch():
    assert _printed(f"import sys, trl_rlaif.recipe; print({HEAVY})") == "[]"


def test_recipe_without_trl_fields_does_not_import_trl(folder, registry):
    Path("recipe.yaml").write_text(GOOD + "label: {prompt: ./own_prompt}\nreward: {eval_fraction: 0.2}\n")
    assert parse_recipe("recipe.yaml", registry=registry).reward.eval_fraction == 0.2
    code = (
        "import sys; from pydantic import BaseModel; from trl_rlaif.recipe import parse_recipe\n"
        "class Options(BaseModel): pass\n"
        "class R:\n"
        "    names = lambda self, kind: ['distilled']\n"
        "    options_model = lambda self, kind, name: Options\n"
        f"parse_recipe('recipe.yaml', registry=R()); print({HEAVY})"
    )
    assert _printed(code) == "[]"


@pytest.mark.parametrize("value", ["!!int ''", "!!float ''", "0x" + "f" * 5000, "1" * 4000, "!!timestamp 'x'"])
def test_values_that_yaml_cannot_make_are_refused(only, value):
    problem = only(GOOD + f"  seed: {value}\n")
    assert problem.where == "recipe.yaml:4"
    assert any(words in problem.what for words in ("cannot be read", "too large", "is not allowed"))


def test_variants_without_a_model_are_told_so(problems):
    found = problems("data: {prompts: prompts.jsonl, eval_prompts: prompts.jsonl}\nevaluate: {}\ncompare: [a, b]\n")
    assert any("'model' is missing" in problem.what for problem in found)
