"""The judge's prompt as files: preambles, exemplars, samples, rubric and endings."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
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
    "rubric.txt", "rating.jinja", "rating_ending.txt", "rating_thinking.txt", "frame.txt",
)  # fmt: skip
_REQUIRED = FILES[:3]
# The frames' code in a template's context.
_CODE = "_code"
_VALUES = {"sample.jinja": ("context", "response_1", "response_2"), "rating.jinja": ("context", "response")}


@dataclass(frozen=True)
class Exemplar:
    """A comparison with its solution, shown to the judge before the one that it has to make."""

    context: str
    response_1: str
    response_2: str
    rationale: str
    preferred: Literal[1, 2]


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge is asked, made from the files of a folder.

    Args:
        name: The folder's name.
        parts: Content of its files by name. ``base.txt`` and ``detailed.txt`` are preambles,
            ``sample.jinja`` a template with ``context``, ``response_1`` and ``response_2``, ``ending.txt``
            what the judge completes with 1 or 2, ``thinking.txt`` what a rationale begins with. To rate one
            response: ``rubric.txt``, ``rating.jinja`` with ``context`` and ``response``,
            ``rating_ending.txt``, ``rating_thinking.txt``. ``frame.txt``: see ``frame``.
        exemplars: From ``exemplars.jsonl``.
    """

    name: str
    parts: dict[str, str]
    exemplars: tuple[Exemplar, ...] = field(default=())

    @classmethod
    def load(cls, folder: str | Path) -> JudgePrompt:
        """Read a prompt folder, UTF-8. Line ends around a part do not count; a space at an ending's end does.

        Raises:
            UserError: The folder or one of base.txt, sample.jinja and ending.txt is missing, a file cannot be
                read, a template does not compile or names what it is not given, an exemplar is not complete.
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
        exemplars = tuple(_exemplar(line, f"{folder / 'exemplars.jsonl'}:{i}") for i, line in lines if line.strip())
        prompt = cls(folder.name, {name: text.strip("\r\n") for name, text in parts.items()}, exemplars)
        for name in _VALUES.keys() & parts.keys():
            prompt._check_names(name, folder / name)
            try:
                prompt._render(name, dict.fromkeys(_VALUES[name], ""))
            except UserError as error:
                raise UserError(error.problems[0].what, where=str(folder / name)) from None
        return prompt

    def _check_names(self, name: str, path: Path) -> None:
        """Refuse a template that names what it is not given, also in a branch that empty texts do not take."""
        try:
            tree = self._environment.parse(self.parts[name])
            unknown = meta.find_undeclared_variables(tree) - {*_VALUES[name]}
        except TemplateError:  # said when it is rendered
            return
        if unknown:
            first = min((of for of in tree.find_all(nodes.Name) if of.name in unknown), key=lambda of: of.lineno)
            *others, last = _VALUES[name]
            raise UserError(
                f"The template {name} of the prompt '{self.name}' is wrong: there is no '{first.name}'.",
                where=f"{path}:{first.lineno}",
                fix=f"Templates are given {', '.join(others)} and {last}; other columns of the data are not.",
            )

    @property
    def frame(self) -> str:
        """What the judge is told of the frames around the texts, behind the preamble; empty: there are no frames.

        It is ``frame.txt``, such as a translation. Without the file it is ``framing.NOTICE``.
        """
        return self.parts.get("frame.txt", NOTICE).strip()

    @cached_property
    def revision(self) -> str:
        """Changes with any of the files, and with the frames: 16 hexadecimal digits."""
        form = [self.frame, framed("", frame_code((), ()))] if self.frame else []
        parts = {name: text for name, text in self.parts.items() if name != "frame.txt"}  # it is in form
        content = json.dumps([parts, [vars(e) for e in self.exemplars], *form], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def compare(
        self,
        prompt: PromptLike,
        response_1: str,
        response_2: str,
        *,
        preamble: Preamble = "base",
        shots: int = 0,
        think: bool = False,
    ) -> Question:
        """The question which of two responses is better; candidates are 1 and 2.

        Args:
            prompt: What was responded to.
            response_1, response_2: In the order in which they are shown.
            preamble: The short or the detailed one.
            shots: Exemplars to show, 0..len(exemplars).
            think: Whether a rationale comes first, in the exemplars too.

        Raises:
            UserError: The folder lacks what is asked for.
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
            messages.append(self._sample(shown.context, shown.response_1, shown.response_2))
            messages.append({"role": "assistant", "content": f"{rationale}{ending}{shown.preferred}"})
        messages.append(self._sample(as_text(prompt), response_1, response_2))
        return self._question(f"{preamble}.txt", messages, ending, thinking)

    def rate(self, prompt: PromptLike, response: str, *, think: bool = False) -> Question:
        """The question how good a response is; candidates are 1 to 10.

        Raises:
            UserError: The folder lacks what is asked for.
        """
        values = {"context": as_text(prompt), "response": response}
        # The code follows from the prompt alone, so that it is computed once for all responses to it.
        messages = [self._turn("rating.jinja", values, seed=[values["context"]])]
        thinking = self._part("rating_thinking.txt") if think else ""
        return self._question("rubric.txt", messages, self._part("rating_ending.txt"), thinking)

    def quote(self, text: str) -> str:
        """A text that is put into the prompt, such as a rationale, unable to pass for a part of the prompt."""
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
        """Lines of the prompt's own that no judged text may imitate: the templates', and the endings."""
        own = [self._render(name, dict.fromkeys(_VALUES[name], "")) for name in _VALUES.keys() & self.parts.keys()]
        own += [text for name, text in self.parts.items() if name.endswith(("ending.txt", "thinking.txt"))]
        return headers("\n".join(own))

    def _sample(self, context: str, response_1: str, response_2: str) -> Message:
        values = {"context": context, "response_1": response_1, "response_2": response_2}
        return self._turn("sample.jinja", values, seed=values.values())

    def _turn(self, template: str, values: dict[str, str], seed: Iterable[str]) -> Message:
        """What the judge is shown: the template with the texts, quoted and framed."""
        quoted = {key: self.quote(text) for key, text in values.items()}
        code = frame_code(quoted.values(), seed) if self.frame else ""
        return {"role": "user", "content": self._render(template, quoted, code)}

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        """Compiles each template once."""
        return ImmutableSandboxedEnvironment(
            loader=DictLoader(self.parts), undefined=StrictUndefined, finalize=_framed_value
        )

    def _render(self, name: str, values: dict[str, str], code: str = "") -> str:
        """A template with values, which are inserted, in frames, and never parsed as templates themselves."""
        self._part(name)
        try:
            return self._environment.get_template(name).render({**values, _CODE: code})
        except Exception as error:  # Jinja's own errors, and whatever an expression in the template raises
            raise UserError(
                f"The template {name} of the prompt '{self.name}' is wrong: {type(error).__name__}: {error}"
            ) from None


@pass_context
def _framed_value(context: Context, value: Any) -> Any:
    """What an expression of a template prints: a frame around whatever its filters left of a text."""
    code = context.get(_CODE)
    if not code or value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return text if code in text else framed(text, code)  # a macro's output holds frames already


def _exemplar(line: str, where: str) -> Exemplar:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"An exemplar is no JSON: {error}", where=where) from None
    names = list(Exemplar.__dataclass_fields__)
    texts = names[:-1]
    if (
        not isinstance(row, dict)
        or set(row) != set(names)
        or not all(isinstance(row[name], str) for name in texts)
        or type(row["preferred"]) is not int
        or row["preferred"] not in (1, 2)
    ):
        raise UserError(
            "An exemplar is not complete.", where=where, fix=f"Give {', '.join(texts)} as texts; preferred is 1 or 2."
        )
    return Exemplar(**row)
