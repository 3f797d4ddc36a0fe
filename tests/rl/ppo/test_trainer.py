"""The PPO loop: rewards of any kind, repeatable and resumable runs, and gradients only where they belong."""

from __future__ import annotations

import numpy
import pytest
import torch
from datasets import Dataset
from helpers.ppo import WORDS
from helpers.ppo import numbers as _numbers
from helpers.ppo import prompts as _dataset
from helpers.ppo import small_trainer as _trainer
from helpers.rewards import length_penalty, not_a_number
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from peft import LoraConfig

from trl_rlaif import DataSelector, PPOConfig, PPOTrainer, RewardTransform, Selection, UserError, hookimpl
from trl_rlaif.plugins import Plugins, installed_plugins
from trl_rlaif.reward.heads import add_expected
from trl_rlaif.rl.metrics import category_spreads

pytestmark = pytest.mark.trl


def test_a_length_penalty_in_five_lines(tmp_path):
    tokenizer, model = make_tokenizer(), make_llama(len(make_tokenizer()))
    dataset = Dataset.from_dict({"prompt": ["what is a fox?", "what is a dog?"] * 4})
    config = PPOConfig(str(tmp_path), per_device_train_batch_size=4, bf16=False, report_to="none", response_length=8)
    trainer = PPOTrainer(config, tokenizer, model, train_dataset=dataset, reward_funcs=[length_penalty])
    trainer.train()
    assert trainer.state.global_step == 6  # 3 epochs of 8 prompts, 4 per batch
    assert trainer.state.log_history[0]["score/length_penalty"] < 0


@pytest.mark.parametrize("chat", [False, True])
def test_reward_functions_see_prompts_completions_and_columns(tmp_path, chat):
    seen = []

    def reward(prompts, completions, completion_ids, answer, category, **rest):
        seen.append((prompts, completions, completion_ids, answer, category))
        return [float(len(a)) for a in answer]

    trainer = _trainer(tmp_path, dataset=_dataset(chat), trainer_kwargs={"reward_funcs": reward})
    trainer.train()
    prompts, completions, ids, answers, categories = seen[0]
    texts = [p[0]["content"] for p in prompts] if chat else prompts
    assert [f"what is the {a}?" for a in answers] == texts
    decoded = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    assert decoded == [c[0]["content"] if chat else c for c in completions]
    mean = sum(len(a) for a in answers) / 4
    assert trainer.state.log_history[0]["objective/scores"] == pytest.approx(mean)
    a_scores = [len(a) for a, c in zip(answers, categories, strict=True) if c == "a"]
    if a_scores:
        assert trainer.state.log_history[0]["reward/a"] == pytest.approx(sum(a_scores) / len(a_scores))


def test_rewards_of_model_and_functions_are_added(tmp_path):
    tokenizer = make_tokenizer()
    separate = {
        "ref_model": make_llama(len(tokenizer)),
        "reward_model": make_scorer(len(tokenizer), seed=1),
        "value_model": make_scorer(len(tokenizer), seed=2),
        "peft_config": None,
    }
    trainer = _trainer(tmp_path, trainer_kwargs=separate)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["objective/scores"] == pytest.approx(first["score/model"] + first["score/length_penalty"], rel=1e-5)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (not_a_number, "not_a_number.*nan for 1 of 4"),
        (lambda prompts, completions, **c: [None, "1", None, 2.0], "1 for 1 of 4"),
        (lambda prompts, completions, **c: [1.0], "1 rewards for 4 completions"),
        (lambda prompts, completions, **c: [float("inf")] * 4, "inf for 4"),
    ],
)
def test_a_bad_reward_is_named_and_what_was_learned_is_kept(tmp_path, reward, message):
    calls = []

    def good_then_bad(prompts, completions, **columns):
        calls.append(1)
        if len(calls) < 3:
            return [0.0] * len(prompts)
        return reward(prompts, completions, **columns)

    good_then_bad.__name__ = getattr(reward, "__name__", "reward")
    trainer = _trainer(tmp_path, trainer_kwargs={"reward_funcs": [good_then_bad]})
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("with_expected", [False, True])
def test_a_separate_reward_model_beside_a_shared_base(tmp_path, with_expected):
    """The policy is an adapter, the reward a separate model: each response alone gives the same scores."""
    model = make_scorer(len(make_tokenizer()), seed=1)
    if with_expected:
        add_expected(model)
        torch.nn.init.normal_(model.score.weight)
    trainer = _trainer(tmp_path, trainer_kwargs={"reward_model": model, "reward_funcs": []})
    rollout = trainer.sample(next(trainer.batches))
    found = trainer.score(rollout)
    scores, expected = found.total, found.expected
    for i, score in enumerate(scores.tolist()):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i].bool()]
        response = rollout.response_ids[i, : rollout.lengths[i] - int(rollout.ended[i])]
        ids = torch.cat((prompt, response, torch.tensor([trainer.processing_class.eos_token_id])))
        with torch.no_grad():
            found = model.score(model.model(ids[None]).last_hidden_state[0])
        assert score == pytest.approx(found[-1, 0].item(), abs=1e-5)
        if with_expected:
            assert expected[i].item() == pytest.approx(found[len(prompt) - 1, 1].item(), abs=1e-5)


