"""RewardTrainer with the Advantage Model: packed or padded, LoRA or NF4, trained and reloaded."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.reward import small_config
from helpers.tiny import make_scorer, make_tokenizer
from peft import LoraConfig
from trl_rlaif_advantage import AdvantageModel

from trl_rlaif import RewardTrainer, load_reward_model
from trl_rlaif.encoding import encode_prompt
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.types import PreferenceScores

pytestmark = pytest.mark.trl

LORA = LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"])


def _data(k: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 400, (count,), generator=generator).tolist()

    rows = []
    for i in range(12):
        prompt = tokens(4 + i % 5)
        row = {
            "chosen_ids": prompt + tokens(3 + i % 7),
            "rejected_ids": prompt + tokens(2 + i % 4),
            "prompt_length": len(prompt) - i % 2,
            "p": [1.0, 0.8, 0.3][i % 3],
            "category": ["code", "chat"][i % 2],
        }
        if k:
            ratios = torch.randn(2, k, generator=generator).tolist()
            row |= {"chosen_log_ratios": ratios[0], "rejected_log_ratios": ratios[1]}
        rows.append(row)
    return Dataset.from_list(rows)


def _trainer(folder, model, k: int = 0, *, lora: bool = True, bf16: bool = False, **options) -> RewardTrainer:
    args = small_config(folder, per_device_train_batch_size=4, num_train_epochs=2, bf16=bf16)
    return RewardTrainer(
        model=model,
        args=args,
        train_dataset=_data(k),
        processing_class=make_tokenizer(),
        peft_config=LORA if lora else None,
        reward_transforms=[AdvantageModel(margin=1.0)],
        **options,
    )


def _losses(trainer: RewardTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("k", [0, 2])
def test_packed_and_padded_pairs_train_alike(tmp_path, k, lora):
    packed, padded = (
        _losses(_trainer(tmp_path, make_scorer(), k, lora=lora, packing=way, batch_tokens=40)) for way in (True, False)
    )
    assert len(packed) == 6 and packed[0] == pytest.approx(padded[0], rel=1e-6)
    assert packed == pytest.approx(padded, rel=1e-4)  # AdamW turns a gradient's rounding error into a full-size step
    assert len({round(loss, 3) for loss in packed}) > 3
    if k:
        assert packed[0] != pytest.approx(_losses(_trainer(tmp_path, make_scorer(), 0, lora=lora))[0], abs=1e-3)


@pytest.mark.parametrize("kind", ["LoRA", "NF4", "full"])
def test_it_learns_e_and_loads_again_as_one_thing(tmp_path, kind):
    base = tmp_path / "base"
    make_scorer(hidden_size=64).save_pretrained(base)
    quantization = "nf4" if kind == "NF4" else "none"
    model = load_model(ModelSpec(str(base), "float32", quantization), num_labels=1)
    trainer = _trainer(tmp_path / "run", model, lora=kind != "full", bf16=kind == "NF4")
    assert trainer.data_collator.packed
    losses = _losses(trainer)
    assert sum(losses[3:]) < sum(losses[:3])
    trainer.save_model(str(tmp_path / "reward"))
    again = load_reward_model(tmp_path / "reward", dtype="float32", quantization=quantization)
    ids = torch.tensor([[5, 9, 12, 3, 7]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "NF4"):  # as it was trained
        expected, found = trainer.model.eval()(ids).logits.float(), again(ids).logits.float()
    assert found.shape == (1, 2) and found[0, 1].abs() > 1e-4  # e(x) is no longer 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- Where e(x) is read in untokenized data ---------------------------------------------------------------

ANSWERS = [("the quick fox", "the quick dog"), ("a city of the country", "a city"), ("no", "the fox")]


def _untokenized(form: str) -> list[dict]:
    """Pairs of responses that start alike, so that both sequences share more than the prompt."""
    rows = []
    for i, sides in enumerate(ANSWERS):
        text = f"what is the {'quick ' * i}fox?"
        prompt = [{"role": "system", "content": "judge"}, {"role": "user", "content": text}]
        turns = [[{"role": "assistant", "content": side}] for side in sides]
        if form == "text":
            rows.append({"prompt": text, "chosen": f" {sides[0]}", "rejected": f" {sides[1]}"})
        elif form == "messages":
            rows.append({"prompt": prompt, "chosen": turns[0], "rejected": turns[1]})
        else:
            rows.append({"chosen": prompt + turns[0], "rejected": prompt + turns[1]})
    return rows


@pytest.mark.parametrize("score_at_end", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("form", ["text", "messages", "messages that repeat the prompt"])
def test_e_is_read_at_the_end_of_the_prompt(tmp_path, form, packing, score_at_end):
    rows, tokenizer = _untokenized(form), make_tokenizer()
    trainer = RewardTrainer(
        model=make_scorer(), args=small_config(tmp_path, per_device_train_batch_size=3),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, packing=packing, score_at_end=score_at_end,
        reward_transforms=[AdvantageModel()],
    )  # fmt: skip
    torch.nn.init.normal_(trainer.model.score.weight)
    seen = []
    trainer.preference_loss = lambda scores, margin: seen.append(scores) or scores.chosen.sum()
    trainer.model.eval()
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
        plain = []
        for row in rows:
            prompt = row.get("prompt") or row["chosen"][:-1]
            ids = torch.tensor([encode_prompt(tokenizer, prompt)])  # as in PPO
            plain.append(trainer.model.score(trainer.model.model(ids).last_hidden_state[0, -1])[1].item())
    assert sorted(seen[0].expected.tolist()) == pytest.approx(sorted(plain), abs=1e-5)  # the loader shuffles
    assert len({round(x, 3) for x in plain}) == 3


def test_a_prompts_end_that_the_data_brings_is_kept(tmp_path):
    rows = [row | {"prompt_length": 2} for row in _untokenized("messages")]
    trainer = RewardTrainer(
        model=make_scorer(), args=small_config(tmp_path), train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(), reward_transforms=[AdvantageModel()],
    )  # fmt: skip
    assert trainer.train_dataset["prompt_length"] == [2, 2, 2]


def test_label_agreement_counts_equal_scores_half():
    """Whichever response the label prefers; labels of 1/2 are left out."""
    logged = defaultdict(list)
    trainer = SimpleNamespace(_metrics={"train": logged}, accelerator=SimpleNamespace(gather=lambda x: x))
    chosen, rejected = torch.tensor([1.0, 2.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 2.0, 3.0, 5.0])
    p = torch.tensor([0.9, 0.8, 0.2, 0.7, 0.5])
    scores = PreferenceScores(chosen, rejected, p, [None] * 5)
    RewardTrainer._log_soft_metrics(trainer, scores, "train")
    assert logged["label_agreement"] == [pytest.approx((1 + 0.5 + 0.5 + 0) / 4)]


def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path):
    """Adaptive margins and the statistics of other policies' ratios are part of a checkpoint."""

    def trainer():
        args = small_config(tmp_path, per_device_train_batch_size=4, num_train_epochs=2,
                            save_strategy="steps", save_steps=2)  # fmt: skip
        transform = AdvantageModel(margin=1.0, adapt="variance", rate=0.3)
        return RewardTrainer(make_scorer(), args, train_dataset=_data(2), processing_class=make_tokenizer(),
                             peft_config=LORA, reward_transforms=[transform])  # fmt: skip

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    states = [one.reward_transforms[0].state_dict() for one in (whole, resumed)]
    assert states[0] == states[1] and states[0]["policies"]["responses"] == 48
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
