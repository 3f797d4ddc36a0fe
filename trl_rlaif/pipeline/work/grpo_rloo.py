"""RLOO and GRPO with TRL's trainers, on the recipe's base, rewards and selectors."""

from __future__ import annotations

import dataclasses
import inspect
import time
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from trl import RLOOTrainer

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.compat.ppo_trainer import without_dropout, work_out_batches
from trl_rlaif.encoding import set_template_kwargs
from trl_rlaif.errors import UserError
from trl_rlaif.files import write_folder
from trl_rlaif.generation import seeded
from trl_rlaif.models.adapters import fitted, train_in_float32, trained_values
from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.models.shared_model import TRL_REFERENCE, SharedBase, save_adapter, set_reference
from trl_rlaif.pipeline import artifacts, rl_setup, tracking
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.results import RlResults
from trl_rlaif.pipeline.training import last_checkpoint, settings_of
from trl_rlaif.progress import say
from trl_rlaif.rl.generation import RolloutGenerator
from trl_rlaif.rl.grpo_rloo.config import group_arguments
from trl_rlaif.rl.grpo_rloo.scoring import GroupReward, GroupScorer
from trl_rlaif.rl.grpo_rloo.trainer import TRAINERS, RehearsalMixin, kept_state
from trl_rlaif.rl.ppo.config import PPOConfig
from trl_rlaif.rl.ppo.construction import longest_row, reader_of, tokenized
from trl_rlaif.rl.prompts import PromptCollator
from trl_rlaif.rl.rehearsal import Rehearsal, given_pairs
from trl_rlaif.rl.scoring import RewardPipeline
from trl_rlaif.rl.selection import MergedSelection, PromptPool, PromptSelection


def run(context: Context) -> RlResults:
    """Train ``policy/``; return the first and last metrics of training."""
    started = time.monotonic()
    trainer, skipped, unused = build_trainer(context)
    if unused:
        say(f"rl: {context.recipe.rl.algorithm} ignores {', '.join(unused)}.")
    scorer = trainer.scorer
    checkpoint = last_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:  # before using its selection, which refers to rows of its prompts
        trainer.same_run.compare(Path(checkpoint))
    _select(context, scorer, checkpoint)
    trainer.train_dataset = scorer.selection.prompts
    callback = context.callback("rl", "Training the policy")
    callback.attach(trainer)
    own = {"role_models": scorer.role_models, "reader": scorer.reader, "log": trainer.log_alone}
    tracker = tracking.attach(context, trainer, scorer.shared, **own)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        callback.close()
    rl_setup.keep_selection(context, scorer.selection.folder)
    write_folder(context.folder / artifacts.POLICY, lambda folder: _save(context, scorer.shared, folder))
    numbers = (
        _numbers(trainer)
        | rl_setup.of_rewards(trainer.state.log_history, scorer.rewards.unscored.total)
        | {"skipped": skipped, "unused": unused}
        | tracking.numbers(tracker)
    )
    return numbers | rl_setup.gpu_memory(context.recipe) | {"seconds": time.monotonic() - started}


def _select(context: Context, scorer: GroupScorer, checkpoint: str | None) -> None:
    """Set the prompts and rehearsal pairs: the checkpoint's, or else the selectors' choice."""

    kept = None if checkpoint is None else kept_state(checkpoint)
    if kept is not None and kept["chosen"] is not None:
        scorer.selection.take(MergedSelection.from_dict(kept["chosen"]))
    elif scorer.selection.selectors:
        with seeded(context.recipe.run.seed, "selection"):
            scorer.selection.take(scorer.selection.choose(0))


def build_trainer(context: Context) -> tuple[RehearsalMixin, dict[str, int], list[str]]:
    """TRL's trainer with a scorer; the number of prompts skipped by reason; unused keys of the section rl."""

    config, unused = trainer_config(context)
    settings = scorer_settings(context, config)  # before the trainer: new arguments reset accelerate's state
    base = context.load_base()
    adapter = fitted(context.lora, base)
    stops = _stop_ids(context, base)
    ends = {"stop_token_ids": stops, "ignore_eos": True} if config.use_vllm else {"eos_token_id": stops}
    config.generation_kwargs = ends | (config.generation_kwargs or {})
    dataset, skipped = rl_setup.prompts(context, base, config.max_completion_length)
    if any(not isinstance(prompt, str) and prompt[-1]["role"] == "assistant" for prompt in dataset["prompt"]):
        raise UserError(  # TRL would end that turn and open another one
            f"A prompt ends with an assistant turn, which {context.recipe.rl.algorithm} does not continue.",
            where=context.recipe.data.prompts,
            fix="Use another algorithm, or end the prompts with a user turn.",
        )
    if context.start is not None:
        base, adapter = PeftModel.from_pretrained(base, context.start, is_trainable=True), None
    score, values = GroupReward(), trained_values(base)
    with settings_of(context.recipe, "rl"):
        trainer = TRAINERS[type(config)](
            model=base,
            reward_funcs=[score],
            args=config,
            train_dataset=dataset,
            processing_class=context.tokenizer,
            peft_config=adapter,
        )
    train_in_float32(trainer, values)
    if context.reference != context.start and TRL_REFERENCE in trainer.model.peft_config:
        set_reference(trainer.model, TRL_REFERENCE, context.reference)
    if hasattr(trainer, "eos_token_ids"):
        trainer.eos_token_ids = stops  # TRL masks by these; its default always includes the tokenizer's EOS
    # The scorer's adapters and heads draw random numbers, which must not affect TRL's trainer.
    with seeded(context.recipe.run.seed, "scorer"):
        score.scorer = _scorer(context, trainer, settings, dataset)
    trainer.take(score.scorer)
    return trainer, skipped, unused


