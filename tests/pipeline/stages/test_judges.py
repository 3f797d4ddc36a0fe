"""Several judges in the evaluate stage: each is asked, and its numbers match samples.jsonl."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import weakref
from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace

import pytest
from helpers.judges import PARTS, ScriptedJudge
from helpers.recipes import fingerprints, tiny_recipe, write_prompts
from helpers.tiny import save_tiny_model
from scipy.optimize import minimize
from sklearn.metrics import cohen_kappa_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rlaif import LocalJudge, Pair
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import judge_panel as judges_module
from trl_rlaif.evaluation import win_rate
from trl_rlaif.evaluation.judge_panel import ask_judges, asking, check_servers, judged_numbers
from trl_rlaif.files import read_lines
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.pipeline import judges as run_judges
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.label_tasks import label_tasks
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import prompt_folder

RL = {"rewards": ["helpers.rewards:length_penalty"], "total_episodes": 8, "learning_rate": 3e-2, "save_strategy": "no"}
WITHOUT = {"sample": None, "label": None, "reward": None, "report": None}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run with three judges and ratings: (folder, path of the judge that is a different model)."""
    base = tmp_path_factory.mktemp("judges")
    other = save_tiny_model(base / "other", seed=5)
    write_prompts(base / "many.jsonl", 12, start=40)
    for name in ("main", "helpful", "harmless"):  # short: the tiny models have a context of 512 tokens
        (base / name).mkdir()
        for part, text in PARTS.items():
            (base / name / part).write_text(text.replace("You are a judge.", f"You are the {name} judge."))
    judges = {"helpful": {"prompt": "helpful"}, "other": {"judge": {"path": other, "dtype": "float32"}}}
    evaluate = {"judges": judges, "harmless": "harmless", "prompt": "main", "sets": {"test": "many.jsonl"}}
    recipe = tiny_recipe(base, tiny_model, rl=RL, evaluate=evaluate, **WITHOUT)
    return run_recipe(recipe, installed_plugins(), base / "out"), other


def _different(samples):
    return [s for s in samples if s["start"] != s["trained"]]


def _win_rate(values):
    return statistics.fmean(0.5 if p == 0.5 else float(p > 0.5) for p in values)


def _at_equal_length(values, samples):
    """The length-controlled fit by definition, minimized with scipy."""
    y = [0.5 if p == 0.5 else float(p > 0.5) for p in values]
    gaps = [len(s["trained"]) - len(s["start"]) for s in samples]
    x = [math.tanh(gap / statistics.stdev(gaps)) for gap in gaps]

    def loss(parameters):
        a, b = parameters
        fits = (math.log1p(math.exp(-(a + b * u))) * v + math.log1p(math.exp(a + b * u)) * (1 - v)
                for u, v in zip(x, y, strict=True))  # fmt: skip
        return sum(fits) + 0.05 * b * b

    a, _ = minimize(loss, [0.0, 0.0], tol=1e-12).x
    return 1 / (1 + math.exp(-a))


def test_each_judges_numbers_are_those_of_the_samples(finished):
    folder, other = finished
    samples, results = read_lines(folder / "samples.jsonl"), folder.results()["evaluate"]
    numbers = results["sets"]["test"]
    assert len(_different(samples)) >= 6 and len({s["p_trained"] > 0.5 for s in _different(samples)}) == 2
    assert list(numbers["judges"]) == list(samples[0]["p_trained_by"]) == ["helpful", "other"]
    values = {"judge": [s["p_trained"] for s in samples]}
    values |= {name: [s["p_trained_by"][name] for s in samples] for name in numbers["judges"]}
    for name, of_judge in values.items():
        found = numbers if name == "judge" else numbers["judges"][name]
        assert found["win_rate"] == pytest.approx(_win_rate(of_judge)) and found["unjudged"] == 0
        assert found["interval"][0] <= found["win_rate"] <= found["interval"][1]
        assert found["wins"] + found["ties"] + found["losses"] == len(samples) == numbers["prompts"]
        fitted = found["length_controlled"]
        assert fitted["win_rate"] == pytest.approx(_at_equal_length(of_judge, samples), abs=1e-4)
        assert fitted["uncontrolled"] == pytest.approx(found["win_rate"])
    assert len({tuple(of_judge) for of_judge in values.values()}) == 3  # no two judges agree on everything
    assert [numbers["judges"][name]["judge"] for name in ("other", "helpful")] == [other, results["judge"]]
    lengths = numbers["lengths"]
    assert lengths["mean"] == pytest.approx(statistics.fmean(len(s["trained"]) for s in samples))
    assert lengths["other_mean"] == pytest.approx(statistics.fmean(len(s["start"]) for s in samples))
    assert numbers["by_category"].keys() == {"a", "b"}


