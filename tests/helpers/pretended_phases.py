"""Everything that computes on a GPU, on CPU tensors that pretend to be on one: a script that prints the counts as JSON.

It needs a separate process, since the new device affects everything that it imports.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl_rlaif_advantage import AdvantageModel
from trl_rlaif_regulator import Clip, DistributionRegulator, Ensemble, LengthPenalty, Whiten
from trl_rlaif_rehearsal.rejection import RejectionSampling
from trl_rlaif_rehearsal.selective import SelectiveRehearsal

from helpers.ppo import small_trainer
from helpers.pretend import DEVICE, move, phase, pretending, seen, watch
from helpers.recipes import tiny_recipe
from helpers.reward import small_config
from helpers.rewards import length_penalty
from helpers.tiny import make_llama, make_scorer, make_tokenizer, save_tiny_model
from trl_rlaif import RewardTrainer, SharedBase
from trl_rlaif.evaluation.forgetting import mean_nll
from trl_rlaif.generation import sample_responses
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.question import Thinking
from trl_rlaif.models.embedding import mean_hidden_states
from trl_rlaif.models.kernels import kernels
from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.pipeline.answers import rewards_of
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work import grpo_rloo
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.responses import ResponseReader
from trl_rlaif.reward.loading import _reading_by_mask
from trl_rlaif.reward.log_ratios import add_log_ratios
from trl_rlaif.reward.scoring import score_pairs
from trl_rlaif.rl.rejection import RejectionTrainer
from trl_rlaif.rl.soft_dpo import SoftDPOTrainer
from trl_rlaif.rl.vllm import MergedPolicy, VLLMSampler
from trl_rlaif.testing.judges import make_judge_prompt
from trl_rlaif.types import RehearsalPair

PROMPTS = [[5, 6, 7], [8, 9, 4, 5, 6], [3, 7]]
PAIRS = [RehearsalPair("what", "a", None, None, "", prompt, [8, 9, 2]) for prompt in PROMPTS]


def _folder() -> Path:
    return Path(tempfile.mkdtemp())


def _model() -> Any:
    return move(make_llama(len(make_tokenizer()), hidden_size=64, length=2048))


def _lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", **more)


def _shared(*, value: bool = False) -> SharedBase:
    """A base with a policy, and a reward role with an e(x) in its head."""
    shared = SharedBase(make_llama(len(make_tokenizer()), hidden_size=64), _lora())
    shared.heads["reward"] = shared._head(2).requires_grad_(False)
    shared.add_adapter("reward", shared.peft.peft_config["policy"])
    if value:
        shared.add_value()
    return move(shared)


def ppo() -> None:
    """Every reward transform, rehearsal, two epochs, checkpoints, and a run that resumes from one."""
    folder = _folder()

    def make(episodes: int) -> Any:
        transforms = [AdvantageModel(), DistributionRegulator(), Clip(), Whiten(), Ensemble(), LengthPenalty()]
        selectors = [SelectiveRehearsal(clusters=2, per_cluster=2)]
        trainer = small_trainer(
            folder, model=_shared(value=True), save_strategy="steps", save_steps=1, num_ppo_epochs=2,
            max_update_kl=5.0, missing_eos_penalty=1.0, whiten_scores=True, score_clip=3.0, length_penalty=0.1,
            reward_normalization="std", micro_batch_tokens=40, total_episodes=episodes, response_length=6,
            trainer_kwargs={
                "reward_funcs": [length_penalty], "reward_transforms": transforms, "data_selectors": selectors,
            },
        )  # fmt: skip
        methods = {
            "sample": "draw", "score": "score", "transform": "transform", "compute_rewards": "rewards per token",
            "compute_advantages": "advantages", "update": "update", "rehearse": "rehearse",
            "compute_metrics": "metrics",
        }  # fmt: skip
        for method, name in methods.items():
            watch(trainer, method, f"ppo: {name}")
        watch(trainer.generator, "_verify", "ppo: verify")
        watch(trainer.selection, "renew", "ppo: select")
        watch(trainer.checkpoints, "save", "ppo: save")
        watch(trainer.checkpoints, "_load", "ppo: load")
        return trainer

    make(8).train()
    make(12).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def judge() -> None:
    """Pairs in both orders, packed and padded, and after a rationale."""
    prompt = make_judge_prompt()
    sides = [("a fox", "a dog"), ("a dog", "a fox")]

    def asked(name: str, *, thinking: Thinking | None = None, packing: bool = True) -> None:
        with kernels(packing=packing):
            local = LocalJudge(_model(), make_tokenizer(), prompt, "judge", batch_tokens=1000)
            groups = [
                [prompt.compare(f"what is {i}?", *side, think=bool(thinking)) for side in sides] for i in range(4)
            ]
            list(local.ask(groups[:1], ["1", "2"], thinking=thinking))  # one-time tests of the model
            with phase(f"judge: {name}"):
                list(local.ask(groups, ["1", "2"], thinking=thinking))

    asked("packed")
    asked("padded", packing=False)
    asked("thinking", thinking=Thinking(max_tokens=6, temperature=1.0))


def passes() -> None:
    """Embeddings, log-ratios, sampling, NLL, the reward role's scores, a loaded reward model."""
    tokenizer = make_tokenizer()
    with phase("embeddings"):
        mean_hidden_states(_model(), PROMPTS, batch_tokens=8)
    rows = [{"chosen_ids": [3, 4, 5, 6 + i], "rejected_ids": [3, 4, 9], "prompt_length": 2} for i in range(4)]
    policy, other = _model(), _model()
    add_log_ratios(Dataset.from_list(rows), policy, [other])  # one-time tests of the model
    with phase("ratios"):
        add_log_ratios(Dataset.from_list(rows), policy, [other], batch_tokens=8)
    shared = _shared()
    with shared.role("policy"):
        sample_responses(shared.model, tokenizer, PROMPTS, max_new_tokens=1, temperature=1.0)
        with phase("sample"):
            sample_responses(shared.model, tokenizer, PROMPTS, num_responses=2, max_new_tokens=6, temperature=1.0)
    with phase("NLL"):
        mean_nll(SharedRoleModels(shared), "policy", PAIRS, batch_size=2, device=DEVICE)
    context = SimpleNamespace(
        reader=lambda model: ResponseReader(tokenizer, (tokenizer.eos_token_id,)),
        recipe=SimpleNamespace(rl=SimpleNamespace(config={})),
    )
    with phase("scores of responses"):
        rewards_of(context, shared, PROMPTS, [[8, 9, 2], [4], [7, 7]])
    import torch

    with phase("a loaded reward model"):
        ids, mask = torch.tensor([[5, 6, 7, 0]], device=DEVICE), torch.tensor([[1, 1, 1, 0]], device=DEVICE)
        _reading_by_mask(move(make_scorer(hidden_size=64)))(ids, attention_mask=mask)


