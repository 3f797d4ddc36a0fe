"""The choice of a precision with scripted probabilities, and restoring the previous one."""

from __future__ import annotations

import pytest
import torch
from helpers.judges import llama, make_prompt
from helpers.tiny import make_tokenizer

from trl_rlaif.judging import local as local_module
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.precision import Probe, choose_precision, matmul_precision

EXACT = [0.25, 0.5]


@pytest.fixture(autouse=True, params=["highest", "high"])
def before(request):
    """Checks that each test restores the previous precision, and resets it."""
    torch.set_float32_matmul_precision(request.param)
    yield
    after = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert after == request.param


def scripted(log=None, **deviations):
    """Probabilities with a given error under each precision."""

    def probabilities():
        precision = torch.get_float32_matmul_precision()
        if log is not None:
            log.append(precision)
        off = deviations.get(precision, 0.0)
        return [EXACT[0], EXACT[1] - off]

    return probabilities


@pytest.mark.parametrize(
    ("medium", "high", "choice"),
    [
        (0.0, 0.0, "medium"),
        (9.9e-5, 1.0, "medium"),
        (-9.9e-5, 1.0, "medium"),
        (1.1e-4, 9.9e-5, "high"),
        (-0.2, 0.0, "high"),
        (1.1e-4, 1.1e-4, "highest"),
        (0.3, -0.1, "highest"),
    ],
)
def test_the_lowest_precision_within_the_tolerance(medium, high, choice):
    log = []
    probe = choose_precision(scripted(log, medium=medium, high=high))
    assert probe.precision == choice
    tried = {"medium": abs(medium), "high": abs(high)}
    assert probe.deviation == pytest.approx({name: tried[name] for name in log[1:]}, abs=1e-12)
    assert log == ["highest", "medium", "high"][: 2 if choice == "medium" else 3]


def test_what_is_no_number_is_not_taken():
    probe = choose_precision(scripted(medium=float("nan"), high=float("nan")))
    assert probe == Probe("highest", {"medium": 1.0, "high": 1.0})


def test_the_setting_comes_back_after_an_exception():
    with pytest.raises(ZeroDivisionError), matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise ZeroDivisionError

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        choose_precision(broken)


# ---- Judges ---------------------------------------------------------------------------------------------

GROUPS = [[make_prompt().compare("what?", f"a city {i}", "b")] for i in range(6)]


def make_judge(**options):
    return LocalJudge(llama(), make_tokenizer(), make_prompt(), "tiny", batch_tokens=1, **options)


def watched(judge):
    """A log of the precision of each forward pass of a judge."""
    log = []
    judge.model.register_forward_pre_hook(lambda *_: log.append(torch.get_float32_matmul_precision()))
    return log


@pytest.mark.parametrize("choice", ["medium", "high", "highest"])
def test_a_judge_computes_with_what_was_chosen(choice, monkeypatch):
    monkeypatch.setattr(local_module, "choose_precision", lambda _: Probe(choice, {}))
    judge = make_judge(precision="auto")
    outside, log = torch.get_float32_matmul_precision(), None
    for number, _ in enumerate(judge.ask(GROUPS, ("1", "2"))):
        assert torch.get_float32_matmul_precision() == outside  # also while the caller has an answer
        if number == 0:
            log = watched(judge)
    assert log == [choice] * 5 and judge.probe == Probe(choice, {})


def test_a_judge_tries_once():
    judge = make_judge(precision="auto")
    for _ in judge.ask(GROUPS, ("1", "2")):
        pass
    probe = judge.probe
    assert probe is not None and set(probe.deviation) <= {"medium", "high"} and "medium" in probe.deviation
    for _ in judge.ask(GROUPS[:2], ("1", "2")):
        pass
    assert judge.probe is probe


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_a_given_precision_is_taken_without_trying(precision, monkeypatch):
    monkeypatch.setattr(local_module, "choose_precision", None)
    judge = make_judge(precision=precision)
    next(judge.ask(GROUPS[:1], ("1", "2")))
    log = watched(judge)
    next(judge.ask(GROUPS[:1], ("1", "2")))
    assert set(log[-1:]) == {precision} and judge.probe is None


def test_a_judge_in_bfloat16_has_no_choice(monkeypatch):
    monkeypatch.setattr(local_module, "choose_precision", None)
    judge = make_judge(precision="auto")
    judge.model.bfloat16()
    [(_, [answer])] = judge.ask(GROUPS[:1], ("1", "2"))
    assert answer.failed is None and judge.probe is None


def test_the_setting_comes_back_after_a_pass_that_fails():
    judge = make_judge(precision="medium")
    stream = judge.ask(GROUPS, ("1", "2"))
    next(stream)

    def broken(*_):
        raise ZeroDivisionError

    judge.model.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError):
        next(stream)
