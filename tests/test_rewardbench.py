"""A run's reward model on a benchmark: the run's own scores, independent of batching, and the printed results."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers.families import save_family
from helpers.recipes import run_cli, tiny_recipe
from helpers.trained import add_trained, make_run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_rlaif import UserError, cli, load_reward_model
from trl_rlaif.encoding import chat_prompt, encode_prompt, encode_response
from trl_rlaif.export import ExportOptions, export_model
from trl_rlaif.files import read_lines
from trl_rlaif.models.loading import load_tokenizer
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.rewardbench import run_benchmark

ROWS = [
    {"id": "1", "subset": "Math", "section": "Reasoning", "prompt": "what is 1?", "chosen": ["a city"],
     "rejected": ["the fox", "a dog", "no"]},
    {"id": "2", "subset": "Math", "section": "Reasoning", "prompt": "what is 2?", "chosen": "it is a country",
     "rejected": "the quick brown fox"},
    {"id": "3", "subset": "Focus", "section": "Chat", "prompt": [{"role": "user", "content": "what is 3?"}],
     "chosen": ["the lazy dog"], "rejected": ["over", "judge"]},
    {"id": "ref:1", "subset": "Ties", "prompt": "a color?", "chosen": ["red"], "rejected": ["dog", "fox"]},
    {"id": "tied:1", "subset": "Ties", "prompt": "a color?", "chosen": ["red", "blue", "green"], "rejected": ["dog"]},
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_scores(folder):
    """Scores of each row's responses, one by one and without padding."""
    model, tokenizer = load_reward_model(folder), load_tokenizer(str(folder))
    found = []
    for row in ROWS:
        prompt = encode_prompt(tokenizer, chat_prompt(row["prompt"], tokenizer))
        texts = [[row[key]] if isinstance(row[key], str) else row[key] for key in ("chosen", "rejected")]
        ids = [torch.tensor([prompt + encode_response(tokenizer, text)]) for text in sum(texts, [])]
        with torch.no_grad():
            found.append([model(input_ids=x).logits[0, 0].item() for x in ids])
    return found


@pytest.mark.parametrize(("kind", "targets"), [("qwen3", ["q_proj"]), ("mamba2", ["in_proj"])])  # packed and padded
@pytest.mark.parametrize("batch_tokens", [8192, 1])
def test_the_scores_are_the_runs_own(kind, targets, batch_tokens, tmp_path):
    run = make_run(tmp_path, save_family(kind, tmp_path / "model"))
    add_trained(run, "reward", target_modules=targets)
    scores = tmp_path / "scores.jsonl"
    source = write(tmp_path / "bench.jsonl", ROWS)
    found = run_benchmark(run.path, source, batch_tokens=batch_tokens, scores=scores)
    rows = read_lines(scores)
    expected = plain_scores(run / "reward")
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["chosen"] + row["rejected"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    right = [float(max(each) == each[0]) for each in expected[:3]]
    assert found["subsets"]["Math"]["rate"] == sum(right[:2]) / 2 and found["subsets"]["Focus"]["rate"] == right[2]
    assert found["sections"]["Reasoning"]["rate"] == sum(right[:2]) / 2 and found["all"]["rate"] == sum(right) / 3
    rates = [sum(right[:2]) / 2, right[2], found["subsets"]["Ties"]["score"]]
    assert found["mean_of_subsets"] == pytest.approx(sum(rates) / 3, abs=1e-12)


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl-rlaif", "rewardbench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def test_the_command_prints_a_table_or_json(tiny_model, tmp_path, monkeypatch, capsys):
    run = add_trained(make_run(tmp_path, tiny_model), "reward")
    long = {"prompt": "dog " * 600, "chosen": "a", "rejected": "b", "subset": "Focus"}
    source = write(tmp_path / "bench.jsonl", [*ROWS, long])
    found = run_benchmark(run.path, source)
    assert found["left_out"] == {"Focus": 1}
    assert json.loads(printed(monkeypatch, capsys, run.path, source, "--json")) == json.loads(json.dumps(found))
    table = printed(monkeypatch, capsys, run.path, source).splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["Focus", "Math", "Ties"] and table[1].endswith(" 1")
    ends = [f"{100 * end:.1f}%" for end in found["all"]["interval"]]
    assert f"{100 * found['all']['rate']:.1f}%  {ends[0]} to {ends[1]}" in next(
        x for x in table if x.startswith("all rows")
    )
    assert table[-1] == "Left out of Focus: 1 row longer than the model's context."


def test_what_is_wrong_is_said(tiny_model, tmp_path, monkeypatch, capsys):
    run = add_trained(make_run(tmp_path, tiny_model), "reward")
    source = write(tmp_path / "bench.jsonl", [ROWS[0], {"prompt": "a?", "chosen": "b"}])
    code, said = run_cli(monkeypatch, capsys, "rewardbench", run.path, source)
    assert code == 2 and "bench.jsonl:2: The row has no 'rejected'" in said
    with pytest.raises(UserError, match="Every row is longer than the model's context"):
        run_benchmark(run.path, write(source, [{"prompt": "dog " * 600, "chosen": "a", "rejected": "b"}]))
    add_trained(run, "policy")
    with pytest.raises(UserError, match="The stage 'reward', which trains the reward model, is not part of this run"):
        run_benchmark(make_run(tmp_path / "other", tiny_model, reward=None, rl=None, evaluate=None).path, source)


@pytest.mark.slow
def test_a_real_run_its_benchmark_and_its_export_agree(tiny_model, tmp_path):
    """The stage reward's scores of held-out pairs are those of the benchmark and of plain transformers."""
    words = "quick brown fox lazy dog capital city country".split()
    pairs = [
        {"prompt": f"what is the {word} {i}?", "chosen": f"it is {word}", "rejected": f"no {i}", "subset": word}
        for i, word in enumerate(words)
    ]
    source = write(tmp_path / "pairs.jsonl", pairs)
    sections = dict.fromkeys(("sample", "label", "rl", "evaluate", "report"))
    data = {"prompts": None, "eval_prompts": None, "pairs": source.name, "format": "preference"}
    recipe = tiny_recipe(tmp_path, tiny_model, data=data, **sections, reward={"learning_rate": 1e-2})
    run = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    written = {(row["chosen"], row["rejected"]) for row in read_lines(run / "reward_scores.jsonl")}
    assert len(written) == run.results_of("reward")["eval_pairs"] >= 2

    run_benchmark(run.path, source, scores=tmp_path / "scores.jsonl")
    benchmark = [(row["chosen"][0], row["rejected"][0]) for row in read_lines(tmp_path / "scores.jsonl")]
    folder = export_model(run.path, "reward", ExportOptions(merge=True)).folder
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exported = []
    for pair in pairs:
        turns = [[{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[key]}]
                 for key in ("chosen", "rejected")]  # fmt: skip
        inputs = tokenizer.apply_chat_template(turns, padding=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            exported.append(tuple(model(**inputs).logits[:, 0].tolist()))
    for scores in (benchmark, exported):
        assert len(scores) == len(pairs)
        for chosen, rejected in written:
            assert any((chosen, rejected) == pytest.approx(each, rel=1e-4, abs=1e-5) for each in scores)
