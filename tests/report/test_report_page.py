"""The report of a run's folder: its content, its omissions, and that text from a run is never active."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from helpers.report_pages import (
    HOSTILE,
    RECIPE,
    Page,
    assert_only_our_script,
    make_results,
    make_run,
    part,
    read,
    set_results,
)

from trl_rlaif.errors import RunError, UserError
from trl_rlaif.report.build import write_report


def test_page_shows_the_numbers_of_the_results(tmp_path):
    page = read(make_run(tmp_path / "run"))
    for shown in (
        "rose by 0.563 (interval +0.471 to +0.652)",
        "63.7% (interval 54.8% to 71.7%): preferred over the initial policy",
        "96 wins, 12 ties, 52 losses, sign test p = 0.00037",
        "mean −0.151 → 0.412",
        "48 → 57 tokens",
        "321 prompts, 612 pairs, 2 redrawn",
        "too long 9",
        "598 of 612 pairs, mean confidence 76.4%",
        "no answer 14",
        "12.3% (interval 10.1% to 14.9%), 598 pairs",
        "71.3% (interval 64.8% to 77.1%), 200 pairs",
        "72.2%",
        "interval 62.2% to 80.4%",
        "12 updates, 3,840 responses",
        "changed from −0.193 to 0.812",
        "12 min 14 s",
        "1 h 30 min",
        "judge-a",
        "70.0%",
        "trl-rlaif run tiny --set run.seed=7",
        "1.12.0",
        "extra/metric 3.25 3.25 12 times",
    ):
        assert shown in page.text, shown
    assert "No warnings" in page.text


def test_position_table_counts_winners_in_both_orders(tmp_path):
    folder = make_run(tmp_path / "run")
    votes = [(0.9, 0.8), (0.9, 0.8), (0.9, 0.8), (0.7, 0.2), (0.7, 0.2), (0.3, 0.6), (0.1, 0.1), (0.5, 0.9)]
    rows = [{"id": i, "p": (a + b) / 2, "p_12": a, "p_21": b} for i, (a, b) in enumerate(votes)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = part(read(folder), "Position bias", "Green")
    assert "3 42.9% · same response 2 28.6% · first position" in text
    assert "1 14.3% · second position 1 14.3% · same response" in text
    assert "1 pair with an exact tie" in read(folder).text


@pytest.mark.parametrize(
    ("stage", "files", "heading", "following"),
    [
        ("label", ["labels.jsonl"], "Labels of the judge", "Reward model"),
        ("reward", [], "Reward model", "Reinforcement learning"),
        ("rl", [], "Reinforcement learning", "Win rates by judge"),
        ("evaluate", ["samples.jsonl"], "Reward on held-out prompts, before and after", "Sample responses"),
        ("evaluate", ["samples.jsonl"], "Sample responses", "Reproduce it"),
        ("sample", ["pairs.jsonl"], None, None),
        ("sft", [], None, None),
    ],
)
def test_missing_stage_is_said_and_not_invented(tmp_path, stage, files, heading, following):
    folder = make_run(tmp_path / "run")
    set_results(folder, lambda results: results.pop(stage, None))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(ln for ln in lines if f'"stage": "{stage}"' not in ln) + "\n")
    for name in files:
        (folder / name).unlink()
    page = read(folder)
    if heading:
        assert part(page, heading, following).removeprefix(heading).strip() == "Not run."
    table = part(page, "Stage State", "Labels of the judge")
    assert f"{stage} not run" in table or (stage == "sft" and "sft" not in table)
    if stage == "evaluate":
        assert "it is unknown whether it improved" in page.text
        assert "rose by" not in page.text
    if stage == "sft":
        assert "Supervised" not in page.text


def test_recipe_alone_gives_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text("run: {name: bare}\n")
    page = read(tmp_path)
    assert "bare" in page.text
    assert page.text.count("Not run.") == 5
    assert not any(tag == "svg" for tag, _ in page.elements)


def test_unfinished_stage_says_how_far_it_came(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "results.json").unlink()
    table = part(read(folder), "Stage State", "Labels of the judge")
    for row in (
        "sft ran 5 steps logged",
        "label not finished 10 labels written",
        "rl not finished 12 steps logged",
    ):
        assert row in table


def test_cut_last_line_is_passed_over_and_other_bad_lines_are_named(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "step": 99, "objective/sc')
    page = read(folder)
    assert "could not be read" not in page.text
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n[1]\n{"stage": "rl", "step": 13, "objective/scores": 9.5}\n')
    page = read(folder)
    assert "2 lines of metrics.jsonl could not be read" in page.text
    assert "0.20 → 9.50" in page.text


def test_not_finite_numbers_are_left_out_and_named(tmp_path, drawn):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        for step, value in ((20, "NaN"), (21, "Infinity"), (22, "1e308"), (23, "-1e400")):
            file.write(f'{{"stage": "rl", "step": {step}, "objective/kl": {value}, "loss/value_avg": NaN}}\n')
    set_results(folder, lambda results: results["evaluate"]["sets"]["held-out"].update(win_rate=float("nan")))
    set_results(folder, lambda results: results["rl"].update(kl_last=float("inf"), seconds=-1))
    page = read(folder)
    assert "metric objective/kl was NaN, infinite or beyond 1e30 4 times" in page.text
    assert "nan" not in page.text.lower().replace("nan, infinite", "")
    assert "Value loss" not in page.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["label"]["position_bias"].update(rate=0.31), "position-biased: in 31.0%"),
        (lambda r: r["label"]["mass"].update(mean=0.42), "only 42.0% of its probability"),
        (lambda r: r["rl"].update(kl_last=12.5), "KL is 12.50 nats"),
        (lambda r: r["evaluate"]["sets"]["held-out"].update(tokens_trained=100), "became 2.1 times as long"),
        (lambda r: r["evaluate"]["sets"]["held-out"].update(tokens_trained=20), "became 0.4 times as long"),
        (lambda r: r["evaluate"]["sets"]["held-out"].update(interval=[0.5, 0.7]), "its interval contains 50%"),
        (
            lambda r: r["evaluate"]["sets"]["held-out"].update(interval=[0.3, 0.4]),
            "the judge prefers the initial policy",
        ),
        (lambda r: r["evaluate"]["sets"]["held-out"].update(interval=[0.4, 0.7]), "exploit the reward model"),
        (
            lambda r: r["evaluate"]["sets"]["held-out"]["reward_gain"].update(interval=[-0.1, 1]),
            "did not clearly",
        ),
        (
            lambda r: r["evaluate"]["sets"]["held-out"]["by_category"]["chat"].update(drift=True),
            "the reward rose on prompts of chat, but the judge prefers the initial policy there",
        ),
        (lambda r: r["reward"].update(accuracy_interval=[0.45, 0.8]), "not clearly better than chance"),
        (lambda r: r.update(warnings=["The prompts were cut."]), "The prompts were cut."),
        (
            lambda r: r["label"].update(calibration={"used": False, "pairs": 20, "reason": "no gain is seen"}),
            "The calibration was not used: no gain is seen. The labels have the judge's uncalibrated confidence.",
        ),
        (
            lambda r: r["label"].update(suspicious={"found": 3, "of": 40, "kinds": {"instruction": 2, "verdict": 1}}),
            "In 3 of 40 labeled pairs, a response addresses the judge (instruction: 2, verdict: 1).",
        ),
        (
            lambda r: r["evaluate"]["sets"]["held-out"].update(
                suspicious_start={"found": 1, "of": 64, "kinds": {"header": 1}},
                suspicious_trained={"found": 9, "of": 64, "kinds": {"verdict": 9}},
            ),
            "9 of 64 responses of the trained policy address the judge (verdict: 9), versus 1 of the initial policy",
        ),
        (
            lambda r: r["evaluate"].update(
                overlaps=[{"held_out": "data.eval_prompts", "training": "data.prompts", "prompts": 40, "shared": 3}]
            ),
            "3 of the 40 prompts of data.eval_prompts are also in data.prompts.",
        ),
        (
            lambda r: r["rl"].update(labels={"soft": False, "mean_confidence": 0.8, "ties": 2}),
            "DPO treated soft labels (mean confidence 80.0%) as certain.",
        ),
        (lambda r: r["rl"].update(unscored=64), "64 of 3,840 responses had no reward and were not trained on."),
        (
            lambda r: r["rl"].update(
                rewards={"model": {"weight": 1.0, "std_last": 6.0}, "direct": {"weight": 0.5, "std_last": 0.2}}
            ),
            "The reward 'model' varies 60 times as much as 'direct', which has hardly any effect.",
        ),
        (lambda r: r["evaluate"].update(judge="judge-a"), "same judge gave the labels and the win rate"),
    ],
)
def test_each_doubt_is_said(tmp_path, change, said):
    folder = make_run(tmp_path / "run")
    for drawn in folder.glob("*.jsonl"):
        drawn.unlink()
    assert said not in read(folder).text
    set_results(folder, change)
    assert said in read(folder).text


def test_a_reward_that_scores_few_responses_is_named(tmp_path):
    folder = make_run(tmp_path / "run")
    set_results(folder, lambda r: r["rl"].update(rewards={"model": {"weight": 1.0}, "few": {"weight": 1.0}}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "rl", "step": 12, "rewards/model/none": 0.0, "rewards/few/none": 0.75}) + "\n")
    assert "The reward 'few' scored only 25.0% of the last responses." in read(folder).text
    assert "The reward 'model' scored only" not in read(folder).text


def test_rewards_of_labelers_on_held_out_prompts_are_shown(tmp_path):
    folder, means = make_run(tmp_path / "run"), {"start": {"mean": 0.412}, "trained": {"mean": 0.537}}
    gain = {"mean": 0.125, "interval": [0.04, 0.21]}
    found = {"rubric": {"prompts": 38, "unscored": 2, "gain": gain, **means}, "direct": {"prompts": 0, "unscored": 40}}
    set_results(folder, lambda r: r["evaluate"]["sets"]["held-out"].update(labeler_rewards=found))
    page = read(folder)
    assert "the mean reward rose by 0.563 (interval +0.471 to +0.652), the reward rubric rose by 0.125" in page.text
    tile = part(page, "Change of the reward rubric on held-out", "Win rate")
    assert "+0.125 increased" in tile and "interval +0.040 to +0.210" in tile
    assert "mean 0.412 → 0.537, 38 prompts, 2 not scored" in tile and "reward direct" not in page.text
    odd = {HOSTILE: {"gain": gain}, "x": [1], "y": {"gain": {"mean": "1", "interval": [1]}, "start": 3}}
    set_results(folder, lambda r: r["evaluate"]["sets"]["held-out"].update(labeler_rewards=odd))
    assert_only_our_script(read(folder))
    assert "Change of the reward <script>" in read(folder).text and "Change of the reward y" not in read(folder).text


def test_pairs_of_a_sampler_are_shown_with_what_it_says_of_them(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "Pairs made by" not in read(folder).text

    def sampled(text, sampler="revise"):
        rows = [
            {
                "id": i, "prompt": f"{text} {i}", "category": "code", "human": None, "response_1": f"first {text}",
                "response_2": "second", "principle": f"clarity {text}", "critique": f"It is vague. {text}", "n": 3,
            }
            for i in range(40)
        ]  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"sample": {"sampler": sampler}}))
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = {"pairs": 40, "revisions": 40, "dropped": {"empty critique": 3, f"other {text}": 1}}
        set_results(folder, lambda results: results.update(sample=found))
        return read(folder)

    page = sampled("plain")
    shown = part(page, "Pairs made by revise", "Reproduce it")
    assert "pairs 40 revisions to fine-tune on 40 dropped empty critique 3, other plain 1" in shown
    assert "response 2 preferred 50.0% of 10 labels" in shown  # five of ten are below one half
    assert "20 sampled pairs" in shown and "Evenly spaced over all 40 pairs" in shown
    whole = "Response 1 first plain principle clarity plain critique It is vague. plain Response 2 second"
    assert shown.count(whole) == 20 and "plain 38" in shown
    assert_only_our_script(sampled(HOSTILE, {HOSTILE: {}}))
    for odd in ([1], 3, {}, None, {"x": 1}):
        sampled(HOSTILE, odd)


def test_hostile_text_stays_text(tmp_path, drawn):
    folder = make_run(tmp_path / "run", text=HOSTILE, category=HOSTILE)
    recipe = {**RECIPE, "run": {"name": HOSTILE[:60]}, "command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = make_results()
    held_out = results["evaluate"]["sets"].pop("held-out")
    held_out["by_category"] = {HOSTILE: {"win_rate": 0.5, "n": 3}}
    results["evaluate"]["sets"][HOSTILE] = held_out
    results["sample"]["dropped"] = {HOSTILE: 3}
    results["label"]["judge"] = HOSTILE
    results["warnings"] = [HOSTILE]
    (folder / "results.json").write_text(json.dumps(results))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "rl", "step": 20, HOSTILE: 1.0, f"reward/{HOSTILE}": float("nan")}) + "\n")

    page = read(folder)
    assert "<script>alert(1)</script></title></style></svg>-->" in page.text
    assert "{{ 7*7 }} $\\frac$ \ufffd\ufffd[31m \ufffd \ufffd & &lt;" in page.text
    assert_only_our_script(page)


def test_plain_page_reaches_for_nothing_outside(tmp_path, drawn):
    path = write_report(make_run(tmp_path / "run"))
    source = path.read_text(encoding="utf-8")
    assert_only_our_script(Page(source))
    for outside in ("http://", "https://", "@import", "url(h", "innerHTML"):
        assert outside not in source, outside


def test_category_is_no_formula_and_no_markup_in_drawings(tmp_path, drawn):
    category = "$\\frac$ </svg><b>"
    folder = make_run(tmp_path / "run", category=category)
    page = read(folder)
    labels = write_report(folder).read_text(encoding="utf-8").count("$\\frac$ &lt;/svg&gt;&lt;b&gt;</text>")
    assert labels == 2, "in the legend of the scores by category, and beside its means"
    assert_only_our_script(page)


def test_drawings_are_titled_and_share_no_ids(tmp_path, drawn):
    page = read(make_run(tmp_path / "run"))
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) >= 10
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_huge_text_is_cut_with_a_note(tmp_path, drawn):
    folder = make_run(tmp_path / "run")
    row = {"set": "held-out", "prompt": "x" * 1_000_000, "start": "y" * 4_000, "trained": "z" * 4_001}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    page = read(folder)
    assert "996,000 more characters not shown here" in page.text
    assert "… 1 more character not shown here" in page.text
    assert "y" * 4_000 in page.text and "z" * 4_001 not in page.text
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_at_most_two_hundred_samples_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [{"set": "held-out", "prompt": f"prompt-{i}.", "start": "a", "trained": "b"} for i in range(500)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read(folder)
    shown = [attributes for tag, attributes in page.elements if tag == "article" and "data-set" in attributes]
    assert len(shown) == 200
    assert "200 of the 500 samples" in page.text
    assert "prompt-0." in page.text and "prompt-497." in page.text


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '"x"',
        '{"rl": 3, "evaluate": {"sets": [1]}, "label": {"mass": "a"}}',
        '{"rounds": {"rows": [1, {"accuracy": {"rate": 1e400}, "kl_last": "x", "score_first": 1}, {"tokens": []}]}}',
        '{"rounds": {"rows": {"a": 1}}}',
    ],
)
def test_results_of_another_shape_do_not_stop_the_report(tmp_path, content):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"rounds": {"number": 3}}))
    (folder / "results.json").write_text(content)
    assert "tiny" in read(folder).text


def test_rows_of_another_shape_do_not_stop_the_report(tmp_path, drawn):
    folder = make_run(tmp_path / "run")
    rows = [
        {},
        {"set": 3, "prompt": None, "start": {"a": [1]}, "trained": 5, "category": ["x"], "reward_start": "1"},
        {"prompt": [1, {"role": None}, None], "reward_start": 1e300, "reward_trained": 2, "p_trained": 7},
        {
            "prompt": [{"role": "user", "content": [{"type": "text"}]}] * 30,
            "reward_start": 2,
            "reward_trained": 2,
        },
    ]
    for name in ("samples", "labels", "pairs", "metrics"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "… 10 more messages" in read(folder).text


def test_same_folder_gives_same_bytes(tmp_path, drawn):
    folder = make_run(tmp_path / "run")
    first = write_report(str(folder)).read_bytes()
    # Another process has other string hashes and no warm state.
    code = f"from trl_rlaif.report.build import write_report; write_report({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "5"})
    assert (folder / "report.html").read_bytes() == first
    names = {"recipe.yaml", "metrics.jsonl", "labels.jsonl", "samples.jsonl", "pairs.jsonl", "results.json"}
    assert {path.name for path in folder.iterdir()} == names | {"report.html", "report.md", "report"}


@pytest.mark.parametrize("recipe", [None, "a: [", "- 1\n"])
def test_no_run_folder_is_the_users_error(tmp_path, recipe):
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match="recipe.yaml"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(UserError):
        write_report(tmp_path / "nowhere")


def test_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    (folder / "report.html").write_text("old")

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not [path for path in folder.iterdir() if path.name.startswith(".report")]


def test_importing_the_report_is_cheap():
    code = (
        "import sys, trl_rlaif.report; "
        "print([m for m in ('matplotlib', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
