"""A response without a reward costs a sample, not the run: it is counted, and nothing is learned from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.group_processes import NONE
from helpers.ppo import numbers, small_trainer
from helpers.ppo import prompts as small_prompts
from helpers.recipes import fingerprints, tiny_recipe
from helpers.rewards import even_share
from trl_rlaif_direct import DirectLabeler
from trl_rlaif_regulator.regulator import DistributionRegulator
from trl_rlaif_rehearsal.rejection import RejectionSampling

from trl_rlaif import DataSelector, RewardTransform, Selection, UserError
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.rl.ppo.checkpoint import find
from trl_rlaif.rl.rejection import RejectionTrainer
from trl_rlaif.rl.scoring import Unscored
from trl_rlaif.testing import ScriptedJudge


def partly(missing, function=even_share):
    """A reward function that returns None for some rows of each batch."""

    def part(**given):
        return [None if i in missing else score for i, score in enumerate(function(**given))]

    return part


def gradients(trainer, rollout, scores):
    """The gradients of one optimizer step on a rollout, for policy and value."""
    found = {}

    def record(*arguments):
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    args = trainer.args
    args.local_batch_size = args.local_mini_batch_size = len(scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.optimizer, "step", record)
        rewards = trainer.compute_rewards(rollout, scores)
        trainer.update(rollout, *trainer.compute_advantages(rollout, rewards))
    return found


@pytest.mark.parametrize("options", [{}, {"value": "trunk"}, {"micro_batch_tokens": 24}])
@pytest.mark.parametrize("missing", [{1}, {0, 3}])
def test_an_update_is_that_of_the_other_responses_alone(tmp_path, options, missing):
    trainer = small_trainer(tmp_path, trainer_kwargs={"reward_funcs": [partly(missing)]}, kl_coef=0.2, **options)
    trainer.args.whiten_rewards = "value" in options
    trainer.begin(None)
    rollout, scores = trainer.collect()
    assert rollout.scored.tolist() == [i not in missing for i in range(4)]
    whole = gradients(trainer, rollout, scores)
    others = rollout.select(rollout.scored)
    wanted = gradients(trainer, others, scores[rollout.scored])
    assert whole.keys() == wanted.keys() and max(g.abs().max() for g in wanted.values()) > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(whole[name], gradient, rtol=1e-5, atol=1e-6)
    alone = gradients(trainer, rollout.select(~rollout.scored), scores[~rollout.scored])
    assert all((gradient == 0).all() for gradient in alone.values())


def test_another_reward_counts_for_the_row(tmp_path):
    def ones(prompts, **columns):
        return [1.0] * len(prompts)

    trainer = small_trainer(tmp_path, trainer_kwargs={"reward_funcs": [partly({1}), ones]})
    trainer.begin(None)
    rollout, scores = trainer.collect()
    assert rollout.scored.all() and scores[1] == 1 and (scores[[0, 2, 3]] > 1).any()
    assert trainer.rewards.unscored.total == 0


class Seeing(RewardTransform):
    """Records its inputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def transform(self, scores, batch):
        self.seen.append((scores, batch))
        return scores + 1


@pytest.mark.parametrize("whiten", [False, True])
def test_transforms_and_whitening_see_the_scored_responses_alone(tmp_path, whiten):
    seeing = Seeing()
    part = partly({2}, lambda prompts, **columns: [1.0, 2.0, 3.0, 5.0])
    kwargs = {"reward_funcs": [part], "reward_transforms": [seeing, DistributionRegulator()]}
    trainer = small_trainer(tmp_path, trainer_kwargs=kwargs, whiten_scores=whiten)
    trainer.begin(None)
    rollout, scores = trainer.collect()
    [(given, seen)] = seeing.seen
    assert given.isfinite().all() and len(given) == len(seen.prompts) == 3
    assert seen.prompts == [rollout.prompts[i] for i in (0, 1, 3)]
    assert torch.equal(seen.lengths, rollout.lengths[[0, 1, 3]]) and torch.equal(seen.kl, rollout.kl()[[0, 1, 3]])
    assert torch.equal(seen.parts["part"], given) and seen.columns["answer"][2] == rollout.columns["answer"][3]
    if whiten:
        known = scores[rollout.scored].double().numpy()
        assert abs(known.mean()) < 1e-6 and known.std() == pytest.approx(1, abs=1e-4)
    assert trainer.rewards.transforms[1].batches == 1


