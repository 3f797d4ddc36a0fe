"""label.budget, and the tokens of judges on servers: counted as the server counts them, and asked for once."""

from __future__ import annotations

import time

import pytest
from helpers.labeling import label_stage, make_pairs, results
from helpers.server import scripted_server

from trl_rlaif.errors import RunError
from trl_rlaif.files import read_lines
from trl_rlaif.labels import LabelStore

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
    """Tokens of all requests by the server's rule: words read, and one written."""
    asked = texts(server)
    return sum(len(text.split()) for text in asked), len(asked)


def test_tokens_and_their_price_are_in_the_results_and_the_report(label, server):
    folder = label(price={"input": 3.0, "output": 20.0}, report={})
    read, written = used(server)
    cost = (3 * read + 20 * written) / 1e6
    assert results(folder)["usage"] == {
        "input_tokens": read, "output_tokens": written, "cost": pytest.approx(cost, rel=1e-12), "uncounted": 0,
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
    assert part <= spent < part + 3 * total / len(PAIRS)  # what two threads had begun
    kept = read_lines(tmp_path / "out" / "labels.jsonl")
    assert len(kept) == len(server.requests) // 2  # whatever was answered is there
    with pytest.raises(RunError, match="used up"):
        label(price=price, budget=budget(part))
    assert sum(used(server)) == spent  # not a request more
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
    with pytest.raises(RunError, match="does not count tokens.*Leave out label.budget"):
        label(pairs=pairs, budget={"tokens": 10**9})
    usage = results(label(pairs=pairs))["usage"]
    assert usage == {"input_tokens": 0, "output_tokens": 0, "cost": None, "uncounted": 2 * len(PAIRS)}


def test_what_a_stopped_run_has_used_still_counts(label, server, monkeypatch):
    """Stopped at its seventh label; the requests that were under way are asked again, and count again."""
    add, added = LabelStore.add, []

    def stop(*args):
        added.append(add(*args))
        if len(added) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LabelStore, "add", stop)
        label()
    time.sleep(0.2)  # of what was under way, the answers come
    before = used(server)[0]
    usage = results(label())["usage"]["input_tokens"]
    asked = used(server)[0]
    most = max(len(text.split()) for text in texts(server))
    assert asked - 2 * 2 * most <= usage <= asked and usage > asked - before
