"""The top of a report as Markdown, for pull requests and model cards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trl_rlaif.report.formatting import count, duration

# Characters with a meaning in Markdown or HTML.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def markdown(page: Mapping[str, Any]) -> str:
    """Results, caveats and stages as Markdown, from the values of a run's or a comparison's page."""
    lines = [f"# {_plain(page['run'].name)}", "", _plain(page["subtitle"]), ""]
    lines += [line for sentence in page["summary"] for line in (_plain(sentence), "")]
    lines += _listed("Signs that this run learned nothing", page.get("no_learning"))
    lines += _listed("Before you trust these results", page.get("warnings") or page.get("notes"))
    lines += _table(("Set", "Prompts", "Metric", "Value", "95% interval", ""), _measures(page))
    stages = [(row.name, row.state, row.did, duration(row.seconds)) for row in page.get("stages", ())]
    lines += _table(("Stage", "State", "Result", "Time"), stages)
    if page["command"]:
        lines += ["Command:", "", f"    {page['command']}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _measures(page: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each metric of each evaluated set; a comparison has its metrics in the summary."""
    for of in page["sets"] if "stages" in page else ():
        named = {"reward": of.reward, **{f"reward {name}": found for name, found in of.labelers.items()}}
        for name, measure in (named | {"win rate over the initial policy": of.win_rate}).items():
            if measure:
                yield of.name, count(of.prompts), name, measure.text, measure.interval_text, measure.verdict


def _listed(heading: str, sentences: Any) -> list[str]:
    return [f"## {heading}", "", *(f"- {_plain(sentence)}" for sentence in sentences), ""] if sentences else []


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    found = [" | ".join(["", *map(_plain, row), ""]).strip() for row in rows]
    return [" | ".join(["", *head, ""]).strip(), "|---" * len(head) + "|", *found, ""] if found else []


def _plain(text: str) -> str:
    """The text on one line, with Markdown's special characters escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
