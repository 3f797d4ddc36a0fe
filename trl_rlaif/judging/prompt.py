"""The judge's prompt as files: preambles, exemplars, samples, rubric and endings."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from jinja2 import DictLoader, StrictUndefined, TemplateError, meta, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trl_rlaif.encoding import PromptLike, as_text
from trl_rlaif.errors import UserError
from trl_rlaif.judging.framing import NOTICE, frame_code, framed
from trl_rlaif.judging.question import Message, Question
from trl_rlaif.judging.quoting import headers, quoted

Preamble = Literal["base", "detailed"]

# Every file that a prompt folder may hold; the first three make a prompt.
FILES = (
    "base.txt", "sample.jinja", "ending.txt", "detailed.txt", "exemplars.jsonl", "thinking.txt",
    "rubric.txt", "rating.jinja", "rating_ending.txt", "rating_thinking.txt",
    "check.txt", "check.jinja", "check_ending.txt", "check_thinking.txt", "draft.txt", "draft.jinja", "frame.txt",
)  # fmt: skip
_REQUIRED = FILES[:3]
# For drafting rubrics; no label depends on them.
_DRAFT = ("draft.txt", "draft.jinja")
# The frames' code in a template's context.
_CODE = "_code"
# Variables of each template besides the columns of the data.
_VALUES = {
    "sample.jinja": ("context", "response_1", "response_2", "criterion"),
    "rating.jinja": ("context", "response", "criterion"),
    "check.jinja": ("context", "response", "criterion"),
    "draft.jinja": ("context",),
}
_RESERVED = frozenset().union(*_VALUES.values())
Columns = Mapping[str, Any]
NO_COLUMNS: Columns = MappingProxyType({})


@dataclass(frozen=True)
class Exemplar:
    """A solved comparison, shown to the judge before the actual one."""

    context: str
    response_1: str
    response_2: str
    rationale: str
    preferred: Literal[1, 2]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgePrompt:
    """A judge's prompt, made from the files of a folder.

    Args:
        name: The folder's name.
        parts: Content of its files by name. ``base.txt`` and ``detailed.txt`` are preambles,
            ``sample.jinja`` a template with ``context``, ``response_1`` and ``response_2``, ``ending.txt``
            the text that the judge completes with 1 or 2, ``thinking.txt`` the start of a rationale. To rate one
            response: ``rubric.txt``, ``rating.jinja`` with ``context`` and ``response``,
            ``rating_ending.txt``, ``rating_thinking.txt``. To check one response: ``check.txt``, ``check.jinja`` with
            ``context``, ``response`` and ``criterion``, ``check_ending.txt``, ``check_thinking.txt``. To draft rubrics:
            ``draft.txt``, ``draft.jinja`` with ``context``. ``frame.txt``: see ``frame``. In the other templates,
            ``criterion`` is empty unless one of several is asked about. All may also name columns of the data.
        exemplars: From ``exemplars.jsonl``; those that are shown have the columns that ``sample.jinja`` names.
    """

    name: str
    parts: dict[str, str]
    exemplars: tuple[Exemplar, ...] = field(default=())

    @classmethod
    def load(cls, folder: str | Path) -> JudgePrompt:
        """Read a prompt folder, UTF-8. Newlines around a part are stripped; an ending's trailing space is kept.

        Raises:
            UserError: The folder or one of base.txt, sample.jinja and ending.txt is missing, a file cannot be
                read, a template does not compile or uses a variable of another template, or an exemplar is incomplete.
        """
        folder = Path(folder)
        if not folder.is_dir():
            names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            near = difflib.get_close_matches(folder.name, names, n=1)
            raise UserError(f"There is no prompt folder {folder}.", fix=f"Did you mean '{near[0]}'?" if near else "")
        parts = {}
        for name in FILES:
            if name not in _REQUIRED and not (folder / name).exists():
                continue
            try:
                parts[name] = (folder / name).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"A part of the prompt cannot be read: {error}", where=str(folder / name)) from None
        lines = enumerate(parts.pop("exemplars.jsonl", "").split("\n"), 1)  # splitlines would cut inside strings
        bare = cls(folder.name, {name: text.strip("\r\n") for name, text in parts.items()})
        for name in _VALUES.keys() & parts.keys():
            bare._check_template(name, folder / name)
        columns = bare.columns_of("sample.jinja")
        where = folder / "exemplars.jsonl"
        exemplars = tuple(_exemplar(line, columns, f"{where}:{i}") for i, line in lines if line.strip())
        return replace(bare, exemplars=exemplars)

    def _check_template(self, name: str, path: Path) -> None:
        """Reject a template that does not compile, fails on empty texts, or uses a variable of another template."""
        foreign = _RESERVED.intersection(self.columns_of(name))
        if foreign:
            tree = self._environment.parse(self.parts[name])
            first = min((of for of in tree.find_all(nodes.Name) if of.name in foreign), key=lambda of: of.lineno)
            *others, last = _VALUES[name]
            raise UserError(
                f"The template {name} of the prompt '{self.name}' is wrong: there is no '{first.name}'.",
                where=f"{path}:{first.lineno}",
                fix=f"It is given {', '.join(others)}{' and ' if others else ''}{last}, and the columns of the data.",
            )
        try:
            self._wording(name)
        except UserError as error:
            raise UserError(error.problems[0].what, where=str(path)) from None

    def columns_of(self, template: str) -> tuple[str, ...]:
        """The columns of the data that a template names, sorted; empty if it is missing or does not compile."""
        return _undeclared(self.parts.get(template, ""), _VALUES[template])

    @property
    def frame(self) -> str:
        """The notice about frames around the texts, placed after the preamble; empty: there are no frames.

        Taken from ``frame.txt``, such as a translation; without the file, ``framing.NOTICE``.
        """
        return self.parts.get("frame.txt", NOTICE).strip()

    @cached_property
    def revision(self) -> str:
        """Hash of the files that labels depend on, and of the frames: 16 hexadecimal digits."""
        form = [self.frame, framed("", frame_code((), ()))] if self.frame else []
        # frame.txt is part of the form.
        parts = {name: text for name, text in self.parts.items() if name not in ("frame.txt", *_DRAFT)}
        shown = [{key: value for key, value in vars(e).items() if key != "columns" or value} for e in self.exemplars]
        content = json.dumps([parts, shown, *form], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def compare(
        self,
        prompt: PromptLike,
        response_1: str,
        response_2: str,
        *,
        criterion: str = "",
        columns: Columns | None = NO_COLUMNS,
        preamble: Preamble = "base",
        shots: int = 0,
        think: bool = False,
    ) -> Question:
        """Ask which of two responses is better; the candidates are 1 and 2.

        Args:
            prompt: The prompt of the responses.
            response_1, response_2: In the order in which they are shown.
            criterion: Criterion of the comparison, in words; empty: the one in the prompt.
            columns: The row's other columns: texts, numbers, and lists and mappings of these. None, without a row, to
                check that the folder has all parts: the sample is then left blank.
            preamble: The short or the detailed preamble.
            shots: Number of exemplars, 0..len(exemplars).
            think: Whether a rationale precedes the answer, also in the exemplars.

        Raises:
            UserError: The folder lacks a required part, its template shows no criterion, the row has no value in a
                column that the template names, or the template fails on it.
        """
        if shots > len(self.exemplars):
            raise UserError(
                f"The prompt '{self.name}' has {len(self.exemplars)} exemplars, and {shots} are asked for.",
                fix="Lower shots, or add lines to exemplars.jsonl.",
            )
        thinking, ending = self._part("thinking.txt") if think else "", self._part("ending.txt")
        messages: list[Message] = []
        for shown in self.exemplars[:shots]:
            rationale = f"{thinking} {shown.rationale}\n\n" if think else ""
            messages.append(self._sample(shown.context, shown.response_1, shown.response_2, shown.columns))
            messages.append({"role": "assistant", "content": f"{rationale}{ending}{shown.preferred}"})
        messages.append(self._sample(as_text(prompt), response_1, response_2, columns, criterion))
        return self._question(f"{preamble}.txt", messages, ending, thinking)

    def rate(
        self,
        prompt: PromptLike,
        response: str,
        *,
        criterion: str = "",
        columns: Columns | None = NO_COLUMNS,
        think: bool = False,
    ) -> Question:
        """Ask how good a response is; the candidates are 1 to 10.

        Arguments and errors as in ``compare``.
        """
        values = {"context": as_text(prompt), "response": response, "criterion": criterion}
        return self._single("rubric.txt", "rating", values, columns, think)

    def check(
        self,
        prompt: PromptLike,
        response: str,
        criterion: str,
        *,
        columns: Columns | None = NO_COLUMNS,
        think: bool = False,
    ) -> Question:
        """Ask whether a response meets a criterion; the candidates are Yes and No.

        Questions about one response differ in the criterion alone. Arguments and errors as in ``compare``.
        """
        values = {"context": as_text(prompt), "response": response, "criterion": criterion}
        return self._single("check.txt", "check", values, columns, think)

    def draft(self, prompt: PromptLike, *, columns: Columns | None = NO_COLUMNS) -> Question:
        """Request a rubric for a prompt. It has no candidates; see ``trl_rlaif.drafting``.

        Arguments and errors as in ``compare``.
        """
        context = as_text(prompt)
        return self._question(
            "draft.txt", [self._turn("draft.jinja", {"context": context}, columns, [context])], "", ""
        )

    def _single(
        self, preamble: str, kind: str, values: dict[str, str], columns: Columns | None, think: bool
    ) -> Question:
        """A question about one response, from the files named after its kind."""
        # The code depends on the prompt alone, so that the prompt is computed once for all responses to it.
        messages = [self._turn(f"{kind}.jinja", values, columns, seed=[values["context"]])]
        thinking = self._part(f"{kind}_thinking.txt") if think else ""
        return self._question(preamble, messages, self._part(f"{kind}_ending.txt"), thinking)

    def quote(self, text: str) -> str:
        """A text to insert into the prompt, such as a rationale, quoted so that it cannot imitate the prompt."""
        return quoted(text, self._headers)

    def _question(self, preamble: str, messages: list[Message], ending: str, thinking: str) -> Question:
        parts = [self._part(preamble), self.frame, messages[0]["content"]]
        messages[0] = {"role": "user", "content": "\n\n".join(filter(None, parts))}
        return Question(tuple(messages), ending, thinking)

    def _part(self, name: str) -> str:
        if name not in self.parts:
            raise UserError(f"The prompt '{self.name}' has no file {name}, which these options need.")
        return self.parts[name]

    @cached_property
    def _headers(self) -> re.Pattern[str]:
        """The prompt's own lines that no judged text may imitate: those of templates and endings."""
        own = [self._wording(name) for name in (_VALUES.keys() & self.parts.keys()).difference(_DRAFT)]
        own += [text for name, text in self.parts.items() if name.endswith(("ending.txt", "thinking.txt"))]
        return headers("\n".join(own))

    def _wording(self, name: str) -> str:
        """A template's literal text in all branches; and its output for empty texts, if it needs no columns."""
        blank = "" if self.columns_of(name) else self._render(name, dict.fromkeys(_VALUES[name], ""))
        tree = self._environment.parse(self.parts[name])
        return "".join([blank, "\n", *(text.data for text in tree.find_all(nodes.TemplateData))])

    def _sample(
        self, context: str, response_1: str, response_2: str, columns: Columns | None, criterion: str = ""
    ) -> Message:
        texts = {"context": context, "response_1": response_1, "response_2": response_2}
        return self._turn("sample.jinja", texts | {"criterion": criterion}, columns, seed=texts.values())

    def _turn(self, template: str, values: dict[str, str], columns: Columns | None, seed: Iterable[str]) -> Message:
        """A user turn: the template with the texts and columns, quoted and framed."""
        self._part(template)
        needed = self.columns_of(template)
        if values.get("criterion") and "criterion" not in _undeclared(self.parts[template], ()):
            raise UserError(
                f"The template {template} of the prompt '{self.name}' names no criterion, which these options need.",
                fix="Add to its end: {% if criterion %}Judge by this alone: {{ criterion }}{% endif %}",
            )
        if columns is None and needed:
            return {"role": "user", "content": ""}
        shown = {**self._found(template, needed, columns or NO_COLUMNS), **values}
        quoted = {key: self._quoted(value) for key, value in shown.items()}
        code = frame_code(_texts([*quoted.values()]), seed) if self.frame else ""
        return {"role": "user", "content": self._render(template, quoted, code)}

    def _found(self, template: str, needed: Iterable[str], columns: Columns) -> dict[str, Any]:
        for name in needed:
            if columns.get(name) is None:
                near = difflib.get_close_matches(name, [*_VALUES[template], *columns], n=1)
                raise UserError(
                    f"There is no column '{name}', which the template {template} of the prompt '{self.name}' names.",
                    fix=f"Did you mean '{near[0]}'?"
                    if near and near[0] != name
                    else "Add the column to every row, with an empty text where there is no value.",
                )
        return {name: columns[name] for name in needed}

    def _quoted(self, value: Any) -> Any:
        """A text, or all texts of a list or a mapping, quoted; numbers as they are."""
        if isinstance(value, Mapping):
            return {key: self._quoted(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._quoted(item) for item in value]
        return value if value is None or isinstance(value, int | float) else self.quote(str(value))

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        """Compiles each template once."""
        return ImmutableSandboxedEnvironment(
            loader=DictLoader(self.parts), undefined=StrictUndefined, finalize=_framed_value
        )

    def _render(self, name: str, values: dict[str, str], code: str = "") -> str:
        """Render a template. Values are inserted in frames, and never parsed as templates themselves."""
        self._part(name)
        try:
            return self._environment.get_template(name).render({**values, _CODE: code})
        except Exception as error:  # Jinja's own errors, and whatever an expression in the template raises
            raise UserError(
                f"The template {name} of the prompt '{self.name}' is wrong: {type(error).__name__}: {error}"
            ) from None


@pass_context
def _framed_value(context: Context, value: Any) -> Any:
    """The output of a template's expression: text is framed after all filters."""
    code = context.get(_CODE)
    if not code or value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return text if code in text else framed(text, code)  # a macro's output holds frames already


@cache
def _undeclared(template: str, given: tuple[str, ...]) -> tuple[str, ...]:
    environment = ImmutableSandboxedEnvironment()
    try:
        found = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:  # reported when it is rendered
        return ()
    return tuple(sorted(found - {*given, *environment.globals}))


def _texts(value: Any) -> Iterator[str]:
    """All texts of a list or a mapping, at any depth, and the keys."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _exemplar(line: str, columns: tuple[str, ...], where: str) -> Exemplar:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"An exemplar is not valid JSON: {error}", where=where) from None
    *texts, preferred, _ = Exemplar.__dataclass_fields__
    if (
        not isinstance(row, dict)
        or not {*texts, preferred} <= set(row) <= {*texts, preferred, *columns}
        or not all(isinstance(row[name], str) for name in texts)
        or type(row["preferred"]) is not int
        or row["preferred"] not in (1, 2)
    ):
        fix = f"Give {', '.join(texts)} as texts; preferred is 1 or 2."
        raise UserError("An exemplar is incomplete.", where=where, fix=fix)
    return Exemplar(**{name: row.pop(name) for name in (*texts, preferred)}, columns=row)
