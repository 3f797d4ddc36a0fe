"""Loading plugins by entry point, and naming the plugin that fails."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement
from pydantic import Field

from trl_rlaif import (
    DataSelector,
    Labeler,
    Options,
    RewardTransform,
    RunError,
    UserError,
    __version__,
    hookimpl,
    interrupts,
)
from trl_rlaif.plugins import ENTRY_POINT_GROUP, Plugins, Registry, build_plugins, installed_plugins
from trl_rlaif.validation import Origin


class WordOptions(Options):
    word: str = "please"
    weight: float = Field(1.0, gt=0)


class WordLabeler(Labeler):
    Options = WordOptions

    def label(self, pairs, judge, done=()):
        yield from ()


class FirstHalf(DataSelector):
    def select(self, pool):
        return range(len(pool.prompts) // 2)


@pytest.fixture
def make_point(monkeypatch):
    """Makes a plugin's entry point: a module with these hooks, from a distribution that is not installed."""
    count = 0

    def make(*hooks, distribution="acme-words", version="1.2", name="words", module=None, requires=None):
        nonlocal count
        count += 1
        plugin = ModuleType(module or f"fake_plugin_{count}")
        for hook in hooks:
            setattr(plugin, hook.__name__, hook)
        if module is None:
            monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
        point = EntryPoint(name, plugin.__name__, ENTRY_POINT_GROUP)
        dist = SimpleNamespace(name=distribution, version=version, requires=requires)
        vars(point).update(dist=distribution and dist)
        return point

    return make


def labeler_hook(name="words", component=WordLabeler):
    @hookimpl
    def register_labelers(register):
        register(name, component)

    return register_labelers


def message(points):
    """The error message from loading these plugins."""
    with pytest.raises(UserError) as caught:
        build_plugins(points)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- Successful loading ---------------------------------------------------------------------------------


def test_components_of_every_kind_are_found_by_name(make_point):
    @hookimpl
    def register_reward_transforms(register):
        register("plain", RewardTransform)

    @hookimpl
    def register_data_selectors(register):
        register("half", FirstHalf)

    both = make_point(labeler_hook(), labeler_hook(), register_data_selectors)
    registry = build_plugins([both, make_point(register_reward_transforms, distribution="other")]).registry
    assert registry.names("labeler") == ["words"]
    assert registry.find("data_selector", "half").component is FirstHalf
    assert registry.find("reward_transform", "plain").distribution == "other"
    assert registry.options_model("labeler", "words") is WordOptions
    assert isinstance(registry.create("reward_transform", "plain"), RewardTransform)
    assert [(r.kind, r.name) for r in registry] == [
        ("data_selector", "half"), ("labeler", "words"), ("reward_transform", "plain"),
    ]  # fmt: skip


def test_one_distribution_may_bring_several_plugins_and_one_name_two_kinds(make_point):
    @hookimpl
    def register_data_selectors(register):
        register("words", FirstHalf)

    points = [make_point(labeler_hook()), make_point(register_data_selectors, name="more")]
    registry = build_plugins(points).registry
    assert registry.names("labeler") == registry.names("data_selector") == ["words"]


def test_no_plugins_no_components():
    registry = build_plugins([]).registry
    assert list(registry) == [] and registry.names("labeler") == []


def test_a_function_without_the_marker_is_no_hook(make_point):
    def register_labelers(register):
        raise AssertionError("not a hook")

    assert build_plugins([make_point(register_labelers)]).registry.names("labeler") == []


def test_what_is_installed_is_loaded_once():
    assert installed_plugins() is installed_plugins()
    assert "distilled" in installed_plugins().registry.names("labeler")


def test_a_component_knows_its_distributions_version(make_point):
    found = build_plugins([make_point(labeler_hook())]).registry.find("labeler", "words")
    assert (found.distribution, found.version) == ("acme-words", "1.2")


