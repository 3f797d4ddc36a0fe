"""Rubrics drafted by a judge: a list of checks for each prompt, in a file for people to edit."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.data import Prompt, load_prompts
from trl_rlaif.errors import UserError
from trl_rlaif.files import append_lines, read_lines, to_line, write_atomically
from trl_rlaif.generation import derived_seed
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.weights import check_weight
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.machine import check_machine
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.progress import progress_bar
from trl_rlaif.recipe import prompt_folder
from trl_rlaif.recipe.base_model import check_base
from trl_rlaif.recipe.inputs import read_prompts

if TYPE_CHECKING:
    from trl_rlaif.judging.judge import Judge
    from trl_rlaif.judging.question import Written
    from trl_rlaif.plugins import Plugins
    from trl_rlaif.recipe import Recipe

COLUMN = "rubric"
# A weight, a colon and a statement, possibly after a bullet.
_CHECK = re.compile(r"(?:[-*•]\s+)?([+-]?\d+(?:\.\d+)?)\s*:\s*(\S.*)")


@dataclass(frozen=True)
class DraftOptions:
    """How rubrics are drafted.

    Args:
        prompt: A packaged prompt's name, or a prompt folder, with ``draft.txt`` and ``draft.jinja``.
        tries: Maximum number of drafts per prompt until one can be parsed; one at temperature 0.
        temperature: Sampling temperature; 0: greedy decoding.
        max_new_tokens: Maximum draft length in tokens.
        batch_size: Drafts per batch.
    """

    prompt: str = "general"
    tries: int = 3
    temperature: float = 0.7
    max_new_tokens: int = 384
    batch_size: int = 16


@dataclass(frozen=True)
class Drafts:
    """Numbers of prompts by outcome.

    Args:
        drafted: Prompts whose rubric was drafted by this call.
        kept: Prompts that already had one: drafted earlier, edited, or given in the data.
        dropped: Prompts whose drafts could not be parsed, by the last draft's reason.
    """

    drafted: int
    kept: int
    dropped: Counter[str]


def draft_rubrics(recipe: Recipe, plugins: Plugins, output: Path, options: DraftOptions | None = None) -> Drafts:
    """Have the recipe's judge write a rubric for each of ``data.prompts`` (Gunjal et al. 2025, arXiv 2507.17746).

    Prompts already in ``output`` stay unchanged. The others are drafted in batches, each written before the next one
    starts; a batch that a kill left unfinished is drafted again as a whole, as in an uninterrupted run. Prompts that
    have a rubric in the data are copied.

    Args:
        recipe: The judge is that of ``label``, or the base; without the adapter that the stage judge would train.
        plugins: The installed plugins.
        output: A .jsonl file of the prompts with their ``rubric``, to be used as ``data.prompts``.
        options: How to draft; None: the defaults.

    Returns:
        The numbers. ``dropped_of(output)`` contains the drafts that could not be parsed.

    Raises:
        UserError: The recipe has no prompts; ``output`` has other prompts or cannot be read; or there is no rubric.
    """
    options = options or DraftOptions()
    prompts = _prompts(recipe, output, options)
    rubrics = _Rubrics(recipe, output, prompts)
    batches = [prompts[i : i + options.batch_size] for i in range(0, len(prompts), options.batch_size)]
    todo = [batch for batch in batches if any(map(rubrics.lacks, batch))]
    if todo:
        done = len(prompts) - sum(map(len, todo))
        with (
            _judge(recipe, plugins, options.prompt) as judge,
            progress_bar("Drafting", len(prompts), done, "prompts") as advance,
        ):
            for batch in todo:
                rubrics.add(batch, _drafted(judge, batch, options, recipe.run.seed))
                advance(len(batch))
    found = rubrics.numbers()
    if not found.kept + found.drafted:
        raise UserError(
            f"No draft could be read ({counted(found.dropped)}).",
            where=str(dropped_of(output)),
            fix="The file contains what the judge wrote. Delete it and use a more capable judge.",
        )
    return found


def counted(reasons: Mapping[str, int]) -> str:
    """The number of dropped prompts for each reason, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def dropped_of(output: Path) -> Path:
    """The file next to the drafted rubrics with the drafts that could not be parsed."""
    return output.with_suffix(".dropped.jsonl")


# ---- Drafts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """The checks of a draft; or else why it has none, and its text."""

    checks: list[Any] | None = None
    reason: str = ""
    text: str = ""


def _drafted(judge: Judge, prompts: Sequence[Prompt], options: DraftOptions, seed: int) -> dict[str, _Draft]:
    """A draft for each prompt, by id: the first one that can be parsed, else the last one."""
    found = {prompt.id: _Draft(prompt.extra[COLUMN]) for prompt in prompts if prompt.extra.get(COLUMN)}
    for attempt in range(options.tries if options.temperature else 1):
        asked = [prompt for prompt in prompts if prompt.id not in found or found[prompt.id].checks is None]
        written = judge.write(
            [judge.prompt.draft(prompt.prompt, columns=prompt.extra) for prompt in asked],
            max_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=derived_seed(seed, "draft", attempt),
        )
        instructions = judge.prompt.parts["draft.txt"]
        found |= {prompt.id: _read(one, instructions) for prompt, one in zip(asked, written, strict=True)}
    return found


def _read(written: Written, instructions: str) -> _Draft:
    reason = written.failed or ("" if written.ended else "cut off")
    if not reason:
        try:
            return _Draft(read_draft(written.text, instructions))
        except ValueError as error:
            reason = str(error)
    return _Draft(None, reason, written.text)


