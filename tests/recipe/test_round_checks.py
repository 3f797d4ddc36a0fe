"""Valid values of the section ``rounds``, and settings that conflict with it."""

import pytest

from trl_rlaif.recipe.sections import RoundsSection

BASE = "model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\n"
STAGES = "sample:\nlabel:\nreward:\nrl:\n"


@pytest.mark.parametrize("written", ["rounds: 3", "rounds: {number: 3}", "rounds: {number: 3, reference: initial}"])
def test_the_short_form_is_the_long_one_with_defaults(parse, written):
    recipe = parse(BASE + STAGES + written)
    assert recipe.rounds == RoundsSection(number=3, reference="initial", earlier=0.5)
    assert recipe.to_dict()["rounds"] == {"number": 3, "previous": None, "reference": "initial", "earlier": 0.5}


def test_an_override_may_write_it(parse):
    assert parse(BASE + STAGES, "rounds=2").rounds.number == 2
    assert parse(BASE + STAGES + "rounds: {number: 2}", "rounds.number=4").rounds.number == 4


@pytest.mark.parametrize("written", ["", "rounds: 1", "rounds: {number: 1, reference: previous}"])
def test_one_round_is_a_run(parse, written):
    recipe = parse(BASE + STAGES + written)
    assert recipe.rounds is None and "rounds" not in recipe.to_dict()


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        ("rounds: 0\n" + STAGES, 3, "'number' in section 'rounds' is 0.", "Write a whole number of at least 1."),
        ("rounds: three\n" + STAGES, 3, "section 'rounds' is a single value", "Write its keys"),
        ("rounds: {reference: previous}\n" + STAGES, 3, "section 'rounds' does not fit.", "Write how many rounds"),
        ("rounds:\n  number: 2\n  earlier: 1.5\n" + STAGES, 5, "'earlier' in section 'rounds' is 1.5.", ""),
        (
            "rounds:\n  number: 2\n  reference: sft\n" + STAGES,
            5,
            "'reference' in section 'rounds' is \"sft\".",
            "Write one of",
        ),
        (
            "rounds:\n  previous: nowhere\n" + STAGES,
            4,
            "'previous' in section 'rounds': there is no folder",
            "Write the",
        ),
        ("rounds: 2\nlabel: {}\nsample: {}\n", 3, "a round needs 'rl'", "Add 'rl'."),
        (
            "rounds: 2\nsample:\nlabel:\nrl: {rewards: [direct]}\n",
            6,
            "'rounds' labels responses for the reward",
            "Add rew",
        ),
        (
            "rounds:\n  number: 2\n  earlier: 0.5\nsample:\nlabel:\nrl: {algorithm: dpo}\n",
            5,
            "'earlier' is a fraction of the reward model's preferences",
            "Leave it out.",
        ),
        (
            "rounds: 2\nsample:\nlabel:\nreward:\n  policies: [base]\nrl:\n",
            7,
            "'policies' names the policies that wrote the responses",
            "Leave out one of the two.",
        ),
        (
            "rounds: 2\nsample:\nlabel:\nrl:\n  algorithm: dpo\n  precompute_ref_log_probs: true\n",
            8,
            "TRL precomputes log-probabilities of the policy at the start of a round",
            "Leave it out, or set rounds.reference to previous.",
        ),
    ],
)
def test_what_is_wrong_is_said_once_with_its_line(only, text, line, what, fix):
    problem = only(BASE + text)
    assert problem.where == f"recipe.yaml:{line}"
    assert problem.what.startswith(what)
    assert problem.fix.startswith(fix)


def test_responses_that_are_given_cannot_be_sampled(only):
    text = (
        "model: {path: gpt2}\ndata:\n  prompts: prompts.jsonl\n  pairs: pairs.jsonl\nlabel:\nreward:\nrl:\nrounds: 2\n"
    )
    problem = only(text)
    assert problem.where == "recipe.yaml:4" and "each of the 'rounds' samples" in problem.what


def test_reference_that_moves_may_be_precomputed(parse):
    rl = "sample:\nlabel:\nrl: {algorithm: dpo, precompute_ref_log_probs: true}\n"
    assert parse(BASE + rl + "rounds: {number: 2, reference: previous}").rounds.reference == "previous"


def test_variants_may_have_rounds(parse):
    text = BASE.replace("}\n", ", eval_prompts: eval.jsonl}\n", 2).replace("gpt2, eval_prompts: eval.jsonl", "gpt2")
    recipe = parse(text + STAGES + "evaluate:\ncompare:\n- once\n- thrice: {rounds: 3}\n")
    assert [variant.rounds and variant.rounds.number for variant in recipe.variants.values()] == [None, 3]
