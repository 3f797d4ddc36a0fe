"""Forward passes and gradients of tiny models in plain float64, and their differences from the project's."""

from __future__ import annotations

import copy
import math
import tempfile
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from settings import QUIET
from torch import nn
from torch.func import functional_call
from transformers import LlamaForCausalLM, PrinterCallback
from trl import RewardConfig
from trl_rlaif_advantage import AdvantageModel
from trl_rlaif_direct import DirectLabeler
from trl_rlaif_distilled import DistilledLabeler
from trl_rlaif_regulator import DistributionRegulator

from trl_rlaif import PPOConfig, PPOTrainer, RewardTrainer
from trl_rlaif.data import Pair
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.recipe import prompt_folder
from trl_rlaif.reward.heads import active_head
from trl_rlaif.reward.log_ratios import add_log_ratios
from trl_rlaif.testing.models import make_llama, make_scorer, make_tokenizer
from trl_rlaif.types import ScoredBatch

WORDS = "quick brown fox lazy dog capital city country judge over".split()
PAIRS = [
    Pair(str(i), f"what is the {word}?", f"it is {' '.join(WORDS[: 1 + i % 4])}", f"no {word} {WORDS[-i]}")
    for i, word in enumerate(WORDS)
]


# ---- Judges ---------------------------------------------------------------------------------------------------


@cache
def _judge() -> LocalJudge:
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer), length=4096)
    return LocalJudge(model, tokenizer, JudgePrompt.load(prompt_folder("general")), "tiny")


@torch.no_grad()
def _continuations(question: Any, texts: list[str]) -> list[float]:
    """log P(text | question and ending), each from one forward pass in float64 over the whole text.

    In this tokenizer "1" is a prefix of "10": the probability of continuing with "0" is not counted for "1".
    """
    judge = _judge()
    model, tokenizer = copy.deepcopy(judge.model).double(), judge.tokenizer
    text = tokenizer.apply_chat_template(list(question.messages), tokenize=False, add_generation_prompt=True)

    def encode(ending: str) -> list[int]:
        return tokenizer.encode(text + ending, add_special_tokens=False)

    start = len(encode(question.ending))
    found = {}
    for candidate in texts:
        ids = encode(question.ending + candidate)
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found[candidate] = math.fsum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids)))
    return [
        math.log(math.exp(found[c]) - math.fsum(math.exp(found[d]) for d in texts if d != c and d.startswith(c)))
        for c in texts
    ]


def distilled_difference() -> float:
    """Largest difference in p_12, p_21 and the masses of ten pairs."""
    judge, largest = _judge(), 0.0
    for pair, label in zip(PAIRS, sorted(DistilledLabeler().label(PAIRS, judge), key=lambda x: int(x.id)), strict=True):
        for order, shown in (("12", (pair.response_1, pair.response_2)), ("21", (pair.response_2, pair.response_1))):
            one, two = map(math.exp, _continuations(judge.prompt.compare(pair.prompt, *shown), ["1", "2"]))
            p = one / (one + two) if order == "12" else two / (one + two)
            found = getattr(label, f"p_{order}"), getattr(label, f"mass_{order}")
            largest = max(largest, abs(found[0] - p), abs(found[1] - one - two))
    return largest


def direct_difference() -> float:
    """Largest difference in the rewards of ten responses."""
    judge, largest = _judge(), 0.0
    rewards = DirectLabeler(judge)([pair.prompt for pair in PAIRS], [pair.response_1 for pair in PAIRS])
    for pair, reward in zip(PAIRS, rewards, strict=True):
        question = judge.prompt.rate(pair.prompt, pair.response_1)
        weights = [math.exp(x) for x in _continuations(question, [str(i) for i in range(1, 11)])]
        rating = math.fsum(i * w for i, w in enumerate(weights, 1)) / math.fsum(weights)
        largest = max(largest, abs(reward - (2 * (rating - 1) / 9 - 1)))
    return largest


# ---- Reward model ---------------------------------------------------------------------------------------------


