"""The README's pictures, from two finished runs of the quickstart.

    python docs/_site/pictures.py runs/quickstart runs/seed-2 --set run.seed=1

The first screen of the first run's report, by a headless Chromium, and a terminal in which that run is resumed and
compared with the other one. ``--set`` is what the first run was started with. The commands are run, in a folder with
copies of the runs, and what they print is drawn as it is, with paths from that folder.
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
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from trl_rlaif.report.build import write_report

PICTURES = Path(__file__).parents[1] / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LARGEST = 150_000  # bytes of a picture
WIDTH, HEIGHT = 1180, 740  # of the report's first screen, in CSS pixels
COLUMNS = 116
# What training leaves to go on with, and earlier results.
NOT_NEEDED = shutil.ignore_patterns("checkpoints", "superseded")


def report(run: Path, picture: Path) -> None:
    """The first screen of a run's report as a PNG, at twice its size for dense screens."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"None of these is installed: {', '.join(BROWSERS)}.")
    page = write_report(run).resolve().as_uri()
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        look = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=2"]
        size = f"--window-size={WIDTH},{HEIGHT}"
        subprocess.run([browser, *look, size, f"--screenshot={shot}", page], check=True, capture_output=True)
        # Text on a plain ground has few colours: a palette of them takes a third of the bytes.
        Image.open(shot).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)


def terminal(commands: Sequence[Sequence[str]], folder: Path, picture: Path) -> None:
    """The commands and all that they print, as an SVG that needs no font of its own."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    for command in commands:
        console.print(Text("$ ", style="dim") + Text(shlex.join(["trl-rlaif", *command]), style="bold bright_white"))
        done = subprocess.run(
            [sys.executable, "-m", "trl_rlaif", *command], cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
        )  # fmt: skip
        console.print(Text(done.stdout.replace(f"{folder.resolve()}/", "")))
    svg = console.export_svg(title="trl-rlaif", unique_id="terminal")
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    """Make both, and refuse what would be slow to load or tells where it was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="A finished run of the quickstart.")
    parser.add_argument("other", type=Path, help="Another one, to compare it with.")
    parser.add_argument("--set", action="append", default=[], help="As the first run was started (repeatable).")
    arguments = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path("runs/quickstart"), Path("runs/other-seed")]
        for source, copy in zip((arguments.run, arguments.other), runs, strict=True):
            shutil.copytree(source, Path(folder) / copy, ignore=NOT_NEEDED)
        sets = [word for each in arguments.set for word in ("--set", each)]
        commands = [["run", "quickstart", *sets, "--resume"], ["compare", *map(str, runs)]]
        terminal(commands, Path(folder), PICTURES / "terminal.svg")
        report(Path(folder) / runs[0], PICTURES / "report.png")
    for picture in sorted(PICTURES.iterdir()):
        size = picture.stat().st_size
        print(f"{picture}: {size / 1000:.0f} kB")
        if size > LARGEST or b"/tmp/" in picture.read_bytes():
            raise SystemExit(f"{picture} is larger than {LARGEST / 1000:.0f} kB or names a folder of this machine.")


if __name__ == "__main__":
    main()
