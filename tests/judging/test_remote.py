"""A judge on a server: its probabilities against the server's rule, and the handling of every fault."""

from __future__ import annotations

import json
import math
import sys
import threading
import time

import pytest
from datasets import load_from_disk
from helpers import server as scripted
from helpers.recipes import tiny_recipe
from helpers.server import ENDING, scripted_server, share

from trl_rlaif.errors import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Thinking
from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.judging.server import Server, ServerGone
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins

PROMPT = JudgePrompt(
    "short",
    {
        "base.txt": "Answer with 1 or 2 only.",
        "sample.jinja": "Request:\n{{ context }}\n\nResponse 1:\n{{ response_1 }}\n\nResponse 2:\n{{ response_2 }}",
        "ending.txt": ENDING,
        "thinking.txt": "Let us compare.",
        "rubric.txt": "Rate the response.",
        "rating.jinja": "Request:\n{{ context }}\n\nResponse:\n{{ response }}",
        "rating_ending.txt": "Rating: ",
        "draft.txt": "Write the checks.",
        "draft.jinja": "Request:\n{{ context }}",
    },
)
ONE_TO_TEN = tuple(str(i) for i in range(1, 11))
TEXTS = ("good good fox", "a dog")
P = share(*TEXTS)


@pytest.fixture(scope="module")
def running():
    with scripted_server() as one:
        yield one


@pytest.fixture
def server(running):
    """The server, reset: no requests yet, no delay."""
    running.set(delay=0, healed=False, names=False)
    running.forget()
    return running


