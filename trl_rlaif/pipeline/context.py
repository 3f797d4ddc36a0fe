"""The context passed to every stage: the recipe, the run's folder, the plugins, and the models by role."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trl_rlaif import distributed, hardware
from trl_rlaif.batching import TokenRows
from trl_rlaif.chat_templates import dated, has_date
from trl_rlaif.data import Pair, Prompt
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.encoding import PromptLike, as_messages, chat_prompt, encode_prompt, is_rendered, set_template_kwargs
from trl_rlaif.errors import UserError
from trl_rlaif.files import read_state, write_state
from trl_rlaif.judging.usage import Total
from trl_rlaif.memory.settings import setting
from trl_rlaif.models import sharding
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.categories import categorized
from trl_rlaif.pipeline.checkpointing import CHECKPOINTING, settle_checkpointing
from trl_rlaif.pipeline.inputs import BATCH
from trl_rlaif.pipeline.judges import Judges
from trl_rlaif.pipeline.lineage import previous_runs
from trl_rlaif.pipeline.machine import machine_of, settled
from trl_rlaif.pipeline.rows import PairRow
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.pipeline.stored_pairs import StoredPairs
from trl_rlaif.plugins import Plugins
from trl_rlaif.progress import say
from trl_rlaif.recipe import ComponentRef, Recipe
from trl_rlaif.recipe.inputs import read_prompts
from trl_rlaif.responses import ResponseReader
from trl_rlaif.stopping import chosen_stop_ids
from trl_rlaif.validation import Origin, validated

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from trl_rlaif.components import Labeler

P = TypeVar("P", Prompt, Pair)


@dataclass(frozen=True)
class Shard:
    """One machine's share of the pairs.

    Args:
        number: 1..count.
        count: Machines.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``i/n``.

        Raises:
            UserError: The text has another form, or i is not from 1 to n.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(
                f"'{text}' is not a part i/n.", fix="Write --shard i/n with i from 1 to n, for example 2/4."
            )
        return cls(int(match[1]), int(match[2]))

    def of(self, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """This machine's pairs: every ``count``-th one, from pair ``number``."""
        return pairs[self.number - 1 :: self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass
class Context:
    """One run. Models are loaded when a stage asks for them and freed when it ends.

    Args:
        shard: This machine's share of the pairs; None: all pairs.
        total: Counts the usage of judges on servers.
    """

    recipe: Recipe
    folder: RunFolder
    plugins: Plugins
    shard: Shard | None = None
    total: Total = field(default_factory=Total)

    def __post_init__(self) -> None:
        self.recipe = settled(self.recipe, machine_of(self.folder))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, with its chat template variables."""
        model = self.recipe.model
        return self.templated(load_tokenizer(model.path), model.chat_template_kwargs)

    @cached_property
    def previous(self) -> list[RunFolder]:
        """The runs that this one continues, the latest first."""
        return previous_runs(self.recipe)

    @cached_property
    def date(self) -> date:
        """The date given to chat templates: the day on which this run, or an earlier one, first asked for it."""
        *earlier, own = (run.state / artifacts.DATE for run in (*reversed(self.previous), self.folder))
        path = next(filter(Path.exists, earlier), own)
        if not path.exists():
            write_state(path, {"date": date.today().isoformat()})
        with suppress(OSError, ValueError):  # the format of the first versions
            return date.fromisoformat(path.read_text(encoding="utf-8").strip())
        found = read_state(path, "Without it, labels of a judge whose chat template tells the date are made again.")
        return date.fromisoformat(found["date"]) if found else date.today()

    def templated(self, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
        """A tokenizer with the given chat template variables, and with the run's date if its template writes a date."""
        today = {"chat_template": dated(tokenizer.chat_template, self.date)} if has_date(tokenizer) else {}
        return set_template_kwargs(tokenizer, today | kwargs)

    def with_template_kwargs(self, dataset: Dataset) -> Dataset:
        """A dataset with the base's chat template variables, for a TRL trainer that renders conversations itself."""
        kwargs = self.recipe.model.chat_template_kwargs
        return dataset.map(lambda _: {"chat_template_kwargs": kwargs}) if kwargs else dataset

    @property
    def model_spec(self) -> ModelSpec:
        """The base's path, dtype and quantization from the recipe."""
        model = self.recipe.model
        return ModelSpec(model.path, model.dtype, model.quantization)

    @property
    def lora(self) -> LoraConfig:
        """The configuration of the LoRA adapters to train."""
        from trl_rlaif.models.adapters import lora_config

        return lora_config(self.recipe.model.lora)

    @property
    def start(self) -> Path | None:
        """The policy's adapter at the start of RL: from the previous run, or else ``initial``; None: a new one."""
        return self.previous[0] / artifacts.POLICY if self.previous else self.initial

    @property
    def initial(self) -> Path | None:
        """The policy's adapter before any RL, from the stage sft of the first run; None: the base."""
        sft = [self.folder, *self.previous][-1] / artifacts.SFT
        there = sft.exists() if self.previous else self.recipe.sft is not None
        return sft if there else None

    @property
    def reference(self) -> Path | None:
        """The adapter of the reference policy; None: the base."""
        moves = self.recipe.rounds is not None and self.recipe.rounds.reference == "previous"
        return self.start if moves else self.initial

    def load_base(self, *, shared_out: bool = False) -> PreTrainedModel:
        """Load the frozen base onto the device.

        Args:
            shared_out: FSDP will shard it, which moves it to the device layer by layer.
        """
        import torch

        torch.set_float32_matmul_precision(self.recipe.model.matmul_precision)
        model = load_model(self.model_spec).eval().requires_grad_(False)
        placed = self.model_spec.quantization == "nf4" or (shared_out and sharding.requested())
        return model if placed else model.to(_device())

    def stop_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        """The tokens that end the policy's responses: from the section rl, or else the model's own."""
        config = self.recipe.rl.config if self.recipe.rl else {}
        named = {name: config.get(name) for name in ("stop_tokens", "stop_token_id")}
        return chosen_stop_ids(self.tokenizer, model, **named)

    def reader(self, model: PreTrainedModel) -> ResponseReader:
        """The parser of the policy's responses."""
        section = self.recipe.model
        return ResponseReader(
            self.tokenizer, self.stop_ids(model), reasoning=section.reasoning, tags=section.reasoning_tags
        )

    @cached_property
    def judges(self) -> Judges:
        """The recipe's judges."""
        return Judges(self)

    @cached_property
    def evaluated_columns(self) -> dict[str, dict[str, Any]]:
        """The other columns of each evaluated prompt, by its ``prompt_key``."""
        sources = self.recipe.evaluate.sets.values() or [self.recipe.data.eval_prompts]
        found = [prompt for source in sources for prompt in read_prompts(self.recipe, source, "eval_prompts").items]
        return {prompt_key(prompt.prompt): prompt.extra for prompt in found}

    def create(self, kind: str, ref: ComponentRef) -> Any:
        """Create a component with its options, validated: errors name its distribution and place in the recipe."""
        origin = Origin.of(self.plugins.registry.find(kind, ref.name), ref.where)
        with origin.blamed("__init__()"):
            return validated(self.plugins.registry.create(kind, ref.name, ref.options), origin)

    def create_labeler(self, ref: ComponentRef) -> Labeler:
        """Create a labeler with its options."""
        return self.create("labeler", ref)

    def chat(self, prompt: PromptLike) -> PromptLike:
        """A prompt in the base's chat format."""
        return chat_prompt(prompt, self.tokenizer)

    def encoded_prompts(
        self, source: str, room: int, base: Any, key: str = "prompts"
    ) -> tuple[list[Any], TokenRows, dict[str, int]]:
        """Prompts, their tokens, and the number of skipped prompts by reason.

        Args:
            source: A prompt file, folder or Hub id.
            room: Tokens reserved for the response.
            base: The model, for its context length and for the embeddings of prompt clusters.
            key: The entry of ``data.columns`` for the source, ``prompts`` or ``eval_prompts``.

        Raises:
            UserError: No prompt is left.
        """
        loaded = read_prompts(self.recipe, source, key)
        skipped = loaded.skip_counts()
        limit = self.longest_prompt(base, room)
        prompts, tokens = [], TokenRows()
        for prompt in self.as_meant(source, loaded.items):
            ids = encode_prompt(self.tokenizer, self.chat(prompt.prompt))
            if len(ids) > limit:
                skipped["prompt longer than the context"] = skipped.get("prompt longer than the context", 0) + 1
            else:
                prompts.append(prompt)
                tokens.append(ids)
        if not prompts:
            raise UserError("Every prompt is longer than the model's context.", where=source)
        return categorized(self, prompts, tokens, base), tokens, skipped

    @staticmethod
    def longest_prompt(base: Any, room: int) -> int:
        """Maximum prompt length in tokens that leaves room for a response of ``room`` tokens in the model's context."""
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 10**9
        return context - room - 1  # the end of turn at which a truncated response is scored

    def as_meant(self, source: str, items: Sequence[P]) -> Sequence[P]:
        """A source's prompts or pairs, as interpreted by ``meaning``."""
        as_meant = self.meaning(source, items)
        return [as_meant(item) for item in items]

    def meaning(self, source: str, items: Iterable[P]) -> Callable[[P], P]:
        """How to interpret a source's prompts or pairs; reports those that are rendered or end with an assistant turn.

        Prompts that begin with control tokens count as rendered only if all prompts of the source do. Otherwise they
        are user text: data must not inject control tokens.
        """
        count = rendered = begun = 0
        for item in items:
            count += 1
            rendered += is_rendered(item.prompt, self.tokenizer)
            begun += not isinstance(item.prompt, str) and item.prompt[-1]["role"] == "assistant"
        if rendered:
            say(
                f"{source}: {rendered} of {count} prompts begin with the control tokens of the model. "
                + ("They are taken as rendered by its chat template, and not wrapped in it again."
                   if rendered == count else "As the others do not, they are taken as text of the user.")
            )  # fmt: skip
        if begun:
            say(f"{source}: {begun} of {count} prompts end with an assistant turn. The responses continue it.")
        if 0 < rendered < count:
            return lambda item: replace(item, prompt=as_messages(item.prompt))
        return lambda item: item

    def pairs(self, folder: RunFolder | None = None) -> StoredPairs:
        """The pairs in pairs.jsonl of this run, or of another run's folder."""
        return StoredPairs((folder or self.folder) / artifacts.PAIRS)

    def transforms(self, section: str) -> list[Any]:
        """The reward transforms of a section, in its order.

        In the stage rl, a transform that the reward model was trained with takes its state from that training, and its
        options too, unless the section rl sets non-default ones.
        """
        from trl_rlaif.states import load_state

        trained = {ref.name: ref for ref in self.recipe.reward.transforms} if self.recipe.reward else {}
        found = []
        for ref in getattr(self.recipe, section).transforms:
            known = section == "rl" and ref.name in trained
            transform = self.create("reward_transform", ref)
            if known and transform.options == type(transform).Options():
                transform = self.create("reward_transform", replace(trained[ref.name], where=ref.where))
            found.append(transform)
            path = self.folder / artifacts.REWARD / artifacts.transform_of(ref.name)
            if known and path.exists():
                transform.load_state_dict(load_state(path))
        return found

    def trainer_arguments(self, stage: str, config: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a TRL config: ``config`` over defaults of the run and the stage, under a few fixed values."""
        model = self.recipe.model
        defaults = {
            # A 4-bit base computes in bfloat16 (QLoRA, Dettmers et al. 2023); with autocast, so do its adapters.
            "bf16": model.dtype == "bfloat16" or model.quantization == "nf4",
            # transformers rejects bf16 without a GPU unless the CPU is requested.
            "use_cpu": hardware.device_type() == "cpu",
            "report_to": "none",
            "run_name": self.recipe.run.name,  # its name in trackers
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        # Setting save_steps turns saving on.
        if "save_steps" in config:
            defaults["save_strategy"] = "steps"
        fixed = {
            "output_dir": str(self.folder / artifacts.checkpoints_of(stage)),
            "seed": self.recipe.run.seed,
            "push_to_hub": False,  # trl_rlaif.export does it when the run ends
        }
        self.recipe = settle_checkpointing(self.recipe, stage)
        own = {**STAGES[stage].defaults, CHECKPOINTING: getattr(self.recipe, stage).config[CHECKPOINTING]}
        found = defaults | own | config | fixed
        if distributed.processes() > 1:  # a recipe's batch size is the total over all processes
            batch = (found.get(key) or setting(self.recipe, stage, key) for key in BATCH)
            found |= zip(BATCH, distributed.share_of_batch(*batch), strict=True)
        if found["bf16"] is None:  # as in PPOConfig and RewardConfig; TRL's own configs turn it on
            found["bf16"] = not found.get("fp16") and hardware.computes_bfloat16(hardware.device_type())
        return found

    def callback(self, stage: str, description: str) -> TrainerCallback:
        """Writes a trainer's logs to metrics.jsonl and drives the progress bar."""
        from trl_rlaif.pipeline.callback import StageCallback

        return StageCallback(self.folder, stage, description)


def _device() -> str:
    return str(distributed.join().device)


def pair_row(pair: Pair) -> PairRow:
    """A pair as a line of pairs.jsonl. Other columns of the data do not overwrite the pair's own fields."""
    known = {
        "id": pair.id,
        "prompt": pair.prompt,
        "response_1": pair.response_1,
        "response_2": pair.response_2,
        "category": pair.category,
        "human": pair.human,
    }
    extra = {k: v for k, v in pair.extra.items() if k not in known}
    return json.loads(json.dumps(known | extra, default=str))
