"""The judge's prompt as files: preamble, sample and ending."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trl_rlaif.encoding import PromptLike, as_text
from trl_rlaif.errors import UserError

_FILES = {"preamble": "base.txt", "sample": "sample.jinja", "ending": "ending.txt"}


@dataclass(frozen=True)
class JudgePrompt:
    """A judge's prompt: preamble, then the sample, then the ending that the judge completes.

    Args:
        name: The folder's name.
        preamble: The task, and how to judge.
        sample: Jinja source with ``context``, ``response_1`` and ``response_2``.
        ending: What opens the judge's answer, for example ``Preferred Response=``.
    """

    name: str
    preamble: str
    sample: str
    ending: str

    @classmethod
    def load(cls, folder: str | Path) -> JudgePrompt:
        """Read a prompt folder: base.txt, sample.jinja and ending.txt, UTF-8.

        Line ends around a part do not count; a space at the end of the ending does.

        Raises:
            UserError: The folder or a file is missing, or the template does not compile.
        """
        folder = Path(folder)
        if not folder.is_dir():
            names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            near = difflib.get_close_matches(folder.name, names, n=1)
            raise UserError(f"There is no prompt folder {folder}.", fix=f"Did you mean '{near[0]}'?" if near else "")
        parts = {}
        for part, filename in _FILES.items():
            try:
                parts[part] = (folder / filename).read_text(encoding="utf-8").strip("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"A prompt's {part} cannot be read: {error}", where=str(folder / filename)) from None
        prompt = cls(folder.name, **parts)
        try:
            prompt.render("", "", "")
        except UserError as error:
            raise UserError(error.problems[0].what, where=str(folder / _FILES["sample"])) from None
        return prompt

    def render(self, prompt: PromptLike, response_1: str, response_2: str) -> str:
        """Preamble and sample as one text. The values are inserted, never parsed as templates.

        Raises:
            UserError: The template is wrong.
        """
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
        try:
            sample = environment.from_string(self.sample).render(
                context=as_text(prompt), response_1=response_1, response_2=response_2
            )
        except Exception as error:  # Jinja's own errors, and whatever an expression in the template raises
            raise UserError(
                f"The sample template of the prompt '{self.name}' is wrong: {type(error).__name__}: {error}"
            ) from None
        return f"{self.preamble}\n\n{sample}"