@pytest.fixture(autouse=True)
def quick(only_local_servers, monkeypatch):
    """Waits between retries are short, unless the server asks for longer ones."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def make_judge(server, **options):
    options = {"timeout": 10.0, "max_retries": 2, "prefill": False} | options
    return RemoteJudge("scripted", PROMPT, Server(base_url=server.base_url, **options))


def pair(context="what?", first=TEXTS[0], second=TEXTS[1], **options):
    """Both orders of a pair."""
    return [
        PROMPT.compare(context, first, second, **options),
        PROMPT.compare(context, second, first, **options),
    ]


def ask(judge, groups, candidates=("1", "2"), **options):
    """Answers by group index."""
    return dict(judge.ask(groups, candidates, **options))


def ask_one(server, context="what?", candidates=("1", "2"), **options):
    """The answer to a single comparison."""
    question = PROMPT.compare(context, *TEXTS)
    return ask(make_judge(server, **options), [[question]], candidates)[0][0]


def logs(*probabilities):
    return pytest.approx([math.log(p) for p in probabilities], abs=1e-9)


# ---- Probabilities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prefill": True}, {"api": "completions"}], ids=str)
def test_answers_are_the_servers_probabilities(server, options):
    responses = [("good good fox", "a dog"), ("a dog", "good " * 7), ("good", "good fox")]
    groups = [pair(f"what {i}? [[mass=0.9]]", *texts) for i, texts in enumerate(responses)]
    found = ask(make_judge(server, **options), groups)
    assert sorted(found) == [0, 1, 2] and len(server.requests) == 6
    for index, texts in enumerate(responses):
        for answer, p in zip(found[index], (share(*texts), share(*texts[::-1])), strict=True):
            assert answer.failed is None and answer.rationales == ()
            assert answer.logprobs[0] == logs(0.9 * p, 0.9 * (1 - p))


def test_a_chat_request_without_prefill_asks_for_the_answer_alone(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    question = PROMPT.compare("what?", *TEXTS)
    ask(make_judge(server, api_key_env="MY_KEY", top_logprobs=7), [[question]])
    (sent,) = server.requests
    assert sent["path"] == "/v1/chat/completions" and sent["key"] == "Bearer secret"
    body = sent["body"]
    assert body.pop("messages") == [
        {
            "role": "user",
            "content": f"{question.messages[0]['content']}\n\nAnswer with one of 1, 2 and nothing else.",
        }
    ]
    assert body == {"model": "scripted", "max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 7}


def test_prefill_begins_the_assistants_turn(server):
    question = PROMPT.compare("what?", *TEXTS)
    ask(make_judge(server, prefill=True), [[question]])
    (sent,) = server.requests
    assert sent["body"]["messages"] == [*question.messages, {"role": "assistant", "content": ENDING}]
    assert sent["body"]["continue_final_message"] is True and sent["body"]["add_generation_prompt"] is False


def test_completions_send_plain_text_up_to_the_ending(server):
    question = PROMPT.compare("what?", *TEXTS)
    ask(make_judge(server, api="completions", top_logprobs=5), [[question]])
    (sent,) = server.requests
    assert sent["path"] == "/v1/completions" and sent["key"] == "Bearer none"
    assert sent["body"]["prompt"] == f"{question.messages[0]['content']}\n\n{ENDING}"
    assert sent["body"]["logprobs"] == 5 and sent["body"]["max_tokens"] == 1


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_spellings_of_a_candidate_are_added(server, api):
    answer = ask_one(server, "what? [[spellings=1 mass=0.8]]", api=api)
    assert answer.logprobs[0] == logs(0.8 * P, 0.8 * (1 - P))


@pytest.mark.parametrize("options", [{}, {"prefill": True}, {"api": "completions"}], ids=str)
def test_ten_is_one_token_or_two(server, options):
    judge = make_judge(server, **options)
    for text in ("a fox", "good good good fox"):
        for split in (0, 1):
            server.forget()
            question = PROMPT.rate(f"what? [[split={split}]]", text)
            (answer,) = ask(judge, [[question]], ONE_TO_TEN)[0]
            if options or not split:
                assert answer.logprobs[0] == logs(*scripted.ratings(text))
                assert len(server.requests) == 1 + split
            else:
                # Nothing can be appended to "1" here: a judge that says 10 must not be read as saying 1.
                assert "10" in answer.failed and "judge.votes" in answer.failed


def test_a_second_token_behind_the_top_k_is_no_guess(server):
    question = PROMPT.rate("what? [[split=1 ten=0.3]]", "a fox")
    for top, failed in ((1, True), (2, False)):
        judge = make_judge(server, api="completions", top_logprobs=top)
        (answer,) = ask(judge, [[question]], ("1", "10"))[0]
        assert (answer.failed is not None) == failed
    assert answer.logprobs[0] == logs(0.7, 0.3)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_candidate_behind_the_top_k_is_no_guess(server, api):
    context = "what? [[p=0.9 mass=0.5]]"  # 1: 0.45, I: 0.3, The: 0.2, 2: 0.05
    answer = ask_one(server, context, api=api, top_logprobs=3)
    assert answer.logprobs == () and "probability of 2:" in answer.failed and "judge.votes" in answer.failed
    assert ("prefill: true" in answer.failed) == (api == "chat") and server.base_url in answer.failed
    assert ask_one(server, context, api=api, top_logprobs=4).logprobs[0] == logs(0.45, 0.05)
    assert len(server.requests) == 2  # a retry would lack it again


def test_what_is_not_listed_is_bounded_by_the_least_that_is(server):
    answer = ask_one(server, "what? [[p=0.9995]]", top_logprobs=1)
    assert answer.failed is None and answer.logprobs[0] == logs(0.9995, 0.0005)
    assert answer.bound == pytest.approx(0.0005) and not answer.voted
    context = "what? [[p=0.999 mass=0.99]]"  # 1: 0.98901, I: 0.006, The: 0.004, 2: 0.00099
    answer = ask_one(server, context, top_logprobs=3)
    assert answer.logprobs[0] == logs(0.98901, 0.00099) and answer.bound == pytest.approx(0.001)
    answer = ask_one(server, context, top_logprobs=2)
    assert answer.logprobs[0] == logs(0.98901, 0.00499) and answer.bound == pytest.approx(0.00499 / 0.994)
    assert ask_one(server, context, top_logprobs=4).bound == 0
    # Where more is unlisted than the lowest listed probability, that is the bound.
    context = "what? [[p=0.995 mass=0.98]]"  # 1: 0.9751, I: 0.012, The: 0.008, 2: 0.0049
    answer = ask_one(server, context, top_logprobs=2, tolerance=0.02)
    assert answer.logprobs[0] == logs(0.9751, 0.012) and answer.bound == pytest.approx(0.012 / 0.9871)
    assert ask_one(server, context, top_logprobs=2, tolerance=0.004).failed
    assert ask_one(server, "what? [[p=0.98]]", top_logprobs=1).failed


def test_a_confident_rating_is_read_though_most_ratings_are_not_listed(server):
    question = PROMPT.rate("what?", "good")  # the likeliest of ten has a probability of 1/4
    for top in (10, 9, 5):
        judge = make_judge(server, top_logprobs=top, tolerance=1.0)
        (answer,) = ask(judge, [[question]], ONE_TO_TEN)[0]
        exact, found = scripted.ratings("good"), [math.exp(x) for x in answer.logprobs[0]]
        total = math.fsum(found)
        moved = math.fsum(abs(p / total - q) for p, q in zip(found, exact, strict=True)) / 2
        assert answer.failed is None and moved <= answer.bound + 1e-12 and (answer.bound == 0) == (top == 10)


def test_an_empty_ending_asks_too(server):
    prompt = JudgePrompt("bare", PROMPT.parts | {"ending.txt": ""})
    question = prompt.compare("what?", *TEXTS, think=True)
    (answer,) = ask(make_judge(server), [[question]], thinking=Thinking())[0]
    assert answer.failed is None and answer.rationales


# ---- Reasoning models -------------------------------------------------------------------------------------


def test_the_chat_templates_variables_go_along(server):
    options = {"chat_template_kwargs": {"reasoning_effort": "low"}}
    for more in ({}, {"prefill": True}):
        assert ask_one(server, **options, **more).logprobs[0] == logs(P, 1 - P)
    ask_one(server)
    bodies = [request["body"] for request in server.requests]
    assert [body.get("chat_template_kwargs") for body in bodies] == [{"reasoning_effort": "low"}] * 2 + [None]
    assert bodies[1]["continue_final_message"] is True and bodies[1]["add_generation_prompt"] is False


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "tags"])
def test_what_the_model_thinks_is_the_rationale_and_the_answer_is_read_without(server, field):
    question = PROMPT.compare(f"what? [[think={field}]]", *TEXTS, think=True)
    judge = make_judge(server, chat_template_kwargs={"enable_thinking": True})
    [answer] = ask(judge, [[question]], thinking=Thinking(1, 50, 0.0, 6))[0]
    assert [" ".join(text.split()) for text in answer.rationales] == ["Okay, the word. Draw 6: the good one wins."]
    assert answer.logprobs[0] == logs(P / 8, 1 - P / 8)  # read after the reasoning
    first, second = (request["body"] for request in server.requests)
    assert [b["chat_template_kwargs"] for b in (first, second)] == [
        {"enable_thinking": True},
        {"enable_thinking": False},
    ]
    assert first["max_tokens"] == 50


@pytest.mark.parametrize(("field", "thought"), [("reasoning", "Okay, the word."), ("tags", "Okay,")])
def test_thoughts_that_use_up_the_budget_are_the_rationale(server, field, thought):
    question = PROMPT.compare(f"what? [[think={field}]]", *TEXTS, think=True)
    judge = make_judge(server, chat_template_kwargs={"enable_thinking": True})
    [answer] = ask(judge, [[question]], thinking=Thinking(1, 9))[0]
    assert answer.failed is None and answer.rationales == (thought,)


def test_a_model_that_thinks_before_it_answers_is_told_how_to_stop(server):
    answer = ask_one(server, "what? [[think=reasoning]]")
    assert "1, 2" in answer.failed and "judge.chat_template_kwargs" in answer.failed
    assert "enable_thinking: false" in answer.failed
    assert ask_one(server, "what? [[think=reasoning]]", chat_template_kwargs={"enable_thinking": False}).failed is None


@pytest.mark.parametrize("options", [{}, {"api": "completions"}, {"prefill": True}], ids=str)
def test_texts_are_written_in_the_order_of_the_requests(server, options):
    judge = make_judge(server, **options)
    marks = ["[[finish=stop]]", "", "[[fault=400]]", "[[finish=stop think=tags]]"]
    asked = [PROMPT.draft(f"{i}? {mark}") for i, mark in enumerate(marks[: 3 if options else 4])]
    found = judge.write(asked, max_tokens=50, temperature=0.5, seed=6)
    text = f"Draw 6: the good one wins.\n{ENDING}1, I think"
    assert [(one.text, one.ended) for one in found[:2]] == [(text, True), (text, False)]
    assert "the context is too long" in found[2].failed and found[0].failed is found[1].failed is None
    assert options or (found[3].text, found[3].ended) == (text, True)  # the reasoning is left out
    [body] = [r["body"] for r in server.requests if "0?" in json.dumps(r["body"])]
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (50, 0.5, 6)
    if "messages" in body:
        assert body["messages"] == list(asked[0].messages) and "continue_final_message" not in body
        assert body["messages"][0]["content"].startswith("Write the checks.")


def test_a_server_that_refuses_this_client_stops_what_is_written(server):
    with pytest.raises(UserError, match="The judge's server rejects the request"):
        make_judge(server).write([PROMPT.draft("what? [[fault=401]]")], max_tokens=50)


# ---- Votes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_votes_are_shares_of_the_samples(server, api):
    answer = ask_one(server, "what? [[logprobs=0 say=1|_2|1.|'1'|maybe]]", api=api, votes=5)
    assert answer.logprobs[0] == logs(0.6, 0.2)
    assert answer.voted
    assert [(r["body"].get("seed"), r["body"].get("n")) for r in server.requests] == [(None, None), (0, 5)]
    assert server.requests[1]["body"]["temperature"] == 1.0


@pytest.mark.parametrize(("mark", "sent"), [("one=ignored", [5, 4, 3, 2, None]), ("one=refused", [5] + [None] * 5)])
def test_votes_from_a_server_that_draws_one_at_a_time(server, mark, sent):
    answer = ask_one(server, f"what? [[logprobs=0 say=1|_2|1.|'1'|maybe {mark}]]", votes=5)
    assert answer.logprobs[0] == logs(0.6, 0.2)
    assert [r["body"].get("n") for r in server.requests[1:]] == sent


def test_votes_stand_in_for_a_hidden_candidate(server):
    answer = ask_one(server, "what? [[p=0.9 mass=0.5 say=1|2]]", top_logprobs=3, votes=4)
    assert answer.logprobs[0] == logs(0.5, 0.5)


@pytest.mark.parametrize("say", ["10|10|1|9|1st", "_10|10.|_1|9!|11", "10|10|1|9|1.5"])
def test_a_vote_for_ten_is_none_for_one(server, say):
    question = PROMPT.rate(f"what? [[logprobs=0 say={say}]]", "a fox")
    (answer,) = ask(make_judge(server, votes=5), [[question]], ONE_TO_TEN)[0]
    found = dict(zip(ONE_TO_TEN, answer.logprobs[0], strict=True))
    assert (found["10"], found["1"], found["9"]) == tuple(map(math.log, (0.4, 0.2, 0.2)))
    assert math.fsum(map(math.exp, found.values())) == pytest.approx(0.8)


def test_a_beginning_that_the_server_repeats_is_no_part_of_the_answer(server):
    context, options = "what? [[begun=repeated logprobs=0 say=1|1|2|1]]", {"prefill": True, "votes": 4}
    assert ask_one(server, context, **options).logprobs[0] == logs(0.75, 0.25)
    question = PROMPT.compare("what? [[begun=repeated]]", *TEXTS, think=True)
    (answer,) = ask(make_judge(server, prefill=True), [[question]], thinking=Thinking())[0]
    assert answer.rationales == ("Draw 0: the good one wins.",)


def test_votes_for_nothing_are_no_answer(server):
    answer = ask_one(server, "what? [[logprobs=0 say=maybe]]", votes=3)
    assert "none of 3" in answer.failed and "1, 2" in answer.failed


def test_votes_are_asked_where_the_server_refuses_logprobs(server, capsys):
    context = "what? [[fault=refuse say=1|1|1|2]]"
    answer = ask_one(server, context, votes=4)
    assert answer.logprobs[0] == logs(0.75, 0.25) and answer.voted
    assert "answers are sampled where they cannot be read" in capsys.readouterr().err
    assert "400" in ask_one(server, context).failed


def test_fewer_log_probabilities_are_asked_for_where_so_many_are_refused(server, capsys):
    judge = make_judge(server, top_logprobs=100, votes=4)
    for _ in range(2):
        (answer,) = ask(judge, [[PROMPT.compare("what? [[most=10]]", *TEXTS)]])[0]
        assert answer.logprobs[0] == logs(P, 1 - P) and not answer.voted
    assert [r["body"]["top_logprobs"] for r in server.requests] == [100, 20, 10, 10]
    assert "100 log-probabilities are refused; asking for 20" in capsys.readouterr().err.replace("\n", " ")


# ---- Faults -----------------------------------------------------------------------------------------------

PASSING = ["429", "500", "drop", "hang", "half"]
LASTING = {
    "429": "429",
    "500": "500",
    "drop": "onnection",
    "hang": "timed out",
    "half": "onnection",
    "json": "",
    "html": "no choice",
    "empty": "no choice",
    "blank": "no",
    "nan": "no log-probabilities",
    "400": "context is too long",
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_leaves_no_trace(server, fault):
    timeout = 0.3 if fault == "hang" else 10.0
    answer = ask_one(server, f"recovers: [[fault={fault} times=2]]", timeout=timeout)
    assert answer.logprobs[0] == logs(P, 1 - P)
    assert len(server.requests) == 3


@pytest.mark.parametrize(("fault", "reason"), LASTING.items())
def test_a_fault_that_lasts_costs_its_pair_alone(server, fault, reason):
    groups = [pair("one?"), pair(f"two? [[fault={fault}]]"), pair("three?"), pair("four?")]
    timeout = 0.3 if fault == "hang" else 10.0
    found = ask(make_judge(server, timeout=timeout, max_retries=1), groups)
    assert sorted(found) == [0, 1, 2, 3]
    for index in (0, 2, 3):
        assert [a.failed for a in found[index]] == [None, None]
        assert found[index][0].logprobs[0] == logs(P, 1 - P)
    for answer in found[1]:
        assert answer.logprobs == () and answer.failed and reason in answer.failed
    assert len(server.requests) == 6 + (4 if fault in PASSING else 2)


@pytest.mark.parametrize("fault", ["blank", "empty", "html", "json"])
def test_sampled_answers_may_be_broken_too(server, fault):
    found = ask(make_judge(server), [pair(f"one? [[fault={fault}]]"), pair("two?")], thinking=Thinking())
    assert found[0][0].failed and found[1][0].failed is None


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_server_without_logprobs_is_told_apart(server, api):
    found = ask(make_judge(server, api=api), [pair("one? [[logprobs=0]]"), pair("two?")])
    assert "no log-probabilities (set judge.votes" in found[0][0].failed
    assert found[1][0].failed is None


@pytest.mark.parametrize("fault", ["401", "403", "404"])
def test_a_refusal_stops_at_once(server, fault):
    groups = [pair(f"{i}? [[fault={fault}]]") for i in range(50)]
    with pytest.raises(UserError) as caught:
        ask(make_judge(server, concurrency=2, api_key_env="MY_KEY"), groups)
    message = str(caught.value)
    assert server.base_url in message and fault in message
    assert all(
        name in message for name in (("judge.path",) if fault == "404" else ("judge.path", "judge.base_url", "MY_KEY"))
    )
    time.sleep(0.2)
    assert len(server.requests) <= 8


def test_nobody_at_the_address_stops_the_run():
    with scripted_server() as gone:
        judge = make_judge(gone, max_retries=1, concurrency=1)
    (answer, _) = ask(judge, [pair()])[0]
    assert "onnection" in answer.failed and gone.base_url in answer.failed
    found = []
    with pytest.raises(ServerGone, match="does not answer.*--resume") as caught:
        found += judge.ask([pair()] * 20, ("1", "2"))
    assert gone.base_url in str(caught.value) and len(found) == 0
    assert caught.value.exit_code == 1 and isinstance(caught.value, UserError)  # so that RL saves its progress


def test_a_server_that_comes_back_is_not_gone(server):
    lost = pair("lost? [[fault=drop]]")
    judge = make_judge(server, max_retries=0, concurrency=1)
    found = ask(judge, [lost, pair(), lost, pair(), lost, pair()])
    assert [found[i][1].failed is None for i in range(6)] == [False, True] * 3


def test_a_wrong_name_gets_the_servers_own_and_an_address_without_v1_a_hint(server):
    question = PROMPT.compare("what? [[fault=404]]", *TEXTS)
    with pytest.raises(UserError, match="one of its models: other, scripted-9b"):
        ask(make_judge(server), [[question]])
    bare = Server(base_url=server.base_url.removesuffix("/v1"), max_retries=0, prefill=False)
    with pytest.raises(UserError, match="Should judge.base_url be .*/v1"):
        ask(RemoteJudge("scripted", PROMPT, bare), [[PROMPT.compare("what?", *TEXTS)]])


# ---- Server capabilities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "prefills"),
    [("begun=continued", True), ("begun=refused", False), ("begun=ignored", False), ("mass=0.3", True)],
)
def test_the_first_question_finds_out_whether_an_answer_can_be_begun(server, mark, prefills, capsys):
    judge = make_judge(server, prefill="auto")
    found = ask(judge, [pair(f"{i}? [[{mark}]]") for i in range(6)])
    assert all(answer.failed is None for answers in found.values() for answer in answers)
    begun = [bool(r["body"].get("continue_final_message")) for r in server.requests]
    assert begun[0] and begun[-12:] == [prefills] * 12 and len(begun) <= 14
    said = capsys.readouterr().err.replace("\n", " ")
    assert said.count("Judge scripted at") == 1 and ("(prefill)" in said) == prefills


@pytest.mark.parametrize("begun", ["refused", "ignored"])
def test_a_server_that_can_neither_begin_an_answer_nor_give_log_probabilities_is_sampled(server, begun, capsys):
    judge = make_judge(server, prefill="auto", votes=4)
    found = ask(judge, [pair(f"{i}? [[begun={begun} logprobs=0 say=1|1|1|2]]") for i in range(3)])
    assert all(a.logprobs[0] == logs(0.75, 0.25) and a.voted for answers in found.values() for a in answers)
    assert not server.requests[-1]["body"].get("continue_final_message")
    assert "nothing can be read" in capsys.readouterr().err.replace("\n", " ")
    assert len(server.requests) == 2 + 6  # log-probabilities are not asked for again


def test_a_question_that_is_refused_decides_nothing(server):
    judge = make_judge(server, prefill="auto", concurrency=1)
    found = ask(judge, [pair("too long [[fault=400]]"), pair("what?")])
    assert all("context is too long" in answer.failed for answer in found[0])
    assert all(answer.failed is None for answer in found[1])
    assert server.requests[-1]["body"]["continue_final_message"] is True


@pytest.mark.parametrize("options", [{}, {"prefill": "auto"}, {"api": "completions"}], ids=str)
@pytest.mark.parametrize("names", [True, False])
def test_the_candidates_own_log_probabilities_are_asked_for_where_that_is_possible(server, names, options, capsys):
    """Exact, although the server's list of top log-probabilities has room for only one of the two."""
    server.set(names=names)
    judge = make_judge(server, top_logprobs=1, **options)
    found = ask(judge, [pair(f"{i}? [[p=0.7 mass=0.8]]") for i in range(3)])
    for answers in found.values():
        for answer in answers:
            assert (answer.failed is None) == names
            assert not names or (answer.logprobs[0] == logs(0.56, 0.24) and answer.bound == 0)
    assert ("own log-probabilities are read" in capsys.readouterr().err.replace("\n", " ")) == names


