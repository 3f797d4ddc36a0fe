"""Forgetting during PPO: the measurements, that measuring does not change training, and early stopping.

Run as a script (tests/ on PYTHONPATH), this is one of several processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from helpers.ppo import numbers, small_trainer
from helpers.ppo_task import make_trainer
from helpers.processes import fork, write_result
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from peft import LoraConfig

from trl_rlaif import RehearsalPair, SharedBase, UserError
from trl_rlaif.evaluation.forgetting import ForgettingTracker, better_half, mean_nll, preferences
from trl_rlaif.models.role_models import SharedRoleModels

PROMPTS = ["what is the fox?", "the quick brown", "is it a city?", "dog", "what is the capital?"]
MEASURED = "forgetting/forget/"


def always_loses(prompts, policy, start):
    return [0.0] * len(prompts)


def tracked(folder, preferred=always_loses, sets=None, tracker=None, **options):
    """A trainer with six updates of four episodes, and its tracker."""
    trainer = small_trainer(folder, **{"total_episodes": 24, **options})
    settings = {"every": 2, "batch_size": 2, **(tracker or {})}
    found = ForgettingTracker(trainer, sets or {"forget": PROMPTS}, preferred, **settings)
    trainer.add_callback(found)
    return trainer, found


def measured(trainer, key=MEASURED + "win_rate"):
    """The logged (update, value) pairs of a metric."""
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


def plain_nll(model, pairs):
    """Mean NLL per response token, with transformers alone, one response at a time."""
    total, count = 0.0, 0
    for prompt, response in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        count += len(response)
    return total / count


def plain_answers(model, prompts, length):
    """Greedy responses, one prompt at a time, including the end token."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, eos_token_id=2
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def test_the_nll_is_the_plain_one_over_response_tokens():
    shared = SharedBase(make_llama(60), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    shared.double().eval()
    torch.manual_seed(3)
    sizes = [(2 + i % 3, 1 + (2 * i) % 5) for i in range(7)]
    rows = [tuple(torch.randint(3, 60, (n,)).tolist() for n in size) for size in sizes]
    pairs = [RehearsalPair("p", "r", None, None, "test", *row) for row in rows]
    found = {}
    for part, role in (("policy", "policy"), ("reference", None)):
        with shared.role(role):
            expected = plain_nll(shared.model, rows)
        for batch_size in (1, 3, 16):
            nll = mean_nll(SharedRoleModels(shared), part, pairs, batch_size=batch_size, device=torch.device("cpu"))
            assert nll == pytest.approx(expected, rel=1e-6)  # log-probabilities are returned in float32
        found[part] = expected
    assert abs(found["policy"] - found["reference"]) > 0.1


def test_what_is_logged_is_what_the_policy_answers_and_thinks_of_the_starts_answers(tmp_path):
    tokenizer, asked = make_tokenizer(), []

    def preferred(prompts, policy, start):
        asked.append((prompts, policy, start))
        return [1.0, None, 0.5, 0.2, 0.9][: len(prompts)]

    trainer, tracker = tracked(tmp_path, preferred, total_episodes=8)  # two updates: measured before and after both
    trainer.train()
    assert [step for step, _ in measured(trainer)] == [0, 2]
    start = make_llama(len(tokenizer)).double()
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answers = plain_answers(start, prompt_ids, 8)
    nlls = dict(measured(trainer, MEASURED + "nll"))
    assert nlls[0] == pytest.approx(plain_nll(start, list(zip(prompt_ids, answers, strict=True))), rel=1e-5)
    assert measured(trainer)[0] == (0, 0.5)

    with trainer.shared.role("policy"):
        policy = plain_answers(trainer.shared.model, prompt_ids, 8)
        trainer.shared.double()
        expected = plain_nll(trainer.shared.model, list(zip(prompt_ids, answers, strict=True)))
    assert nlls[2] == pytest.approx(expected, rel=1e-5) and abs(nlls[2] - nlls[0]) > 1e-3
    texts = [[t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)] for ids in (policy, answers)]
    different = [i for i in range(5) if texts[0][i] != texts[1][i]]
    assert asked == [tuple([column[i] for i in different] for column in (PROMPTS, *texts))]
    assert len(different) == 5  # one is not judged; of the other four, the policy wins two, ties one and loses one
    assert measured(trainer)[1] == (2, 0.625)
    assert tracker.numbers()["forget"] == {
        "prompts": 5, "good": 5, "win_rate_first": 0.5, "win_rate_last": 0.625, "nll_first": nlls[0],
        "nll_last": nlls[2],
    }  # fmt: skip


