"""The blind order, the votes on disk, and the resulting numbers."""

from __future__ import annotations

import json
import sys
from math import comb, sqrt

import pytest

from trl_rlaif import cli
from trl_rlaif.errors import TrlRlaifError, UserError
from trl_rlaif.evaluation import agreement, win_rate
from trl_rlaif.rating import describe, people_results, rate_run, read_comparisons
from trl_rlaif.rating.pairs import blind_order, trained_is_left
from trl_rlaif.rating.session import Session
from trl_rlaif.rating.votes import Vote, VoteFile


def cast(folder, rater, choices):
    """Adds votes on the set "test" to the file: {id: probability that trained is better}."""
    named = {c.name[1]: c.name for c in read_comparisons(folder) if c.set == "test"}
    for id_, choice in choices.items():
        VoteFile(folder / "votes.jsonl").add(Vote(named[id_], rater, choice))


# ---- The blind order --------------------------------------------------------------------------------------


def test_the_sides_are_balanced_and_the_same_at_every_start(make_run):
    comparisons = read_comparisons(make_run(2000))
    sides = [trained_is_left(c, "ann") for c in comparisons]
    assert abs(sum(sides) - 1000) < 4 * sqrt(2000) / 2
    assert sides == [trained_is_left(c, "ann") for c in comparisons]
    for others in (
        [trained_is_left(c, "bob") for c in comparisons],
        [trained_is_left(c, "ann", 1) for c in comparisons],
    ):
        assert abs(sum(a == b for a, b in zip(sides, others, strict=True)) - 1000) < 4 * sqrt(2000) / 2
    # Neither the place in the order nor the previous pair reveals the side.
    sides = [trained_is_left(c, "ann") for c in blind_order(comparisons, "ann")]
    assert abs(sum(sides[:1000]) - 500) < 4 * sqrt(1000) / 2
    assert abs(sum(a == b for a, b in zip(sides, sides[1:], strict=False)) - 1000) < 4 * sqrt(2000) / 2


def test_the_order_is_the_raters_own(make_run):
    comparisons = read_comparisons(make_run(200))
    order = blind_order(comparisons, "ann")
    assert order == blind_order(reversed(comparisons), "ann") and set(c.name for c in order) == {
        c.name for c in comparisons
    }
    orders = [comparisons, order, blind_order(comparisons, "bob"), blind_order(comparisons, "ann", 1)]
    places = [[c.name for c in o].index for o in orders]
    for i, one in enumerate(places):
        for other in places[:i]:
            inversions = sum(
                (one(a.name) < one(b.name)) != (other(a.name) < other(b.name))
                for k, a in enumerate(comparisons[:60])
                for b in comparisons[:k]
            )
            assert 0.35 < inversions / comb(60, 2) < 0.65
    half = [c for c in order if int(c.name[1][1:]) % 2]
    assert blind_order([c for c in comparisons if int(c.name[1][1:]) % 2], "ann") == half


def test_equal_responses_are_not_asked(make_run):
    folder = make_run([make_run.sample(0, start="same", trained="same"), make_run.sample(1)])
    session = Session(read_comparisons(folder), VoteFile(folder / "votes.jsonl"), "ann")
    assert session.state()["total"] == 1 and "1" in session.state()["pair"]["left"]


# ---- The votes --------------------------------------------------------------------------------------------