@pytest.mark.parametrize("split", [0, 1])
def test_all_ratings_are_exact_where_tokens_can_be_named(server, split):
    server.set(names=True)
    judge = make_judge(server, prefill=True, top_logprobs=2)
    for text in ("a fox", "good good good fox"):
        (answer,) = ask(judge, [[PROMPT.rate(f"what? [[split={split} mass=0.5]]", text)]], ONE_TO_TEN)[0]
        assert answer.logprobs[0] == logs(*(p / 2 for p in scripted.ratings(text))) and answer.bound == 0


@pytest.mark.parametrize("most", [1000, 20])
def test_more_tokens_are_asked_for_once_a_candidate_is_not_listed(server, most, monkeypatch):
    monkeypatch.setattr("trl_rlaif.judging.server._USUAL", 3)
    judge = make_judge(server, concurrency=1)
    groups = [pair(f"one? [[most={most}]]"), pair(f"two? [[p=0.98 mass=0.9 most={most}]]"), pair("three?")]
    found = ask(judge, groups)
    asked = [r["body"]["top_logprobs"] for r in server.requests]
    assert asked == ([3] * 3 + [200] * 4 if most == 1000 else [3] * 3 + [200, 20] + [20] * 3)
    assert all(answer.failed is None and answer.bound == 0 for answers in found.values() for answer in answers)


