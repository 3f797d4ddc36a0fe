"""The README's pictures, from a run of the quickstart that this script makes: 12 minutes on two cores.

    python docs/_site/pictures.py --set run.seed=1

A cast of the terminal as an animated SVG: the command and what it prints, line by line, with the pauses cut. Of a
progress that is printed several times, only the last line is kept. And the first screen of the run's report, by a
headless Chromium.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parents[1] / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LARGEST = 150_000  # bytes of a picture
WIDTH, HEIGHT = 1180, 740  # of the report's first screen, in CSS pixels
COLUMNS = 116
FIRST, LONGEST = 1.0, 0.8  # seconds before the first line, and of a pause
# A viewer that does not animate, or whose reader asked for less motion, shows all lines at once.
ANIMATION = """
    @keyframes printed { from { visibility: hidden; } }
    @media (prefers-reduced-motion: no-preference) { g.terminal-matrix text { animation: printed 1ms both; } }
"""


def recorded(command: Sequence[str], folder: Path) -> list[tuple[float, str]]:
    """The lines that a command prints, each with the seconds after the start of the cast."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_rlaif", *command], cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines: list[tuple[float, str]] = []
    shown, last = FIRST, time.monotonic()
    assert process.stdout is not None
    for line in process.stdout:
        now = time.monotonic()
        shown, last = shown + min(now - last, LONGEST), now
        text = line.rstrip().replace(f"{folder.resolve()}/", "")
        if lines and text.startswith("  ") and text.split(":")[:-1] == lines[-1][1].split(":")[:-1]:
            shown = lines.pop()[0]
        lines.append((shown, text))
    if process.wait():
        raise SystemExit(f"{shlex.join(command)} failed with {process.returncode}:\n" + "\n".join(t for _, t in lines))
    return lines


def cast(command: Sequence[str], lines: Sequence[tuple[float, str]], picture: Path) -> None:
    """The command and its lines as an SVG that needs no font of its own."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text("$ ", style="dim") + Text(shlex.join(["trl-rlaif", *command]), style="bold bright_white"))
    rows = [0.0]
    for shown, text in lines:
        wrapped = Text(text).wrap(console, COLUMNS)
        rows += [shown] * len(wrapped)
        console.print(Text(text))
    svg = console.export_svg(title="trl-rlaif", unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("</style>", f"{ANIMATION}    </style>")
    row = re.compile(r'clip-path="url\(#terminal-line-(\d+)\)"(?=>[^<])')
    svg = row.sub(lambda found: f'{found[0]} style="animation-delay: {rows[int(found[1])]:.2f}s"', svg)
    picture.write_text(svg, encoding="utf-8")


def report(run: Path, picture: Path) -> None:
    """The first screen of a run's report as a PNG, at twice its size for dense screens."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"None of these is installed: {', '.join(BROWSERS)}.")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        look = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=2"]
        size = f"--window-size={WIDTH},{HEIGHT}"
        page = (run / "report.html").resolve().as_uri()
        subprocess.run([browser, *look, size, f"--screenshot={shot}", page], check=True, capture_output=True)
        # Text on a plain ground has few colours: a palette of them takes a third of the bytes.
        Image.open(shot).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)


def main() -> None:
    """Make both, and refuse what would be slow to load or tells where it was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], help="A setting of the run (repeatable).")
    arguments = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    command = ["run", "quickstart", *(word for each in arguments.set for word in ("--set", each))]
    with tempfile.TemporaryDirectory() as folder:
        cast(command, recorded(command, Path(folder)), PICTURES / "terminal.svg")
        report(Path(folder) / "runs" / "quickstart", PICTURES / "report.png")
    for picture in sorted(PICTURES.iterdir()):
        size = picture.stat().st_size
        print(f"{picture}: {size / 1000:.0f} kB")
        if size > LARGEST or b"/tmp/" in picture.read_bytes():
            raise SystemExit(f"{picture} is larger than {LARGEST / 1000:.0f} kB or names a folder of this machine.")


if __name__ == "__main__":
    main()
