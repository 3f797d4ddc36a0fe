"""label.budget, and the token usage of judges on servers: as the server counts it, with no request sent twice."""

from __future__ import annotations

import random
import time
from decimal import Decimal
from types import SimpleNamespace

import pytest
from helpers.labeling import label_stage, make_pairs, results
from helpers.recipes import tiny_recipe, write_rows
from helpers.server import scripted_server

from trl_rlaif.errors import RunError
from trl_rlaif.experiments.pairwise import play
from trl_rlaif.files import read_lines
from trl_rlaif.judging.usage import Budget, Meter, Price, Usage
from trl_rlaif.labels import LabelStore
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.usage import StoredTotal, counted, usage_numbers
from trl_rlaif.plugins import installed_plugins

PAIRS = make_pairs(12)


@pytest.fixture(scope="module")
def server():
    with scripted_server() as one:
        yield one


@pytest.fixture(autouse=True)
def unasked(server, only_local_servers):
    server.forget()


@pytest.fixture
def label(tiny_model, tmp_path, server):
    run, address = label_stage(tiny_model, tmp_path), server.base_url

    def label(price=None, pairs=PAIRS, **section):
        judge = {"backend": "openai", "path": "scripted", "base_url": address, "prefill": False, "concurrency": 2}
        return run(judge=judge | {"price": price, "max_retries": 0}, prompt="general", pairs=pairs, **section)

    return label


def texts(server):
    return [request["body"]["messages"][0]["content"] for request in server.requests]


def used(server):
    """Tokens of all requests by the server's rule: input words, and one output token per request."""
    asked = texts(server)
    return sum(len(text.split()) for text in asked), len(asked)


def test_tokens_and_their_price_are_in_the_results_and_the_report(label, server):
    folder = label(price={"input": 3.0, "output": 20.0}, report={})
    read, written = used(server)
    cost = (3 * read + 20 * written) / 1e6
    assert results(folder)["usage"] == {
        "input_tokens": read, "output_tokens": written, "cost": cost, "uncounted": 0,
    }  # fmt: skip
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{read:,} read, {written:,} written; cost {cost:.4g}" in page
    assert label(price={"input": 1.0, "output": 1.0}, budget={"tokens": 1}).results() == folder.results()  # not redone


@pytest.mark.parametrize("kind", ["tokens", "cost"])
def test_labeling_stops_where_the_budget_is_used_up_and_goes_on_with_a_larger_one(label, server, tmp_path, kind):
    price = {"input": 2.0, "output": 2.0}
    whole = label(output="whole", price=price)
    total = sum(used(server))
    server.forget()
    part = total // 3

    def budget(tokens):
        return {"tokens": tokens} if kind == "tokens" else {"cost": 2 * tokens / 1e6}

    with pytest.raises(RunError, match=r"label.budget is used up: [0-9,]+.* tokens.*Raise label.budget") as caught:
        label(price=price, budget=budget(part))
    spent = sum(used(server))
    assert f"{spent:,}" in str(caught.value)
    assert part <= spent < part + 3 * total / len(PAIRS)  # requests of two threads in flight
    kept = read_lines(tmp_path / "out" / "labels.jsonl")
    assert len(kept) == len(server.requests) // 2  # every answer is kept
    with pytest.raises(RunError, match="used up"):
        label(price=price, budget=budget(part))
    assert sum(used(server)) == spent  # no further request
    folder = label(price=price, budget=budget(total + 1))
    assert sum(used(server)) == total and len(set(texts(server))) == len(texts(server)) == 2 * len(PAIRS)
    assert results(folder)["usage"] == pytest.approx(results(whole)["usage"])
    by_id = [{row["id"]: row for row in read_lines(of / "labels.jsonl")} for of in (folder, whole)]
    assert by_id[0] == by_id[1]


def test_a_budget_that_is_just_enough_is_no_error(label, server):
    label(output="whole")
    assert results(label(budget={"tokens": sum(used(server))}))["labeled"] == len(PAIRS)


def test_a_server_that_does_not_count_has_no_budget(label, server):
    pairs = [row | {"prompt": f"{row['prompt']} [[usage=0]]"} for row in PAIRS]
    with pytest.raises(RunError, match="does not report its token usage.*Leave out label.budget"):
        label(pairs=pairs, budget={"tokens": 10**9})
    usage = results(label(pairs=pairs))["usage"]
    assert usage == {"input_tokens": 0, "output_tokens": 0, "cost": None, "uncounted": 2 * len(PAIRS)}


def test_what_a_stopped_run_has_used_still_counts(label, server, monkeypatch):
    """Stopped at the seventh label; requests in flight are sent again, and count again."""
    add, added = LabelStore.add, []

    def stop(*args):
        added.append(add(*args))
        if len(added) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LabelStore, "add", stop)
        label()
    time.sleep(0.2)  # for the answers to requests in flight
    before = used(server)[0]
    usage = results(label())["usage"]["input_tokens"]
    asked = used(server)[0]
    most = max(len(text.split()) for text in texts(server))
    assert asked - 2 * 2 * most <= usage <= asked and usage > asked - before


# ---- Every stage that asks a judge -----------------------------------------------------------------------