def test_further_fields_go_along(server):
    for more in ({}, {"prefill": True}, {"api": "completions"}):
        assert ask_one(server, extra_body={"guided": "1"}, **more).failed is None
    assert [r["body"]["guided"] for r in server.requests] == ["1"] * 3


def test_retry_after_is_honoured(server):
    answer = ask_one(server, "waits: [[fault=429 times=1 after=1]]")
    first, second = (request["time"] for request in server.requests)
    assert answer.failed is None and 0.95 <= second - first < 2


# ---- Concurrency ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency_is_bounded_and_used(concurrency):
    with scripted_server() as fresh:
        fresh.set(delay=0.05)
        found = ask(make_judge(fresh, concurrency=concurrency), [pair(f"{i}?") for i in range(8)])
        assert len(found) == 8 and all(a.failed is None for answers in found.values() for a in answers)
        assert fresh.most == concurrency


def test_answers_come_as_soon_as_they_are_known(server):
    groups = [pair("slow? [[fault=hang times=1]]"), pair("quick?")]
    order = [index for index, _ in make_judge(server, timeout=1.0, concurrency=2).ask(groups, ("1", "2"))]
    assert order == [1, 0]


def test_done_groups_are_not_asked(server):
    groups = [pair(f"number {i}?") for i in range(5)]
    judge = make_judge(server)
    found = ask(judge, groups, done={0, 2, 3})
    assert sorted(found) == [1, 4]
    asked = {r["body"]["messages"][0]["content"].split("number ")[1][0] for r in server.requests}
    assert asked == {"1", "4"} and len(server.requests) == 4
    server.forget()
    assert ask(judge, groups, done=range(5)) == {} and server.requests == []
    assert ask(judge, []) == {}


