"""A hook of mkdocs: the pages that are made from the code and from files outside of docs/, and the links to them."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import trl_rlaif
from trl_rlaif.cli import app
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.plugins import KINDS, installed_plugins
from trl_rlaif.recipe import packaged_recipes
from trl_rlaif.recipe.component_refs import COMPONENT_KEYS
from trl_rlaif.recipe.explaining import keys_below
from trl_rlaif.recipe.schema import recipe_schema

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = "reference/packaged.md"
# Files of the repository that are pages, and what they are called there.
COPIED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "measurements/index.md",
    "examples/README.md": "reference/examples.md",
} | {str(p.relative_to(ROOT)): f"measurements/{p.name}" for p in sorted(ROOT.glob("benchmarks/results/*.md"))}

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf-8") + _scripts(ROOT / source)
        files.append(File.generated(config, page, content=_linked(text, source, page)))
    for page, lines in _generated():
        files.append(File.generated(config, page, content="\n".join(lines) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page of docs/ to what is a page here."""
    source = page.file.src_uri
    return markdown if page.file.generated_by else _linked(markdown, f"docs/{source}", source)


def _linked(text: str, source: str, page: str) -> str:
    """With the links between files of the repository as links between pages; of what is no page, the text alone."""

    def link(found: re.Match[str]) -> str:
        image, words, target, heading = found.group(1), found.group(2), found.group(3), found.group(4) or ""
        if not target or ":" in target:
            return found.group()
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        recipe = re.fullmatch(r"recipes/([\w-]+)\.yaml", file)
        there = PACKAGED if recipe else COPIED.get(file, file.removeprefix("docs/"))
        if not recipe and file not in COPIED and not file.startswith("docs/"):
            return words
        heading = f"#{recipe.group(1)}" if recipe else heading
        return f"{image}[{words}]({os.path.relpath(there, posixpath.dirname(page) or '.')}{heading})"

    return _LINK.sub(link, text)


def _scripts(page: Path) -> str:
    """The scripts beside the page of the examples."""
    scripts = sorted(page.parent.glob("*.py")) if page.parent.name == "examples" else []
    return "".join(f"\n## {s.name}\n\n```python\n{s.read_text(encoding='utf-8')}```\n" for s in scripts)


def _generated() -> Iterator[tuple[str, Iterable[str]]]:
    yield PACKAGED, _packaged()
    yield "reference/keys.md", _keys()
    yield "reference/components.md", _components()
    yield "reference/commands.md", _commands()
    yield "reference/python.md", _python()


def _packaged() -> Iterator[str]:
    yield from ["# Packaged recipes", "", "As `trl-rlaif recipes show NAME` prints them."]
    for name, path in packaged_recipes().items():
        yield from ["", f"## {name}", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```"]


def _keys() -> Iterator[str]:
    defaults = {name: stage.defaults for name, stage in STAGES.items()}
    schema = recipe_schema(installed_plugins().registry, defaults)
    yield from [
        "# Recipe keys",
        "",
        "Made from the models that check recipes; `trl-rlaif explain KEY` prints the same.",
    ]
    for section in keys_below(schema, ""):
        yield from ["", f"## {section.name}", "", *filter(None, [_cell(section.description)])]
        rows = [*_tree(schema, section.name)]
        if rows:
            yield from ["", "| key | type | default | description |", "|---|---|---|---|", *rows]


def _tree(schema: dict[str, Any], path: str) -> Iterator[str]:
    """A row of the table for each key below a path, and those below it; a component's options have their own page."""
    for key in keys_below(schema, path):
        whole = f"{path}.{key.name}"
        component = COMPONENT_KEYS.get((path, key.name))
        kind = f"[{component[0].replace('_', ' ')}](components.md)" if component else _cell(key.type)
        default = f"`{key.default}`".replace("|", "\\|") if key.default else ""
        yield f"| `{whole}` | {kind} | {default} | {_cell(key.description)} |"
        if not component:
            yield from _tree(schema, whole)


def _cell(text: str) -> str:
    """Text in a table: outside of code nothing in it is markup."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(re.sub(r"(\|)" if part.startswith("`") else r"([|*<\[])", r"\\\1", part) for part in parts)


def _components() -> Iterator[str]:
    yield from ["# Components", "", "Those that come with the package; `trl-rlaif plugins` lists what is installed."]
    for kind in KINDS:
        yield from ["", f"## {kind.replace('_', ' ').capitalize()}s"]
        for found in installed_plugins().registry:
            if found.kind == kind:
                yield from ["", f"### {found.name}", "", (found.component.__doc__ or "").strip().partition("\n")[0]]
                fields = found.component.Options.model_fields
                if fields:
                    yield from ["", "| option | default | description |", "|---|---|---|"]
                for name, field in fields.items():
                    default = (
                        "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
                    )
                    yield f"| `{name}` | {default} | {_cell(field.description or '')} |"


def _commands() -> Iterator[str]:
    yield from ["# Commands", "", "The options of each command, as `--help` prints them."]
    yield from _command(typer.main.get_command(app), "trl-rlaif")


def _command(command: click.Command, name: str) -> Iterator[str]:
    with click.Context(command, info_name=name) as context:
        usage = " ".join(command.collect_usage_pieces(context))
        yield from ["", f"## {name}", "", (command.help or "").strip(), "", f"    {name} {usage}", ""]
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context) or (
                parameter.human_readable_name,
                getattr(parameter, "help", ""),
            )
            yield f"- `{record[0]}`: {_cell(record[1] or '')}"
    for sub, child in sorted(getattr(command, "commands", {}).items()):
        yield from _command(child, f"{name} {sub}")


def _python() -> Iterator[str]:
    yield from ["# Python API", "", "`from trl_rlaif import NAME`."]
    for name in trl_rlaif.__all__:
        value = getattr(trl_rlaif, name)
        module = getattr(value, "__module__", "")
        if name != "hookimpl" and module.startswith("trl_rlaif"):
            yield from ["", f"::: {module}.{name}"]
