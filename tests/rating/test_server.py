"""The rating page over real HTTP: access, stored votes, and the effect of a kill."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from trl_rlaif.rating.pairs import blind_order, read_comparisons
from trl_rlaif.rating.votes import VoteFile


def lines(folder):
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]


# ---- Access -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "state", "vote", "undo", "skip"])
def test_without_the_token_nothing_is_served(serve, make_run, name):
    folder = make_run(2)
    server, client = serve(folder)
    wrong = "x" * len(server.token)
    body = {"pair": 0, "choice": "left"}
    for path in (f"/{name}", f"/{wrong}/{name}", f"/{server.token[:-1]}/{name}", f"//{server.token}x/{name}"):
        for sent in (None, body):
            status, headers, content = client.ask(path, sent)
            assert status == 403 and b"trained" not in content and server.token.encode() not in content
            assert "Location" not in headers
    assert client.ask(f"/{server.token}")[0] == 403
    assert client.ask(client.path + name, body, Referer=client.address, Host="evil.example")[0] == 403
    assert not (folder / "votes.jsonl").exists()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("localhost", 200), ("localhost:1234", 200),
        ("evil.example:{port}", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example:{port}", 403),
        ("evil.example:127.0.0.1", 403), ("localhost:x", 403), ("", 403), ("[::1]:{port}", 403),
        ("0.0.0.0:{port}", 403),
    ],
)  # fmt: skip
def test_the_host_must_be_this_machine(serve, make_run, host, status):
    _, client = serve(make_run(1))
    assert client.ask(client.path + "state", Host=host.format(port=client.port))[0] == status
    assert client.ask(client.path + "undo", {}, Host=host.format(port=client.port))[0] == status


@pytest.mark.parametrize("hosts", [[], ["localhost", "evil.example"], ["localhost", "localhost"]])
def test_the_host_is_named_once(serve, make_run, hosts):
    _, client = serve(make_run(1))
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        head = "".join(f"Host: {host}\r\n" for host in hosts)
        connection.sendall(f"GET {client.path}state HTTP/1.1\r\n{head}\r\n".encode())
        assert b" 403 " in connection.makefile("rb").readline()


def test_it_listens_on_loopback_alone(serve, make_run):
    server, _ = serve(make_run(1))
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) >= 43  # 256 bits


def test_the_opening_address_works_once(serve, make_run):
    server, client = serve(make_run(1))
    opening = urlsplit(server.opening).path
    assert server.token not in opening
    assert client.ask(opening, Host="evil.example")[0] == 403
    status, headers, _ = client.ask(opening)
    assert (status, headers["Location"]) == (303, client.path)
    assert client.ask(opening)[0] == 403


def test_the_page_is_one_file_that_loads_nothing(serve, make_run):
    _, client = serve(make_run(1))
    status, headers, page = client.ask(client.path)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert not re.search(rb"(src|href)=\"(?!data:,\")|url\(|@import|innerHTML", page)
    assert client.ask(client.path + "other")[0] == client.ask(client.path + "state", {})[0] == 404
    assert client.ask(client.path + "../state")[0] == 404
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD"):
        assert client.ask(client.path, method=method)[0] == 501


# ---- Requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400), (b"", 400), (b"\xff", 400), (b"[]", 400), (b"null", 400), (b'"x"', 400), (b"[" * 4000, 400),
        (b'{"pair": ' + b"9" * 4000 + b"}", 400), ({}, 400), ({"pair": 0}, 400), ({"pair": 0, "choice": "start"}, 400),
        ({"pair": 2, "choice": "left"}, 400), ({"pair": -1, "choice": "left"}, 400),
        ({"pair": True, "choice": "left"}, 400), ({"pair": "0", "choice": "left"}, 400),
        ({"pair": 0, "choice": ["left"]}, 400), ({"pair": 0, "choice": "left", "more": "x" * 4096}, 413),
    ],
)  # fmt: skip
def test_what_is_no_vote_is_refused(serve, make_run, body, status):
    folder = make_run(2)
    _, client = serve(folder)
    found, _, content = client.ask(client.path + "vote", body)
    assert found == status and json.loads(content)["error"]
    assert not (folder / "votes.jsonl").exists()
    assert client.post("vote", pair=0, choice="left")[0] == 200  # the server still works


@pytest.mark.parametrize(
    ("length", "status"), [("9" * 4, 413), ("9" * 400, 413), ("-1", 411), ("x", 411), ("٣", 411), (None, 411)]
)
def test_a_body_is_not_read_before_its_length_is_known(serve, make_run, length, status):
    _, client = serve(make_run(1))
    with socket.create_connection(("127.0.0.1", client.port), timeout=5) as connection:
        head = "" if length is None else f"Content-Length: {length}\r\n"
        connection.sendall(f"POST {client.path}vote HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
        assert f" {status} ".encode() in connection.makefile("rb").readline()


def test_a_client_that_goes_away_is_no_news(serve, make_run, capsys):
    _, client = serve(make_run([make_run.sample(0, start="x" * 5_000_000)]))
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.sendall(f"GET {client.path}state HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            connection.recv(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
    assert client.state()["total"] == 1
    assert "Traceback" not in capsys.readouterr().err


# ---- Stored votes -----------------------------------------------------------------------------------------


def test_a_vote_is_on_the_disk_when_it_is_acknowledged(serve, make_run):
    folder = make_run(3)
    _, client = serve(folder)
    state = client.state()
    for done, (side, choice) in enumerate([("left", 1.0), ("right", 0.0), ("tie", 0.5)]):
        pair = state["pair"]
        trained_left = pair["left"].startswith("trained")
        status, state = client.post("vote", pair=pair["number"], choice=side)
        row = lines(folder)[-1]
        assert status == 200 and state["done"] == done + 1 == len(lines(folder))
        assert row["choice"] == (choice if side == "tie" or trained_left else 1 - choice)
        assert (row["set"], row["rater"]) == ("test", "ann") and row["id"] == "p" + pair["left"].split()[1]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", row["time"])
    assert state["pair"] is None


def test_the_state_does_not_tell_whose_a_response_is(serve, make_run):
    _, client = serve(make_run([make_run.sample(0, start="A", trained="B", reward_trained=0.77)]))
    assert set(client.state()["pair"]) == {"number", "set", "category", "prompt", "left", "right", "skipped"}
    content = client.ask(client.path + "state")[2]
    assert not any(word in content for word in (b"trained", b"start", b"0.8", b"0.77"))


def test_undo_withdraws_and_shows_the_pair_again(serve, make_run):
    folder = make_run(3)
    _, client = serve(folder)
    assert client.post("undo")[1]["can_undo"] is False
    first = client.state()["pair"]["number"]
    second = client.post("vote", pair=first, choice="left")[1]["pair"]["number"]
    client.post("vote", pair=second, choice="tie")
    state = client.post("undo")[1]
    assert (state["pair"]["number"], state["done"]) == (second, 1)
    state = client.post("undo")[1]
    assert (state["pair"]["number"], state["done"], state["can_undo"]) == (first, 0, False)
    assert [row["choice"] for row in lines(folder)][2:] == [None, None]
    assert [row["id"] for row in lines(folder)] == [lines(folder)[i]["id"] for i in (0, 1, 1, 0)]


def test_a_second_start_goes_on_where_the_first_stopped(serve, make_run):
    folder = make_run(6)
    _, client = serve(folder)
    state = client.state()
    for _ in range(3):
        state = client.post("vote", pair=state["pair"]["number"], choice="left")[1]
    _, again = serve(folder)
    assert again.state() == client.state() and again.state()["done"] == 3
    _, other = serve(folder, rater="bob")
    assert other.state()["done"] == 0
    state = again.post("undo")[1]  # also votes from before the restart
    assert state["done"] == 2 and lines(folder)[-1]["choice"] is None
    assert lines(folder)[-1]["id"] == lines(folder)[2]["id"]
    _, third = serve(folder)
    assert third.state()["pair"] == state["pair"]


def test_skipped_pairs_come_again_at_the_end(serve, make_run):
    folder = make_run(3)
    _, client = serve(folder)
    first = client.state()["pair"]["number"]
    state = client.post("skip", pair=first)[1]
    assert state["pair"]["number"] != first and state["done"] == 0 and not (folder / "votes.jsonl").exists()
    state = client.post("skip", pair=state["pair"]["number"])[1]
    state = client.post("undo")[1]
    assert state["pair"]["skipped"] is False
    for _ in range(2):
        state = client.post("vote", pair=state["pair"]["number"], choice="left")[1]
    assert state["pair"]["number"] == first and state["pair"]["skipped"] and state["done"] == 2


def test_concurrent_votes_of_several_raters_are_all_kept(serve, make_run):
    folder, pairs = make_run(20), range(20)
    clients = [serve(folder, rater)[1] for rater in ("ann", "bob", "cleo")]
    jobs = [(client, pair) for pair in pairs for client in clients]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda job: job[0].post("vote", pair=job[1], choice="left"), jobs))
    assert {status for status, _ in answers} == {200}
    found = lines(folder)
    assert len(found) == 60 == len({(row["rater"], row["id"]) for row in found})
    for client in clients:
        assert client.state()["done"] == 20 and client.state()["pair"] is None


def test_a_vote_cast_twice_counts_once(serve, make_run):
    folder = make_run(2)
    _, client = serve(folder)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.post("vote", pair=0, choice="left"), range(8)))
    assert client.post("vote", pair=0, choice="right")[1]["done"] == 1
    _, again = serve(folder)
    assert again.state()["done"] == 1


def test_a_vote_that_cannot_be_kept_is_not_acknowledged(serve, make_run):
    folder = make_run(2)
    _, client = serve(folder)
    client.post("vote", pair=0, choice="left")
    (folder / "votes.jsonl").rename(folder / "moved")
    (folder / "votes.jsonl").mkdir()
    for action in ("vote", "undo"):
        status, answer = client.post(action, pair=1, choice="left")
        assert status == 500 and "Is a directory" in answer["error"]
        assert client.state()["done"] == 1 and client.state()["can_undo"]


# ---- The process ------------------------------------------------------------------------------------------


def start(folder, *arguments):
    command = [sys.executable, "-c", "from trl_rlaif.cli import main; main()"]
    process = subprocess.Popen(
        [*command, "rate", str(folder), "--rater", "ann", "--no-browser", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and a test run may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    watch = threading.Timer(60, process.kill)
    watch.start()
    head = ""
    while not (found := re.search(r"http://127\.0\.0\.1:\d+/\S+/", head)):
        line = process.stderr.readline()
        assert line, head
        head += line
    return process, found.group(), watch


@pytest.mark.parametrize("after", [1, 40])
def test_kill_9_loses_nothing_that_was_acknowledged(connect, make_run, after):
    folder = make_run(5000)
    process, address, watch = start(folder)
    client, kept = connect(address), []

    def vote(first):
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            for pair in range(first, 5000, 4):
                if client.post("vote", pair=pair, choice="tie")[0] == 200:
                    kept.append(pair)

    voters = [threading.Thread(target=vote, args=(first,)) for first in range(4)]
    for voter in voters:
        voter.start()
    while len(kept) < after and process.poll() is None:
        pass
    process.kill()
    for voter in voters:
        voter.join()
    process.communicate()
    watch.cancel()
    assert after <= len(kept) < 5000
    order = blind_order(read_comparisons(folder), "ann")
    standing = VoteFile(folder / "votes.jsonl").standing()["ann"]
    assert {order[pair].name for pair in kept} <= standing.keys()
    assert len(standing) <= len(kept) + 4  # plus at most the requests in flight


def test_ctrl_c_ends_it_with_the_result(connect, make_run):
    folder = make_run(2)
    process, address, watch = start(folder, "--set", "test")
    client = connect(address)
    pair = client.state()["pair"]
    client.post("vote", pair=pair["number"], choice="left" if pair["left"].startswith("trained") else "right")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    watch.cancel()
    assert process.returncode == 0 and "Traceback" not in errors
    assert "test: people prefer the trained policy in 100.0% of pairs" in output and "1 of 2 pairs rated" in output
    with pytest.raises(OSError):
        client.state()
