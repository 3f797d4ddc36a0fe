"""Options that this project adds to TRL's, each against a plain computation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.ppo import numbers, small_trainer
from helpers.tiny import CHAT_TEMPLATE, make_llama, make_tokenizer
from transformers import HfArgumentParser

from trl_rlaif import PPOConfig, UserError
from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.compat.trl_ppo import BasePPOConfig
from trl_rlaif.rl.ppo.advantages import explained_variance
from trl_rlaif.rl.reward_shaping import AdaptiveKLController, shaped_scores
from trl_rlaif.types import Rollout

pytestmark = pytest.mark.trl

SCORES = [2.0, -1.0, 0.5, 7.0]


def _rollout(lengths, ended):
    ids = torch.full((len(lengths), 8), 5)
    for row, (length, end) in enumerate(zip(lengths, ended, strict=True)):
        if end:
            ids[row, length - 1] = 2
    zeros = torch.zeros(len(lengths), 8)
    return Rollout(
        prompt_ids=ids, prompt_mask=ids > 0, response_ids=ids, lengths=torch.tensor(lengths),
        ended=torch.tensor(ended), logprobs=zeros, ref_logprobs=zeros, values=zeros,
        prompts=["p"] * len(lengths), completions=["c"] * len(lengths),
    )  # fmt: skip


def _shaped(**options):
    defaults = {"whiten_scores": False, "score_clip": None, "missing_eos_penalty": None, "length_penalty": 0.0}
    args = SimpleNamespace(**{"response_length": 8, **defaults, **options})
    rollout = _rollout([8, 4, 2, 8], [False, True, True, True])
    return shaped_scores(torch.tensor(SCORES), rollout, args, rollout.ended).tolist()


def test_scores_stay_as_they_are_unless_asked():
    assert _shaped() == SCORES


def test_scores_are_whitened_then_clipped_then_penalized():
    white = (np.array(SCORES) - np.mean(SCORES)) / np.std(SCORES)
    assert _shaped(whiten_scores=True) == pytest.approx(white.tolist(), abs=1e-6)
    assert _shaped(score_clip=1.0) == [1.0, -1.0, 0.5, 1.0]
    assert _shaped(missing_eos_penalty=3.0) == [-1.0, -1.0, 0.5, 7.0]
    assert _shaped(length_penalty=2.0) == [0.0, -2.0, 0.0, 5.0]
    every = _shaped(whiten_scores=True, score_clip=0.5, missing_eos_penalty=3.0, length_penalty=2.0)
    expected = np.clip(white, -0.5, 0.5) - [3, 0, 0, 0] - 2 * np.array([8, 4, 2, 8]) / 8
    assert every == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_kl_weight_is_steered_to_its_target():
    weight = AdaptiveKLController(0.1, 6.0, 100)
    weight.observe(6.3, 10)  # 5% too much
    assert weight.coef == pytest.approx(0.1 * (1 + 0.05 * 10 / 100))
    weight = AdaptiveKLController(0.1, 6.0, 100)
    weight.observe(60.0, 10)  # clipped at 20%
    assert weight.coef == pytest.approx(0.1 * 1.02)
    weight.observe(0.0, 10)
    assert weight.coef == pytest.approx(0.1 * 1.02 * 0.98)
    fixed = AdaptiveKLController(0.1, None, 100)
    fixed.observe(60.0, 10)
    assert fixed.coef == 0.1


def test_the_weighted_objective_shares_out_between_score_and_kl(tmp_path):
    trainer = small_trainer(tmp_path, kl_weighting="weighted", kl_coef=0.2)
    seen = []
    original = trainer.compute_rewards

    def spy(rollout, scores):
        seen.append((rollout, scores, original(rollout, scores)))
        return seen[-1][2]

    trainer.compute_rewards = spy
    trainer.train()
    for (rollout, scores, rewards), logged in zip(seen, numbers(trainer), strict=True):
        kl = (rollout.logprobs - rollout.ref_logprobs).double().sum(1)
        torch.testing.assert_close(rewards.double().sum(1), 0.8 * scores.double() - 0.2 * kl, rtol=1e-5, atol=1e-6)
        assert logged["objective/rlhf_reward"] == pytest.approx((0.8 * scores - 0.2 * kl).mean().item(), rel=1e-4)


def test_an_update_stops_when_the_policy_went_too_far(tmp_path):
    epochs = {"num_ppo_epochs": 4, "learning_rate": 0.05}
    assert {n["policy/epochs"] for n in numbers(_trained(tmp_path / "a", **epochs))} == {4}
    few = [n["policy/epochs"] for n in numbers(_trained(tmp_path / "b", max_update_kl=1e-6, **epochs))]
    assert min(few) < 4 and max(few) <= 4
    assert few[0] == 2  # in the first epoch, the policy is still the sampling policy


def _trained(folder, **options):
    trainer = small_trainer(folder, **options)
    trainer.train()
    return trainer


def test_parts_of_a_micro_batch_give_the_same_run(tmp_path):
    whole, parts = _trained(tmp_path / "a"), _trained(tmp_path / "b", micro_batch_tokens=24)
    for a, b in zip(numbers(whole), numbers(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_the_value_may_live_on_the_policys_trunk(tmp_path):
    trainer = small_trainer(tmp_path, value="trunk", save_strategy="steps", save_steps=1, total_episodes=24)
    assert set(trainer.shared.peft.peft_config) == {"policy"}
    before = trainer.shared.heads["value"].weight.clone()
    trainer.train()
    assert (trainer.shared.heads["value"].weight != before).any()
    assert all(np.isfinite(n["loss/value_avg"]) for n in numbers(trainer))
    again = small_trainer(tmp_path, value="trunk", total_episodes=24)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert numbers(again) == numbers(trainer)


def test_a_trunk_needs_one_base(tmp_path):
    value = make_llama(len(make_tokenizer()))
    with pytest.raises(UserError, match="one base for every role"):
        small_trainer(tmp_path, value="trunk", trainer_kwargs={"value_model": value})


def test_reinforce_is_one_pass_without_a_clipped_ratio(tmp_path):
    trainer, steps = small_trainer(tmp_path, **ALGORITHMS["reinforce"].preset), []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.state.global_step))
    # A ratio of 1, as before the first step on a rollout and only then, is never clipped, however large the advantages.
    scale = trainer.compute_advantages
    trainer.compute_advantages = lambda *given: tuple(100 * x for x in scale(*given))
    trainer.train()
    assert steps == list(range(trainer.state.global_step)) and len(steps) > 1
    for logged in numbers(trainer):
        assert logged["policy/clipfrac_avg"] == 0
        assert logged["val/ratio"] == pytest.approx(1, abs=1e-5)


def test_the_bases_arguments_get_the_defaults(tmp_path):
    options = {"per_device_train_batch_size": 4, "bf16": False, "report_to": "none", "response_length": 8}
    theirs = BasePPOConfig(str(tmp_path), total_episodes=4, num_sample_generations=0, **options)
    trainer = small_trainer(tmp_path)
    other = type(trainer)(
        theirs, make_tokenizer(), make_llama(len(make_tokenizer())),
        train_dataset=trainer.train_dataset, reward_funcs=trainer.rewards.functions,
    )  # fmt: skip
    other.train()
    assert other.args.kl_weighting == "additive" and other.state.global_step == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "head"}, "adapter, trunk"),
        ({"kl_weighting": "both"}, "additive, weighted"),
        ({"score_clip": 0.0}, "score_clip is 0.0"),
        ({"micro_batch_tokens": -1}, "micro_batch_tokens is -1"),
        ({"kl_weighting": "weighted", "kl_coef": 1.5}, "a fraction from 0 to 1"),
        ({"kl_weighting": "weighted", "kl_target": 6.0}, "additive weight"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(str(tmp_path), bf16=False, **options)


def test_explained_variance():
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) > 0.3
    guess = returns + 0.5 * torch.randn(6, 5, generator=generator)
    r, e = returns[mask].double().numpy(), (returns - guess)[mask].double().numpy()
    assert explained_variance(guess, returns, mask).item() == pytest.approx(1 - e.var() / r.var(), abs=1e-6)
    assert explained_variance(returns, returns, mask).item() == 1.0


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_the_optimizer_may_keep_its_states_in_8_bits(tmp_path, optim):
    """bitsandbytes' optimizers, as `trl-rlaif memory` advises; tensors below 4096 elements stay in 32 bits there."""
    trainer = small_trainer(tmp_path, optim=optim)
    before = {n: p.clone() for n, p in trainer.shared.named_parameters() if ".policy." in n and "lora_B" in n}
    trainer.train()
    assert "AdamW" in type(trainer.optimizer.optimizer).__name__
    assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
    after = dict(trainer.shared.named_parameters())
    assert any((after[name] != value).any() for name, value in before.items())