def _tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _comparisons() -> Dataset:
    """Pairs of unequal length with soft labels, and log-ratios under one other policy."""
    rows = []
    for i, (prompt, chosen, rejected) in enumerate([(9, 12, 3), (4, 5, 8), (17, 2, 20), (6, 9, 9)]):
        start = _tokens(prompt, i)
        rows.append({
            "chosen_ids": [*start, *_tokens(chosen, 50 + i)], "rejected_ids": [*start, *_tokens(rejected, 90 + i)],
            "prompt_length": prompt, "p": (0.9, 0.35, 1.0, 0.6)[i],
            "chosen_log_ratios": [(-0.7, 0.2, -2.0, -0.1)[i]], "rejected_log_ratios": [(0.3, -1.1, -0.4, -0.9)[i]],
        })  # fmt: skip
    return Dataset.from_list(rows)


class _Gradients:
    """Records the gradients before an optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, {}

    def __call__(self, *_: Any) -> None:
        named = self.model.named_parameters()
        self.found = {n: p.grad.detach().double().clone() for n, p in named if p.grad is not None}


def reward_difference(*, advantage: bool) -> float:
    """Largest difference in the loss and gradient of one RewardTrainer step, relative to the largest value of each."""
    model, rows = make_scorer(), _comparisons()
    if not advantage:
        rows = rows.remove_columns(["chosen_log_ratios", "rejected_log_ratios"])
    transform = AdvantageModel(margin=1.5, weight=3.0)
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(folder, **QUIET, per_device_train_batch_size=len(rows), max_steps=1, max_grad_norm=0.0,
                              logging_steps=1)  # fmt: skip
        trainer = RewardTrainer(model, config, train_dataset=rows, processing_class=make_tokenizer(),
                                reward_transforms=[transform] if advantage else [])  # fmt: skip
        # The second output of the head, e(x), is zero at first.
        nn.init.normal_(active_head(model).weight, std=0.3, generator=torch.Generator().manual_seed(5))
        reference, gradients = copy.deepcopy(model).double(), _Gradients(model)
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer_and_scheduler(1)
        trainer.optimizer.register_step_pre_hook(gradients)
        trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    expected = torch.stack([_pair_loss(reference, row, advantage) for row in rows]).mean()
    expected.backward()
    return max(abs(loss - expected.item()) / expected.item(), _relative(gradients.found, reference))


def _pair_loss(model: nn.Module, row: dict[str, Any], advantage: bool) -> torch.Tensor:
    """The loss by its formula, from one forward pass per response."""

    def scores(ids: list[int], position: int) -> torch.Tensor:
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, position])

    p, log_sigmoid = row["p"], nn.functional.logsigmoid
    better, worse = (scores(row[name], -1)[0] for name in ("chosen_ids", "rejected_ids"))
    if not advantage:
        return -(p * log_sigmoid(better - worse) + (1 - p) * log_sigmoid(worse - better))
    weight, margin = 3.0, 1.5
    expected = scores(row["chosen_ids"], row["prompt_length"] - 1)[1]

    def a(reward: torch.Tensor, log_ratios: list[float]) -> torch.Tensor:
        ratios = math.fsum(map(math.exp, log_ratios))
        return reward - (weight - 1) / weight * expected - ratios / weight * reward

    def direction(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return log_sigmoid(up - down) + log_sigmoid(margin - up) + log_sigmoid(margin + down)

    better, worse = a(better, row["chosen_log_ratios"]), a(worse, row["rejected_log_ratios"])
    return -(p * direction(better, worse) + (1 - p) * direction(worse, better))


def _relative(found: dict[str, torch.Tensor], reference: nn.Module) -> float:
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    return max((found[name] - expected[name]).abs().max().item() for name in expected) / largest


def regulator_difference() -> float:
    """Difference of regulated scores from z-scores by each category's own mean and standard deviation.

    Three categories of 5,600 scores with very different means and spreads. The remaining difference is due to the
    priors and the exponential weights of the running statistics.
    """
    draw, shapes = np.random.default_rng(0), {"a": (1, 0), "b": (4, 9), "c": (0.3, -2)}
    raw = {name: (std * draw.standard_normal(5600) + mean).astype(np.float32) for name, (std, mean) in shapes.items()}
    categories = [name for name in raw for _ in raw[name]]
    every = torch.tensor(np.concatenate(list(raw.values())))
    nothing = torch.zeros(len(every))
    texts = [""] * len(every)
    batch = ScoredBatch(texts, texts, nothing.long(), nothing, {"category": categories})
    found = DistributionRegulator().transform_pool(every, batch).double().numpy()
    z = np.concatenate([(x - x.mean()) / x.std() for x in (x.astype(np.float64) for x in raw.values())])
    within = math.sqrt(sum(x.astype(np.float64).var() for x in raw.values()) / len(raw))
    expected = min(within, 1.0) * 3 * np.tanh(z / 3)
    return float(np.abs(found - expected).max())


@torch.no_grad()
def log_ratio_difference() -> float:
    """Largest difference in log pi / pi' of eight whole responses."""
    models, rows = [make_llama(seed=seed) for seed in (0, 1)], _comparisons()
    found = add_log_ratios(rows.remove_columns(["chosen_log_ratios", "rejected_log_ratios"]), models[0], models[1:])
    policy, other = (copy.deepcopy(model).double() for model in models)
    largest = 0.0
    for row in found:
        for name in ("chosen", "rejected"):
            ids, first = row[f"{name}_ids"], row["prompt_length"]
            sums = [_response(model, ids, first).sum().item() for model in (policy, other)]
            largest = max(largest, abs(row[f"{name}_log_ratios"][0] - (sums[0] - sums[1])))
    return largest


