"""Where a score is read: every path reads the same token, the end of the response's turn."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from helpers.ppo import prompts, small_trainer
from helpers.reward import small_config
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from peft import LoraConfig
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from trl import RewardTrainer as ParentTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from trl_rlaif import RewardTrainer, SharedBase, load_reward_model
from trl_rlaif.encoding import encode_prompt, encode_response
from trl_rlaif.models.forward import as_responses
from trl_rlaif.pipeline.work.reward import tokenize_preference
from trl_rlaif.responses import ResponseReader
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.scoring import score_pairs
from trl_rlaif.rl.rollouts import scored_rows
from trl_rlaif.types import RehearsalPair

pytestmark = pytest.mark.trl
ANSWERS = ["the fox", "a lazy dog is a city", "the quick brown fox jumps over", "no"]
PROMPTS = [[{"role": "user", "content": text}] for text in ("what is it?", "the capital city of the country?")]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def tokenizer_with(pad):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    return tokenizer


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward adapter with a head, and its base."""
    folder = tmp_path_factory.mktemp("reward")
    make_llama(seed=3).save_pretrained(folder / "base")
    torch.manual_seed(0)
    trainer = RewardTrainer(
        model=str(folder / "base"),
        args=small_config(folder / "run", model_init_kwargs={"num_labels": 1, "dtype": "float32"}),
        train_dataset=Dataset.from_list([{"chosen_ids": [5, 2], "rejected_ids": [6, 2]}]),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA),
    )
    torch.nn.init.normal_(trainer.model.base_model.model.score.modules_to_save["default"].weight)
    trainer.save_model(str(folder / "adapter"))
    return folder


def rows_of(tokenizer):
    """Tokenized preference pairs, as in the recipe's reward stage."""
    examples = []
    for i, prompt in enumerate(PROMPTS):
        pair = {"prompt": prompt, "chosen": ANSWERS[2 * i], "rejected": ANSWERS[2 * i + 1]}
        examples.append(tokenize_preference(tokenizer, pair))
    return examples


def read_plainly(reward, rows):
    """The head's output for the last token's hidden state, one row at a time."""
    model = load_reward_model(reward / "adapter", dtype="float32").base_model.model
    with torch.no_grad():
        hidden = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        return model.score(torch.stack(hidden))[:, 0]


def ppo_trainer(reward, folder, tokenizer, **options):
    base = SharedBase(load_base(reward), LoraConfig(**LORA))
    trainer = small_trainer(
        folder,
        model=base,
        dataset=prompts(chat=True),
        trainer_kwargs={"reward_funcs": [], "reward_model": reward / "adapter", "peft_config": None},
        **options,
    )
    trainer.processing_class = trainer.generator.tokenizer = tokenizer
    return trainer


def load_base(reward):
    from trl_rlaif.models.loading import ModelSpec, load_model

    return load_model(ModelSpec(str(reward / "base"), "float32"))


@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_every_path_reads_the_same_token(reward, tmp_path, pad):
    """Even if padding is the end token: the mask gives the position, not a search for padding."""
    tokenizer = tokenizer_with(pad)
    examples = rows_of(tokenizer)
    rows = [row[name] for row in examples for name in ("chosen_ids", "rejected_ids")]
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    expected = read_plainly(reward, rows)
    model = load_reward_model(reward / "adapter", dtype="float32")

    for packed in (True, False):
        collator = SoftPreferenceCollator(pad_token_id=tokenizer.pad_token_id, packed=packed)
        chosen, rejected, _ = score_pairs(model, examples, collator, batch=2, tokens=64)
        torch.testing.assert_close(torch.stack((chosen, rejected), 1).flatten(), expected, rtol=1e-5, atol=1e-5)

    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with torch.no_grad():
            found, by_position = (
                model(**batch).logits[:, 0],
                model(batch["input_ids"], batch["attention_mask"]).logits[:, 0],
            )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(by_position, expected, rtol=1e-5, atol=1e-5)

    # PPO: sampled responses end, or are cut off right before their end.
    trainer = ppo_trainer(reward, tmp_path, tokenizer)
    pairs = [RehearsalPair("", "", None, None, "", row[:n], row[n:]) for row, n in zip(
        rows, [length for e in examples for length in [e["prompt_length"]] * 2], strict=True)]  # fmt: skip
    cut = [RehearsalPair(**{**vars(pair), "response_ids": pair.response_ids[:-1]}) for pair in pairs]
    for drawn in (pairs, cut, [pairs[0], cut[1], cut[2], pairs[3]]):
        rollout = as_responses(drawn, torch.device("cpu"))
        torch.testing.assert_close(trainer.score(rollout).total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packing", [None, False])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_the_reward_trainers_first_loss_is_that_of_the_last_tokens(tmp_path, pad, packing):
    tokenizer = tokenizer_with(pad)
    rows = [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows_of(tokenizer)]
    model = make_scorer(len(tokenizer))

    def first_loss(trainer_class, **more):
        args = small_config(tmp_path, per_device_train_batch_size=2, max_steps=1)
        trainer = trainer_class(model=copy.deepcopy(model), args=args, train_dataset=Dataset.from_list(rows),
                                processing_class=tokenizer, **more)  # fmt: skip
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    with torch.no_grad():
        scores = [[model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]) for ids in row.values()]
                  for row in rows]  # fmt: skip
    expected = -torch.stack([torch.nn.functional.logsigmoid(c - r) for c, r in scores]).mean().item()
    assert first_loss(RewardTrainer, packing=packing) == pytest.approx(expected, abs=1e-5)
    if pad == "<|pad|>":  # TRL reads the same token
        assert first_loss(ParentTrainer) == pytest.approx(expected, abs=1e-5)