def test_variables_of_the_chat_template_reach_the_prompts(tmp_path):
    """Those of the configuration, overridden by a row's own, as in TRL."""
    tokenizer = make_tokenizer()
    template = CHAT_TEMPLATE + "{% if enable_thinking is false %}no thoughts{% endif %}"
    rows = [[{"role": "user", "content": word}] for word in ("fox", "dog", "city", "judge")]
    kwargs = [{"enable_thinking": i > 1} for i in range(4)]
    dataset = Dataset.from_dict({"prompt": rows, "chat_template_kwargs": kwargs})

    def encoded(dataset, **options):
        trainer = small_trainer(tmp_path, dataset=dataset, template=template, **options)
        return trainer.processing_class.batch_decode(list(trainer.train_dataset["input_ids"]))

    tokenizer.chat_template = template

    def wanted(row, thinking):
        return tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)

    assert encoded(dataset) == [wanted(row, i > 1) for i, row in enumerate(rows)]
    without = dataset.remove_columns("chat_template_kwargs")
    assert encoded(without, chat_template_kwargs={"enable_thinking": False}) == [wanted(row, False) for row in rows]
    assert encoded(dataset, chat_template_kwargs={"enable_thinking": True}) == encoded(dataset)


def test_rendered_prompts_keep_their_control_tokens(tmp_path):
    """Only if all of them start like the chat template; otherwise they are the text of a user."""
    tokenizer = make_tokenizer()
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": word}], tokenize=False, add_generation_prompt=True)
        for word in ("fox", "dog", "city", "judge")
    ]
    ids = list(small_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": rendered})).train_dataset["input_ids"])
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    mixed = small_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": [*rendered[:3], "a fox"]})).train_dataset
    assert not any(tokenizer.eos_token_id in row for row in mixed["input_ids"])


def test_a_command_line_has_every_option(tmp_path):
    """As TRL's scripts parse their arguments."""
    given = ["--output_dir", str(tmp_path), "--bf16", "False", "--stop_tokens", "<turn>", "<eos>"]
    given += ["--chat_template_kwargs", '{"enable_thinking": false}', "--reasoning_tags", "[", "]"]
    [found] = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(given)
    assert found.stop_tokens == ["<turn>", "<eos>"] and found.reasoning_tags == ["[", "]"]
    assert found.chat_template_kwargs == {"enable_thinking": False} and found.score_at_end