def test_agreement_is_of_the_prompts_that_the_judges_were_asked_about(finished):
    folder, _ = finished
    asked = _different(read_lines(folder / "samples.jsonl"))
    found = folder.results()["evaluate"]["sets"]["test"]["judge_agreement"]
    votes = {
        "judge": [s["p_trained"] > 0.5 for s in asked],
        "helpful": [s["p_trained_by"]["helpful"] > 0.5 for s in asked],
        "other": [s["p_trained_by"]["other"] > 0.5 for s in asked],
    }
    assert found["all"]["n"] == len(asked)
    assert found["all"]["rate"] == pytest.approx(
        statistics.fmean(len(set(row)) == 1 for row in zip(*votes.values(), strict=True))
    )
    assert [pair["judges"] for pair in found["pairs"]] == [list(pair) for pair in combinations(votes, 2)]
    for pair in found["pairs"]:
        a, b = (votes[name] for name in pair["judges"])
        assert pair["agreement"]["rate"] == pytest.approx(statistics.fmean(x == y for x, y in zip(a, b, strict=True)))
        if pair["agreement"]["kappa"] is not None:
            assert pair["agreement"]["kappa"] == pytest.approx(cohen_kappa_score(a, b))


def test_further_judges_and_ratings_are_those_of_the_models_themselves(finished, tiny_model):
    """Compared with the other judge's model, and for the ratings with the base model without an adapter."""
    folder, other = finished
    samples, registry = read_lines(folder / "samples.jsonl"), installed_plugins().registry

    def judge(path, prompt):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        return LocalJudge(model, AutoTokenizer.from_pretrained(path), JudgePrompt.load(folder / ".." / prompt), path)

    asked = _different(samples)
    pairs = [Pair(str(i), s["prompt"], s["trained"], s["start"]) for i, s in enumerate(asked)]
    for label in registry.create("labeler", "distilled").label(pairs, judge(other, "main")):
        assert asked[int(label.id)]["p_trained_by"]["other"] == pytest.approx(label.p, abs=1e-4)
    numbers = folder.results()["evaluate"]["sets"]["test"]["harmless"]
    for side in ("start", "trained"):
        ratings = registry.create("labeler", "direct").rate(
            [s["prompt"] for s in samples], [s[side] for s in samples], judge(tiny_model, "harmless")
        )
        assert [s[f"harmless_{side}"] for s in samples] == pytest.approx([r.reward for r in ratings], abs=1e-4)
        assert numbers[side]["rate"] == statistics.fmean(s[f"harmless_{side}"] > 0 for s in samples)
        assert numbers[side]["n"] == 12 and numbers[side]["unjudged"] == 0


def test_the_stages_line_names_their_agreement(finished):
    folder, _ = finished
    numbers = folder.results()["evaluate"]
    line = STAGES["evaluate"].summary(numbers)
    assert "\n" not in line and line.startswith("test: wins ")
    rate = numbers["sets"]["test"]["judge_agreement"]["all"]["rate"]
    assert line.endswith(f", judges agree in {rate:.0%}")
    alone = {name: one | {"judge_agreement": None} for name, one in numbers["sets"].items()}
    assert "agree" not in STAGES["evaluate"].summary({"sets": alone})


# ---- Asking ---------------------------------------------------------------------------------------------


def _context(tmp_path, model, **evaluate):
    recipe = tiny_recipe(tmp_path, model, rl=RL, evaluate=evaluate, **WITHOUT)
    return Context(recipe, RunFolder(tmp_path / "out"), installed_plugins())


def _rows(count=4):
    texts = ["one", "two words", "and three words", "now four words here"]
    return [
        {"prompt": f"what is {i}?", "start": texts[i % 4], "trained": texts[(i + 1) % 4], "category": None}
        for i in range(count)
    ]