def read_draft(text: str, instructions: str = "") -> list[dict[str, Any]]:
    """Parse the checks of a draft: each line must be a weight, a colon and a statement.

    Args:
        text: The draft.
        instructions: The judge's instructions; checks copied from their examples are rejected.

    Returns:
        The ``criterion`` and ``weight`` of each check, as the labeler `rubric` reads them.

    Raises:
        ValueError: The draft is not such a list; the message gives the reason in a few words.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        check = _CHECK.fullmatch(line)
        if check is None:
            raise ValueError("not a list of checks")
        weight, statement = float(check[1]), check[2]
        try:
            check_weight(weight, "a check")
        except UserError:
            raise ValueError("a weight that is 0, too large or too fine") from None
        if statement.casefold() in found:
            raise ValueError("the same check twice")
        if statement in instructions:
            raise ValueError("copied from the instructions")
        found[statement.casefold()] = {"criterion": statement, "weight": int(weight) if weight.is_integer() else weight}
    if not any(check["weight"] > 0 for check in found.values()):
        raise ValueError("no check of positive weight" if found else "empty")
    return list(found.values())


# ---- Files and models -------------------------------------------------------------------------------------


def _prompts(recipe: Recipe, output: Path, options: DraftOptions) -> list[Prompt]:
    """The prompts to draft rubrics for; errors in the input are raised before a model is loaded."""
    if recipe.data.prompts is None:
        raise UserError("There are no prompts to draft rubrics for.", where=str(recipe.source), fix="Set data.prompts.")
    if output.suffix != ".jsonl":
        raise UserError("Rubrics are written as lines of JSON.", where=str(output), fix="Name a file ending in .jsonl.")
    prompts, template = read_prompts(recipe, recipe.data.prompts).items, JudgePrompt.load(prompt_folder(options.prompt))
    for prompt in prompts:
        template.draft(prompt.prompt, columns=prompt.extra)
    return prompts


class _Rubrics:
    """The file that people edit, and the one next to it with the drafts that could not be parsed."""

    def __init__(self, recipe: Recipe, output: Path, prompts: Sequence[Prompt]) -> None:
        self.data, self.output, self.prompts = recipe.data, output, prompts
        output.parent.mkdir(parents=True, exist_ok=True)
        self.before = self._before()
        self.drafted: set[str] = set()
        self.copied: set[str] = set()
        self.dropped = {row["id"]: row["dropped"] for row in read_lines(dropped_of(output))}

    def _before(self) -> set[str]:
        """The ids of the prompts that the file already contains."""
        if not self.output.exists() or not self.output.stat().st_size:
            return set()
        columns = self.data.columns_of("prompts")
        found = load_prompts(self.output, category=self.data.category, columns=columns).items
        known = {prompt.id: prompt.prompt for prompt in found}
        for prompt in self.prompts:
            if known.get(prompt.id, prompt.prompt) != prompt.prompt:
                what = f"The prompt '{prompt.id}' differs from the one in {self.data.prompts}."
                raise UserError(what, where=str(self.output), fix="Name another file with --output.")
        return set(known)

    def lacks(self, prompt: Prompt) -> bool:
        """Whether a prompt has neither a rubric nor been dropped."""
        return not any(prompt.id in ids for ids in (self.before, self.drafted, self.copied, self.dropped))

    def add(self, batch: Sequence[Prompt], drafts: Mapping[str, _Draft]) -> None:
        """Write the drafts of those prompts in a batch that the files lack."""
        fresh = [(prompt, drafts[prompt.id]) for prompt in batch if self.lacks(prompt)]
        bad = [(prompt, draft) for prompt, draft in fresh if draft.checks is None]
        good = [(prompt, draft) for prompt, draft in fresh if draft.checks is not None]
        rows = [{"id": p.id, "prompt": p.prompt, "dropped": draft.reason, "draft": draft.text} for p, draft in bad]
        if rows:
            append_lines(dropped_of(self.output), rows)
        self.dropped |= {row["id"]: row["dropped"] for row in rows}
        # People edit the file, so it is read only now, and written atomically.
        text = self.output.read_bytes().decode() if self.output.exists() else ""
        text += "\n" if text and not text.endswith("\n") else ""
        write_atomically(self.output, text + "".join(to_line(self._row(*each)) for each in good))
        own = {prompt.id for prompt, _ in good if prompt.extra.get(COLUMN)}
        self.copied |= own
        self.drafted |= {prompt.id for prompt, _ in good} - own

    def _row(self, prompt: Prompt, draft: _Draft) -> dict[str, Any]:
        """A prompt with its columns, named as in the recipe's data, and its rubric."""
        names = self.data.columns_of("prompts")
        own = {"id": prompt.id, "prompt": prompt.prompt, names.get("category", self.data.category): prompt.category}
        row = {names.get(key, key): value for key, value in own.items() if value is not None}
        return row | prompt.extra | {COLUMN: draft.checks}

    def numbers(self) -> Drafts:
        """The numbers for this recipe's prompts."""
        ids = [prompt.id for prompt in self.prompts]
        has = self.before | self.copied | self.drafted
        dropped = Counter(self.dropped[id] for id in ids if id not in has)
        return Drafts(
            sum(id in self.drafted for id in ids), sum(id in self.before | self.copied for id in ids), dropped
        )


@contextmanager
def _judge(recipe: Recipe, plugins: Plugins, prompt: str) -> Iterator[Judge]:
    """The judge of the section label, or the base."""
    check_machine(recipe)
    check_base(recipe)
    section = recipe.label.judge if recipe.label else "same"
    if section == "taught" and recipe.judge:
        section = recipe.judge.model
    with tempfile.TemporaryDirectory() as folder:  # stands in for a run's folder
        context = Context(recipe, RunFolder(folder), plugins)
        yield context.judges.load(section, prompt)