def test_metrics_are_of_the_scored_responses_and_count_the_others(tmp_path):
    def marked(prompts, completions, **columns):
        return [None, 2.0, 4.0, 6.0]

    trainer = small_trainer(tmp_path, trainer_kwargs={"reward_funcs": [marked]}, kl_coef=0.0)
    trainer.train()
    for entry in numbers(trainer):
        assert entry["objective/scores"] == entry["objective/rlhf_reward"] == 4
        assert entry["rollout/unscored"] == entry["rewards/marked/none"] == 0.25
        assert entry["rewards/marked/std"] == pytest.approx(np.std([2, 4, 6], ddof=1))
    assert trainer.rewards.unscored.total == 3
    assert all(math.isfinite(value) for entry in numbers(trainer) for value in entry.values())


# ---- Unreliable judges ----------------------------------------------------------------------------------


def dropping(every=50):
    """The labeler `direct`, with a judge that permanently fails every ``every``-th call."""
    calls = []

    def rule(context, response):
        calls.append(response)
        if len(calls) % every == 0:
            return "the connection was dropped"
        return [float(len(response) % 7 == i) for i in range(10)]

    return DirectLabeler(ScriptedJudge(rule)), calls


def test_ppo_finishes_with_a_judge_that_drops_one_call_in_fifty(tmp_path, capsys):
    labeler, calls = dropping()
    trainer = small_trainer(
        tmp_path, trainer_kwargs={"reward_funcs": [labeler]}, per_device_train_batch_size=8, total_episodes=128
    )
    trainer.train()
    assert len(calls) == 128 and trainer.state.global_step == 16 and trainer.rewards.unscored.total == 2
    assert sum(entry["rollout/unscored"] for entry in numbers(trainer)) == 2 / 8
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("Warning: 1 of the last 8 responses have no reward. 'direct' failed for 1: the connection") == 1


def test_rejection_sampling_finishes_and_never_accepts_such_a_response(tmp_path):
    labeler, calls = dropping(every=10)
    accepted = []

    class Watching(DataSelector):
        num_responses = 2

        def select(self, pool):
            assert pool.scores.isfinite().all()
            accepted.append(len(pool))
            return self.inner.select(pool)

        inner = RejectionSampling(num_responses=2)

    kwargs = {"reward_funcs": [labeler], "data_selectors": [Watching()]}
    trainer = small_trainer(tmp_path, trainer_kwargs=kwargs, max_failed=0.2)
    RejectionTrainer.of(trainer, 2).train()
    assert len(calls) == 2 * 20 and accepted == [18, 18]
    assert all(entry["rollout/unscored"] > 0 for entry in numbers(trainer))


# ---- Too many missing rewards ------------------------------------------------------------------------------


def test_too_many_stop_the_run_with_a_checkpoint_and_its_resumption_continues(tmp_path):
    broken = []

    def rule(context, response):
        return "the server is down" if broken and len(response) >= 0 else [1.0] * 10

    def trainer():
        return small_trainer(
            tmp_path, trainer_kwargs={"reward_funcs": [DirectLabeler(ScriptedJudge(rule))]}, total_episodes=48
        )

    first = trainer()
    steps = first.update
    first.update = lambda *given: (broken.append(1) if first.state.global_step == 1 else None, steps(*given))[1]
    with pytest.raises(
        UserError, match=r"12 of the last 20 responses have no reward\. 'direct' failed for 12: the"
    ) as e:
        first.train()
    assert "max_failed allows (10%)" in str(e.value) and "--resume" in str(e.value)
    assert first.state.global_step == 4  # of 4 responses each; the third one without rewards is not trained on
    assert find(tmp_path, True).name == "checkpoint-4"
    broken.clear()
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12 and again.rewards.unscored.total == 8