def test_equal_answers_are_a_tie_and_nobody_is_asked():
    asked = []

    def preferred(*columns):
        asked.append(columns)
        return [None, 1]

    assert preferences(preferred, ["p", "q", "r"], ["a", "b", "c"], ["x", "b", "y"]) == [None, 0.5, 1.0]
    assert asked == [(["p", "r"], ["a", "c"], ["x", "y"])]
    assert preferences(preferred, ["p"], ["a"], ["a"]) == [0.5] and len(asked) == 1


def test_the_good_answers_are_the_better_half(tmp_path):
    assert better_half([1.0, 3.0, 2.0, 3.0, -1.0]) == [1, 2, 3]
    assert better_half([0.0]) == [0]
    seen = {}

    def score(prompts, completions, completion_ids, prompt_ids):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, prompt_ids=prompt_ids)
        return [float(len(prompt)) for prompt in prompts]

    trainer, tracker = tracked(tmp_path, tracker={"score": score}, total_episodes=4)
    trainer.train()
    good = tracker.start["forget"].good
    assert [pair.prompt for pair in good] == [PROMPTS[0], PROMPTS[1], PROMPTS[4]]
    assert seen["prompts"] == PROMPTS and seen["completions"] == tracker.start["forget"].texts
    assert [pair.response_ids for pair in good] == [seen["completion_ids"][i] for i in (0, 1, 4)]
    assert seen["prompt_ids"] == tracker.start["forget"].prompt_ids


def test_when_it_is_measured(tmp_path):
    updates = {}
    for every in (1, 4, 0.3, 0.01):
        trainer, _ = tracked(tmp_path / str(every), tracker={"every": every})
        trainer.train()
        updates[every] = [step for step, _ in measured(trainer)]
    assert updates == {1: [0, 1, 2, 3, 4, 5, 6], 4: [0, 4, 6], 0.3: [0, 2, 4, 6], 0.01: [0, 1, 2, 3, 4, 5, 6]}


