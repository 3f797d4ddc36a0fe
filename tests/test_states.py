"""No file that a run loads can run code: states of checkpoints, adapters and models."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch
from datasets import Dataset
from helpers.ppo import small_trainer
from helpers.tiny import make_llama, make_tokenizer
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from trl_rlaif import content
from trl_rlaif.errors import TrlRlaifError, UserError
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.states import load_state, save_state


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _write(file, content):
    """In torch.save's zip format."""
    torch.save(content, file)
    assert zipfile.is_zipfile(file)


@pytest.mark.parametrize("write", [_write, lambda file, content: file.write_bytes(pickle.dumps(content))])
def test_a_state_that_would_run_code_is_refused(tmp_path, write):
    file, trace = tmp_path / "training.pt", tmp_path / "trace"
    write(file, {"parameters": {}, "processes": [Hostile(trace)]})
    with pytest.raises(TrlRlaifError, match="training.pt.*damaged"):
        load_state(file)
    assert not trace.exists()


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(UserError, match="cannot hold this state"):
        save_state({"own": Hostile(tmp_path / "trace")}, tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []


def test_tensors_numbers_and_containers_come_back(tmp_path):
    state = {"a": torch.arange(3), 1: (None, True, 0.5, float("inf"), "text", [b"raw"]), ("x", 2): {}}
    save_state(state, tmp_path / "state.pt")
    found = load_state(tmp_path / "state.pt")
    assert torch.equal(found.pop("a"), state.pop("a"))
    assert found == state


@pytest.mark.trl
def test_a_ppo_checkpoint_that_would_run_code_is_refused(tmp_path):
    small_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    folder, trace = tmp_path / "checkpoint-3", tmp_path / "trace"
    state = load_state(folder / "training.pt")
    _write(folder / "training.pt", state | {"scheduler": Hostile(trace)})
    content.record(folder)  # an attacker who can write the folder can also write its digests
    with pytest.raises(TrlRlaifError, match="damaged"):
        small_trainer(tmp_path, save_strategy="steps", save_steps=1).train(resume_from_checkpoint=str(folder))
    assert not trace.exists()


@pytest.mark.trl
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_transformers_that_would_run_code_is_refused(tmp_path, name):
    def train(resume=None):
        options = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[1, 2, 3]] * 4})
        trainer = Trainer(make_llama(), TrainingArguments(str(tmp_path), **options), train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)

    train()
    file = tmp_path / "checkpoint-1" / name
    assert file.exists()
    _write(file, {"cpu": Hostile(tmp_path / "trace")})
    with pytest.raises(pickle.UnpicklingError):
        train(str(file.parent))
    assert not (tmp_path / "trace").exists()


def test_what_a_kill_left_of_a_list_of_digests_is_no_file_of_the_next_one(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / ".content.json.building").write_text("{")
    content.record(tmp_path)
    assert content.damaged(tmp_path) is None and [*content.recorded(tmp_path)] == ["file"]


def test_pickled_weights_that_would_run_code_are_refused(tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    _write(tmp_path / "model" / "pytorch_model.bin", {"lm_head.weight": Hostile(tmp_path / "trace")})
    with pytest.raises(Exception, match=r"(?i)unpickl|weights"):
        load_model(ModelSpec(str(tmp_path / "model")))
    shared = SharedBase(model, LoraConfig(target_modules=["q_proj"]))
    shared.peft.save_pretrained(tmp_path / "adapter")
    folder = next(path.parent for path in (tmp_path / "adapter").rglob("adapter_model.safetensors"))
    (folder / "adapter_model.safetensors").unlink()
    _write(folder / "adapter_model.bin", {"x": Hostile(tmp_path / "trace")})
    with pytest.raises(Exception, match=r"(?i)unpickl|weights"):
        shared.peft.load_adapter(str(folder), "other")
    assert not (tmp_path / "trace").exists()
