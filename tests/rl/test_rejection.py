"""Rejection sampling: its gradient is that of a plain loss, it learns, repeats and resumes, and keeps other roles."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers.ppo import numbers, small_trainer
from helpers.ppo_task import RESPONSE_LENGTH, WORDS, make_policy, make_trainer, share_of_yes, trainable
from helpers.rewards import length_penalty
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from trl_rlaif_regulator import DistributionRegulator
from trl_rlaif_rehearsal.rejection import RejectionSampling

from trl_rlaif import DataSelector, RewardTransform, Selection, SharedBase, UserError
from trl_rlaif.rl.rejection import RejectionTrainer, as_dataset, count_iterations, sft_config

pytestmark = pytest.mark.trl


class Watching(DataSelector):
    """Accepts like rejection_sampling with these options, and records the pools that it sees."""

    def __init__(self, **options):
        self.inner, self.pools, self.options = RejectionSampling(**options), [], None

    @property
    def num_responses(self):
        return self.inner.num_responses

    def select(self, pool):
        self.pools.append(pool)
        return self.inner.select(pool)


def _task(folder, *, selector=None, prompts=32, **options):
    arguments = {"per_device_train_batch_size": 32, "num_ppo_epochs": 2, "learning_rate": 1e-2, **options}
    trainer = make_trainer(folder, prompts=prompts, **arguments)
    trainer.selection.selectors = [selector or RejectionSampling()]
    return trainer


def _small(folder, *, selector=None, **options):
    kwargs = {"data_selectors": [selector or RejectionSampling(num_responses=2)], **options.pop("trainer_kwargs", {})}
    return small_trainer(folder, trainer_kwargs=kwargs, **options)


def _policy(shared):
    return {n: p for n, p in shared.named_parameters() if ".policy." in n}


def _short_ones(prompts, completions, completion_ids, **columns):
    """Every response has its own score."""
    return [-len(ids) + sum(i * n for n, i in enumerate(ids, 1)) % 997 / 1e3 for ids in completion_ids]


@pytest.mark.parametrize(
    ("batch", "accumulation", "checkpointing"), [(8, 1, False), (2, 4, False), (3, 2, False), (2, 4, True)]
)
def test_a_step_goes_down_the_gradient_of_the_plain_loss_over_response_tokens(
    tmp_path, batch, accumulation, checkpointing
):
    """SGD with a learning rate of 1 subtracts exactly the gradient from the weights."""
    base = SharedBase(make_llama(len(make_tokenizer())), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(4)
    for name, parameter in _policy(base).items():
        parameter.data.normal_(std=0.05 if "lora_B" in name else 0.3)
    watching = Watching(num_responses=4, keep="above", quantile=0.85)
    trainer = _small(
        tmp_path, selector=watching, model=base, trainer_kwargs={"reward_funcs": [_short_ones]}, num_ppo_epochs=1,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1e9, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    before = copy.deepcopy(trainer.shared)
    RejectionTrainer.of(trainer, 1).train()

    [pool], pairs = watching.pools, trainer.rehearsal.pairs
    scores = _short_ones(pool.prompts, pool.responses, pool.response_ids)
    best = sorted(range(40), key=lambda i: -scores[i])[:6]  # from the 0.85 quantile up
    assert sorted(pair.response_ids for pair in pairs) == sorted(pool.response_ids[i] for i in best)
    assert len({len(pair.response_ids) for pair in pairs}) > 1  # a mean over tokens is not one over rows
    total, count = 0.0, 0
    with before.role("policy"):
        for pair in pairs:
            logits = before.model(torch.tensor([pair.prompt_ids + pair.response_ids])).logits[0]
            logprobs = logits[len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            total -= logprobs.gather(1, torch.tensor(pair.response_ids)[:, None]).sum()
            count += len(pair.response_ids)
        (total / count).backward()
    assert trainer.state.log_history[0]["loss/sft"] == pytest.approx(total.item() / count, rel=1e-4)
    after = dict(trainer.shared.named_parameters())
    for name, parameter in _policy(before).items():
        torch.testing.assert_close(
            parameter.data - after[name].data, parameter.grad, rtol=1e-3, atol=1e-5, msg=f"{name} {parameter.grad}"
        )
    assert max(p.grad.abs().max() for p in _policy(before).values()) > 0.01


@pytest.mark.slow
def test_it_learns_the_known_task(tmp_path):
    trainer = _task(tmp_path, selector=RejectionSampling(num_responses=4))
    RejectionTrainer.of(trainer, 12).train()
    history = trainer.state.log_history
    scores = [entry["objective/scores"] for entry in history]
    assert len(scores) == 12 and scores[0] < 0.2
    assert scores[-1] > 0.9
    assert history[-1]["objective/kl"] > history[0]["objective/kl"] and history[-1]["loss/sft"] < history[0]["loss/sft"]


def test_what_is_logged_is_what_was_drawn_and_accepted(tmp_path):
    watching = Watching(num_responses=3, keep="above", threshold=[0.2, 0.5])
    trainer = _task(tmp_path, selector=watching, prompts=16, per_device_train_batch_size=8)
    start = copy.deepcopy(trainer.shared)
    RejectionTrainer.of(trainer, 3).train()
    assert [pool.selection for pool in watching.pools] == [0, 1, 2]
    for entry, pool, threshold in zip(trainer.state.log_history, watching.pools, (0.2, 0.5, 0.5), strict=True):
        assert len(pool) == 48
        scores = share_of_yes(pool.prompts, pool.responses)
        kept = {(p, r): s for p, r, s in zip(pool.prompts, pool.responses, scores, strict=True) if s >= threshold}
        assert entry["objective/scores"] == pytest.approx(sum(scores) / 48)
        assert entry["rejection/accepted"] == len(kept) / 48
        assert entry["rejection/threshold"] == min(kept.values())
        assert entry["rejection/score"] == pytest.approx(sum(kept.values()) / len(kept))
        assert (entry["rollout/length"], entry["rollout/ended"]) == (RESPONSE_LENGTH, 0)  # responses cannot end
        of_a = [s for s, c in zip(scores, pool.categories, strict=True) if c == "a"]
        assert entry["reward/a"] == pytest.approx(sum(of_a) / len(of_a))
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2, 3]
    assert [entry["episode"] for entry in trainer.state.log_history] == [48, 96, 144]
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    # At the start, policy and reference are equal, and the entropy is minus the log-probability of the samples.
    pool = watching.pools[0]
    with torch.no_grad(), start.role(None):
        ids = torch.tensor([p + r for p, r in zip(pool.prompt_ids, pool.response_ids, strict=True)])
        logs = start.model(ids).logits.log_softmax(-1)[:, 3:-1].gather(2, ids[:, 4:, None])
    assert trainer.state.log_history[0]["objective/entropy"] == pytest.approx(-logs.sum((1, 2)).mean().item(), rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    assert [line["response"] for line in lines] == [pair.response for pair in trainer.rehearsal.pairs]


class Drifting(RewardTransform):
    """Subtracts an offset that grows with the number of scores it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def transform(self, scores, batch):
        self.seen += len(scores)
        return scores - self.seen / 1e4

    def metrics(self):
        return {"drifting/seen": self.seen}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.slow
