"""Faulty components in a run: one message with who, where and what, exit code 1, and a run that can be resumed."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.recipes import write_recipe

from trl_rlaif import DataSelector, Label, Labeler, RewardTransform, RunError, Selection, UserError, cli, hookimpl
from trl_rlaif.files import read_lines
from trl_rlaif.plugins import ENTRY_POINT_GROUP, Registered, build_plugins
from trl_rlaif.reward.trainer import RewardTrainer
from trl_rlaif.rl.reward_functions import call_rewards
from trl_rlaif.rl.selection import responses_needed, select
from trl_rlaif.testing import make_pairs, make_pool, make_preference_scores, make_rollout, make_scored_batch
from trl_rlaif.validation import ComponentError, Origin, RewardError, tagged, validated

WHERE = "my.yaml:7"


def _picked(kind, base, **methods):
    """A component with these methods, as picked by a recipe."""
    cls = type("Acme", (base,), methods)
    return validated(cls(), Origin.of(Registered(kind, "acme", cls, "acme-words", "1.2"), WHERE))


def _message(kind, call, *parts, error=ComponentError):
    with pytest.raises(RunError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error and caught.value.exit_code == 1
    assert text.startswith(f"{WHERE}: The {kind} 'acme' of acme-words 1.2 ") and text.endswith(
        "continue with --resume."
    )
    assert all(part in text for part in parts), text
    return caught.value


def _raise(*arguments, **named):
    raise ValueError("no such word")


# ---- Labels ---------------------------------------------------------------------------------------------


def _each(make):
    return lambda self, pairs, judge, done=(): (make(pair) for pair in pairs if pair.id not in done)


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        (_each(lambda pair: Label(pair.id, p=float("nan"))), ["yields p = nan of 'pair-0', outside [0, 1]"]),
        (_each(lambda pair: Label(pair.id, p=1.01)), ["yields p = 1.01 of 'pair-0'", "clamp"]),
        (_each(lambda pair: Label(pair.id, p=torch.tensor(0.5))), ["yields a Tensor as p", "float(...)"]),
        (_each(lambda pair: Label(pair.id, p=0.5, mass_12=2.0)), ["mass_12 = 2.0"]),
        (_each(lambda pair: Label(pair.id)), ["neither p nor a reason"]),
        (_each(lambda pair: Label(pair.id, p=0.5, judge={1})), ["cannot be written as JSON"]),
        (_each(lambda pair: pair.id), ["yields a str", "trl_rlaif.Label(pair.id, p=...)"]),
        (_each(lambda pair: Label(pair.id.upper(), p=0.5)), ["the id 'PAIR-0', which no pair has"]),
        (_each(lambda pair: Label([pair.id], p=0.5)), ["the id ['pair-0'], which no pair has"]),
        (lambda self, pairs, judge, done=(): [Label("pair-0", p=0.5)] * 2, ["two labels of 'pair-0'"]),
        (lambda self, pairs, judge, done=(): [Label("pair-3", p=0.5)], ["labels 'pair-3' again"]),
        (lambda self, pairs, judge, done=(): [Label("pair-1", p=0.5)], ["no label of 'pair-0'. Yield"]),
        (lambda self, pairs, judge, done=(): [], ["no label of 'pair-0' and 1 more"]),
        (lambda self, pairs, judge, done=(): None, ["failed in label(): TypeError"]),
        (lambda self, pairs: [], ["failed in label(): TypeError"]),
        (_raise, ["failed in label(): ValueError: no such word.", "--debug"]),
        (_each(_raise), ["failed in label(): ValueError: no such word."]),
    ],
)
def test_a_labeler(label, parts):
    labeler = _picked("labeler", Labeler, label=label)
    _message("labeler", lambda: list(labeler.label(make_pairs(4)[:4], None, {"pair-3", "pair-2"})), *parts)


def test_a_labelers_good_labels_come_one_by_one_and_it_is_closed_at_the_first_bad_one():
    asked, ends = [], []

    def label(self, pairs, judge, done=()):
        try:
            for pair in pairs:
                asked.append(pair.id)
                yield Label(pair.id, p=0.5 if len(asked) < 3 else None)
        finally:
            ends.append(len(asked))

    found = _picked("labeler", Labeler, label=label).label(make_pairs(4), None)
    assert next(found).id == "pair-0" and asked == ["pair-0"]
    assert next(found).id == "pair-1"
    _message("labeler", lambda: next(found), "of 'pair-2' with neither")
    assert ends == [3]


def test_what_speaks_to_users_keeps_its_type_and_is_given_the_place():
    def label(self, pairs, judge, done=()):
        raise UserError("There is no key.", fix="Set ACME_KEY.")

    with pytest.raises(UserError) as caught:
        list(_picked("labeler", Labeler, label=label).label(make_pairs(2), None))
    assert str(caught.value) == f"{WHERE}: There is no key. Set ACME_KEY." and caught.value.exit_code == 2


def test_an_interruption_is_nobodys_fault():
    def label(self, pairs, judge, done=()):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(_picked("labeler", Labeler, label=label).label(make_pairs(2), None))


# ---- Transforms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "parts"),
    [
        (lambda self, scores, batch: scores.mean(), ["returns the shape () for (6,)"]),
        (lambda self, scores, batch: scores[1:], ["returns the shape (5,) for (6,)"]),
        (lambda self, scores, batch: scores / 0, ["not finite", "Guard divisions"]),
        (lambda self, scores, batch: scores.double(), ["returns torch.float64", ".float()"]),
        (lambda self, scores, batch: scores > 0, ["returns torch.bool"]),
        (lambda self, scores, batch: scores.to("meta"), ["returns scores on meta for cpu"]),
        (lambda self, scores, batch: None, ["returns a NoneType"]),
        (lambda self, scores, batch: scores.tolist(), ["returns a list"]),
        (_raise, ["failed in transform(): ValueError: no such word."]),
    ],
)
def test_a_transforms_scores(transform, parts):
    component = _picked("reward_transform", RewardTransform, transform=transform)
    _message("reward transform", lambda: component.transform(torch.ones(6), make_scored_batch()), *parts)


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        (lambda self, scores: scores.chosen - scores.rejected, ["gives shape (6,) as its loss"]),
        (lambda self, scores: scores.chosen.mean() / 0, ["gives tensor(", "finite scalar"]),
        (lambda self, scores: 0.5, ["gives 0.5 as its loss"]),
        (lambda self, scores: scores.chosen.mean().detach(), ["without gradient", "detach()"]),
        (_raise, ["failed in loss(): ValueError: no such word."]),
    ],
)
def test_a_transforms_loss(loss, parts):
    component = _picked("reward_transform", RewardTransform, loss=loss)
    trainer = SimpleNamespace(reward_transforms=[component])
    scores = make_preference_scores()
    _message("reward transform", lambda: RewardTrainer.preference_loss(trainer, scores), *parts)


def test_a_model_that_diverged_is_not_the_transforms_fault():
    scores = make_preference_scores()
    scores.chosen.data[0] = float("nan")
    component = _picked("reward_transform", RewardTransform, loss=lambda self, scores: scores.chosen.mean())
    assert component.loss(scores).isnan()


@pytest.mark.parametrize("method", ["metrics", "state_dict", "load_state_dict"])
def test_a_transforms_other_methods_are_named(method):
    component = _picked("reward_transform", RewardTransform, **{method: _raise})
    arguments = [{}] if method == "load_state_dict" else []
    _message("reward transform", lambda: getattr(component, method)(*arguments), f"failed in {method}(): ValueError")


# ---- Selectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choose", "parts"),
    [
        (lambda self, pool: [8], ["chose the index 8 of a pool of 8", "counted from 0"]),
        (lambda self, pool: [-1], ["chose the index -1"]),
        (lambda self, pool: [], ["chose 0 rows of 8"]),
        (lambda self, pool: Selection(prompts=np.array([], dtype=int)), ["chose 0 rows of 8"]),
        (lambda self, pool: [1.0], ["returns 1.0, which is no index"]),
        (lambda self, pool: torch.tensor([0.0]), ["which is no index"]),
        (lambda self, pool: pool.scores > 0, ["returns a mask"]),
        (lambda self, pool: (pool.scores > 0).numpy(), ["returns a mask"]),
        (lambda self, pool: "all", ["returns a str"]),
        (lambda self, pool: None, ["returns a NoneType"]),
        (lambda self, pool: Selection([0, 1], strata=["a"]), ["strata that do not belong"]),
        (lambda self, pool: Selection(rehearsal=[pool.prompts[0]]), ["rehearses a list"]),
        (lambda self, pool: Selection(clusters=[0]), ["1 clusters for 8 rows"]),
        (_raise, ["failed in select(): ValueError: no such word."]),
    ],
)
def test_a_selector(choose, parts):
    selector = _picked("data_selector", DataSelector, select=choose)
    _message("data selector", lambda: select([selector], make_pool(8, 1)), *parts)


@pytest.mark.parametrize("count", [0, 2.0, "2", None, property(_raise)])
def test_a_selectors_number_of_responses(count):
    selector = _picked("data_selector", DataSelector, select=_raise, num_responses=count)
    _message("data selector", lambda: responses_needed(selector), "num_responses")


@pytest.mark.parametrize("rows", [[0, 2], (2,), range(3), np.array([1]), torch.tensor([1, 0]), [np.int64(1)]])
def test_a_selectors_indices_may_be_of_any_kind(rows):
    selector = _picked("data_selector", DataSelector, select=lambda self, pool: rows)
    assert select([selector], make_pool(8, 1)).rows == [int(row) for row in rows]


# ---- Reward functions -----------------------------------------------------------------------------------

REWARDS = [
    (lambda **c: [1.0], "returned 1 rewards for 6 completions"),
    (lambda **c: [0.0] * 5 + [float("nan")], "returned nan for 1 of 6 completions"),
    (lambda **c: [float("inf")] * 6, "returned inf for 6 of 6"),
    (lambda **c: ["good"] * 6, "returned good for 6 of 6"),
    (lambda **c: torch.zeros(6, 2), "returned [0.0, 0.0] for 6 of 6"),
    (lambda **c: None, "returned None for 6 completions"),
    (lambda **c: 1.0, "returned 1.0 for 6 completions"),
]


@pytest.mark.parametrize(("function", "what"), REWARDS)
def test_a_reward_function(function, what):
    function = tagged(function, Origin("reward function 'acme' of acme-words 1.2", WHERE))
    error = _message("reward function", lambda: call_rewards([function], make_rollout(6)), what, error=RewardError)
    assert isinstance(error, UserError)  # so that trainers save their progress


def test_a_reward_function_that_raises():
    async def later(**columns):
        _raise()

    for function in (lambda **c: _raise(), later):
        function = tagged(function, Origin("reward function 'acme' of acme-words 1.2", WHERE))
        error = _message(
            "reward function", lambda f=function: call_rewards([f], make_rollout(6)),
            "ValueError: no such word.", error=RewardError,
        )  # fmt: skip
        assert isinstance(error.__cause__, ValueError)


# ---- Outside of recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "what"), REWARDS)
def test_what_no_recipe_picked_breaks_a_rule_with_a_user_error(function, what):
    with pytest.raises(UserError, match="The reward function '<lambda>' returned") as caught:
        call_rewards([function], make_rollout(6))
    assert type(caught.value) is UserError and what in str(caught.value)

    class Nothing(DataSelector):
        def select(self, pool):
            return []

    with pytest.raises(UserError, match="The data selector Nothing chose 0 rows"):
        select([Nothing()], make_pool(8, 1))


def test_what_no_recipe_picked_raises_what_it_raises():
    with pytest.raises(ValueError, match="no such word"):
        call_rewards([_raise], make_rollout(6))
    with pytest.raises(ValueError, match="no such word"):
        select([type("Raises", (DataSelector,), {"select": _raise})()], make_pool(8, 1))


def test_a_guard_is_set_once_and_a_component_stays_what_it_is():
    class Doubled(RewardTransform):
        def transform(self, scores, batch):
            return 2 * scores

    component = Doubled()
    assert validated(validated(component)) is component and type(component) is Doubled
    assert component.transform(torch.ones(3), make_scored_batch(3)).tolist() == [2.0] * 3
    assert component.loss(make_preference_scores()) is None


# ---- Whole runs -----------------------------------------------------------------------------------------


class Trouble:
    """The faulty kind of component, and after how many calls it fails; None once it is fixed."""

    kind, after, calls = None, 0, 0

    @classmethod
    def at(cls, kind):
        cls.calls += cls.kind == kind
        return cls.kind == kind and cls.calls > cls.after


class Words(Labeler):
    def label(self, pairs, judge, done=()):
        for pair in pairs:
            if pair.id not in done:
                yield Label(pair.id, p=float("nan") if Trouble.at("labeler") else 0.75)


class Calm(RewardTransform):
    total = 0.0

    def transform(self, scores, batch):
        self.total += scores.sum().item()
        return scores[:1] if Trouble.at("reward transform") else scores - self.total / 100

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


class Pick(DataSelector):
    def select(self, pool):
        return [len(pool)] if Trouble.at("data selector") else range(6)


@pytest.fixture
def trouble(monkeypatch):
    """Installs a plugin with one faulty component of each kind."""

    @hookimpl
    def register_labelers(register):
        register("acme", Words)

    @hookimpl
    def register_reward_transforms(register):
        register("acme", Calm)

    @hookimpl
    def register_data_selectors(register):
        register("acme", Pick)

    module = ModuleType("acme_words")
    for hook in (register_labelers, register_reward_transforms, register_data_selectors):
        setattr(module, hook.__name__, hook)
    monkeypatch.setitem(sys.modules, "acme_words", module)
    point = EntryPoint("acme", "acme_words", ENTRY_POINT_GROUP)
    vars(point).update(dist=SimpleNamespace(name="acme-words", version="1.2"))
    plugins = build_plugins([point])
    monkeypatch.setattr("trl_rlaif.plugins.installed_plugins", lambda: plugins)
    for name in ("kind", "after", "calls"):
        monkeypatch.setattr(Trouble, name, getattr(Trouble, name))
    return Trouble


def _run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl-rlaif", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, capsys.readouterr().err


def _line(path, key):
    return 1 + next(i for i, line in enumerate(path.read_text().splitlines()) if line.strip().startswith(key))


def test_labels_before_a_bad_one_are_kept_and_the_run_goes_on(trouble, tiny_model, tmp_path, monkeypatch, capsys):
    pairs = [{"prompt": f"why {i}?", "response_1": "yes", "response_2": "no"} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rest = dict.fromkeys(("sample", "reward", "rl", "evaluate", "report"))
    recipe = write_recipe(tmp_path, tiny_model, data={"pairs": "pairs.jsonl"}, label={"labeler": "acme"}, **rest)
    out, place = tmp_path / "out", f"{recipe.name}:{_line(recipe, 'labeler:')}: "

    trouble.kind, trouble.after = "labeler", 3
    code, stderr = _run(monkeypatch, capsys, "run", recipe, "--output", out)
    assert code == 1 and "Traceback" not in stderr
    assert f"{place}The labeler 'acme' of acme-words 1.2 yields p = nan of " in stderr
    kept = read_lines(out / "labels.jsonl")
    assert len(kept) == 3

    monkeypatch.setattr(sys, "argv", ["trl-rlaif", "--debug", "run", str(recipe), "--output", str(out), "--resume"])
    with pytest.raises(ComponentError):  # with its traceback
        cli.main()
    trouble.kind = None
    code, _ = _run(monkeypatch, capsys, "run", recipe, "--output", out, "--resume")
    rows = read_lines(out / "labels.jsonl")
    assert code == 0 and rows[:3] == kept and [row["p"] for row in rows] == [0.75] * 5


REWARD = """
from test_validation import Trouble