def _stop_ids(context: Context, base: Any) -> list[int]:
    """The tokens that end a response, as far as the installed TRL supports several.

    Raises:
        UserError: It masks responses only by the tokenizer's EOS (until TRL 1.14), which does not end these.
    """
    stops, eos_id = list(context.stop_ids(base)), context.tokenizer.eos_token_id
    if "eos_token_ids" in inspect.getsource(RLOOTrainer) or stops == [eos_id]:
        return stops
    if eos_id != stops[0]:
        raise UserError(
            f"This TRL knows one end of a response, {context.tokenizer.eos_token!r}, and the model's end of turn is "
            f"{context.tokenizer.convert_ids_to_tokens(stops[0])!r}.",
            where=context.recipe.line(("rl", "algorithm")),
            fix="Run: pip install -U trl; or set algorithm: ppo.",
        )
    return [eos_id]


def _scorer(context: Context, trainer: RehearsalMixin, args: PPOConfig, dataset: Any) -> GroupScorer:
    """The object that scores, selects and rehearses, on the same base that TRL's trainer trains."""
    accelerator, tokenizer, shared = trainer.accelerator, context.tokenizer, SharedBase.around(trainer.model)
    if context.reference != context.start:
        shared.compare_with(context.reference)
    work_out_batches(args, accelerator.num_processes, len(dataset))
    has_reward = "reward" in context.recipe.rl.reward_names
    if has_reward:
        shared.add_reward(context.folder / artifacts.REWARD)
    without_dropout(shared.to(accelerator.device))
    role_models = SharedRoleModels(shared)
    reader = reader_of(args, tokenizer, shared.peft)
    generator = RolloutGenerator(args, accelerator, reader)
    scored = (lambda responses: generator.scores(role_models, responses)) if has_reward else None
    rewards = RewardPipeline(
        rl_setup.reward_functions(context, shared), context.transforms("rl"), scored, args, reader, accelerator
    )
    pairs = given_pairs(rl_setup.rehearsal_dataset(context), tokenizer, max_length=longest_row(shared.peft, args))
    rehearsal = Rehearsal(pairs, args, args.seed + accelerator.process_index * 100_003)  # as PPO's local_seed
    scorer = GroupScorer(
        args, accelerator, shared, role_models, reader, generator, rewards, rehearsal, context.plugins, trainer.state
    )
    prompts = tokenized(dataset, tokenizer, shared.peft, args)
    policy = partial(role_models.model, "policy")
    pool = PromptPool(prompts, PromptCollator(tokenizer), scorer, rewards, policy, args, accelerator)
    scorer.selection = PromptSelection(rl_setup.selectors(context), pool, rehearsal, args.output_dir)
    return scorer


def scorer_settings(context: Context, config: Any) -> PPOConfig:
    """PPO's settings from the recipe, for a trainer that samples and batches by TRL's settings."""
    args = dataclasses.replace(  # type: ignore[call-arg]  # fields of TRL's own class
        rl_setup.config(context),
        response_length=config.max_completion_length,
        temperature=config.temperature,  # the default is TRL's, not PPO's
        value="trunk",  # no value model: the rehearsal batch is sized for one forward and backward pass
    )
    if args.fp16:
        where = context.recipe.line(("rl", "fp16"))
        raise UserError("fp16 is not supported in rl.", where=where, fix="Use bf16, or neither for float32.")
    if args.chat_template_kwargs is not None:
        set_template_kwargs(context.tokenizer, args.chat_template_kwargs)
    return args


def trainer_config(context: Context) -> tuple[Any, list[str]]:
    """The trainer's settings, and the unused keys of the section rl."""
    section = context.recipe.rl
    algorithm = ALGORITHMS[section.algorithm]
    config_class = algorithm.config_class()
    with settings_of(context.recipe, "rl"):
        own, unused = group_arguments(section.config, config_class, algorithm.renamed)
    arguments = context.trainer_arguments("rl", own) | rl_setup.saving(own)
    kwargs = context.recipe.model.chat_template_kwargs
    defaults = {"chat_template_kwargs": kwargs} if kwargs else {}
    with settings_of(context.recipe, "rl"):
        return config_class(**defaults | arguments), unused


def _save(context: Context, shared: SharedBase, folder: Path) -> None:
    save_adapter(shared.peft, "policy", folder)
    context.tokenizer.save_pretrained(str(folder))


def _numbers(trainer: RehearsalMixin) -> dict[str, Any]:
    logged = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    args, steps = trainer.args, trainer.state.global_step
    drawn = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    numbers = {
        "updates": steps,
        "episodes": steps * drawn // trainer.num_iterations,
        "prompts": len(trainer.train_dataset),
    }
    if logged:
        numbers |= {"score_first": logged[0]["objective/scores"], "score_last": logged[-1]["objective/scores"]}
        ended = [entry["rollout/ended"] for entry in logged if "rollout/ended" in entry]  # earlier versions logged none
        numbers |= {"ended_first": ended[0], "ended_last": ended[-1]} if ended else {}
        if "kl" in logged[-1]:  # TRL logs nats per token; PPO and the report's warnings use nats per response
            numbers["kl_last"] = logged[-1]["kl"] * logged[-1]["completions/mean_length"]
    if logged and "rehearsal/nll" in logged[0]:
        numbers["rehearsal"] = {
            "pairs": len(trainer.scorer.rehearsal.pairs),
            "nll_first": logged[0]["rehearsal/nll"],
            "nll_last": logged[-1]["rehearsal/nll"],
            "share_of_time": sum(e["time/rehearsal"] for e in logged) / sum(e["step_time"] for e in logged),
        }
    return numbers