def test_the_regulator_maps_every_iterations_pool_by_that_pool_and_watches_all_of_them(tmp_path):
    """Batch by batch, the first responses of a pool would be mapped with other statistics than the last."""
    watching, regulator = Watching(num_responses=4), DistributionRegulator(prior=0, bound=1e6)
    trainer = _task(tmp_path, selector=watching, prompts=16, per_device_train_batch_size=8)
    trainer.rewards.transforms = [regulator]
    RejectionTrainer.of(trainer, 3).train()
    for pool in watching.pools:
        raw = np.array(share_of_yes(pool.prompts, pool.responses))
        kinds, found = np.array(pool.categories), pool.scores.numpy()
        free = sum(len(raw[kinds == kind]) - 1 for kind in "ab")
        within = np.sqrt(sum(((raw - raw[kinds == kind].mean())[kinds == kind] ** 2).sum() for kind in "ab") / free)
        for kind in "ab":
            mine = raw[kinds == kind]
            plain = within * (mine - mine.mean()) / mine.std(ddof=1)
            np.testing.assert_allclose(found[kinds == kind], plain, atol=1e-4)
    assert regulator.batches == 3 and {rise.count for rise in regulator.rises.values()} == {3 * 6, 3 * 10}  # prompts
    assert all("regulator/a/drift" in entry for entry in trainer.state.log_history)


OPTIONS = {"prompts": 16, "per_device_train_batch_size": 8, "save_strategy": "steps", "lr_scheduler_type": "linear"}


def _drifting(folder):
    trainer = _task(folder, selector=RejectionSampling(quantile=[0.3, 0.5, 0.7]), **OPTIONS)
    trainer.rewards.transforms = [Drifting()]
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = _drifting(folder)
    RejectionTrainer.of(trainer, 4).train()
    return trainer


def _same(found, expected):
    assert numbers(found) == numbers(expected)
    assert all(torch.equal(p, trainable(expected)[n]) for n, p in trainable(found).items())


def test_a_run_can_be_repeated_whatever_was_drawn_before(tmp_path, whole):
    torch.manual_seed(99)
    again = _drifting(tmp_path)
    torch.rand(7)
    RejectionTrainer.of(again, 4).train()
    _same(again, whole)
    assert whole.rewards.transforms[0].seen == 4 * 16 * 4