def test_a_hook_may_have_a_name_of_its_own(make_point):
    @hookimpl(specname="register_labelers")
    def bring_words(register):
        register("words", WordLabeler)

    assert build_plugins([make_point(bring_words)]).registry.names("labeler") == ["words"]


# ---- Errors while loading -------------------------------------------------------------------------------


def test_two_plugins_with_one_name(make_point):
    text = message([make_point(labeler_hook()), make_point(labeler_hook(), distribution="rival")])
    assert "labeler 'words'" in text and "acme-words" in text and "rival" in text and "Uninstall" in text


def test_one_plugin_that_registers_a_name_twice(make_point):
    @hookimpl
    def register_labelers(register):
        register("words", WordLabeler)
        register("words", WordLabeler)

    assert "acme-words" in message([make_point(register_labelers)])


@pytest.mark.parametrize("component", [FirstHalf, dict, WordLabeler(), "WordLabeler", None, lambda: WordLabeler()])
def test_a_component_of_another_kind(make_point, component):
    text = message([make_point(labeler_hook("odd", component))])
    assert "acme-words" in text and "labeler 'odd'" in text and "trl_rlaif.Labeler" in text


def test_a_module_that_is_not_there(make_point):
    text = message([make_point(labeler_hook(), module="no_such_module_anywhere")])
    assert "acme-words 1.2" in text and "no_such_module_anywhere" in text and "ModuleNotFoundError" in text


@pytest.mark.parametrize("line", ["raise RuntimeError('half installed')", "import no_such_module_anywhere", "def x(:"])
def test_a_module_that_fails_while_it_is_imported(make_point, tmp_path, monkeypatch, line):
    (tmp_path / "breaking_plugin.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "breaking_plugin", raising=False)
    text = message([make_point(module="breaking_plugin")])
    assert "acme-words 1.2" in text and "breaking_plugin" in text and "uninstall" in text


@pytest.mark.parametrize("needed", ["trl-rlaif>=99", "trl_rlaif >= 99, != 100", "TRL-RLAIF<0.1; python_version > '3'"])
def test_a_plugin_for_another_release_says_so_before_it_is_imported(make_point, needed):
    text = message([make_point(module="no_such_module_anywhere", requires=["numpy", "trl>=1", needed])])
    specifier = Requirement(needed).specifier
    assert f"acme-words 1.2 (words) needs trl-rlaif {specifier}, and this is {__version__}." in text
    assert "ModuleNotFoundError" not in text and "Install such a release" in text


@pytest.mark.parametrize(
    "needed",
    [
        "trl-rlaif",
        f"trl-rlaif<=99,>={__version__}",
        "trl-rlaif>=99; extra == 'new'",
        "trl-rlaif>=99; python_version < '3'",
        "trl-rlaif-more>=99",
        "trl>=0",
    ],
)
def test_a_plugin_for_this_release_is_loaded(make_point, needed):
    assert list(build_plugins([make_point(labeler_hook(), requires=[needed])]).registry)


def test_an_attribute_that_is_not_there(make_point):
    point = make_point(labeler_hook())
    missing = EntryPoint(point.name, f"{point.value}:plugin", point.group)
    vars(missing).update(dist=point.dist)
    text = message([missing])
    assert "acme-words" in text and ":plugin" in text and "AttributeError" in text


def test_a_hook_that_does_not_exist(make_point):
    @hookimpl
    def register_labellers(register):
        pass

    text = message([make_point(labeler_hook()), make_point(register_labellers, distribution="typo")])
    assert "typo 1.2" in text and "register_labellers" in text and "acme-words" not in text


def test_a_hook_with_an_argument_that_does_not_exist(make_point):
    @hookimpl
    def rollout_collected(trainer, rollouts):
        pass

    text = message([make_point(rollout_collected)])
    assert "acme-words 1.2" in text and "rollout_collected" in text and "rollouts" in text


def test_a_register_hook_that_raises(make_point):
    @hookimpl
    def register_reward_transforms(register):
        raise KeyError("no licence")

    text = message([make_point(register_reward_transforms)])
    assert "acme-words" in text and "register_reward_transforms" in text and "KeyError: 'no licence'" in text


def test_a_register_hook_that_calls_register_in_the_wrong_way(make_point):
    @hookimpl
    def register_labelers(register):
        register(WordLabeler)

    text = message([make_point(register_labelers)])
    assert "acme-words" in text and "register_labelers" in text and "TypeError" in text


def test_one_plugin_installed_twice(make_point):
    point = make_point(labeler_hook())
    text = message([point, point])
    assert "acme-words 1.2" in text and "twice" in text
    again = EntryPoint("alias", point.value, point.group)
    vars(again).update(dist=SimpleNamespace(name="copycat", version="3"))
    assert "copycat 3" in message([point, again])


def test_without_a_distribution_the_module_is_named(make_point):
    point = make_point(labeler_hook("odd", dict), distribution=None)
    assert point.value in message([point])


# ---- Lookup and creation --------------------------------------------------------------------------------


@pytest.fixture
def registry(make_point) -> Registry:
    return build_plugins([make_point(labeler_hook())]).registry


def test_a_name_that_is_nearly_right(registry):
    with pytest.raises(UserError) as caught:
        registry.find("labeler", "wrods")
    assert str(caught.value) == "There is no labeler 'wrods'. Did you mean 'words'?"


def test_a_name_that_is_not_near_to_any(registry):
    with pytest.raises(UserError, match="There is no labeler 'xyz'. Known: words."):
        registry.find("labeler", "xyz")
    with pytest.raises(UserError, match="There is no data selector 'words'. Known: none is installed."):
        registry.find("data_selector", "words")


def test_options_are_typed_and_have_defaults(registry):
    assert registry.create("labeler", "words").options == WordOptions()
    options = registry.create("labeler", "words", {"word": "thanks", "weight": 2}).options
    assert (options.word, options.weight) == ("thanks", 2.0)


def test_all_wrong_options_are_reported_at_once_with_the_distribution(registry):
    with pytest.raises(UserError) as caught:
        registry.create("labeler", "words", {"word": 5, "weight": -1, "wieght": 2})
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems) == 3
    assert all("acme-words" in line and "labeler 'words'" in line for line in lines)
    for option in ("word", "weight", "wieght"):
        assert any(f"'{option}'" in line for line in lines)