def test_closing_early_ends_quickly():
    groups = [[PROMPT.compare(f"{i}?", *TEXTS)] * 10 for i in range(40)]
    groups[0] = groups[0][:1]
    before = set(threading.enumerate())
    with scripted_server() as fresh:
        fresh.set(delay=0.1)
        answers = make_judge(fresh, concurrency=3).ask(groups, ("1", "2"))
        assert next(answers)[0] == 0
        threads = set(threading.enumerate()) - before
        # A non-daemon thread would keep a stopped program waiting for its server.
        assert len(threads) == 3 and all(thread.daemon for thread in threads)
        sent, started = len(fresh.requests), time.monotonic()
        answers.close()
        assert time.monotonic() - started < 0.1
        for thread in threads:
            thread.join(timeout=5)
        assert not any(thread.is_alive() for thread in threads)
        assert len(fresh.requests) <= sent + 3


def test_threads_wait_for_who_takes_their_answers(server):
    answers = make_judge(server, concurrency=2).ask([[PROMPT.compare(f"{i}?", *TEXTS)] for i in range(30)], ("1", "2"))
    next(answers)
    time.sleep(0.3)
    assert len(server.requests) <= 5  # the one taken, and four ahead
    assert len(list(answers)) == 29


# ---- Rationales -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prefill": True}, {"api": "completions"}], ids=str)
def test_a_rationale_is_written_cut_and_sent_back(server, options):
    question = PROMPT.compare("what?", *TEXTS, think=True)
    thinking = Thinking(rationales=2, max_tokens=50, temperature=0.7, seed=3)
    (answer,) = ask(make_judge(server, **options), [[question]], thinking=thinking)[0]
    assert answer.rationales == ("Draw 3: the good one wins.", "Draw 4: the good one wins.")
    # The server's rule divides by 2 + the draw number in the text before the answer.
    assert list(answer.logprobs[0]) == logs(P / 5, 1 - P / 5)
    assert list(answer.logprobs[1]) == logs(P / 6, 1 - P / 6)
    written, behind = server.requests[:2], server.requests[2:]
    for request, seed in zip(written, (3, 4), strict=True):
        body = request["body"]
        assert (body["max_tokens"], body["temperature"], body["seed"]) == (50, 0.7, seed)
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        assert "Let us compare." in text and "Answer with one of" not in text and ENDING not in text
    for request, rationale in zip(behind, answer.rationales, strict=True):
        body = request["body"]
        said = f"Let us compare. {rationale}"
        if options.get("api"):
            assert body["prompt"].endswith(f"\n\n{said}\n\nWhat is your answer?\n\n{ENDING}")
        else:
            assert body["messages"][1] == {"role": "assistant", "content": said}
            assert body["messages"][2]["role"] == "user"
            assert (body["messages"][-1]["content"] == ENDING) == bool(options)
        assert body["max_tokens"] == 1