def test_the_last_vote_of_a_rater_counts(make_run):
    folder = make_run(3)
    cast(folder, "ann", {"p0": 1, "p1": 0, "p2": 1})
    cast(folder, "bob", {"p0": 0})
    cast(folder, "ann", {"p0": 0.5, "p1": None})
    standing = VoteFile(folder / "votes.jsonl").standing()
    assert {rater: [(n[1], p) for n, p in votes.items()] for rater, votes in standing.items()} == {
        "ann": [("p2", 1.0), ("p0", 0.5)],
        "bob": [("p0", 0.0)],
    }
    cast(folder, "bob", {"p0": None})
    assert "bob" not in VoteFile(folder / "votes.jsonl").standing()
    assert len((folder / "votes.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize("torn", ['{"id": "p1", "se', '{"id": "p1\u00e9'.encode()[:-1].decode("latin-1"), "\ud800"])
def test_a_torn_last_line_costs_no_other_vote(make_run, torn):
    folder = make_run(3)
    cast(folder, "ann", {"p0": 1})
    path = folder / "votes.jsonl"
    with path.open("ab") as file:
        file.write(torn.encode("utf-8", "surrogatepass"))
    cast(folder, "ann", {"p1": 0})
    assert list(VoteFile(path).standing()["ann"].values()) == [1.0, 0.0]
    with path.open("ab") as file:
        file.write(b'{"id"')
    assert len(VoteFile(path).standing()["ann"]) == 2


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"set": "test", "id": "p0", "pair": "x", "rater": "ann", "choice": 0.7}', '{"choice": 1}',
     '{"set": "test", "id": 0, "pair": "x", "rater": "ann", "choice": 1}',
     '{"set": "test", "id": "p0", "pair": "x", "rater": "ann", "choice": "1"}'],
)  # fmt: skip
def test_a_file_changed_by_hand_is_named_with_its_line(make_run, line):
    folder = make_run(2)
    cast(folder, "ann", {"p0": 1})
    with (folder / "votes.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TrlRlaifError, match=r"votes\.jsonl:2"):
        people_results(folder)


def test_any_name_of_a_rater_comes_back(make_run):
    folder = make_run(1)
    for rater in ("Åsa ", '"\n\u2028', "\ud800"):
        cast(folder, rater, {"p0": 1})
        assert rater in VoteFile(folder / "votes.jsonl").standing()


# ---- The numbers ------------------------------------------------------------------------------------------


def test_the_numbers_by_hand(make_run):
    judged = [0.9, 0.2, 0.8, 0.6, 0.5, None, 0.9, 0.9]
    samples = [make_run.sample(i, p_trained=p) for i, p in enumerate(judged)]
    samples += [make_run.sample(0, set="forget", p_trained=0.1), make_run.sample(1, set="unrated")]
    folder = make_run(samples)
    # p7 remains unrated, and two people disagree about p6.
    cast(folder, "ann", {"p0": 1, "p1": 1, "p2": 1, "p3": 0, "p4": 1, "p5": 0, "p6": 1})
    cast(folder, "bob", {"p0": 1, "p3": 0.5, "p6": 0})
    results = people_results(folder)
    test = results["sets"]["test"]
    # p0 1, p1 1, p2 1, p3 0.25, p4 1, p5 0, p6 0.5: four wins, one tie, two losses of seven.
    assert (test["wins"], test["ties"], test["losses"]) == (4, 1, 2)
    assert test["win_rate"] == pytest.approx(4.5 / 7)
    assert test["interval"] == win_rate([1, 1, 1, 0, 1, 0, 0.5])["interval"]
    assert (test["pairs"], test["rated"], test["equal"], test["votes"], test["raters"]) == (8, 7, 0, 10, 2)
    # The judge agrees with people on p0 and p2, disagrees on p1 and p3, is undecided on p4, and has not judged p5.
    assert test["judge"]["rate"] == pytest.approx(2.5 / 5) and test["judge"]["n"] == 5
    assert test["judge"]["interval"] == agreement([0.9, 0.2, 0.8, 0.6, 0.5], [1, 1, 1, 2, 1])["interval"]
    assert results["sets"]["unrated"] == {"pairs": 1, "rated": 0, "equal": 0, "votes": 0, "raters": 0}
    assert results["outdated"] == 0 and results["sets"]["forget"]["rated"] == 0  # its p0 is another pair
    bob = people_results(folder, rater="bob", only="test")["sets"]
    assert list(bob) == ["test"] and (bob["test"]["wins"], bob["test"]["ties"], bob["test"]["losses"]) == (1, 1, 1)
    said = describe(results)
    assert "test: people prefer the trained policy in 64.3% of pairs" in said
    assert "4 wins, 1 tie, 2 losses. 7 of 8 pairs rated, by 2 people." in said
    assert "The judge chooses as people do in 50.0% of pairs" in said and "among the 5 that are no tie" in said
    assert "unrated: no votes yet on its 1 pair." in said


def test_equal_responses_count_as_far_as_people_have_come(make_run):
    same = {"start": "same", "trained": "same"}
    folder = make_run([make_run.sample(i, **(same if i % 3 == 0 else {})) for i in range(60)])
    assert people_results(folder)["sets"]["test"]["rated"] == 0
    order = blind_order(read_comparisons(folder), "ann")
    asked = [c for c in order if not c.is_equal]
    cast(folder, "ann", {c.name[1]: 1 for c in asked[:10]})
    test = people_results(folder)["sets"]["test"]
    passed = order.index(asked[9]) + 1
    assert 0 < test["equal"] < 15 and test["rated"] == passed == 10 + test["equal"] == test["wins"] + test["ties"]
    assert test["win_rate"] == pytest.approx((10 + 0.5 * (passed - 10)) / passed)
    assert f"({test['equal']} with equal responses, unasked)" in describe({"sets": {"test": test}, "outdated": 0})
    cast(folder, "ann", {c.name[1]: 1 for c in asked[10:]})
    test = people_results(folder)["sets"]["test"]
    assert (test["rated"], test["equal"], test["wins"], test["ties"]) == (60, 20, 40, 20)
    assert test["judge"]["n"] == 40


def test_a_set_without_a_difference_is_a_tie_unasked(make_run):
    folder = make_run([make_run.sample(i, start="same", trained="same") for i in range(5)])
    test = people_results(folder)["sets"]["test"]
    assert (test["win_rate"], test["ties"], test["votes"], test["judge"]) == (0.5, 5, 0, None)
    assert rate_run(folder, browser=False) is None  # there is nothing to serve


def test_votes_on_texts_that_are_gone_do_not_count(make_run):
    folder = make_run(3)
    cast(folder, "ann", {"p0": 1, "p1": 1})
    make_run([make_run.sample(0), make_run.sample(1, trained="anew"), make_run.sample(2)])
    results = people_results(folder)
    assert results["outdated"] == 1 and results["sets"]["test"]["rated"] == 1
    assert "1 vote does not count: the responses have changed since." in describe(results)
    session = Session(read_comparisons(folder), VoteFile(folder / "votes.jsonl"), "ann")
    assert session.state()["done"] == 1


def test_a_category_and_a_judges_word_may_be_missing(make_run):
    rows = [make_run.sample(0, category=None, p_trained=float("nan")), make_run.sample(1)]
    del rows[1]["p_trained"]
    assert [c.p_trained for c in read_comparisons(make_run(rows))] == [None, None]


# ---- The command ------------------------------------------------------------------------------------------


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl-rlaif", "rate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_result_without_a_server(monkeypatch, capsys, make_run):
    folder = make_run(2)
    monkeypatch.setattr("trl_rlaif.rating.server.RatingServer", None)
    assert main(monkeypatch, folder, "--result") == 0
    assert capsys.readouterr().out == "test: no votes yet on its 2 pairs.\n"
    cast(folder, "ann", {"p0": 1})
    assert main(monkeypatch, folder, "--result", "--rater", "ann") == 0
    assert "1 win, 0 ties, 0 losses" in capsys.readouterr().out
    assert main(monkeypatch, folder, "--result", "--rater", "an") == 2
    assert "There are votes by: ann." in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--result",)])
def test_what_is_no_run_is_one_message(monkeypatch, capsys, make_run, tmp_path, more):
    folder = make_run(1)
    cases = {tmp_path / "none": "no recipe.yaml", folder / "samples.jsonl": "no recipe.yaml"}
    for path, message in cases.items():
        assert main(monkeypatch, path, *more) == 2
        errors = capsys.readouterr().err
        assert message in errors and str(path) in errors and "Traceback" not in errors
    assert not (tmp_path / "none").exists()
    assert main(monkeypatch, folder, "--set", "tset", *more) == 2
    assert "There are: test." in capsys.readouterr().err
    wrong = [make_run.sample(0, **change) for change in ({"trained": None}, {"prompt": []}, {"prompt": [{}]})]
    for content in ("", '{"set": "test"}\n', "[]\n", *(json.dumps(row) + "\n" for row in wrong)):
        (folder / "samples.jsonl").write_text(content)
        assert main(monkeypatch, folder, *more) == 2
        assert f"samples.jsonl{':1' if content else ''}: " in capsys.readouterr().err
    (folder / "samples.jsonl").unlink()
    assert main(monkeypatch, folder, *more) == 2
    assert "no samples.jsonl" in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_name_that_is_none(serve, make_run):
    folder = make_run(1)
    server, _ = serve(folder)
    with pytest.raises(UserError, match=f"Port {server.server_port} cannot be used"):
        rate_run(folder, port=server.server_port, browser=False)
    for name in ("", "  ", "x" * 101):
        with pytest.raises(UserError, match="1 to 100 characters"):
            rate_run(folder, rater=name, browser=False)
