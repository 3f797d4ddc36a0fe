"""Requirements of a recipe's stages on each other."""

import pytest
import yaml

from trl_rlaif.errors import Problem

MODEL = "model: {path: gpt2}\n"
PROMPTS = MODEL + "data: {prompts: prompts.jsonl}\n"
PAIRS = MODEL + "data:\n  pairs: pairs.jsonl\n"


def assert_lacking(problem, line, what, fix=""):
    assert problem.where == f"recipe.yaml:{line}"
    assert problem.what.startswith(what)
    assert problem.fix.startswith(fix)


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        (MODEL + "data:\nsample:\n", 3, "'sample' has no prompts.", "Set data.prompts."),
        (
            PAIRS + "  prompts: prompts.jsonl\nsample:\n",
            3,
            "data.pairs replaces sampled responses",
            "Remove one of the two.",
        ),
        (PROMPTS + "label:\n", 3, "'label' has no pairs to judge.", "Add 'sample', or set data.pairs."),
        (PROMPTS + "sample:\nreward:\n", 4, "'reward' has no preferences to learn from.", "Add 'label'."),
        (PAIRS + "reward:\n", 4, "'reward' has no preferences", "Add 'label', or set data.format to"),
        (MODEL + "data:\nrl: {rewards: [direct]}\n", 3, "'rl' has no prompts.", "Set data.prompts."),
        (PROMPTS + "rl:\n", 3, "'rl' uses the reward model,", "Add 'reward', or set rl.rewards"),
        (PROMPTS + "rl:\n  rewards:\n  - direct\n  - reward\n", 6, "'rl' uses the reward model", "Add 'reward'"),
        (PROMPTS + "rl: {rewards: [direct]}\nevaluate:\n", 4, "'evaluate' has no prompts.", "Set data.eval"),
        (PROMPTS + "evaluate: {sets: {a: eval.jsonl}}\n", 3, "'evaluate' has no trained policy", "Add 'rl'."),
        (
            PROMPTS + "rl: {rewards: [direct]}\nevaluate: {sets: {a: eval.jsonl}, num_responses: 2}\n",
            4,
            "'evaluate' draws 2 responses per prompt at temperature 0",
            "Set evaluate.temperature above 0, or leave the key out.",
        ),
        (
            PROMPTS + "rl: {rewards: [direct]}\nevaluate:\n  sets: {a: eval.jsonl}\n  stop_on_forgetting: 0.1\n",
            6,
            "'stop_on_forgetting' needs a set 'forget' in evaluate.sets.",
            "Set evaluate.sets.forget to prompts that",
        ),
        (
            PROMPTS + "rl: {rewards: [direct]}\n"
            "evaluate: {sets: {forget: eval.jsonl}, track_every: 0, stop_on_forgetting: 0.1}\n",
            4,
            "'stop_on_forgetting' needs measurements, but track_every is 0.",
            "Leave out track_every, or set it to 1 or more.",
        ),
        (PROMPTS, 1, "the recipe has no stage.", "Add at least one of sft, sample, judge, label"),
    ],
)
def test_stage_lacks_something(only, text, line, what, fix):
    assert_lacking(only(text), line, what, fix)


@pytest.mark.parametrize("layout", ["preference", "responses", "hh"])
def test_reward_may_learn_from_human_labels(parse, layout):
    assert parse(PAIRS + f"  format: {layout}\nreward:\n").label is None


def test_label_may_take_pairs(parse):
    assert parse(PAIRS + "label:\nreward:\n").sample is None


def test_evaluate_may_bring_its_own_sets(parse):
    assert parse(PROMPTS + "rl: {rewards: [direct]}\nevaluate: {sets: {a: eval.jsonl}}\n").evaluate.sets


def test_rl_may_end_on_forgetting(parse):
    text = PROMPTS + "rl: {rewards: [direct]}\nevaluate: {sets: {forget: eval.jsonl}, stop_on_forgetting: 1e-1}\n"
    evaluate = parse(text).evaluate
    assert (evaluate.stop_on_forgetting, evaluate.track_every, evaluate.track_prompts) == (0.1, None, 64)


@pytest.mark.parametrize("wrong", ["stop_on_forgetting: 0.5", "track_every: -1", "track_prompts: 0"])
def test_what_is_tracked_has_a_range(only, wrong):
    problem = only(PROMPTS + f"rl: {{rewards: [direct]}}\nevaluate: {{sets: {{forget: eval.jsonl}}, {wrong}}}\n")
    assert problem.where == "recipe.yaml:4" and problem.what.startswith(f"'{wrong.partition(':')[0]}'")


def test_missing_required_sections(problems):
    assert problems("\nreport:\n") == [
        Problem("the section 'model' is missing.", "recipe.yaml:2", "Add 'model:' with its keys."),
        Problem("the section 'data' is missing.", "recipe.yaml:2", "Add 'data:' with its keys."),
    ]