def reward() -> None:
    """A step of reward training with the Advantage Model and importance weights, packed and padded."""
    rows = [
        {
            "chosen_ids": [3, 4, 5, 6 + i], "rejected_ids": [3, 4, 9], "prompt_length": 2, "p": 0.8, "category": "a",
            "chosen_log_ratios": [0.1], "rejected_log_ratios": [0.2],
        }
        for i in range(4)
    ]  # fmt: skip
    for packing in (True, False):
        trainer = RewardTrainer(
            model=move(make_scorer(hidden_size=64)),
            args=small_config(_folder(), per_device_train_batch_size=4, max_steps=2),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            peft_config=_lora(task_type="SEQ_CLS", modules_to_save=["score"]),
            reward_transforms=[AdvantageModel(margin=1.0, adapt="variance")],
            packing=packing,
        )
        watch(trainer, "training_step", f"reward: step, {'packed' if packing else 'padded'}")
        trainer.train()
    with phase("reward: scores of pairs"):
        score_pairs(trainer.model, rows, trainer.data_collator, 4, 100)


def dpo() -> None:
    """A step on soft labels."""
    config = small_config(_folder(), per_device_train_batch_size=2, max_steps=1)
    from trl import DPOConfig

    known = {key: getattr(config, key) for key in ("bf16", "use_cpu", "report_to", "save_strategy", "max_steps")}
    rows = [{"prompt": "what is", "chosen": " a fox", "rejected": " a dog", "p": 0.8}] * 2
    trainer = SoftDPOTrainer(
        model=_model(), args=DPOConfig(str(_folder()), gradient_checkpointing=False, **known),
        train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(), peft_config=_lora(),
    )  # fmt: skip
    watch(trainer, "training_step", "dpo: step")
    trainer.train()