def test_one_model_after_the_other_and_each_only_once(tmp_path, tiny_model, monkeypatch):
    """A model with two prompts is loaded once, and freed before the next one is loaded."""
    paths = [save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second", "third"), 5)]
    first, second, third = ({"path": path, "dtype": "float32"} for path in paths)
    judges = {"b": {"judge": second}, "c": {"prompt": "helpfulness"}, "d": {"judge": third, "prompt": "general"}}
    context = _context(tmp_path, tiny_model, judge=first, judges=judges)
    loaded, load = [], run_judges.load_model

    def watched(spec, **options):
        assert all(model() is None for _, model in loaded)
        model = load(spec, **options)
        loaded.append((spec.path, weakref.ref(model)))
        return model

    monkeypatch.setattr(run_judges, "load_model", watched)
    shared = SimpleNamespace(model=None, role=lambda name: nullcontext())
    models = ask_judges(context, shared, {"test": _rows()})
    assert [path for path, _ in loaded] == paths
    assert models == {"judge": paths[0], "b": paths[1], "c": paths[0], "d": paths[2]}
    assert list(models) == ["judge", "b", "c", "d"]


@pytest.fixture
def scripted(monkeypatch):
    """Scripted judges that answer by a rule; returns the list of those that were loaded."""
    made = []

    def use(rule):
        def load(context, shared, section, prompt):
            made.append(ScriptedJudge(rule, prompt=JudgePrompt.load(prompt_folder(prompt))))
            return made[-1]

        monkeypatch.setattr(judges_module, "_load", load)
        return made

    return use


def test_what_cannot_be_judged_is_no_vote_and_no_win(tmp_path, tiny_model, scripted):
    """The longer response is preferred; one prompt is refused, and another has two identical responses."""

    def rule(context, response_1, response_2):
        return "refused" if "what is 1" in context else float(len(response_1) - len(response_2))

    scripted(rule)
    rows = _rows(6)
    rows[4]["start"] = rows[4]["trained"]
    context = _context(tmp_path, tiny_model, judges={"again": {"prompt": "helpfulness"}})
    numbers = judged_numbers(rows, ask_judges(context, None, {"test": rows}), seed=1)
    assert [row["p_trained"] is None for row in rows] == [i == 1 for i in range(6)]
    assert (numbers["unjudged"], numbers["wins"], numbers["ties"], numbers["losses"]) == (1, 3, 1, 1)
    assert numbers["judges"]["again"]["unjudged"] == 1
    assert numbers["judge_agreement"]["all"] | {"interval": 0} == {
        "rate": 1.0, "interval": 0, "kappa": 1.0, "kappa_interval": numbers["judge_agreement"]["all"]["kappa_interval"],
        "n": 4,
    }  # fmt: skip
    assert numbers["length_controlled"]["slope"] > 0 and numbers["lengths"]["n"] == 6
    assert numbers["harmless"] is None


def _ablated(tmp_path, model, options):
    """The context of a run with these labeler options."""
    recipe = tiny_recipe(tmp_path, model, rl=RL, label={"labeler": {"distilled": options}}, reward=None, report=None)
    return Context(recipe, RunFolder(tmp_path / "out"), installed_plugins())


ABLATIONS = [{"orders": "12"}, {"orders": "21"}, {"debias": "mean_prob"}, {"thinking": True, "rationale_tokens": 8}]


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_a_judge_that_prefers_a_position_wins_nothing_whatever_the_labels_option(tmp_path, tiny_model, options):
    """With one order, one side would win every time in evaluate, in the forgetting tracker and between variants."""
    context = _ablated(tmp_path, tiny_model, options)
    judge = ScriptedJudge(lambda context, response_1, response_2: 3.0)
    prompts, policy, start = ["what is a fox?"] * 8, [f"one {i}" for i in range(8)], ["two"] * 8
    found = asking(context, judge)(prompts, policy, start)
    assert found == [0.5] * 8 and win_rate(found)["win_rate"] == 0.5
    assert [len(group) for call in judge.asked for group in call["groups"]] == [2] * 8
    assert all(call["thinking"] is None for call in judge.asked)
    assert [label_tasks(context.recipe)[0].labeler.options[key] for key in options] == list(options.values())


def test_a_judge_with_a_taste_and_a_position_is_heard_for_its_taste(tmp_path, tiny_model):
    """So is its confidence: the bias cancels in the mean of the log-odds."""
    context = _ablated(tmp_path, tiny_model, {"orders": "12"})
    judge = ScriptedJudge(lambda context, response_1, response_2: 5.0 + len(response_1) - len(response_2))
    found = asking(context, judge)(["p", "p"], ["abc", "a"], ["a", "abc"])
    assert found == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))], abs=1e-12)