class TestRewardFunctions:
    HEAD = PROMPTS + "rl:\n  rewards:\n"

    def test_file_becomes_absolute_and_is_not_imported(self, parse, folder):
        (folder / "mine.py").write_text("raise SystemExit('imported')\n")
        assert parse(self.HEAD + "  - mine.py:brevity\n").rl.rewards == [f"{folder / 'mine.py'}:brevity"]

    @pytest.mark.parametrize(
        ("written", "what", "fix"),
        [
            ("rewards/min.py:f", "there is no file 'rewards/min.py'.", "Did you mean 'rewards/mine.py'?"),
            ("direkt", "'direkt' is not a reward.", "Did you mean 'direct'?"),
            (
                "my-module:f",
                "'my-module:f' is not a reward.",
                "Write reward, direct, package.module:function or",
            ),
            ("module:", "'module:' is not a reward.", "Write reward,"),
            ("module:a.b", "'module:a.b' is not a reward.", "Write reward,"),
        ],
    )
    def test_wrong(self, only, folder, written, what, fix):
        (folder / "rewards").mkdir()
        (folder / "rewards" / "mine.py").touch()
        problem = only(self.HEAD + f"  - '{written}'\n")
        assert problem.where == "recipe.yaml:5"
        assert problem.what == f"'rewards.0' in section 'rl': {what}"
        assert problem.fix.startswith(fix)


def test_direct_rewards_need_a_labeler_of_that_name(parse_errors_of_direct):
    assert "'direct' is a labeler, and none of that name is installed." in parse_errors_of_direct


RANKED = PROMPTS + "sample: {num_responses: 4, keep_pairs: all}\n"


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        (
            PROMPTS + "sample:\nlabel:\n  ranking: {method: tournament}\n",
            5,
            "'label' ranks responses, ",
            "Set sample.n",
        ),
        (
            PROMPTS + "sample: {num_responses: 4}\nlabel:\n  ranking: {method: all_pairs}\n",
            5,
            "'label' ranks all responses, but 'sample' keeps only the first two.",
            "Set sample.keep_pairs to all.",
        ),
        (
            RANKED + "label:\n  ranking: {method: tournament}\n  calibration: pairs.jsonl\n",
            6,
            "label.calibration calibrates single labels",
            "Leave out one of the two.",
        ),
        (
            RANKED + "label:\n  ranking:\n    method: all_pairs\n    questions: 3\n",
            7,
            "questions is for tournaments; all_pairs asks all questions.",
            "Leave it out.",
        ),
        (PAIRS + "label:\n  jury: {join: log_odds}\n", 5, "'label' has a jury of one", "Name two or more"),
        (
            RANKED + "label:\n  ranking: {method: all_pairs}\n  compare: {rated: {labeler: direct}}\n  jury: {}\n",
            7,
            "label.ranking uses the answers of one labeler",
            "Leave out one of the two.",
        ),
    ],
)
def test_a_ranking_or_a_jury_lacks_something(only, text, line, what, fix):
    assert_lacking(only(text), line, what, fix)


def test_a_ranking_may_be_of_pairs_of_data(parse):
    ranking = parse(PAIRS + "label:\n  ranking: {method: tournament}\n").label.ranking
    assert (ranking.questions, ranking.at_once, ranking.confidence) == (None, 1, 0.95)


SAMPLER = PROMPTS + "sample:\n  sampler: {revise: {principles: sft.jsonl}}\n"


def test_a_samplers_file_is_found_beside_the_recipe(parse, folder):
    ref = parse(SAMPLER).sample.sampler
    assert (ref.name, ref.files) == ("revise", ("principles",))
    assert ref.options == {"principles": str(folder / "sft.jsonl"), "rounds": 1}
    again = parse(yaml.safe_dump(parse(SAMPLER).to_dict()), name="again.yaml")
    assert again.sample == parse(SAMPLER).sample


def test_without_a_sampler_pairs_are_drawn(parse):
    assert parse(PROMPTS + "sample: {sampler: null}\n").sample.sampler is None


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (SAMPLER + "  num_responses: 4\n", 5, "'num_responses' controls how pairs are sampled"),
        (SAMPLER + "  redraws: 0\n", 5, "'redraws' controls how pairs are sampled"),
        (SAMPLER + "  keep_pairs: all\n", 5, "'keep_pairs' controls how pairs are sampled"),
        (SAMPLER + "label:\n  ranking: {method: all_pairs}\n", 6, "'label' ranks all responses to a prompt"),
        (
            SAMPLER.replace("sft.jsonl", "stf.jsonl"),
            4,
            "'principles' in the options of pair sampler 'revise': there is no",
        ),
        (SAMPLER.replace("revise:", "review:"), 4, "there is no pair sampler 'review'."),
    ],
)
def test_what_a_sampler_has_no_use_for(only, text, line, what):
    assert_lacking(only(text), line, what)
