"""Complete run folders for the report, and their pages."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import yaml

from trl_rlaif.report.build import render, run_page
from trl_rlaif.report.files import write_page
from trl_rlaif.report.run_data import read_run

HOSTILE = (
    "<script>alert(1)</script></title></style></svg>-->]]><img src=x onerror=alert(2)>"
    '" onmouseover="alert(3)" \' {{ 7*7 }} $\\frac$ \x00\x1b[31m \ud800 \ufffe & &lt;'
)

RECIPE = {
    "run": {"name": "tiny", "seed": 7},
    "model": {"path": "org/model", "dtype": "bfloat16", "quantization": "nf4", "lora": {"r": 8}},
    "data": {"prompts": "prompts.jsonl"},
    "label": {"judge": "same"},
    "rl": {"algorithm": "ppo"},
    "evaluate": {"judge": "same"},
    "versions": {"trl-rlaif": "0.1.0", "trl": "1.12.0"},
    "command": "trl-rlaif run tiny --set run.seed=7",
}


def make_results() -> dict:
    gain = {"mean": 0.563, "interval": [0.471, 0.652]}
    held_out = {
        "prompts": 160, "win_rate": 0.6375, "interval": [0.548, 0.717], "wins": 96, "ties": 12, "losses": 52,
        "reward_start": {"mean": -0.151, "interval": [-0.24, -0.06]},
        "reward_trained": {"mean": 0.412, "interval": [0.33, 0.49]},
        "reward_gain": gain, "tokens_start": 48.2, "tokens_trained": 57.4,
        "by_category": {"code": {"win_rate": 0.7, "n": 20}, "chat": {"win_rate": 0.575, "n": 20}},
    }  # fmt: skip
    return {
        "sample": {"prompts": 321, "pairs": 612, "dropped": {"too long": 9}, "redrawn": 2, "seconds": 734},
        "label": {
            "pairs": 612, "labeled": 598, "skipped": {"no answer": 14}, "mean_confidence": 0.764,
            "position_bias":
                {"rate": 0.123, "interval": [0.101, 0.149], "n": 598, "first": 0.1, "second": 0.02},
            "mass": {"mean": 0.965, "min": 0.71, "low": 0},
            "agreement": {"rate": 0.713, "interval": [0.648, 0.771], "n": 200},
            "judge": "judge-a", "seconds": 4.2,
        },
        "reward": {
            "train_pairs": 500, "eval_pairs": 98, "skipped": 0,
            "accuracy": 0.722, "accuracy_interval": [0.622, 0.804], "seconds": 305,
        },
        "rl": {
            "updates": 12, "episodes": 3840, "score_first": -0.193, "score_last": 0.812, "kl_last": 5.62,
            "seconds": 5421,
        },
        "evaluate": {"judge": "judge-b", "sets": {"held-out": held_out}, "seconds": 388},
    }  # fmt: skip


def make_run(folder: Path, text: str = "plain words", category: str = "code") -> Path:
    """A complete run folder; ``text`` and ``category`` appear wherever a model or user can put text."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    metrics = [{"stage": "sft", "step": s, "loss": 2 / s} for s in range(1, 6)]
    metrics += [
        {"stage": "reward", "step": s, "loss": 0.7 / s, "accuracy": 0.6, "eval_accuracy": 0.61} for s in range(1, 6)
    ]
    metrics += [
        {
            "stage": "rl", "step": s, "objective/kl": 0.1 * s, "objective/scores": 0.2 * s,
            "loss/policy_avg": -0.01,
            "rollout/length": 40 + s, f"reward/{category}": 0.1 * s, "reward/chat": 0.2, "extra/metric": 3.25,
        }
        for s in range(1, 13)
    ]  # fmt: skip
    labels = [
        {
            "id": i,
            "p": 0.2 + 0.06 * i,
            "p_12": 0.3 + 0.05 * i,
            "p_21": 0.1 + 0.05 * i,
            "mass_12": 1,
            "judge": text,
        }
        for i in range(10)
    ]
    samples = [
        {
            "set": "held-out", "id": i, "category": category if i % 2 else "chat", "start": text,
            "trained": f"{text} {i}",
            "prompt": [{"role": text, "content": text}] if i % 2 else text,
            "reward_start": -0.1 * i, "reward_trained": 0.1 * i, "p_trained": 0.6,
        }
        for i in range(10)
    ]  # fmt: skip
    pairs = [{"id": i, "prompt": text, "response_1": text, "response_2": text, "category": category} for i in range(10)]
    for name, rows in (("metrics", metrics), ("labels", labels), ("samples", samples), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps(make_results()))
    return folder


def set_results(folder: Path, change) -> None:
    path = folder / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


class Page(HTMLParser):
    """A page as a browser sees it: scripts, elements with attributes, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(folder: Path) -> Page:
    """Render only the page: writing plot files would double the time."""
    html = render(run_page(read_run(folder)))
    write_page(folder / "report.html", html)
    return Page(html)


def part(page: Page, start: str, end: str) -> str:
    """The text between two headings, from the last occurrence of the first, since the navigation names them too."""
    text = page.text
    begin = text.rindex(start)
    return text[begin : text.index(end, begin + len(start))]


def assert_only_our_script(page: Page) -> None:
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none';")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "object", "embed", "link", "base", "foreignobject", "animate", "set"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action"):
                assert value and value.startswith("#"), (tag, name, value)
