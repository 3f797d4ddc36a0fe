"""What README.md and docs/ must say, whose code must run, and which public names must explain themselves."""

from __future__ import annotations

import inspect
import math
import re
import sys
import textwrap
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jsonschema
import pluggy
import pytest
import torch
import yaml
from helpers.labeling import make_pairs, mapped_in_turn
from helpers.pages import Reader, python_blocks
from helpers.recipes import write_recipe, write_rows
from helpers.trained import add_trained

import trl_rlaif
from trl_rlaif import UserError, hookspecs, testing
from trl_rlaif.cli import app
from trl_rlaif.cli_lists import _schema
from trl_rlaif.data import Pair
from trl_rlaif.files import read_lines
from trl_rlaif.labels import ray as by_ray
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.plugins import ENTRY_POINT_GROUP, KINDS, build_plugins
from trl_rlaif.testing import make_rollout, make_scored_batch

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/**/*.md"))}
PAGES |= {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")
}
README, PLUGINS, RECIPES = PAGES["README.md"], PAGES["docs/plugins.md"], PAGES["docs/recipes.md"]


def _hooks():
    """Every hook with its signature as the documentation writes it: ``name(argument, argument)``."""
    manager = pluggy.PluginManager("trl_rlaif")
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    hooks = [f for name, f in functions if manager.parse_hookspec_opts(hookspecs, name) is not None]
    return [f"{hook.__name__}({', '.join(inspect.signature(hook).parameters)})" for hook in hooks]


def _recipes():
    return sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_there_is_something_to_look_for():
    assert {"register_labelers(register)", "rollout_collected(trainer, rollout)"} <= set(_hooks())
    assert "quickstart" in _recipes()


@pytest.mark.parametrize("signature", _hooks())
def test_the_docs_have_every_hook(signature):
    assert f"`{signature}`" in PLUGINS


@pytest.mark.parametrize("recipe", _recipes())
def test_the_docs_list_every_recipe(recipe):
    assert f"recipes/{recipe}.yaml" in RECIPES


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250
    assert f"[{len(_recipes())} recipes](docs/recipes.md)" in README


def test_the_readmes_shares_are_those_of_the_results_that_it_names():
    files = re.findall(r"\]\((benchmarks/results/\w+\.md)\)", README)
    results = "".join((ROOT / file).read_text(encoding="utf-8") for file in set(files))
    shares = re.findall(r"\d[\d.]*%(?: \(.*?%\))?", README)
    assert len(shares) >= 5 and not [share for share in shares if share not in results]
    evidence = " ".join(PAGES["docs/evidence.md"].split())
    assert not [share for share in shares if share not in evidence]


def test_the_readmes_pictures_are_small_and_name_no_folder_of_a_machine():
    pictures = re.findall(r"!\[[^\]]+\]\((docs/pictures/[\w.]+)\)", README)
    assert pictures == ["docs/pictures/report.png", "docs/pictures/terminal.svg"]
    contents = [(ROOT / picture).read_bytes() for picture in pictures]
    assert max(map(len, contents)) < 150_000 and contents[0].startswith(b"\x89PNG")
    words = re.sub(r"<[^>]*>|&#160;", " ", contents[1].decode())
    assert len(set(re.findall(r"animation-delay: [\d.]+s", contents[1].decode()))) > 10  # a cast
    assert "trl-rlaif run quickstart" in " ".join(words.split()) and not re.search(
        r"/(tmp|home|root|work|Users)/", words
    )


def test_what_the_docs_call_a_hook_or_a_recipe_exists():
    names = {hook.partition("(")[0] for hook in _hooks()}
    calls = re.findall(r"`(\w+)\(([\w, ]*)\)`", README + PLUGINS)
    written = {f"{name}({args})" for name, args in calls if name in names or name.startswith("register_")}
    assert written == set(_hooks())
    assert set(re.findall(r"recipes/([\w-]+)\.yaml", "".join(PAGES.values()))) == set(_recipes())


# ---- Plugins ----------------------------------------------------------------------------------------------


def _examples():
    """By title, the blocks of each section of docs/plugins.md: (language, text)."""
    sections = re.split(r"^## ", PLUGINS, flags=re.MULTILINE)[1:]
    blocks = {s.partition("\n")[0]: re.findall(r"```(\w+)\n(.*?)```", s, re.DOTALL) for s in sections}
    return {title: found for title, found in blocks.items() if found}