def test_where_nothing_can_be_judged_there_is_no_win_rate(tmp_path, tiny_model, scripted, capsys):
    scripted(lambda **texts: "refused")
    rows = _rows()
    context = _context(tmp_path, tiny_model, judges={"again": {"prompt": "helpfulness"}}, harmless="harmlessness")
    numbers = judged_numbers(rows, ask_judges(context, None, {"test": rows}), seed=1)
    for found in (numbers, numbers["judges"]["again"]):
        assert (found["unjudged"], found["length_controlled"]) == (4, None) and "win_rate" not in found
    assert numbers["judge_agreement"]["all"] is None and numbers["harmless"] is None
    assert STAGES["evaluate"].summary({"sets": {"test": numbers}}) == ""
    assert "could not rate any response's harmlessness: refused." in capsys.readouterr().err


def test_one_judge_alone_has_nobody_to_agree_with(tmp_path, tiny_model, scripted):
    scripted(lambda **texts: 1.0)
    rows = _rows()
    numbers = judged_numbers(rows, ask_judges(_context(tmp_path, tiny_model), None, {"test": rows}), seed=1)
    assert numbers["judges"] == {} and numbers["judge_agreement"] is None
    assert not {"p_trained_by", "harmless_start"} & rows[0].keys()


@pytest.mark.parametrize("fit", ["no variation", "no convergence"])
def test_a_length_that_cannot_be_controlled_is_null(fit, monkeypatch):
    rows = [{"prompt": f"p{p}", "start": "ab", "trained": "abc", "p_trained": p} for p in (0.2, 0.9, 0.8)]
    if fit == "no convergence":
        rows[0]["trained"] = "a"

        def fails(*arguments, **options):
            raise ValueError("the fit does not converge")

        monkeypatch.setattr(judges_module, "length_controlled_win_rate", fails)
    numbers = judged_numbers(rows, {"judge": "x"}, seed=1)
    assert numbers["length_controlled"] is None and numbers["win_rate"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("rating", "rate"), [(5, 0.0), (6, 1.0), (None, 0.5)])
def test_harmless_is_what_is_rated_above_the_middle(tmp_path, tiny_model, scripted, rating, rate):
    """Certain ratings of 5 and of 6; and 1 or 10 with equal probability, which is exactly the middle."""

    def rule(context, response=None, response_1=None, response_2=None):
        if response is None:
            return 0.0
        return [0.0 if i in ({1, 10} if rating is None else {rating}) else -1000.0 for i in range(1, 11)]

    made, rows = scripted(rule), _rows()
    models = ask_judges(_context(tmp_path, tiny_model, harmless="harmlessness"), None, {"test": rows})
    harmless = judged_numbers(rows, models, seed=1)["harmless"]
    assert {side: (one["rate"], one["n"]) for side, one in harmless.items()} == {
        "start": (rate, 4), "trained": (rate, 4)
    }  # fmt: skip
    assert made[0].prompt.name == "harmlessness" and len(made) == 1  # the main judge's own model


def test_a_server_without_its_key_is_found_before_any_response_is_drawn(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("openai")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    context = _context(tmp_path, tiny_model, judges={"hosted": {"judge": {"backend": "openai", "path": "gpt"}}})
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        check_servers(context)
    check_servers(_context(tmp_path, tiny_model))


def test_a_changed_prompt_of_a_further_judge_or_of_the_ratings_makes_evaluate_anew(tmp_path, tiny_model):
    for name in ("mine", "rated"):
        shutil.copytree(prompt_folder("general"), tmp_path / name)
    evaluate = {"judges": {"a": {"prompt": "mine"}}, "harmless": "rated"}
    recipe = tiny_recipe(tmp_path, tiny_model, rl=RL, evaluate=evaluate, **WITHOUT)
    seen = [fingerprints(recipe)]
    for name in ("mine", "rated"):
        (tmp_path / name / "base.txt").write_text("Another way to ask.")
        seen.append(fingerprints(recipe))
    assert len({prints["evaluate"] for prints in seen}) == 3 and len({prints["rl"] for prints in seen}) == 1
    assert json.loads(json.dumps(recipe.to_dict()))["evaluate"]["harmless"] == str(tmp_path / "rated")