def length(prompts, completions, completion_ids, **columns):
    rewards = [-len(ids) / 10 for ids in completion_ids]
    return rewards[1:] if Trouble.at("reward function") else rewards
"""


def test_a_run_of_rl_goes_on_as_if_nothing_had_happened(trouble, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "test_validation", sys.modules[__name__])
    (tmp_path / "rewards.py").write_text(REWARD)
    rl = {"rewards": ["rewards.py:length"], "transforms": ["acme"], "selectors": ["acme"], "selection_every": 2}
    rest = dict.fromkeys(("sample", "label", "reward", "evaluate", "report"))
    recipe = write_recipe(tmp_path, tiny_model, rl=rl | {"total_episodes": 16}, **rest)
    assert _run(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "whole")[0] == 0
    whole = _scores(tmp_path / "whole")
    assert len(whole) == 4
    parts = {
        # The first calls score the selection's pool.
        "reward transform": (4, "transforms", "'acme' of acme-words 1.2 returns the shape (1,) for (4,)"),
        "data selector": (1, "selectors", "'acme' of acme-words 1.2 chose the index 10 of a pool of 10"),
        "reward function": (4, "rewards", f"'length' of {tmp_path}/rewards.py returned 3 rewards for 4"),
    }
    for kind, (after, key, message) in parts.items():
        out, place = tmp_path / key, f"{recipe.name}:{_line(recipe, key + ':') + 1}: "
        trouble.kind, trouble.after, trouble.calls = kind, after, 0
        code, stderr = _run(monkeypatch, capsys, "run", recipe, "--output", out)
        assert code == 1 and f"{place}The {kind} {message}" in stderr and "Traceback" not in stderr, stderr
        assert 0 < len(_scores(out)) < 4
        trouble.kind = None
        assert _run(monkeypatch, capsys, "run", recipe, "--output", out, "--resume")[0] == 0
        assert _scores(out) == whole, kind


def _scores(folder):
    rows = read_lines(folder / "metrics.jsonl")
    return [(row["step"], row["objective/scores"]) for row in rows if "objective/scores" in row]
