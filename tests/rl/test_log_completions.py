"""Responses to ``eval_dataset``, shown during a run and on request."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.ppo import numbers, prompts, small_trainer
from helpers.rewards import length_penalty
from helpers.tiny import make_llama, make_tokenizer

from trl_rlaif.rl.log_completions import CompletionLog


def _trainer(folder, *, rows=3, **options):
    kwargs = {"eval_dataset": prompts().select(range(rows)), **options.pop("trainer_kwargs", {})}
    settings = {"num_sample_generations": 2, "per_device_eval_batch_size": 2, "total_episodes": 16} | options
    return small_trainer(folder, trainer_kwargs=kwargs, **settings)


@pytest.mark.parametrize(("often", "updates"), [(0, []), (1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (10, [1, 2, 3, 4])])
def test_samples_are_shown_as_often_as_asked(tmp_path, monkeypatch, often, updates):
    trainer, shown = _trainer(tmp_path, num_sample_generations=often), []
    monkeypatch.setattr(trainer, "generate_completions", lambda sampling: shown.append(trainer.state.global_step))
    trainer.train()
    assert trainer.state.global_step == 4 and shown == updates


def test_without_prompts_nothing_is_shown(tmp_path, capsys):
    trainer = small_trainer(tmp_path, num_sample_generations=2)
    trainer.train()
    trainer.generate_completions()
    assert "Update" not in capsys.readouterr().out


def test_what_is_shown_is_the_likeliest_response_and_its_score(tmp_path, capsys):
    tokenizer = make_tokenizer()
    sure = make_llama(len(tokenizer))
    sure.lm_head.weight.data *= 1000  # a random model's logits are nearly equal
    sure.lm_head.weight.data[tokenizer.pad_token_id] = 0  # never the likeliest
    trainer = _trainer(tmp_path, model=sure)
    rows = trainer.completion_log.show(0, first_batch=False)
    assert [prompt for prompt, _, _ in rows] == trainer.eval_dataset["prompt"]
    model = trainer.shared.peft
    for prompt, completion, score in rows:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        drawn = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )[0, ids.shape[1] :]  # fmt: skip
        greedy = tokenizer.decode(drawn, skip_special_tokens=True)
        assert completion == greedy
        length = int((drawn == tokenizer.eos_token_id).nonzero()[0]) + 1 if tokenizer.eos_token_id in drawn else 8
        expected = length_penalty(prompts=[prompt], completions=[completion], completion_ids=[drawn[:length].tolist()])
        assert score == pytest.approx(expected[0])
    assert "what is the" in capsys.readouterr().out


def test_the_first_batch_alone_is_shown_in_a_run(tmp_path):
    assert len(_trainer(tmp_path, rows=5).completion_log.show(0, first_batch=True)) == 2
    assert (
        len(_trainer(tmp_path, rows=1).completion_log.show(0, first_batch=True)) == 1
    )  # TRL drops a batch that is not full


def test_the_sampling_temperature_of_the_run_stays(tmp_path):
    trainer = _trainer(tmp_path)
    before = trainer.generator.temperature
    trainer.rewards.functions = [lambda prompts, completions, **columns: 1 / 0]
    with pytest.raises(ZeroDivisionError):
        trainer.generate_completions()
    assert trainer.generator.temperature == before == pytest.approx(trainer.args.temperature)


def test_a_resumed_run_goes_on_bit_for_bit_where_samples_are_shown(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "num_sample_generations": 4}
    whole = _trainer(tmp_path / "whole", **saving)
    whole.train()
    resumed = _trainer(tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert numbers(resumed)[-2:] == numbers(whole)[-2:] and resumed.state.global_step == 4
    for a, b in zip(whole.shared.parameters(), resumed.shared.parameters(), strict=True):
        assert torch.equal(a, b)


def test_text_of_a_model_does_not_steer_the_terminal(tmp_path, capsys, monkeypatch):
    hostile = [[("a\x1b[2Jb \x07[red]no markup[/red]", "\ud800 [/]", 1.0)]]
    monkeypatch.setattr(CompletionLog, "_sampled", lambda *args, **kwargs: hostile[0])
    _trainer(tmp_path).completion_log.show(0, first_batch=False)
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and "\x07" not in out and "[red]no markup[/red]" in out and "[/]" in out


def test_conversations_are_shown_as_text(tmp_path):
    chat = Dataset.from_dict({"prompt": [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": w}]
                                         for w in ("fox", "dog")]})  # fmt: skip
    trainer = _trainer(tmp_path, dataset=prompts(chat=True), trainer_kwargs={"eval_dataset": chat})
    (first, completion, _), _ = trainer.completion_log.show(0, first_batch=False)
    assert first == "Be brief.\nfox" and isinstance(completion, str)


@pytest.mark.parametrize("running", [True, False])
def test_running_trackers_get_a_table(tmp_path, monkeypatch, running):
    logged = []
    table = SimpleNamespace(log_table=lambda name, rows, headers: logged.append((name, rows, headers)))
    wandb = SimpleNamespace(
        run=object() if running else None,
        log=lambda numbers: logged.append(numbers["completions"]),
        Table=lambda columns, data: ("wandb", data, columns),
    )
    comet = SimpleNamespace(get_running_experiment=lambda: table if running else None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    trainer = _trainer(tmp_path)
    trainer.args.report_to = ["wandb", "comet_ml"]
    rows = [list(row) for row in trainer.completion_log.show(0, first_batch=True)]
    columns = ["prompt", "completion", "score"]
    assert logged == ([("wandb", rows, columns), ("completions.csv", rows, columns)] if running else [])