def test_training_is_the_same_as_without(tmp_path):
    """Even with a judge and dropout that use random numbers."""

    def preferred(prompts, policy, start):
        return torch.rand(len(prompts)).tolist()

    lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2)}
    plain = small_trainer(tmp_path / "plain", total_episodes=24, trainer_kwargs=lora)
    plain.train()
    trainer, _ = tracked(tmp_path / "tracked", preferred, tracker={"every": 1}, trainer_kwargs=lora)
    trainer.train()
    assert len({rate for _, rate in measured(trainer)}) > 2
    assert [e for e in numbers(trainer) if "objective/kl" in e] == numbers(plain)
    for ours, theirs in zip(trainer.shared.parameters(), plain.shared.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path):
    def preferred(prompts, policy, start):
        return [len(a) / (len(a) + len(b)) for a, b in zip(policy, start, strict=True)]

    options = {"save_strategy": "steps", "save_steps": 1}
    whole, first = tracked(tmp_path / "whole", preferred, **options)
    whole.train()
    torch.manual_seed(99)
    resumed, second = tracked(tmp_path / "resumed", preferred, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3")
    assert numbers(resumed) == numbers(whole)
    assert [step for step, _ in measured(resumed)] == [0, 2, 4, 6]
    assert first.start == second.start and first.numbers() == second.numbers()


def test_a_run_that_was_not_measured_before_is_measured_where_it_goes_on(tmp_path):
    small_trainer(tmp_path, total_episodes=24, save_strategy="steps", save_steps=3).train()
    trainer, _ = tracked(tmp_path)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert [step for step, _ in measured(trainer)] == [3, 4, 6]
    assert measured(trainer)[0][1] < 0.5


def test_a_set_that_is_forgotten_ends_the_run(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 3, "tracker": {"every": 2, "stop_below": {"forget": 0.4}}}
    sets = {"other": PROMPTS[:1], "forget": PROMPTS}
    trainer, tracker = tracked(tmp_path, sets=sets, **options)
    trainer.train()
    last = measured(trainer)[-1]
    assert last[0] == 2 and last[1] < 0.4
    assert tracker.stopped == {"set": "forget", "update": 2, "win_rate": last[1], "limit": 0.4}
    [message] = [record.getMessage() for record in caplog.records if "forgetting" in record.name]
    assert message == (
        f"Stopped at update 2 of 6: on the set 'forget', the win rate over the initial policy fell to "
        f"{100 * last[1]:.1f}%, below 40.0%."
    )
    assert trainer.state.global_step == 2
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again, resumed = tracked(tmp_path, sets=sets, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and resumed.stopped == tracker.stopped
    assert numbers(again) == numbers(trainer)


def test_a_win_rate_at_the_limit_or_at_the_last_update_ends_nothing(tmp_path):
    def even(prompts, policy, start):
        return [0.5] * len(prompts)

    trainer, tracker = tracked(tmp_path / "even", even, tracker={"stop_below": {"forget": 0.5}})
    trainer.train()
    assert trainer.state.global_step == 6 and tracker.stopped is None
    trainer, tracker = tracked(tmp_path / "last", tracker={"every": 6, "stop_below": {"forget": 0.5}})
    trainer.train()
    assert measured(trainer)[-1][1] < 0.5 and tracker.stopped is None


def test_answers_that_nobody_can_judge_leave_no_win_rate(tmp_path):
    trainer, tracker = tracked(
        tmp_path, lambda prompts, *_: [None] * len(prompts), tracker={"every": 1, "stop_below": {"forget": 0.5}}
    )
    trainer.train()
    assert measured(trainer)[-1][0] < 6  # no win rate once all answers differ
    assert [step for step, _ in measured(trainer, MEASURED + "nll")] == list(range(7)) and tracker.stopped is None


def test_the_start_is_the_references_answers_with_separate_models(tmp_path):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    models = {"ref_model": make_llama(size, seed=5), "value_model": make_scorer(size), "peft_config": None}
    trainer, tracker = tracked(tmp_path, total_episodes=4, trainer_kwargs=models)
    trainer.train()
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answers = plain_answers(make_llama(size, seed=5), prompt_ids, 8)
    assert [pair.response_ids for pair in tracker.start["forget"].good] == answers
    expected = plain_nll(make_llama(size, seed=5).double(), list(zip(prompt_ids, answers, strict=True)))
    assert measured(trainer, MEASURED + "nll")[0] == (0, pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize(
    ("sets", "settings", "message"),
    [
        ({"forget": []}, {}, "The set 'forget' has no prompts"),
        ({"test": ["a"]}, {"stop_below": {"forget": 0.4}}, "stop_below names 'forget', which is not one of the sets"),
        (
            {"test": ["a", "x" * 600]},
            {},
            "A prompt of the set 'test' has 600 tokens: the model's 512 leave no room for 8",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(tmp_path, sets, settings, message):
    with pytest.raises(UserError, match=message):
        ForgettingTracker(small_trainer(tmp_path), sets, always_loses, **settings)


# ---- Several processes ----------------------------------------------------------------------------------


def _in_processes(folder, failing):
    """Results of one of two processes, in a run that stops, or in which the judge raises, at the second update."""
    asked = []

    def preferred(prompts, policy, start):
        asked.append(trainer.state.global_step)
        return 1 / 0 if failing else always_loses(prompts, policy, start)

    trainer = make_trainer(
        folder, prompts=8, per_device_train_batch_size=4, total_episodes=48, learning_rate=1e-1, num_ppo_epochs=4,
        save_strategy="steps", save_steps=5,
    )  # fmt: skip
    sets, stop = {"forget": ["is the fox", "what is red", "moon is blue"]}, {"forget": 0.4}
    tracker = ForgettingTracker(trainer, sets, preferred, every=2, stop_below=stop)
    trainer.add_callback(tracker)
    try:
        trainer.train()
        kind = ""
    except Exception as error:
        kind = f"{type(error).__name__}: {error}"
    PartialState().wait_for_everyone()
    return {
        "asked": asked,
        "rates": measured(trainer),
        "stopped": tracker.stopped,
        "raised": kind,
        "step": trainer.state.global_step,
        "saved": sorted(path.name for path in folder.glob("checkpoint-*")),
    }


def test_one_of_two_processes_measures_and_both_stop(tmp_path):
    first, second = fork(__file__, tmp_path)
    stopping, failing = ([result[name] for result in (first, second)] for name in ("stopping", "failing"))
    assert [r["asked"] for r in stopping] == [[2], []]
    assert stopping[0]["rates"] == stopping[1]["rates"]
    assert [step for step, _ in stopping[0]["rates"]] == [0, 2] and stopping[0]["rates"][1][1] < 0.4
    assert [r["raised"] for r in stopping] == ["", ""]
    assert stopping[0]["stopped"] == stopping[1]["stopped"] is not None
    assert [r["step"] for r in stopping] == [2, 2] and stopping[1]["saved"] == ["checkpoint-2"]
    assert failing[0]["raised"] == "ZeroDivisionError: division by zero"
    assert failing[1]["raised"] == "RunError: Process 0 failed: ZeroDivisionError: division by zero"


def main(output: str) -> None:
    """Write this process's results to ``output/RANK.pt``."""
    torch.set_num_threads(1)
    folder = Path(output)
    stopping, failing = (_in_processes(folder / name, name == "failing") for name in ("stopping", "failing"))
    write_result(folder, {"stopping": stopping, "failing": failing})


if __name__ == "__main__":
    main(*sys.argv[1:])