class _Random(DataSelector):
    """Selects at random: a resumed run that selected again would train on other prompts."""

    def select(self, pool):
        return torch.randperm(len(pool.prompts))[:6].tolist()


class _Everything(DataSelector):
    """Random prompts in strata, and rehearsal pairs from two responses per prompt."""

    num_responses = 2

    def select(self, pool):
        chosen = torch.randperm(len(pool))[:8].tolist()
        rehearsal = [pool.pair(i, why="by chance", cluster=i % 3) for i in range(0, len(pool), 3)]
        return Selection(chosen, [i % 2 for i in chosen], rehearsal, clusters=[i % 3 for i in range(len(pool))])


@pytest.mark.parametrize(
    ("selectors", "more"),
    [
        ((), {}),
        ((_Random(),), {}),
        ((_Everything(),), {"rehearsal_coef": 0.5, "rehearsal_schedule": "cosine", "selection_every": 4}),
    ],
    ids=["all prompts", "selected prompts", "rehearsal, chosen anew"],
)
def test_a_run_is_resumed_bit_for_bit(tmp_path, selectors, more):
    """A whole run, and one that is stopped in its fourth update and resumed from checkpoint 2, are bit-identical."""
    options = dict(more)
    options |= {"num_mini_batches": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    options["trainer_kwargs"] = {"data_selectors": selectors}
    whole = _trainer(tmp_path / "whole", total_episodes=24, **options)
    whole.train()
    stopped = _trainer(tmp_path / "stopped", total_episodes=24, save_strategy="steps", save_steps=2, **options)
    original, steps = stopped.update, []

    def fail_in_the_fourth(*args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(*args)

    stopped.update = fail_in_the_fourth
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    # A partially written checkpoint is skipped.
    (tmp_path / "stopped" / ".building-checkpoint-3").mkdir()
    torch.manual_seed(99)
    resumed = _trainer(tmp_path / "stopped", total_episodes=24, **options)
    resumed.train(resume_from_checkpoint=True)
    assert len(_numbers(whole)) == 6
    assert _numbers(resumed) == _numbers(whole)
    assert ("rehearsal/nll" in whole.state.log_history[0]) == bool(more)
    for a, b in zip(whole.shared.parameters(), resumed.shared.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_wrong_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no PPO checkpoint"):
        _trainer(tmp_path / "a").train(resume_from_checkpoint=tmp_path)
    _trainer(tmp_path / "b", total_episodes=4, save_strategy="steps", save_steps=1).train()
    other = _trainer(tmp_path / "b", trainer_kwargs={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])})
    with pytest.raises(UserError, match="another model or LoRA"):
        other.train(resume_from_checkpoint=True)


def test_minibatches_do_not_halve_the_statistics(tmp_path):
    """TRL 1.12 averages over slots that it never filled: its val/ratio reads 0.5 with two minibatches."""
    trainer = _trainer(
        tmp_path, learning_rate=0.0, num_mini_batches=2, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    trainer.train()
    assert trainer.state.log_history[0]["val/ratio"] == pytest.approx(1.0, abs=1e-4)


def test_there_is_an_optimizer_step_for_every_minibatch(tmp_path):
    trainer = _trainer(
        tmp_path,
        num_mini_batches=2,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        num_ppo_epochs=3,
        total_episodes=8,
    )
    steps, optimizer = [], trainer.optimizer.optimizer
    original = optimizer.step
    optimizer.step = lambda *a, **k: (steps.append(1), original(*a, **k))
    trainer.train()
    assert len(steps) == 2 * 3


def test_micro_batches_add_up_to_the_whole(tmp_path):
    """One batch of 4 and 4 micro-batches of 1, with responses of equal length, give the same parameters."""
    same_length = {"seed": 1, "stop_token": None, "total_episodes": 4, "dataset": _dataset().select([0, 1, 8, 9])}
    trainers = []
    for size in (4, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = _trainer(tmp_path / str(size), **same_length, **options)
        trainer.train()
        assert trainer.state.log_history[0]["rollout/length"] == 8
        trainers.append(trainer)
    for a, b in zip(*(t.shared.parameters() for t in trainers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_another_trainer_in_between_changes_nothing(tmp_path):
    """accelerate shares its accumulation state among trainers: a later one must not switch off our steps."""
    trainer = _trainer(tmp_path / "a", total_episodes=4)
    _trainer(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    before = trainer.shared.heads["value"].weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.shared.heads["value"].weight)


def test_gradient_checkpointing_changes_no_number(tmp_path):
    plain = _trainer(tmp_path / "a", trainer_kwargs={"reward_funcs": [length_penalty]})
    plain.train()
    checkpointed = _trainer(tmp_path / "b", gradient_checkpointing=True)
    checkpointed.train()
    assert checkpointed.shared.model.is_gradient_checkpointing
    for a, b in zip(_numbers(plain), _numbers(checkpointed), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_only_policy_and_value_learn(tmp_path):
    trainer = _trainer(tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.shared.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.shared.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".policy." in n or ".value." in n or n == "heads.value.weight" for n in changed)
    assert any(".policy." in n for n in changed) and any(".value." in n for n in changed)


@pytest.mark.slow
def test_ppo_learns_what_is_rewarded(tmp_path):
    """Reward = share of one token: it must rise far above chance."""

    def share_of_x(prompts, completions, completion_ids, **columns):
        return [sum(t == 90 for t in ids) / max(len(ids), 1) for ids in completion_ids]

    trainer = _trainer(
        tmp_path,
        total_episodes=16 * 30,
        per_device_train_batch_size=16,
        num_ppo_epochs=4,
        learning_rate=3e-2,
        kl_coef=0.0,
        stop_token=None,
        temperature=1.0,
        dataset=Dataset.from_dict({"prompt": [f"what is the {w}?" for w in WORDS * 2]}),
        trainer_kwargs={"reward_funcs": [share_of_x]},
    )
    trainer.train()
    scores = [e["objective/scores"] for e in trainer.state.log_history]
    assert scores[0] < 0.05
    assert scores[-1] > 0.8


def test_transforms_apply_in_order_and_selectors_choose_prompts(tmp_path):
    class Shift(RewardTransform):
        def transform(self, scores, batch):
            return scores + 1

    class Double(RewardTransform):
        def transform(self, scores, batch):
            return scores * 2

    class OnlyCategoryA(DataSelector):
        def select(self, pool):
            return [i for i, c in enumerate(pool.categories) if c == "a"]

    seen = []

    def zero(prompts, completions, category, **columns):
        seen.extend(category)
        return [0.0] * len(prompts)

    trainer = _trainer(
        tmp_path,
        trainer_kwargs={
            "reward_funcs": zero,
            "reward_transforms": [Shift(), Double()],
            "data_selectors": [OnlyCategoryA()],
        },
    )
    trainer.train()
    assert trainer.state.log_history[0]["objective/scores"] == 2.0
    assert set(seen[:10]) == {"a", "b"}  # the pool: every prompt once
    assert set(seen[10:]) == {"a"}


def test_a_selector_that_chooses_nothing_is_named(tmp_path):
    class Nothing(DataSelector):
        def select(self, pool):
            return []

    with pytest.raises(UserError, match="Nothing chose 0 rows of 10"):
        _trainer(tmp_path, trainer_kwargs={"data_selectors": [Nothing()]}).train()


def test_observing_hooks_are_called(tmp_path):
    calls = []

    class Observer:
        @hookimpl
        def rollout_collected(self, trainer, rollout):
            calls.append(("rollout", rollout.response_ids.shape[0]))

        @hookimpl
        def rewards_computed(self, rewards):
            calls.append(("rewards", rewards.ndim))

        @hookimpl
        def policy_updated(self, metrics):
            calls.append(("updated", "objective/kl" in metrics))

    import pluggy

    from trl_rlaif import hookspecs

    manager = pluggy.PluginManager("trl_rlaif")
    manager.add_hookspecs(hookspecs)
    manager.register(Observer())
    plugins = Plugins(manager, installed_plugins().registry)
    _trainer(tmp_path, total_episodes=4, trainer_kwargs={"plugins": plugins}).train()
    assert calls == [("rollout", 4), ("rewards", 2), ("updated", True)]


def test_bad_prompt_datasets(tmp_path):
    with pytest.raises(UserError, match="empty"):
        _trainer(tmp_path, dataset=Dataset.from_dict({"prompt": []}))
    with pytest.raises(UserError, match="text.*'prompt'"):
        _trainer(tmp_path, dataset=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(UserError, match="1 rows have no prompt; the first is row 1"):
        _trainer(tmp_path, dataset=Dataset.from_dict({"prompt": ["a", ""]}))
    with pytest.raises(UserError, match="longer than 2 tokens"):
        _trainer(tmp_path, max_prompt_length=2)
    with pytest.raises(UserError, match="fewer prompts than one batch"):
        _trainer(tmp_path, dataset=_dataset().select([0, 1])).train()
    with pytest.raises(UserError, match="no reward"):
        _trainer(tmp_path, trainer_kwargs={"reward_funcs": ()})


def test_the_saved_policy_is_an_adapter(tmp_path):
    from peft import PeftModel

    trainer = _trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    loaded = PeftModel.from_pretrained(make_llama(len(trainer.processing_class)), tmp_path / "policy").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), trainer.shared.role("policy"):
        torch.testing.assert_close(trainer.shared.model(ids).logits, loaded(ids).logits, rtol=0, atol=0)


def test_a_subclass_may_score_by_itself(tmp_path):
    """An override of `score` may return only the scores, without the other results of the built-in one."""

    class Own(PPOTrainer):
        def score(self, rollout):
            return rollout.lengths.float()

    trainer = _trainer(tmp_path, trainer_kwargs={"reward_transforms": [RewardTransform()]})
    trainer.__class__ = Own
    trainer.train()
    assert trainer.state.log_history[0]["objective/scores"] > 0


def test_spreads_between_categories_are_logged_before_and_after_each_transform(tmp_path):
    class Doubled(RewardTransform):
        def transform(self, scores, batch):
            return 2 * scores

    class Again(Doubled):
        pass

    Again.__name__ = "Doubled"

    class OfA(RewardTransform):
        def transform(self, scores, batch):
            return scores + torch.tensor([10.0 if c == "a" else 0.0 for c in batch.categories])

    def by_answer(prompts, completions, answer, **columns):
        return [float(len(a)) for a in answer]

    kwargs = {"reward_funcs": by_answer, "reward_transforms": [Doubled(), Again(), OfA()]}
    trainer = _trainer(tmp_path, per_device_train_batch_size=8, total_episodes=8, trainer_kwargs=kwargs)
    rollout = trainer.sample(next(trainer.batches))
    raw = trainer.score(rollout)
    spreads = trainer.transform(raw, rollout).spreads
    of_a = numpy.array([c == "a" for c in rollout.categories])

    def spread(scores):
        a, b = scores[of_a], scores[~of_a]
        within = (len(a) * a.var() + len(b) * b.var()) / (len(scores) - 2)
        chance = within * (1 / len(a) + 1 / len(b)) / 2
        return max(numpy.var([a.mean(), b.mean()], ddof=1) - chance, 0) ** 0.5 / scores.std()

    scores = raw.total.double().numpy()
    expected = [spread(scores), spread(2 * scores), spread(4 * scores), spread(4 * scores + 10 * of_a)]
    assert list(spreads) == ["spread/raw", "spread/Doubled", "spread/Doubled 2", "spread/OfA"]
    assert list(spreads.values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [16, 64, 400])
def test_kinds_of_prompt_that_are_alike_have_no_spread_however_small_the_batch(size):
    generator, found = numpy.random.default_rng(0), []
    for _ in range(200):
        categories = [f"c{i % 8}" for i in range(size)]
        found.append(category_spreads(categories, {"raw": generator.normal(size=size).tolist()})["spread/raw"])
    assert numpy.mean(numpy.square(found)) < 0.7 / size**0.5  # as a variance; its floor at 0 leaves a small bias
    assert category_spreads(["a", "b", "c"], {"raw": [1.0, 2.0, 3.0]}) == {}  # cannot be told from chance