def test_the_options_of_a_component_that_takes_none(registry):
    registry.add("data_selector", "half", FirstHalf, "acme-words", "1.2")
    with pytest.raises(UserError, match="'share'"):
        registry.create("data_selector", "half", {"share": 0.5})


# ---- Observing hooks ------------------------------------------------------------------------------------


def test_observing_hooks_get_what_they_ask_for(make_point):
    seen = []

    @hookimpl
    def rewards_computed(trainer, rollout, rewards):
        seen.append(("all", trainer, rollout, rewards))

    def other():
        @hookimpl
        def rewards_computed(rewards, trainer):
            seen.append(("two", rewards, trainer))

        return rewards_computed

    def third():
        @hookimpl
        def rewards_computed():
            seen.append(("none",))

        return rewards_computed

    hooks = (rewards_computed, other(), third())
    plugins = build_plugins([make_point(hook, distribution=f"d{i}") for i, hook in enumerate(hooks)])
    plugins.notify("rewards_computed", trainer="T", rollout="R", rewards="W")
    assert sorted(seen) == [("all", "T", "R", "W"), ("none",), ("two", "W", "T")]
    plugins.notify("policy_updated", trainer="T", metrics={})  # no plugin observes it
    assert len(seen) == 3


def test_an_observing_hook_of_an_object_gets_no_self(make_point):
    class Watcher:
        def __init__(self):
            self.seen = []

        @hookimpl
        def policy_updated(self, metrics):
            self.seen.append(metrics)

    point = make_point()
    sys.modules[point.value].watcher = watcher = Watcher()
    instance = EntryPoint("w", f"{point.value}:watcher", point.group)
    vars(instance).update(dist=point.dist)
    build_plugins([instance]).notify("policy_updated", trainer=None, metrics={"a": 1})
    assert watcher.seen == [{"a": 1}]


