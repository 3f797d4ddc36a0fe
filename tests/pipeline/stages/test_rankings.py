"""More than two responses per prompt on a tiny model: sampled pairs, questions to the judge, and rankings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.labeling import preferences, results
from helpers.recipes import tiny_recipe, write_prompt_folder, write_rows

from trl_rlaif.data import Pair
from trl_rlaif.errors import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.labels import LabelStore
from trl_rlaif.pipeline.judges import Judges
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.ranking.bradley_terry import Comparisons, fit
from trl_rlaif.ranking.tournament import default_questions

NO_MORE = {"reward": None, "rl": None, "evaluate": None, "report": None}
TOURNAMENT = {"method": "tournament"}


@pytest.fixture
def ranked(tiny_model, tmp_path):
    """A function that runs sample and label, and returns the run folder."""
    write_prompt_folder(tmp_path / "prompt")

    def run(output="out", ranking=TOURNAMENT, sample=None, pairs=None, shard=None, **label):
        sections = {"sample": {"num_responses": 4, "keep_pairs": "all", **(sample or {})}, **NO_MORE}
        if pairs is not None:
            write_rows(tmp_path / "pairs.jsonl", pairs)
            sections |= {"sample": None, "data": {"prompts": None, "pairs": "pairs.jsonl"}}
        keys = {"prompt": "prompt", "precision": "highest", "ranking": ranking and {**TOURNAMENT, **ranking}, **label}
        recipe = tiny_recipe(tmp_path, tiny_model, **sections, label=keys)
        return run_recipe(recipe, installed_plugins(), tmp_path / output, resume=True, shard=shard)

    return run


def rows(folder, name):
    return read_lines(folder / f"{name}.jsonl")


def test_all_pairs_of_a_prompt_are_kept(ranked):
    folder = ranked(ranking={"method": "all_pairs"})
    pairs = rows(folder, "pairs")
    by_prompt = {}
    for pair in pairs:
        by_prompt.setdefault(pair["prompt"], []).append(pair)
    assert len(by_prompt) == 10 and len({pair["id"] for pair in pairs}) == len(pairs) > 10
    for of in by_prompt.values():
        texts = list(dict.fromkeys(text for pair in of for text in (pair["response_1"], pair["response_2"])))
        assert len(of) == math.comb(len(texts), 2) and 2 <= len(texts) <= 4
        for pair in of:
            *_, i, j = pair["id"].split("-")
            assert [pair["response_1"], pair["response_2"]] == [texts[int(i) - 1], texts[int(j) - 1]]
    assert folder.results()["sample"]["pairs"] == len(pairs) and folder.results()["sample"]["prompts"] == 10


def test_pairs_first_are_the_first_two_of_all(ranked):
    everything = {row["id"]: row for row in rows(ranked("all"), "pairs")}
    first = rows(ranked("first", ranking=None, sample={"num_responses": 4, "keep_pairs": "first"}), "pairs")
    for row in first:
        assert everything[f"{row['id']}-1-2"] == row | {"id": f"{row['id']}-1-2"}


def test_a_tournament_asks_its_budget_and_ranks_all_pairs(ranked):
    folder = ranked()
    rankings, labels, numbers = rows(folder, "rankings"), rows(folder, "labels"), results(folder)
    pairs = {row["id"]: row for row in rows(folder, "pairs")}
    sizes = [len(row["responses"]) for row in rankings]
    assert len(labels) == numbers["ranking"]["questions"] <= sum(map(default_questions, sizes))
    assert numbers["ranking"]["all_questions"] == sum(n * (n - 1) for n in sizes)
    assert {row["p_21"] for row in labels} == {None} and {row["setup"] for row in labels} == {numbers["setup"]}
    assert numbers["labeled"] == numbers["pairs"] == len(pairs) == sum(len(row["pairs"]) for row in rankings)
    found = preferences(folder)
    for row in rankings:
        assert row["strengths"] == sorted(row["strengths"], reverse=True)
        assert sum(row["strengths"]) == pytest.approx(0, abs=1e-9)
        for id, p in row["pairs"].items():
            first, second = (row["responses"].index(pairs[id][key]) for key in ("response_1", "response_2"))
            assert (p > 0.5) == (first < second) or p == pytest.approx(0.5, abs=1e-6)
            assert found[id]["p"] == pytest.approx(max(p, 1 - p), abs=1e-12)
            assert found[id]["chosen"][0]["content"] == pairs[id]["response_1" if p >= 0.5 else "response_2"]


def test_the_strengths_are_those_of_the_answers_in_labels_jsonl(ranked):
    folder = ranked(ranking={"questions": 6, "at_once": 2})
    by_texts = {(row["responses"][i], row["responses"][j], row["prompt"]): p
                for row in rows(folder, "rankings") for i, j, p in row["answers"]}  # fmt: skip
    assert sorted(by_texts.values()) == pytest.approx(sorted(row["p"] for row in rows(folder, "labels")), abs=0)
    rankings = rows(folder, "rankings")
    columns = [(g, i, j, p) for g, row in enumerate(rankings) for i, j, p in row["answers"]]
    group, first, second, p = np.array(columns).T
    sizes = [len(row["responses"]) for row in rankings]
    again = fit(Comparisons(*(a.astype(int) for a in (group, first, second)), p, np.ones(len(p))), sizes)
    for g, row in enumerate(rankings):
        np.testing.assert_allclose(row["strengths"], again.values[g, : sizes[g]], atol=1e-6)
        np.testing.assert_allclose(np.diff(row["intervals"]) / 2, 1.96 * again.errors()[g, : sizes[g], None], rtol=1e-4)
    assert results(folder)["ranking"]["position"] == pytest.approx(again.position, abs=1e-6)


def test_all_pairs_ranks_the_labels_that_are_there(ranked):
    """Each of the two orders of a label is one comparison."""
    before = rows(ranked(ranking=None), "labels")
    folder = ranked(ranking={"method": "all_pairs"})
    assert rows(folder, "labels") == before
    labels = {row["id"]: row for row in before}
    numbers, rankings = results(folder)["ranking"], rows(folder, "rankings")
    assert numbers["questions"] == numbers["all_questions"] == 2 * len(labels)
    texts = {row["id"]: (row["response_1"], row["response_2"]) for row in rows(folder, "pairs")}
    columns = []
    for g, row in enumerate(rankings):
        for id in row["pairs"]:
            i, j = map(row["responses"].index, texts[id])
            columns += [(g, i, j, labels[id]["p_12"]), (g, j, i, 1 - labels[id]["p_21"])]
    group, first, second, p = np.array(columns).T
    comparisons = Comparisons(*(a.astype(int) for a in (group, first, second)), p, np.ones(len(p)))
    again = fit(comparisons, [len(row["responses"]) for row in rankings])
    for g, row in enumerate(rankings):
        np.testing.assert_allclose(row["strengths"], again.values[g, : len(row["strengths"])], atol=1e-6)


def test_labels_without_orders_are_ranked_as_they_are(ranked):
    folder = ranked(ranking={"method": "all_pairs"}, labeler="direct")
    labels, rankings = {row["id"]: row for row in rows(folder, "labels")}, rows(folder, "rankings")
    numbers = results(folder)["ranking"]
    assert numbers["questions"] == len(labels) and numbers["position"] is None and numbers["position_interval"] is None
    for row in rankings:
        assert sorted(p for *_, p in row["answers"]) == pytest.approx(sorted(labels[id]["p"] for id in row["pairs"]))


def test_a_ranking_that_is_added_is_made(ranked):
    folder = ranked(ranking=None)
    assert not (folder / "rankings.jsonl").exists()
    assert rows(ranked(), "rankings")
    ranked(ranking=None)
    assert not (folder / "rankings.jsonl").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 7, 13])
def test_a_killed_tournament_goes_on_where_it_was(ranked, monkeypatch, after):
    whole = ranked("whole", ranking={"questions": 3}, batch_tokens=300)
    add, count = LabelStore.add, 0

    def dying(self, *arguments):
        nonlocal count
        if count == after:
            raise Killed
        count += 1
        add(self, *arguments)

    monkeypatch.setattr(LabelStore, "add", dying)
    with pytest.raises(Killed):
        ranked("killed", ranking={"questions": 3}, batch_tokens=300)
    monkeypatch.setattr(LabelStore, "add", add)
    resumed = ranked("killed", ranking={"questions": 3}, batch_tokens=300)
    for name in ("labels", "rankings", "pairs"):
        assert rows(resumed, name) == rows(whole, name)
    assert results(resumed)["made"] == results(whole)["made"]
    assert preferences(resumed) == preferences(whole)


def test_a_larger_budget_asks_only_what_is_new(ranked, monkeypatch):
    folder = ranked(ranking={"questions": 3})
    before, loaded, load = rows(folder, "labels"), [], Judges.load
    monkeypatch.setattr(Judges, "load", lambda self, *named: loaded.append(named) or load(self, *named))
    ranked(ranking={"questions": 5})
    after = rows(folder, "labels")
    assert after[: len(before)] == before and len(after) > len(before) and len(loaded) == 1
    keys = [row["pair"] for row in after]
    assert len(keys) == len(set(keys))


def test_pairs_of_data_are_ranked_by_prompt_and_text(ranked):
    texts = ["a fox", "the lazy dog", "a quick brown fox", "dog"]
    data = [
        {"id": f"{prompt}{i}{j}", "prompt": prompt, "response_1": texts[i], "response_2": texts[j]}
        for prompt in ("what is it?", "who is it?")
        for i, j in ((0, 1), (1, 2), (3, 0))
    ]
    folder = ranked(pairs=data, ranking={"questions": 12, "confidence": 1.0})
    rankings = rows(folder, "rankings")
    assert [sorted(row["responses"]) for row in rankings] == [sorted(texts)] * 2
    assert len(rows(folder, "labels")) == 24  # including pairs that are not in the data
    assert preferences(folder).keys() == {row["id"] for row in data}


def test_what_cannot_be_judged_is_said(ranked):
    data = [
        {"id": "long", "prompt": "what?", "response_1": "fox " * 3000, "response_2": "dog"},
        {"id": "short", "prompt": "who?", "response_1": "fox", "response_2": "dog"},
    ]
    folder = ranked(pairs=data)
    assert results(folder)["skipped"] == {"longer than the judge's context": 1}
    assert preferences(folder).keys() == {"short"}


def test_a_tournament_is_not_divided(ranked):
    with pytest.raises(UserError, match="cannot be divided") as error:
        ranked(shard="1/2")
    assert "recipe.yaml" in error.value.problems[0].where


def test_a_pair_that_the_data_has_turned_counts_once(ranked):
    texts = [("a fox", "dog"), ("dog", "a fox"), ("a fox", "dog"), ("dog", "city")]
    data = [{"id": f"{i}", "prompt": "what?", "response_1": a, "response_2": b} for i, (a, b) in enumerate(texts)]
    folder = ranked(pairs=data, ranking={"method": "all_pairs"})
    assert results(folder)["ranking"]["questions"] == len(rows(folder, "rankings")[0]["answers"]) == 4
    assert {row["id"]: row["p"] for row in preferences(folder).values()}.keys() == {"0", "1", "2", "3"}


def test_a_group_turns_pairs_and_finds_them(ranked):
    from trl_rlaif.pipeline.rankings import Rankings

    pairs = [Pair("x", "why?", "a", "b"), Pair("y", "why?", "c", "a", human=1)]
    group = Rankings(None, pairs).groups[0]
    assert [group.pair(*ij).id for ij in ((0, 1), (2, 0), (0, 2))] == ["x", "y", "y turned to 1-3"]
    turned = group.pair(0, 2)
    assert (turned.response_1, turned.response_2, turned.human) == ("a", "c", None)


def test_prompts_that_differ_in_what_labels_depend_on_are_apart():
    from trl_rlaif.pipeline.rankings import Rankings

    pairs = [Pair(f"{i}", "why?", "a", "b", extra={"reference": i % 2}) for i in range(3)]
    assert len(Rankings(None, pairs, ["reference"]).groups) == 2
    assert len(Rankings(None, pairs).groups) == 1