def _plugin(source, monkeypatch, name="page_plugin"):
    """A page's code as an installed plugin: its module, and what it registers."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, "plugins.md", "exec", dont_inherit=True), vars(module))
    point = EntryPoint("page", name, ENTRY_POINT_GROUP)
    vars(point).update(dist=SimpleNamespace(name="page", version="0"))
    return module, build_plugins([point])


def test_there_is_an_example_of_every_kind():
    sources = [source for blocks in _examples().values() for language, source in blocks if language == "python"]
    for kind in KINDS:
        assert any(f"def register_{kind}s(register)" in source for source in sources)


COMPONENTS = [title for title, blocks in _examples().items() if blocks[-1][0] == "yaml"]


@pytest.mark.parametrize("title", COMPONENTS)
def test_an_example_is_a_plugin_that_passes_its_test(title, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the example's own server
    (_, source), (_, test), (_, recipe) = _examples()[title]
    module, plugins = _plugin(source, monkeypatch)
    exec(compile(test, title, "exec", dont_inherit=True), vars(module))
    (found,) = plugins.registry
    section = next(iter(yaml.safe_load(recipe).values()))
    named = (
        section.get("labeler") or section.get("sampler") or (section.get("transforms") or section.get("selectors"))[0]
    )
    assert plugins.registry.create(found.kind, found.name, named[found.name])


def test_there_are_examples_with_tests():
    assert len(COMPONENTS) == 5


def test_the_keyword_reward_is_a_reward_too(monkeypatch):
    module, _ = _plugin(_examples()["A labeler that is also a reward"][0][1], monkeypatch)
    labeler = module.KeywordReward(words={"fox": 2.0, "dog": -1.0})
    assert labeler(["x", "x"], ["A fox, a Fox", [{"role": "assistant", "content": "dog"}]]) == [4.0, -1.0]
    [label] = labeler.label([Pair("a", "x", "fox", "dog")], None)
    assert label.p == pytest.approx(1 / (1 + math.exp(-3)))


def test_the_http_judge_skips_what_the_server_cannot_judge(monkeypatch):
    module, _ = _plugin(_examples()["A judge behind an HTTP API"][0][1], monkeypatch)
    labeler = module.HttpJudge(url="http://judge")
    answers = {"good": 0.9, "bad": 0.3}
    monkeypatch.setattr(labeler, "ask", lambda prompt, first, second: answers[first])
    labels = {la.id: la for la in labeler.label([Pair("a", "x", "good", "bad"), Pair("b", "x", "good", "odd")], None)}
    assert labels["a"].p == pytest.approx((0.9 + 0.7) / 2) and labels["a"].p_21 == pytest.approx(0.7)
    assert labels["b"].skipped == "KeyError: 'odd'"


def test_the_mix_is_in_units_of_the_rewards_spreads(monkeypatch):
    module, _ = _plugin(_examples()["A transform that mixes two rewards"][0][1], monkeypatch)
    parts = {"model": torch.tensor([100.0, -100.0]), "direct": torch.tensor([0.0, 0.2])}
    batch = replace(make_scored_batch(2), parts=parts)
    mixed = module.Mix(weights={"model": 1.0, "direct": 0.5}).transform(torch.zeros(2), batch)
    assert mixed.tolist() == pytest.approx([1.0, -1.0 + 0.5 * math.sqrt(2)])
    with pytest.raises(UserError, match="no reward 'other'"):
        module.Mix(weights={"other": 1.0}).transform(torch.zeros(2), batch)


def test_the_watching_plugin_watches(monkeypatch, capsys):
    _, plugins = _plugin(_examples()["A plugin that watches"][0][1], monkeypatch)
    rollout, trainer = make_rollout(3), SimpleNamespace(state=SimpleNamespace(global_step=4))
    plugins.notify("rollout_collected", trainer=trainer, rollout=replace(rollout, ended=torch.zeros(3).bool()))
    plugins.notify("rewards_computed", trainer=trainer, rollout=rollout, rewards=torch.ones(3, 7))
    metrics = {"objective/kl": 3.0, "objective/scores": -1.5}
    plugins.notify("policy_updated", trainer=trainer, metrics=metrics)
    assert metrics["watch/kl_per_score"] == 2.0
    printed = capsys.readouterr().out
    assert "Update 4: no response came to an end." in printed and "7.000 a response, over 3 responses" in printed


def test_what_the_section_on_checks_shows_runs():
    blocks = _examples()["The checks"]
    assert len(blocks) == 1
    exec(compile(blocks[0][1], "plugins.md", "exec", dont_inherit=True), {})


def test_the_docs_name_the_whole_test_kit():
    missing = [name for name in testing.__all__ if f"`{name}" not in PLUGINS and not name.isupper()]
    assert not missing


# ---- Every page -------------------------------------------------------------------------------------------


def _headings(text):
    """As a link writes them."""
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" not in target:
            path, _, heading = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            if heading:
                assert heading in _headings(file.read_text(encoding="utf-8")), target


def _blocks(language, without=()):
    """Each fenced block of a language with its page, as parameters of a test."""
    return [
        pytest.param(textwrap.dedent(block), id=f"{page}-{i}")
        for page, text in PAGES.items()
        if page not in without
        for i, block in enumerate(re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE))
    ]


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_is_python(block):
    compile(block, "page", "exec", dont_inherit=True)


@pytest.fixture(scope="module")
def schema():
    """Of recipes, of which a block may show a part."""
    return _schema() | {"required": []}


@pytest.mark.parametrize("block", _blocks("yaml", without=["docs/plugins.md"]))  # whose plugins are tested above
def test_yaml_is_a_part_of_a_recipe(block, schema):
    errors = [*jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(block))]
    assert not errors, errors[0].message


# Pages whose Python needs more than the folder below, or must give certain numbers: the tests that run all of it.
RUN_BY = {
    "docs/moving_in.md": "test_moving_in.py",
    "docs/plugins.md": "test_docs.py",
    "docs/stock_trl.md": "test_stock_trl.py",
    "docs/tutorials/label_with_a_server.md": "test_tutorials.py",
    "docs/tutorials/own_judge.md": "test_tutorials.py",
    "docs/tutorials/plugin.md": "test_third_party.py",
}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader with a recipe of pairs, my.yaml, and its run in runs/my, whose models are trained."""
    reader = Reader(tmp_path, monkeypatch)
    monkeypatch.setattr(by_ray, "_mapped", mapped_in_turn)
    write_rows(tmp_path / "pairs.jsonl", make_pairs(4))
    write_recipe(tmp_path, reader.model, data={"pairs": "pairs.jsonl"}, sample=None).rename("my.yaml")
    app("run my.yaml --only sample --output runs/my".split(), standalone_mode=False)
    for what in ("reward", "policy", "judge"):
        add_trained(RunFolder(Path("runs/my")), what)
    return reader