def test_a_rationale_whose_answer_fails_is_kept(server):
    question = PROMPT.compare("what? [[logprobs=0]]", *TEXTS, think=True)
    (answer,) = ask(make_judge(server), [[question]], thinking=Thinking())[0]
    assert answer.failed and answer.rationales == ("Draw 0: the good one wins.",)


# ---- Requirements -----------------------------------------------------------------------------------------


def test_a_hosted_judge_needs_its_key(monkeypatch):
    with pytest.raises(UserError, match="MY_KEY"):
        RemoteJudge("scripted", PROMPT, Server(api_key_env="MY_KEY"))
    monkeypatch.setenv("MY_KEY", "secret")
    assert RemoteJudge("scripted", PROMPT, Server(api_key_env="MY_KEY")).name == "scripted"


def test_the_address_may_stand_in_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    judge = RemoteJudge("scripted", PROMPT, Server())
    assert ask(judge, [pair()])[0][0].logprobs[0] == logs(P, 1 - P)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'trl-rlaif\[openai\]'"):
        RemoteJudge("scripted", PROMPT, Server(base_url="http://127.0.0.1:9/v1"))


# ---- A run ------------------------------------------------------------------------------------------------


def judge_section(base_url):
    return {"backend": "openai", "path": "scripted", "base_url": base_url, "max_retries": 1}


