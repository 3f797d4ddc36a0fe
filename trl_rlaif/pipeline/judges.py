"""Loads a recipe's judges: the base, the taught judge, another model, or a model on a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif import distributed
from trl_rlaif.errors import UserError
from trl_rlaif.judging.judge import Judge
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.judging.server import Server
from trl_rlaif.judging.usage import Meter, Price
from trl_rlaif.judging.vllm import Engine, VLLMJudge
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.pipeline import artifacts
from trl_rlaif.recipe import (
    JudgeSection,
    ServerJudgeSection,
    VLLMJudgeSection,
    prompt_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trl_rlaif.models.shared_model import SharedBase
    from trl_rlaif.pipeline.context import Context


class Judges:
    """The judges of a run, loaded on demand."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def tokenizer(self, judge: str | JudgeSection) -> PreTrainedTokenizerBase:
        """A judge's tokenizer."""
        if isinstance(judge, str):
            return self.context.tokenizer
        if judge.path not in self._tokenizers:
            self._tokenizers[judge.path] = self.context.templated(load_tokenizer(judge.path), {})
        return self._tokenizers[judge.path]

    def load(
        self, section: str | JudgeSection | ServerJudgeSection, prompt: str, shared: SharedBase | None = None
    ) -> Judge:
        """Load the judge of a section; ``same`` is the base itself, ``taught`` the result of the stage judge.

        Args:
            section: The judge's section, ``same`` or ``taught``.
            prompt: Name or folder of its prompt.
            shared: The base with its roles, if it is already loaded.
        """
        if isinstance(section, ServerJudgeSection):
            remote = RemoteJudge(section.path, JudgePrompt.load(prompt_folder(prompt)), server_of(section))
            remote.meter = Meter(price_of(section), total=self.context.total)
            return remote
        taught = section == "taught"
        own = self.context.recipe.judge.model if taught else section
        if isinstance(own, VLLMJudgeSection):
            return self._in_engine(own, prompt, self.taught_adapter if taught else None)
        if isinstance(own, str) and shared is not None:
            role = self._taught_role(shared) if taught else None
            return self._local(own, prompt, shared.model, context=lambda: shared.role(role))
        model = self._model(own)
        return self._local(own, prompt, self._with_taught(model) if taught else model)

    def untaught(self) -> LocalJudge:
        """Load the judge that the stage judge will teach."""
        section = self.context.recipe.judge.model
        return self._local(section, self.context.recipe.teaching_prompt, self._model(section))

    def _model(self, section: str | JudgeSection) -> PreTrainedModel:
        if isinstance(section, str):
            return self.context.load_base()
        spec = model_spec(section)
        model = load_model(spec).eval().requires_grad_(False)
        return model if spec.quantization == "nf4" else model.to(str(distributed.join().device))

    def _local(self, section: str | JudgeSection, prompt: str, model: PreTrainedModel, **options: Any) -> LocalJudge:
        if label := self.context.recipe.label:
            options |= {"batch_tokens": label.batch_tokens, "precision": label.precision}
        if not isinstance(section, str):
            options["chat_template_kwargs"] = section.chat_template_kwargs
        name = self.context.recipe.model.path if isinstance(section, str) else section.path
        template = JudgePrompt.load(prompt_folder(prompt))
        return LocalJudge(model, self.tokenizer(section), template, name, **options)

    def _in_engine(self, section: VLLMJudgeSection, prompt: str, adapter: Path | None) -> VLLMJudge:
        if distributed.processes() > 1:
            raise UserError(
                "A judge with backend: vllm runs in a single process.",
                fix="Run its stage without accelerate launch (tensor_parallel_size splits the judge across GPUs), or "
                "use a vLLM server with backend: openai.",
            )
        return VLLMJudge(
            Engine.start(model_spec(section), adapter, **section.engine),
            self.tokenizer(section),
            JudgePrompt.load(prompt_folder(prompt)),
            section.path,
            chat_template_kwargs=section.chat_template_kwargs,
        )

    @property
    def taught_adapter(self) -> Path | None:
        """The adapter from the stage judge; None if teaching did not help, so the judge is used as it is."""
        for run in self.context.previous or [self.context.folder]:
            if found := run.results_of("judge"):
                return run / artifacts.JUDGE if found["used"] else None
        return None

    def _taught_role(self, shared: SharedBase) -> str | None:
        if self.taught_adapter is None:
            return None
        if "judge" not in shared.peft.peft_config:
            shared.load_adapter("judge", self.taught_adapter)
        return "judge"

    def _with_taught(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.taught_adapter is None:
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(self.taught_adapter)).eval().get_base_model()


def server_of(section: ServerJudgeSection) -> Server:
    """A judge's server from the recipe."""
    return Server(**section.model_dump(exclude={"backend", "path", "price"}))


def price_of(section: ServerJudgeSection) -> Price | None:
    """The price of its tokens, if the recipe sets it."""
    return Price(**section.price.model_dump()) if section.price else None


def model_spec(section: JudgeSection) -> ModelSpec:
    """A judge's model from the recipe."""
    return ModelSpec(section.path, section.dtype, section.quantization)