def test_conversations_are_read_at_the_turns_end_and_in_the_tokens_of_ppo(tmp_path):
    tokenizer = make_tokenizer()
    rows = [
        {"prompt": prompt, "chosen": [{"role": "assistant", "content": ANSWERS[i]}],
         "rejected": [{"role": "assistant", "content": ANSWERS[i + 2]}]}
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    trainer = RewardTrainer(
        model=make_scorer(len(tokenizer)), args=small_config(tmp_path), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    for row, found in zip(rows, trainer.train_dataset, strict=True):
        prompt = encode_prompt(tokenizer, row["prompt"])
        for side in ("chosen", "rejected"):
            assert found[f"{side}_ids"] == prompt + encode_response(tokenizer, row[side][0]["content"])


def test_a_row_for_the_reward_model_ends_with_the_end_of_turn():
    """It replaces another stop token at the end, and is appended to a response that was cut off."""
    tokenizer = make_tokenizer()
    reader, end = ResponseReader(tokenizer, (tokenizer.eos_token_id, 9)), tokenizer.eos_token_id
    drawn = [[5, 6, end], [5, 9], [9], [5, 6, 8]]
    pairs = [RehearsalPair("", "", None, None, "", [4], ids) for ids in drawn]
    rollout = scored_rows(as_responses(pairs, torch.device("cpu")), reader)
    found = [ids[:n].tolist() for ids, n in zip(rollout.response_ids, rollout.lengths.tolist(), strict=True)]
    assert found == [[5, 6, end], [5, end], [end], [5, 6, 8, end]]
    assert pairs[1].response_ids == [5, 9]


def test_what_rewards_and_judges_see_ends_before_the_stop_token(tmp_path):
    """Even if that token is not flagged as special, like many models' end of turn."""
    stops = [token for token, id in make_tokenizer().get_vocab().items() if id % 4 == 0]
    trainer = small_trainer(tmp_path, dataset=prompts(chat=True), stop_token=None, stop_tokens=stops)
    rollout = trainer.sample(next(trainer.batches))
    assert rollout.ended.any()
    for ids, n, ended, [message] in zip(
        rollout.response_ids, rollout.lengths, rollout.ended, rollout.completions, strict=True
    ):
        assert ended == (ids[n - 1] in trainer.reader.stop_ids)
        assert message["content"] == trainer.processing_class.decode(ids[: n - int(ended)], skip_special_tokens=True)


def test_there_is_room_for_the_end_of_a_turn_behind_the_longest_response(tmp_path):
    """With learned positions, one token too many would be an error in the middle of a run."""
    tokenizer, lengths = make_tokenizer(), (5, 15, 16)
    dataset = Dataset.from_list([{"input_ids": [5] * length} for length in lengths for _ in range(4)])
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24}
    reward = GPT2ForSequenceClassification(GPT2Config(num_labels=1, pad_token_id=0, **shape)).eval()
    lora = LoraConfig(r=2, target_modules=["c_attn"])
    trainer = small_trainer(
        tmp_path, dataset=dataset, model=GPT2LMHeadModel(GPT2Config(**shape)).eval(), response_length=8,
        stop_token=None, stop_tokens=["<|pad|>"],
        trainer_kwargs={"reward_funcs": [], "reward_model": reward, "peft_config": lora},
    )  # fmt: skip
    assert {len(ids) for ids in trainer.train_dataset["input_ids"]} == {5, 15}
    rows = trainer.data_collator([row for row in trainer.train_dataset if len(row["input_ids"]) == 15])
    rollout = trainer.sample(rows)
    assert not rollout.ended.all() and trainer.score(rollout).total.isfinite().all()


def test_a_data_collator_of_the_users_own_keeps_its_padding(tmp_path):
    tokenizer = tokenizer_with("<|end|>")
    rows = [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows_of(tokenizer)]
    trainer = RewardTrainer(
        model=make_scorer(len(tokenizer)), args=small_config(tmp_path), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id),
    )  # fmt: skip
    assert trainer.processing_class.pad_token == "<|end|>"
    assert trainer.model.config.pad_token_id == tokenizer.eos_token_id
    assert trainer.compute_loss(trainer.model, trainer.data_collator(rows)).isfinite()