def server_recipe(folder, model, server, **label):
    """Labels from the server, followed only by the report."""
    rows = [
        {"prompt": f"number {i}?", "response_1": "good " * i + "fox", "response_2": "good dog", "human": 1 + i % 2}
        for i in range(5)
    ]
    rows[3]["prompt"] += " [[fault=500]]"
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judge = judge_section(server.base_url)
    left_out = dict.fromkeys(("sample", "reward", "rl", "evaluate"))
    data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}
    return tiny_recipe(folder, model, data=data, label={"judge": judge, "labeler": "distilled"} | label, **left_out)


def test_a_run_skips_what_fails_and_asks_it_again_later(tmp_path, tiny_model, server):
    plugins = installed_plugins()
    recipe = server_recipe(tmp_path, tiny_model, server)
    folder = run_recipe(recipe, plugins, tmp_path / "out")
    results = folder.results()["label"]
    assert (results["pairs"], results["labeled"], results["made"]) == (5, 4, 4)
    ((reason, count),) = results["skipped"].items()
    assert "500" in reason and count == 1
    assert results["judge"] == "scripted" and (folder / "report.html").stat().st_size > 0
    # The first request probes prefill; both orders of the failing pair are retried once.
    assert len(server.requests) == 1 + 4 * 2 + 2 * 2

    number = {row["id"]: int(row["prompt"].split()[1].rstrip("?")) for row in read_lines(folder / "pairs.jsonl")}
    labels = {number[row["id"]]: row for row in read_lines(folder / "labels.jsonl")}
    assert labels[3]["p"] is None and labels[3]["skipped"] == reason
    for i in (0, 1, 2, 4):
        first, second = "good " * i + "fox", "good dog"
        assert labels[i]["p_12"] == pytest.approx(share(first, second), abs=1e-9)
        assert labels[i]["p_21"] == pytest.approx(1 - share(second, first), abs=1e-9)
        assert labels[i]["mass_12"] == pytest.approx(1)
    assert len(load_from_disk(folder / "preferences")) == 4

    server.set(healed=True)
    server.forget()
    again = server_recipe(tmp_path, tiny_model, server, min_confidence=0.51)
    results = run_recipe(again, plugins, tmp_path / "out", resume=True).results()["label"]
    texts = [request["body"]["messages"][0]["content"] for request in server.requests]
    assert len(texts) == 1 + 2 and all("number 3?" in text for text in texts)
    assert (results["labeled"], results["made"], results["skipped"]) == (5, 1, {})
    labels = {number[row["id"]]: row for row in read_lines(folder / "labels.jsonl")}  # the last line counts
    assert labels[3]["p_12"] == pytest.approx(share("good " * 3 + "fox", "good dog"), abs=1e-9)


def test_labels_are_the_same_wherever_the_model_is_served(tmp_path, tiny_model, server):
    """With another address, or several, neither the stage nor any request is repeated."""
    plugins = installed_plugins()
    server.set(healed=True)
    one = run_recipe(server_recipe(tmp_path, tiny_model, server), plugins, tmp_path / "out")
    before = read_lines(one / "labels.jsonl")
    with scripted_server() as other:
        server.forget()
        recipe = server_recipe(tmp_path, tiny_model, server, judge=judge_section([other.base_url, server.base_url]))
        assert run_recipe(recipe, plugins, tmp_path / "out", resume=True).results()["label"]["made"] == 5
        assert not server.requests and not other.requests
        two = run_recipe(recipe, plugins, tmp_path / "two")
        assert server.requests and other.requests
    assert read_lines(one / "labels.jsonl") == before
    assert sorted(map(str, read_lines(two / "labels.jsonl"))) == sorted(map(str, before))