def _response(model: nn.Module, ids: list[int], first: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the tokens from ``first`` on."""
    logprobs = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    return torch.stack([logprobs[t - 1, ids[t]] for t in range(first, len(ids))])


# ---- PPO ------------------------------------------------------------------------------------------------------

BETA, GAMMA, LAMBDA, TEMPERATURE, VF, CLIP_VALUE, REHEARSAL = 0.1, 0.97, 0.9, 0.9, 0.3, 0.2, 0.5


def _length_reward(completions: list[str], **_: Any) -> list[float]:
    return [math.sin(len(text)) for text in completions]


class _Recorder(PPOTrainer):
    """Records the rollout and its scores."""

    def transform(self, scores: Any, rollout: Any) -> Any:
        found = super().transform(scores, rollout)
        self.rollout, self.scores = rollout, found.total
        return found


@cache
def ppo_differences(*, rehearsal: bool = False) -> dict[str, float]:
    """Differences in a rollout's log-probabilities and values, and in an update's gradient, relative to its maximum."""
    tokenizer = make_tokenizer()
    prompts = [" ".join(["what is the", *WORDS[: 1 + i % 5], WORDS[-i]]) for i in range(8)]
    ends = tokenizer.convert_ids_to_tokens(range(3, 70))  # many, so that responses have all lengths
    pairs = Dataset.from_dict({"prompt": prompts[:3], "completion": [" it is a city", " no", " over the lazy dog"]})
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            folder, **QUIET, learning_rate=1e-3, total_episodes=8, per_device_train_batch_size=2,
            gradient_accumulation_steps=4, num_ppo_epochs=1, num_mini_batches=1, response_length=12, stop_tokens=ends,
            kl_coef=BETA, gamma=GAMMA, lam=LAMBDA, temperature=TEMPERATURE, vf_coef=VF, cliprange_value=CLIP_VALUE,
            num_sample_generations=0, rehearsal_coef=REHEARSAL, rehearsal_batch_size=len(pairs),
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = _Recorder(
            config, tokenizer, make_llama(len(tokenizer)), train_dataset=Dataset.from_dict({"prompt": prompts}),
            reward_funcs=[_length_reward], peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
            rehearsal_dataset=pairs if rehearsal else None,
        )  # fmt: skip
        # A new adapter equals the reference, and a new value head is zero: neither would reveal an error.
        learned = [p for p in trainer.model.parameters() if p.requires_grad]
        for i, parameter in enumerate(learned):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        policy, value, reference = (Role(trainer.shared, name) for name in ("policy", "value", None))
        gradients = _Gradients(trainer.accelerator.unwrap_model(trainer.model))
        trainer.optimizer.optimizer.register_step_pre_hook(gradients)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return _compare(trainer, policy, value, reference, gradients.found, rehearsal)


class Role:
    """A role of a shared base as a plain float64 model, with the LoRA weights as leaves."""

    def __init__(self, shared: Any, role: str | None) -> None:
        self.model = LlamaForCausalLM(shared.model.config).double().eval()
        self.plain: dict[str, torch.Tensor] = {
            name.replace(".base_layer", ""): p.detach().double().clone()
            for name, p in shared.model.named_parameters()
            if "lora_" not in name
        }
        self.leaves: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
        for name, layer in shared.model.named_modules():
            if role is not None and isinstance(layer, BaseTunerLayer):
                a, b = (m[role].weight.detach().double().clone().requires_grad_() for m in (layer.lora_A, layer.lora_B))
                self.leaves[name] = a, b, layer.scaling[role]
        self.role = role
        if role in shared.heads:
            self.head = shared.heads[role].weight.detach().double().clone().requires_grad_()

    def __call__(self, ids: list[int], *, values: bool = False) -> torch.Tensor:
        """(T, V) logits, or (T,) values."""
        weights = dict(self.plain)
        for name, (a, b, scaling) in self.leaves.items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + scaling * b @ a
        output = functional_call(self.model, weights, (torch.tensor([ids]),), {"output_hidden_states": values})
        return output.hidden_states[-1][0] @ self.head[0] if values else output.logits[0]

    def response(self, ids: list[int], first: int, temperature: float) -> torch.Tensor:
        """Log-probabilities of the tokens from ``first`` on."""
        logprobs = (self(ids) / temperature).log_softmax(-1)
        return torch.stack([logprobs[t - 1, ids[t]] for t in range(first, len(ids))])

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by the suffix of the parameter's name in the shared base."""
        found = {f".{name}.lora_{x}.{self.role}.weight": leaf.grad for name, (a, b, _) in self.leaves.items()
                 for x, leaf in (("A", a), ("B", b))}  # fmt: skip
        return found | ({".score.weight": self.head.grad} if hasattr(self, "head") else {})


def _compare(
    trainer: Any, policy: Role, value: Role, reference: Role, found: dict, rehearsal: bool
) -> dict[str, float]:
    rollout, scores = trainer.rollout, trainer.scores
    assert len(set(rollout.lengths.tolist())) > 3
    rows, width, off = [], rollout.response_ids.shape[1], 0.0
    for i, length in enumerate(rollout.lengths.tolist()):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        ids, first = [*prompt, *rollout.response_ids[i, :length].tolist()], len(prompt)
        new, ref = policy.response(ids, first, TEMPERATURE), reference.response(ids, first, TEMPERATURE)
        steps = min(length + 1, width)
        values = value(ids, values=True)[first - 1 : first - 1 + steps]
        rows.append((new, values, *_advantages(new, ref, values, float(scores[i]), length, width)))
        for mine, theirs in ((new, rollout.logprobs), (ref, rollout.ref_logprobs), (values, rollout.values)):
            off = max(off, (mine.detach() - theirs[i, : len(mine)].double()).abs().max().item())
    advantages = torch.cat([row[2] for row in rows])
    mean, deviation = advantages.mean(), advantages.std(correction=1)
    # At the first step the ratio is 1 and no value has moved: nothing is clipped, and these terms give the gradients.
    surrogate = torch.cat([(row[0] - row[0].detach()).exp() * (row[2] - mean) / deviation for row in rows]).mean()
    error = torch.cat([(row[1] - row[3]) ** 2 for row in rows]).mean()
    loss = -surrogate + VF * 0.5 * error
    if rehearsal:
        texts = [(pair.prompt_ids, pair.response_ids) for pair in trainer.rehearsal.pairs]
        nll = torch.cat([-policy.response([*prompt, *ids], len(prompt), 1.0) for prompt, ids in texts]).mean()
        loss = loss + REHEARSAL * nll
    loss.backward()
    expected = policy.gradients() | value.gradients()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    errors = []
    for end, gradient in expected.items():
        name = next(name for name in found if name.endswith(end))
        errors.append((found[name] - gradient).abs().max().item() / largest)
    assert len(errors) == len(found)
    return {"rollout": off, "gradient": max(errors)}


@torch.no_grad()
def _advantages(new: Any, ref: Any, values: Any, score: float, length: int, width: int) -> tuple[Any, Any]:
    """GAE as explicit sums of discounted errors (Schulman et al. 2016, eq. 16), and returns."""
    steps = len(values)
    rewards = torch.zeros(steps, dtype=torch.float64)
    rewards[:length] = -BETA * (new - ref)[:steps]
    rewards[min(length, width - 1)] += score
    following = torch.cat((values[1:], values.new_zeros(1)))
    delta = rewards + GAMMA * following - values
    advantages = torch.stack(
        [sum((GAMMA * LAMBDA) ** (k - t) * delta[k] for k in range(t, steps)) for t in range(steps)]
    )
    return advantages[:length], advantages + values
