"""A recipe's arguments for the base's chat template reach every prompt, including those that TRL's trainers render."""

from __future__ import annotations

import shutil

import pytest
from datasets import Dataset
from helpers.recipes import tiny_recipe
from helpers.tiny import CHAT_TEMPLATE

from trl_rlaif.encoding import encode_prompt
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work import dpo
from trl_rlaif.pipeline.work import grpo_rloo as groups
from trl_rlaif.plugins import installed_plugins

pytestmark = pytest.mark.trl

TURN = [{"role": "user", "content": "what?"}]


@pytest.fixture
def context(tiny_model, tmp_path):
    """A function that makes a recipe's context for an algorithm, on a base with a variable in its chat template."""
    shutil.copytree(tiny_model, tmp_path / "base")
    template = CHAT_TEMPLATE.replace("{% for", "{{ effort }}{% for", 1)
    (tmp_path / "base" / "chat_template.jinja").write_text(template)

    def make(algorithm):
        model = {"chat_template_kwargs": {"effort": "the fox"}}
        recipe = tiny_recipe(tmp_path, str(tmp_path / "base"), model=model, rl={"algorithm": algorithm})
        return Context(recipe, RunFolder(tmp_path / "out"), installed_plugins())

    return make


def test_our_prompts(context):
    tokenizer = context("ppo").tokenizer
    assert tokenizer.decode(encode_prompt(tokenizer, TURN)).startswith("the fox<|start|>user")


def test_dpo(context):
    made = context("dpo")
    said = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    Dataset.from_list([{"prompt": TURN, "p": 0.9, **said}] * 4).save_to_disk(str(made.folder / "preferences"))
    trainer, _ = dpo.build_trainer(made)
    row = trainer.train_dataset[0]
    assert made.tokenizer.decode(row["prompt_ids"]).startswith("the fox<|start|>user")


def test_fine_tuning(context):
    rows = context("ppo").with_template_kwargs(Dataset.from_list([{"messages": TURN}]))
    assert rows["chat_template_kwargs"] == [{"effort": "the fox"}]  # the column that TRL's SFTTrainer reads


def test_group_trainers(context):
    config, _ = groups.trainer_config(context("grpo"))
    assert config.chat_template_kwargs == {"effort": "the fox"}
