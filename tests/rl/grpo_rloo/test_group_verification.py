"""RLOO and GRPO refuse models for which TRL's numbers are wrong with left-padded prompts."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.group_processes import NONE, TRAINERS
from helpers.recipes import tiny_recipe
from helpers.tiny import make_gpt2, make_llama, make_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

from trl_rlaif import UserError
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work.grpo_rloo import build_trainer
from trl_rlaif.plugins import installed_plugins

pytestmark = pytest.mark.trl


def _gemma2(vocab_size: int):
    """Its logits are more than hidden states times the output embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=vocab_size, initializer_range=0.3, **sizes, **heads)).eval()


def _trainer(folder, make, algorithm):
    tokenizer = make_tokenizer()
    for part in (make(len(tokenizer)), tokenizer):
        part.save_pretrained(folder / "model")
    rl = {"algorithm": algorithm, "rewards": ["helpers.rewards:even_share"], "num_generations": 2, "kl_coef": 0.1}
    recipe = tiny_recipe(folder, str(folder / "model"), **NONE, rl=rl)
    trainer, *_ = build_trainer(Context(recipe, RunFolder(folder / "out"), installed_plugins()))
    trainer.scorer.selection.pool.prompts = Dataset.from_dict(
        {"input_ids": [list(range(5, 5 + n)) for n in (30, 6, 12, 40, 9)]}
    )
    return trainer


@pytest.mark.parametrize("algorithm", TRAINERS)
@pytest.mark.parametrize("make", [make_llama, _gemma2])
def test_a_sound_model_is_verified_without_a_trace(tmp_path, algorithm, make):
    trainer = _trainer(tmp_path, make, algorithm)
    trainer.model.train()
    state = torch.get_rng_state()
    trainer.verify()
    assert torch.equal(torch.get_rng_state(), state) and trainer.model.training


@pytest.mark.parametrize("algorithm", TRAINERS)
def test_gpt2_is_refused(tmp_path, algorithm):
    """TRL passes no position ids, so GPT-2 counts positions from the padding on."""
    trainer = _trainer(tmp_path, make_gpt2, algorithm)
    with pytest.raises(UserError, match=r"GPT2LMHeadModel: .* Set algorithm: ppo"):
        trainer.train()
    assert trainer.state.global_step == 0