@pytest.mark.parametrize("last", [1, 3])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, whole, last, monkeypatch):
    stopped = _drifting(tmp_path)
    fine_tune = RejectionTrainer.fine_tune

    def failing(self, pairs):
        if self.loop.state.global_step == last:
            fine_tune(self, pairs)
            raise KeyboardInterrupt
        return fine_tune(self, pairs)

    monkeypatch.setattr(RejectionTrainer, "fine_tune", failing)
    with pytest.raises(KeyboardInterrupt):
        RejectionTrainer.of(stopped, 4).train()
    monkeypatch.undo()
    torch.manual_seed(99)
    resumed = _drifting(tmp_path)
    RejectionTrainer.of(resumed, 4).train(resume_from_checkpoint=True)
    _same(resumed, whole)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3, 4)]


def test_nothing_accepted_says_what_to_lower_and_what_was_learned_is_there(tmp_path):
    rising = RejectionSampling(keep="above", threshold=[0.2, 2.0])
    trainer = _task(tmp_path, selector=rising, **OPTIONS | {"save_strategy": "no"})
    trainer.rewards.transforms = [Drifting()]
    with pytest.raises(UserError, match="Nothing was accepted in iteration 2: of 64 responses the best has") as raised:
        RejectionTrainer.of(trainer, 3).train()
    assert "Lower the selector's threshold" in str(raised.value) and raised.value.exit_code == 2
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert trainer.rewards.transforms[0].seen == 64  # only the first iteration
    lowered = _task(tmp_path, selector=RejectionSampling(keep="above", threshold=[0.2, 0.3]), **OPTIONS)
    lowered.rewards.transforms = [Drifting()]
    RejectionTrainer.of(lowered, 3).train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in lowered.state.log_history] == [1, 2, 3]


class Nothing(DataSelector):
    def select(self, pool):
        return Selection(prompts=[0])


def test_a_selector_that_only_picks_prompts_accepts_nothing(tmp_path):
    with pytest.raises(UserError, match="Nothing was accepted in iteration 1"):
        RejectionTrainer.of(_small(tmp_path, selector=Nothing()), 1).train()


def _all_roles(folder):
    """A policy that starts from an adapter, which is also the reference, and a reward adapter."""
    from peft import get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(make_policy(), config).save_pretrained(folder / "start")
    config = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_CLS", modules_to_save=["score"]
    )
    get_peft_model(make_scorer(len(WORDS), hidden_size=64), config).save_pretrained(folder / "reward")
    shared = SharedBase(make_policy(), folder / "start", reference=folder / "start")
    shared.add_reward(folder / "reward")
    return shared


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"value": "trunk"}], ids=str)
def test_the_policy_alone_learns_and_every_role_is_as_it_was(tmp_path, options):
    trainer = _task(
        tmp_path / "run", model=_all_roles(tmp_path), prompts=8, per_device_train_batch_size=8, num_ppo_epochs=1,
        **options,
    )  # fmt: skip
    shared = trainer.shared
    layers = [m for m in shared.modules() if isinstance(m, BaseTunerLayer)]

    def state():
        return {
            "learns": [n for n, p in shared.named_parameters() if p.requires_grad],
            "active": [(m._active_adapter, m._disable_adapters) for m in layers],
            "forward": [m.__dict__.get("forward") for m in (shared.peft, shared.model)],
            "attention": shared.model.config._attn_implementation,
            "use_cache": shared.model.config.use_cache,
            "dtypes": {n: p.dtype for n, p in shared.named_parameters()},
            "adapter": shared.peft.active_adapter,
        }

    before, weights = state(), {n: t.detach().clone() for n, t in shared.state_dict(keep_vars=True).items()}
    RejectionTrainer.of(trainer, 2).train()
    assert state() == before
    changed = {n for n, t in shared.state_dict(keep_vars=True).items() if not torch.equal(t, weights[n])}
    assert changed == {n for n in weights if ".policy." in n}
    assert all(p.grad is None for p in shared.parameters()) and not shared.model.training
    # PPO can continue from there.
    trainer.selection.selectors, trainer.selection.chosen = [], None
    trainer.args.num_total_batches = 1
    trainer.train()
    changed = {n for n, t in shared.state_dict(keep_vars=True).items() if not torch.equal(t, weights[n])}
    assert any("value" in n for n in changed) and not any(".reward." in n or ".reference." in n for n in changed)


def test_the_users_own_pairs_are_trained_on_as_well(tmp_path):
    from datasets import Dataset

    given = Dataset.from_dict({"prompt": ["what is that?"], "completion": ["a lazy fox"]})
    trainer = _small(tmp_path, trainer_kwargs={"rehearsal_dataset": given}, learning_rate=0.0)
    seen = []
    rejection = RejectionTrainer.of(trainer, 2)
    fine_tune = rejection.fine_tune
    rejection.fine_tune = lambda pairs: (seen.append(list(pairs)), fine_tune(pairs))[1]
    rejection.train()
    assert [pairs[0].response for pairs in seen] == ["a lazy fox"] * 2 and all(len(pairs) > 5 for pairs in seen)
    assert all(entry["rejection/accepted"] == (len(pairs) - 1) / 20 for entry, pairs in
               zip(trainer.state.log_history, seen, strict=True))  # fmt: skip