def group(algorithm: str) -> None:
    """Two steps of TRL's trainer with a regulator and rehearsal."""
    folder = _folder()
    rl = {"algorithm": algorithm, "rewards": ["helpers.rewards:even_share"], "num_generations": 2}
    rl |= {"transforms": ["distribution_regulator"], "total_episodes": 8, "save_strategy": "no", "response_length": 6}
    recipe = tiny_recipe(folder, save_tiny_model(folder / "model"), reward=None, rl=rl)
    context = Context(recipe, RunFolder(folder / "out"), installed_plugins())
    # Not loaded: under a dispatch mode, transformers leaves buffers that are not in a checkpoint uninitialized.
    base = move(make_llama(len(make_tokenizer())))
    context.load_base = lambda: base
    trainer, *_ = grpo_rloo.build_trainer(context)
    scorer = trainer.scorer
    trainer.train_dataset = scorer.selection.prompts
    scorer.rehearsal.fill(PAIRS)
    watch(scorer, "rehearse", f"{algorithm}: rehearse")
    watch(scorer.rewards, "score", f"{algorithm}: score")
    watch(scorer.rewards, "transform", f"{algorithm}: transform")
    watch(trainer, "_generate", f"{algorithm}: draw")
    watch(trainer, "verify", f"{algorithm}: verify")
    watch(trainer, "training_step", f"{algorithm}: step")
    trainer.train()


def rejection() -> None:
    """An iteration of rejection sampling: a pool, the accepted responses, and TRL's fine-tuning on them."""
    selector = {"data_selectors": [RejectionSampling(num_responses=2)]}
    options = {"response_length": 4, "dataloader_pin_memory": False, "trainer_kwargs": selector}
    trainer = RejectionTrainer.of(small_trainer(_folder(), model=_shared(value=True), **options), 1)
    watch(trainer, "select", "rejection: select")
    watch(trainer, "fine_tune", "rejection: fine-tune")
    trainer.train()


def vllm() -> None:
    """Handing the weights to an engine."""
    shared = _shared()
    sampler = VLLMSampler.__new__(VLLMSampler)
    sampler._given, given = None, []
    merged = MergedPolicy(shared.model)
    sampler._engine = SimpleNamespace(sync_weights=lambda: given.extend(merged.named_parameters()))
    with shared.role("policy"), phase("vllm: weights"):
        sampler._hand_over(shared.model)
    assert given


def probe() -> None:
    """What must be detected: an operation on mixed devices, and two reads of values."""
    import torch

    with phase("probe"):
        x = torch.ones(3, device=DEVICE)
        x + torch.ones(3)
        x.sum().item()
        x[x > 0]


PHASES: dict[str, Callable[[], None]] = {
    "probe": probe, "ppo": ppo, "judge": judge, "passes": passes, "reward": reward, "dpo": dpo, "rejection": rejection,
    "vllm": vllm, "rloo": lambda: group("rloo"), "grpo": lambda: group("grpo"),
}  # fmt: skip


def main(*names: str) -> None:
    """Run the named phases, or all."""
    with redirect_stdout(sys.stderr), pretending():
        for name in names or PHASES:
            PHASES[name]()
    print(json.dumps(seen(), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
