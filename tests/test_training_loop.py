"""transformers' training loop when it is resumed: the same steps and losses as in an uninterrupted run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trl_rlaif.compat.training_loop import resumable
from trl_rlaif.pipeline.training import last_checkpoint

pytestmark = pytest.mark.trl


class Line(torch.nn.Module):
    """y = w * x, and its squared error."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, y, length=None):
        return {"loss": ((self.weight * x - y) ** 2).mean()}


def train(folder, resume=None, callbacks=(), **options):
    """Train with a checkpoint per step; returns the trainer and its result."""
    settings = {"save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 0.1}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "optim": "sgd"} | options
    data = Dataset.from_list([{"x": 0.1 * i, "y": 0.3 * i + 1, "length": i} for i in range(8)])
    trainer = Trainer(Line(), TrainingArguments(str(folder), **settings), train_dataset=data)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    return trainer, resumable(trainer, partial(trainer.train, resume_from_checkpoint=resume))


def test_the_last_checkpoint_is_one_that_is_whole(tmp_path, capsys):
    """A checkpoint without digests is accepted as it is, if all of its files exist."""
    for step, names in ((1, ["content.json"]), (2, ["run.json", ".content.json.building"]), (3, ["model.safetensors"])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    said = capsys.readouterr().err.replace("\n", " ")
    assert "checkpoint-3 is not whole" in said and "checkpoint-2 has no digests" in said
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")  # it has digests from now on
    assert "checkpoint-2" not in capsys.readouterr().err
    (tmp_path / "checkpoint-2" / "run.json").unlink()
    assert last_checkpoint(tmp_path) is None  # the first one's list of files is empty


@pytest.mark.parametrize("logging_steps", [1, 3, 50])
@pytest.mark.parametrize("step", [1, 4, 7])
def test_the_losses_of_a_resumed_training_are_those_of_an_undisturbed_one(tmp_path, step, logging_steps):
    whole, output = train(tmp_path, max_steps=7, logging_steps=logging_steps)
    again, resumed = train(tmp_path, str(tmp_path / f"checkpoint-{step}"), max_steps=7, logging_steps=logging_steps)
    losses = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 7 // logging_steps
    assert resumed.training_loss == output.training_loss > 0
    assert again.state.global_step == 7 and torch.equal(again.model.weight, whole.model.weight)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 9])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_resumed_epoch_has_the_order_of_an_undisturbed_one(tmp_path, step, strategy):
    """Three batches per epoch; otherwise, one row would be trained on twice, and another one not at all."""
    options = {"num_train_epochs": 4, "per_device_train_batch_size": 3, "train_sampling_strategy": strategy}
    whole, _ = train(tmp_path, **options)
    torch.manual_seed(99)
    again, _ = train(tmp_path, str(tmp_path / f"checkpoint-{step}"), **options)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_one_that_a_callback_stops_at_its_begin_makes_no_step(tmp_path):
    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            control.should_training_stop = True

    train(tmp_path, max_steps=3)
    trainer, output = train(tmp_path, str(tmp_path / "checkpoint-2"), max_steps=3, callbacks=[Stop()])
    assert output.global_step == trainer.state.global_step == 2