def test_tokens_are_marked_as_prompt_or_response(tmp_path):
    trainer = _small(tmp_path)
    pairs = trainer.selection.pool.draw().pair(0, why="first"), trainer.selection.pool.draw().pair(1, why="second")
    for row, pair in zip(as_dataset(pairs), pairs, strict=True):
        assert row["input_ids"] == pair.prompt_ids + pair.response_ids
        assert [t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m] == pair.response_ids


def test_what_fine_tuning_shares_with_ppo_is_carried_over(tmp_path):
    given = {
        "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1,
        "optim": "adafactor", "max_grad_norm": 0.3, "adam_beta2": 0.9, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3, "use_cpu": True,
    }  # fmt: skip
    args = small_trainer(tmp_path, num_ppo_epochs=5, report_to="none", gradient_checkpointing=True, **given).args
    config = sft_config(args, 11)
    assert {name: getattr(config, name) for name in given} == given
    assert (config.num_train_epochs, config.seed, config.max_length, config.completion_only_loss) == (5, 11, None, True)
    assert config.gradient_checkpointing is False and args.gradient_checkpointing is True
    assert config.save_strategy == "no" and config.report_to == []


@pytest.mark.parametrize(
    ("options", "total", "iterations"),
    [
        ({"num_train_epochs": 3}, None, 3),
        ({"num_train_epochs": 0.25}, None, 1),
        ({"num_train_epochs": 3, "selection_prompts": 4}, None, 8),  # of ten prompts
        ({"num_train_epochs": 3, "selection_prompts": 99}, None, 3),
        ({"num_train_epochs": 3}, 80, 4),  # two responses per prompt
        ({"num_train_epochs": 3}, 81, 5),
        ({"num_train_epochs": 3, "selection_prompts": 5}, 80, 8),
    ],
)
def test_how_many_iterations_there_are(tmp_path, options, total, iterations):
    trainer = _small(tmp_path, total_episodes=total, **options)
    assert count_iterations(trainer.selection, total) == iterations


def test_every_iteration_draws_prompts_of_its_own_where_not_all_are_drawn(tmp_path):
    watching = Watching(num_responses=2)
    RejectionTrainer.of(_small(tmp_path, selector=watching, selection_prompts=4, learning_rate=0.0), 4).train()
    rows = [tuple(sorted(set(pool.rows.tolist()))) for pool in watching.pools]
    assert all(len(r) == 4 for r in rows) and len(set(rows)) > 1
    responses = [tuple(pool.responses) for pool in watching.pools]
    assert len(set(responses)) == 4


def test_with_ppo_the_selections_are_counted_and_a_resumed_run_goes_on_counting(tmp_path):
    options = {"selection_every": 2, "save_strategy": "steps", "save_steps": 3, "total_episodes": 24}
    watching = Watching(num_responses=2)
    _small(tmp_path, selector=watching, **options).train()
    assert [pool.selection for pool in watching.pools] == [0, 1, 2]
    resumed = Watching(num_responses=2)
    trainer = _small(tmp_path, selector=resumed, **options)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert [pool.selection for pool in resumed.pools] == [2]


@pytest.mark.parametrize("what", ["selectors", "models", "iterations"])
def test_what_it_cannot_do_is_refused(tmp_path, what):
    if what == "models":
        size = len(make_tokenizer())
        kwargs = {"value_model": make_scorer(size), "reward_funcs": [length_penalty]}
        trainer = _small(tmp_path, trainer_kwargs=kwargs)
    else:
        trainer = _small(tmp_path)
    if what == "selectors":
        trainer.selection.selectors = []
    expected = {"selectors": "needs a data selector", "models": "one base for every role", "iterations": "is 0"}[what]
    with pytest.raises(UserError, match=expected):
        RejectionTrainer.of(trainer, 0 if what == "iterations" else 1)


def test_a_callback_may_end_the_run(tmp_path):
    from transformers import TrainerCallback

    class Ending(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = _small(tmp_path)
    trainer.add_callback(Ending())
    RejectionTrainer.of(trainer, 3).train()
    assert trainer.state.global_step == 1


def test_fine_tuning_says_nothing_of_its_own(tmp_path, capfd):
    trainer = _small(tmp_path)
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    RejectionTrainer.of(trainer, 2).train()
    out, err = capfd.readouterr()
    assert out == "" and "it/s" not in err and "examples/s" not in err