def test_what_share_is_too_many():
    def seen(limit, *batches, failed=()):
        unscored = Unscored(limit)
        for size, missing in batches:
            scores = torch.zeros(size)
            scores[:missing] = math.nan
            unscored.observe(scores, {"direct": ["why"] * len(failed)} if failed else {})
        return unscored.error()

    assert seen(0.1, (200, 20)) is None and "21 of the last 200" in str(seen(0.1, (200, 21)))
    assert seen(0.1, (200, 21), (200, 0)) is None  # only the last update counts
    assert seen(0.1, (8, 1)) is None and seen(0.1, *[(8, 1)] * 10) is None and seen(0.1, (8, 8), (8, 3)) is not None
    assert seen(0.1, *[(16, 2)] * 10) is not None  # of the last hundred responses
    assert seen(1.0, *[(16, 16)] * 10) is None and seen(0.0, (200, 1)) is not None
    # Failures of a judge count even if another reward covers the responses.
    assert "'direct' failed for 21: why" in str(seen(0.1, (200, 0), failed=range(21)))


@pytest.mark.parametrize("limit", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(tmp_path, limit):
    with pytest.raises(UserError, match="max_failed is"):
        small_trainer(tmp_path, max_failed=limit)


def test_an_update_without_any_reward_leaves_numbers_finite(tmp_path):
    kwargs = {"reward_funcs": [partly({0, 1, 2, 3})], "reward_transforms": [DistributionRegulator()]}
    trainer = small_trainer(tmp_path, trainer_kwargs=kwargs, max_failed=1.0, whiten_scores=True)
    trainer.args.whiten_rewards = True
    trainer.train()
    assert len(numbers(trainer)) == 3
    for entry in numbers(trainer):
        assert entry["rollout/unscored"] == 1 and "objective/scores" not in entry
        assert all(math.isfinite(value) for value in entry.values())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_selectors_choose_from_scored_responses_and_the_pools_failures_are_not_counted(tmp_path):
    pools = []

    class Watching(DataSelector):
        num_responses = 2

        def select(self, pool):
            pools.append(pool)
            assert len(pool.embeddings) == len(pool)
            return Selection(prompts=list(range(len(pool))))

    kwargs = {"reward_funcs": [partly({1})], "data_selectors": [Watching()]}
    trainer = small_trainer(tmp_path, trainer_kwargs=kwargs, max_failed=0.5)
    trainer.train()
    [pool] = pools
    assert len(pool) == 15 and pool.scores.isfinite().all()  # of 20: one in each batch of 4 is left out
    assert pool.prompts == [small_prompts()["prompt"][row] for row in pool.rows.tolist()]
    assert trainer.rewards.unscored.total == 3


def test_responses_that_are_shown_may_have_no_score(tmp_path, capsys):
    trainer = small_trainer(
        tmp_path,
        trainer_kwargs={"reward_funcs": [partly({0})], "eval_dataset": small_prompts()},
        num_sample_generations=1,
    )
    trainer.train()
    assert "none" in capsys.readouterr().out
    assert trainer.rewards.unscored.total == 3


# ---- In a recipe ------------------------------------------------------------------------------------------


def _limited(folder, model, **limits):
    rl = {"rewards": ["helpers.rewards:even_share"], "total_episodes": 48, "save_strategy": "no"} | limits
    return tiny_recipe(folder, model, rl=rl, **NONE)


def test_a_stopped_recipe_continues_with_a_raised_limit(tiny_model, tmp_path, monkeypatch):
    calls = []

    def failing(prompts, completions, **columns):
        calls.append(len(prompts))
        return [None if len(calls) >= 4 and i else 1.0 + i for i in range(len(prompts))]

    monkeypatch.setattr("helpers.rewards.even_share", failing)
    with pytest.raises(UserError, match="max_failed"):
        run_recipe(_limited(tmp_path, tiny_model), installed_plugins(), tmp_path / "out")
    stopped_at = int(find(tmp_path / "out" / "checkpoints" / "rl", True).name.removeprefix("checkpoint-"))
    assert len(calls) == stopped_at + 1 < 12
    limits = {"max_failed": 1.0, "reward_timeout": 60}
    folder = run_recipe(_limited(tmp_path, tiny_model, **limits), installed_plugins(), tmp_path / "out", resume=True)
    assert len(calls) == 12 + 1  # only the batch that stopped the run is scored again
    steps = [row["step"] for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert steps == list(range(1, 13))


def test_limits_that_only_stop_a_run_are_no_part_of_a_fingerprint(tiny_model, tmp_path):
    def prints(**limits):
        return fingerprints(_limited(tmp_path, tiny_model, **limits))

    assert prints() == prints(max_failed=0.5) == prints(reward_timeout=None, max_failed=0.1)
    assert prints() != prints(kl_coef=0.5)