@pytest.fixture
def run(tiny_model, tmp_path, server):
    """A function that runs stages with labels, rewards and win rates from a server; returns the last one's results."""
    judge = {"backend": "openai", "path": "scripted", "base_url": server.base_url, "prefill": False}
    dear, cheap = ({"price": dict(zip(("input", "output"), of, strict=True))} for of in ((3.0, 20.0), (1.0, 2.0)))
    recipe = tiny_recipe(
        tmp_path,
        tiny_model,
        reward=None,
        label={"judge": judge | dear, "prompt": "general"},
        rl={"rewards": ["direct"], "total_episodes": 8, "per_device_train_batch_size": 4, "save_steps": 1},
        evaluate={"judge": judge | cheap, "prompt": "general"},
        report={},
    )

    def run(*stages):
        server.forget()
        folder = run_recipe(recipe, installed_plugins(), tmp_path / "out", only=stages)
        return folder.results()[stages[-1]]

    return run


def cost(server):
    """The cost of all requests; ratings, and comparisons in evaluate, have different prices."""
    rated = ["from 1 to 10" in text for text in texts(server)]
    words = [len(text.split()) for text in texts(server)]
    return sum(3 * n + 20 if dear else n + 2 for n, dear in zip(words, rated, strict=True)) / 1e6


def test_rewards_and_win_rates_by_a_server_are_counted_each_by_its_price(run, server, tmp_path, capsys, monkeypatch):
    run("sample", "label")
    usage = run("rl")["usage"]
    assert len(server.requests) == 8 and (usage["input_tokens"], usage["output_tokens"]) == used(server)
    assert usage["cost"] == cost(server)
    assert f", {sum(used(server)):,} tokens for {usage['cost']:.4g}" in capsys.readouterr().err

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trl_rlaif.pipeline.work.evaluate.write_atomically", stop)
        run("evaluate")
    stopped, spent = used(server), cost(server)
    usage = run("evaluate", "report", "evaluate")["usage"]  # all requests are sent again, and count again
    assert used(server) == stopped and 8 < len(server.requests)  # ratings of 4 prompts' responses, and comparisons
    assert (usage["input_tokens"], usage["output_tokens"]) == tuple(2 * n for n in stopped)
    assert usage["cost"] == 2 * spent and usage["uncounted"] == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{2 * sum(stopped):,} tokens (judges on servers), cost {usage['cost']:.4g}" in page


def test_a_comparison_counts_what_all_its_judgments_took(tiny_model, tmp_path, server):
    judge = {"backend": "openai", "path": "scripted", "base_url": server.base_url, "prefill": False}
    recipe = tiny_recipe(tmp_path, tiny_model, evaluate={"judge": judge, "prompt": "general"})
    folder, runs = RunFolder(tmp_path / "out"), {name: RunFolder(tmp_path / name) for name in "ab"}
    told = {"set": "test", "category": None, "start": "the fox", **dict.fromkeys(("tokens_start", "ended_start"), 1.0)}
    for name, run in runs.items():
        rows = [{"id": f"p{i}", "prompt": f"what is {i}?", "trained": f"{name} {i}"} for i in range(3)]
        write_rows(run / "samples.jsonl", [told | row | {"tokens_trained": 2.0, "ended_trained": 1.0} for row in rows])
    usage = play(recipe, installed_plugins(), folder, runs)["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == used(server) and len(server.requests) == 3 * 3 * 2
    assert play(recipe, installed_plugins(), folder, runs)["usage"] == usage  # no request is repeated
    assert len(server.requests) == 3 * 3 * 2


def test_the_cost_does_not_depend_on_the_order_of_the_answers():
    """Answers arrive in any order, and the last digit of a float sum of 0.1 or 0.7 depends on the order."""
    answers = [(number * 37 % 101, number % 5) for number in range(200)]
    costs = set()
    for seed in range(20):
        meter = Meter(Price(0.1, 0.7))
        for read, written in random.Random(seed).sample(answers, len(answers)):
            meter.add(SimpleNamespace(prompt_tokens=read, completion_tokens=written))
        costs.add(meter.used.row()["cost"])
    read, written = (sum(counts) for counts in zip(*answers, strict=True))
    assert costs == {(read + 7 * written) / 1e7}
    assert Usage.of_row(meter.used.row()) == meter.used


def test_a_budget_of_money_is_used_up_once_the_cost_is_equal():
    meter = Meter(Price(0.1, 0.1), Budget(cost=0.1))
    for tokens, full in ((999_999, False), (1, True)):
        meter.add(SimpleNamespace(prompt_tokens=tokens, completion_tokens=0))
        assert meter.used_up is full


def test_each_process_counts_in_a_file_of_its_own(tmp_path, monkeypatch):
    """Each of two processes counts its own usage; after a kill, a single process continues."""
    context = SimpleNamespace(folder=RunFolder(tmp_path), total=None)
    for rank, used in enumerate([Usage(10, 1, Decimal("0.5")), Usage(20, 2, None, 3)]):
        with monkeypatch.context() as patch:
            for name, value in {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": 2}.items():
                patch.setenv(name, str(value))
            with counted(context, "rl"):
                context.total.add(used)
    with counted(context, "rl"):
        context.total.add(Usage(100, 10))
    assert usage_numbers(context, "rl")["usage"] == {
        "input_tokens": 130, "output_tokens": 13, "cost": 0.5, "uncounted": 3,
    }  # fmt: skip
    assert usage_numbers(context, "evaluate") == {}


def test_a_kill_loses_what_was_counted_in_a_second(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("trl_rlaif.pipeline.usage.time", clock)
    total = StoredTotal(tmp_path / "rl.work")
    for clock.now in (0.5, 1.0, 1.5, 1.9):
        total.add(Usage(1, 1))
    assert StoredTotal(tmp_path / "rl.work").used == Usage(2, 2)