def _adapted(model):
    """The sum of what an adapter adds to the weights, as numbers."""
    return sum(p.abs().sum().item() for name, p in model.named_parameters() if "lora_B" in name)


# What shows that a page's Python did what the page says, from its names.
SHOWN = {
    "README.md": lambda names: Path("short-policy/checkpoint-2/adapter_model.safetensors").exists(),
    "docs/cluster.md": lambda names: len(read_lines(Path("runs/my/labels.jsonl"))) == 4,
    "docs/python.md": lambda names: Path("short-policy/adapter_model.safetensors").exists(),
    "docs/teaching.md": lambda names: _adapted(names["judge"]) > 0,
    "docs/tutorials/ppo_24gb.md": lambda names: _adapted(names["policy"]) > 0,
}


def test_the_python_of_every_page_is_run():
    assert {*RUN_BY, *SHOWN} == {page for page, text in PAGES.items() if "```python" in text}
    for page, file in RUN_BY.items():
        assert Path(page).name in (ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", SHOWN)
def test_the_python_of_a_page_runs(page, reader):
    names = {}
    for block in python_blocks(page):
        reader.run(block, names)
    assert SHOWN[page](names)


def test_the_site_shows_every_page():
    """`make docs` says so too, with a warning that stops it."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    shown = set(re.findall(r"[\w/-]+\.md", nav))
    assert {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} <= shown


def test_the_page_on_the_run_folder_has_every_file_that_stays_there():
    names = {value for key, value in vars(artifacts).items() if key.isupper() and isinstance(value, str)}
    internal = {value for key, value in vars(artifacts).items() if key in ("STATE", "LOCK", "DATE", "LABEL_INDEX")}
    gone = {artifacts.PARTIAL_PAIRS, artifacts.PROGRESS}
    page = PAGES["docs/run_folder.md"]
    assert not [
        x for x in names - internal - gone if not re.search(rf"(?:^    |; ){re.escape(x)}/? ", page, re.MULTILINE)
    ]


def test_the_files_that_the_architecture_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:\w+/)+\w+\.py|(?:\w+/)+(?=`)|(?<=`)\w+\.py", text))
    assert len(named) > 40
    assert not {path for path in named if not any((root / path).exists() for root in (ROOT, ROOT / "trl_rlaif"))}


@pytest.mark.parametrize("name", [name for name in trl_rlaif.__all__ if not name.startswith("__")])
def test_every_public_name_has_a_docstring_of_its_own(name):
    value = getattr(trl_rlaif, name)
    documentation = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    assert documentation and documentation.strip()
    assert not documentation.startswith(f"{name}(")  # a dataclass without one gets its signature
