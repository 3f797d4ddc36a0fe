"""Several servers of one model: load balancing, retries of dead servers, and answers that depend on neither."""

from __future__ import annotations

from types import SimpleNamespace

import openai
import pytest
from helpers.server import scripted_server

from trl_rlaif.judging import pool
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.judging.server import Server, ServerGone

PROMPT = JudgePrompt(
    "short",
    {
        "base.txt": "Answer with 1 or 2 only.",
        "sample.jinja": "Request:\n{{ context }}\n\nResponse 1:\n{{ response_1 }}\n\nResponse 2:\n{{ response_2 }}",
        "ending.txt": "Preferred Response=",
    },
)
A, B = "http://a/v1/", "http://b/v1/"


@pytest.fixture(autouse=True)
def quick(only_local_servers, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


# ---- Which server is asked --------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""
    now = [1000.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def servers():
    return pool.ServerPool(Server(base_url=[A, B], max_retries=3))


def lost(client):
    return openai.APIConnectionError(request=SimpleNamespace(url=f"{client.base_url}chat/completions"))


def refused(client, status, **headers):
    request = SimpleNamespace(url=f"{client.base_url}chat/completions")
    response = SimpleNamespace(request=request, status_code=status, headers=headers)
    return openai.APIStatusError("no", response=response, body=None)


def asked_by(servers, fails, error=lost):
    """The servers that a request goes to, in order, with the retries of each."""
    asked = []

    def send(client):
        asked.append((str(client.base_url), client.max_retries))
        if asked[-1][0] in fails:
            raise error(client)

    try:
        servers.request(send)
    except openai.APIError:
        asked.append("failed")
    return asked


def test_the_least_busy_server_is_asked(servers):
    def send(depth):
        def inner(client):
            return [str(client.base_url), *(servers.request(send(depth - 1)) if depth else [])]

        return inner

    assert servers.request(send(3)) == [A, B, A, B]
    assert servers.request(send(0)) == [A]  # all are idle again


def test_a_dead_server_is_left_out_for_twice_as_long_each_time(servers, clock, capsys):
    start, tries = clock[0], []
    while clock[0] < start + 200:
        asked = asked_by(servers, {A})
        assert asked[-1] == (B, 3)
        tries += [clock[0] - start] if asked[0][0] == A else []
        clock[0] += 0.5
    assert tries == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    assert capsys.readouterr().err.count(A) == 1
    clock[0] += 60
    assert asked_by(servers, ()) == [(A, 0)]
    assert asked_by(servers, {A}) == [(A, 0), (B, 3)]  # it has answered: the backoff starts over
    clock[0] += 1
    assert asked_by(servers, ()) == [(A, 0)]


def test_one_that_was_dead_is_asked_once_until_it_answers(servers, clock):
    asked_by(servers, {A})
    clock[0] += 1

    def send(client):
        return [str(client.base_url), *(asked_by(servers, ()) + asked_by(servers, ()))]

    assert servers.request(send) == [A, (B, 3), (B, 3)]


def test_what_the_servers_refuse_is_no_reason_to_leave_them_out(servers, clock):
    for status in (400, 401, 404, 422):
        assert asked_by(servers, {A}, lambda client, status=status: refused(client, status)) == [(A, 0), "failed"]
    for status in (408, 409, 429, 500, 503):
        error = lambda client, status=status: refused(client, status)  # noqa: E731
        assert asked_by(servers, {A}, error) == [(A, 0), (B, 3)]
        clock[0] += 100


def test_a_server_rests_as_long_as_it_asks_to(servers, clock):
    asked_by(servers, {A}, lambda client: refused(client, 429, **{"retry-after": "7"}))
    clock[0] += 6.9
    assert asked_by(servers, ()) == [(B, 3)]
    clock[0] += 0.2
    assert asked_by(servers, ()) == [(A, 0)]


def test_where_all_are_dead_the_first_to_be_back_is_asked_at_once(servers, clock):
    assert asked_by(servers, {A, B}) == [(A, 0), (B, 3), "failed"]
    clock[0] += 0.1
    assert asked_by(servers, {A, B}) == [(A, 3), "failed"]
    assert asked_by(servers, ()) == [(A, 3)]


# ---- Real connections -------------------------------------------------------------------------------------


def judge_of(*servers, **options):
    options = {"timeout": 10.0, "max_retries": 1, "prefill": False} | options
    return RemoteJudge("scripted", PROMPT, Server(base_url=[one.base_url for one in servers], **options))


def groups(count):
    return [[PROMPT.compare(f"{i}?", "good " * i, text) for text in ("a dog", "good fox")] for i in range(count)]


def test_all_answers_come_though_a_server_is_killed_in_the_middle(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_REST", 0.05)
    with scripted_server() as first, scripted_server() as second:
        alone = dict(judge_of(second).ask(groups(30), ("1", "2")))
        second.forget()
        for one in (first, second):
            one.set(delay=0.01)
        found = {}
        for index, answers in judge_of(first, second, concurrency=4).ask(groups(30), ("1", "2")):
            found[index] = answers
            if len(found) == 8:
                assert first.requests and second.requests
                first.kill()
        assert found == alone and all(a.failed is None for answers in found.values() for a in answers)


def test_a_server_that_is_started_again_gets_requests_again(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_REST", 0.05)
    with scripted_server() as first, scripted_server() as second:
        judge = judge_of(first, second, concurrency=2)
        first.kill()
        assert all(a.failed is None for _, answers in judge.ask(groups(4), ("1", "2")) for a in answers)
        with scripted_server(first.port) as again:
            for one in (again, second):
                one.set(delay=0.02)
            assert len(list(judge.ask(groups(20), ("1", "2")))) == 20
            assert len(again.requests) > 5


def test_nobody_at_any_address_stops_the_run():
    with scripted_server() as first, scripted_server() as second:
        judge = judge_of(first, second, concurrency=1)
    with pytest.raises(ServerGone) as caught:
        list(judge.ask(groups(5), ("1", "2")))
    assert first.base_url in str(caught.value) and second.base_url in str(caught.value)


def test_a_request_that_fails_everywhere_costs_its_pair_alone():
    poison = [PROMPT.compare("what? [[fault=500]]", "good", "fox")]
    with scripted_server() as first, scripted_server() as second:
        found = dict(judge_of(first, second).ask([*groups(4), poison, *groups(4)], ("1", "2")))
        assert "500" in found.pop(4)[0].failed
        assert len(found) == 8 and all(a.failed is None for answers in found.values() for a in answers)


def test_a_wrong_name_is_blamed_on_the_server_that_said_so():
    with scripted_server() as first, scripted_server() as second:
        judge = judge_of(first, second, concurrency=1)
        with pytest.raises(openai.NotFoundError) as caught:
            judge._connection.choices(PROMPT.compare("what? [[fault=404]]", "good", "fox"), "", max_tokens=1)
        assert judge._connection.address_of(caught.value) == f"{first.base_url}/"
        assert judge._connection.models(caught.value) == ["other", "scripted-9b"]


# ---- Concurrency ------------------------------------------------------------------------------------------


def overloaded(servers, status=429):
    """Reports a response of this status from the first server, as its client does."""
    servers._hear(servers._members[0], SimpleNamespace(status_code=status))


@pytest.fixture
def alone():
    return pool.ServerPool(Server(base_url=A, concurrency=8))


def most_at_once(servers):
    """How many concurrent requests are let through."""
    member, count = servers._members[0], 0
    while member.has_room:
        servers._take(())
        count += 1
    member.busy = 0
    return count


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_server_is_asked_half_as_much_and_then_one_more_a_round(alone, clock, status):
    assert most_at_once(alone) == 8
    member = alone._members[0]
    for expected in (4, 2, 1, 1):
        member.busy = int(member.most)
        overloaded(alone, status)
        clock[0] += 0.5
        overloaded(alone, status)  # in the same round
        member.busy, clock[0] = 0, clock[0] + 1
        assert most_at_once(alone) == expected
    for expected in (2, 3, 4, 5, 6, 7, 8, 8):
        for _ in range(int(member.most) + 1):
            alone.request(lambda client: None)
        assert most_at_once(alone) == expected


def test_what_was_not_under_way_does_not_count(alone, clock):
    """With fewer requests in flight than the limit, the limit becomes half of those in flight."""
    alone._members[0].busy = 3
    overloaded(alone)
    alone._members[0].busy = 0
    assert most_at_once(alone) == 1


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_other_answers_do_not_slow_down(alone, clock, status):
    overloaded(alone, status)
    assert most_at_once(alone) == 8


def test_an_answer_that_is_too_late_slows_down(alone, clock):
    def late(client):
        raise openai.APITimeoutError(request=SimpleNamespace(url=A))

    alone._members[0].busy = 7
    with pytest.raises(openai.APITimeoutError):
        alone.request(late)
    alone._members[0].busy = 0
    assert most_at_once(alone) == 4


def test_of_several_servers_the_one_with_room_is_asked(servers, clock):
    first, second = servers._members
    first.most, first.busy, second.busy = 2.0, 2, 5
    assert asked_by(servers, ()) == [(B, 0)]


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_takes_few_at_once_answers_everything(status):
    with scripted_server() as server:
        server.set(delay=0.03, room=3, crowded=status)
        judge = judge_of(server, concurrency=8, max_retries=6)
        found = dict(judge.ask(groups(30), ("1", "2")))
        assert all(a.failed is None for answers in found.values() for a in answers) and len(found) == 30
        assert server.most == 3 and 1 <= server.turned_away < 60
        server.set(delay=0.3, room=1_000_000)  # long enough for a busy machine to send eight
        list(judge.ask(groups(16), ("1", "2")))
        assert server.most == 8  # the concurrency limit