def test_an_observing_hook_that_raises_stops_the_run_and_is_named(make_point):
    @hookimpl
    def policy_updated(metrics):
        raise ValueError("no such column")

    plugins: Plugins = build_plugins([make_point(policy_updated, name="logger")])
    with pytest.raises(RunError) as caught:
        plugins.notify("policy_updated", trainer=None, metrics={})
    assert caught.value.exit_code == 1 and isinstance(caught.value.__cause__, ValueError)
    for part in ("acme-words 1.2", "logger", "policy_updated", "ValueError: no such column"):
        assert part in str(caught.value)


def test_an_interruption_in_a_hook_is_not_the_plugins_fault(make_point):
    @hookimpl
    def policy_updated(metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plugins([make_point(policy_updated)]).notify("policy_updated", trainer=None, metrics={})


ENDING = [SystemExit(0), KeyboardInterrupt(), GeneratorExit()]


@pytest.fixture
def listening(monkeypatch):
    """Listens as the command does, so that a KeyboardInterrupt is not taken for the user's."""
    monkeypatch.setattr(interrupts, "_listening", True)


@pytest.mark.parametrize("error", ENDING, ids=repr)
def test_a_plugin_that_would_end_the_program_at_import_is_blamed(tmp_path, monkeypatch, listening, make_point, error):
    (tmp_path / "ending_plugin.py").write_text(f"raise {error!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"acme-words 1.2 .*cannot be imported.*{type(error).__name__}"):
        build_plugins([make_point(module="ending_plugin")])
    assert "ending_plugin" not in sys.modules


@pytest.mark.parametrize("error", ENDING, ids=repr)
def test_a_hook_that_would_end_the_program_is_blamed(listening, make_point, error):
    def raises(*_):
        raise error

    @hookimpl
    def register_labelers(register):
        raises()

    with pytest.raises(UserError, match=f"acme-words 1.2 .*failed in register_labelers: {type(error).__name__}"):
        build_plugins([make_point(register_labelers)])

    @hookimpl
    def policy_updated(trainer, metrics):
        raises()

    plugins = build_plugins([make_point(policy_updated)])
    with pytest.raises(RunError, match=f"failed in its hook policy_updated: {type(error).__name__}"):
        plugins.notify("policy_updated", trainer=None, metrics={})
    # A generator that is closed early is nobody's fault.
    blamed = GeneratorExit if isinstance(error, GeneratorExit) else RunError
    with pytest.raises(blamed, match="" if blamed is GeneratorExit else "labeler 'words' failed in label: "):
        with Origin("labeler 'words'").blamed("label"):
            raises()


@pytest.mark.parametrize("error", [interrupts.CtrlC(), KeyboardInterrupt()])
def test_the_users_own_ctrl_c_blames_nobody(monkeypatch, error):
    monkeypatch.setattr(interrupts, "_listening", isinstance(error, interrupts.CtrlC))
    with pytest.raises(KeyboardInterrupt), Origin("labeler 'words'").blamed("label"):
        raise error


def test_a_half_removed_distribution_is_named_by_its_folder(make_point):
    point = make_point(distribution=None, module="no_such_module")
    vars(point).update(dist=SimpleNamespace(name=None, version=None, requires=None, _path="/site/acme-1.0.dist-info"))
    with pytest.raises(UserError, match=r"plugin of /site/acme-1.0.dist-info \(half installed\) \(words\) cannot"):
        build_plugins([point])


def test_the_others_are_listed_beside_a_broken_one(make_point):
    broken: list = []
    found = build_plugins([make_point(module="no_such_module", name="gone"), make_point(labeler_hook())], broken)
    assert [each.name for each in found.registry] == ["words"]
    assert [problem.what.split(" cannot")[0] for problem in broken] == ["The plugin acme-words 1.2 (gone)"]
