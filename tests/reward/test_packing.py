"""Packed pairs give the scores and gradients of plain sequences."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from datasets import Dataset
from helpers.reward import small_config
from helpers.tiny import make_scorer, make_tokenizer
from peft import LoraConfig, get_peft_model

from trl_rlaif import RewardTrainer, UserError
from trl_rlaif.models.kernels import attention
from trl_rlaif.models.loading import keep_gradients
from trl_rlaif.reward import scoring
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.heads import add_expected
from trl_rlaif.reward.packing import PADDING, PackedRow, pack, packed_mask
from trl_rlaif.reward.scoring import PairScorer, can_pack

pytestmark = pytest.mark.trl

PAIRS = [
    ([5, 9, 4, 7, 8, 2], [5, 9, 4, 6]),
    ([5, 3], [5, 3, 8, 8, 9, 10, 11, 12, 13]),
    ([6, 7, 8], [9, 10]),
    ([4, 4, 4, 4, 9], [4, 4, 4, 4, 5, 6, 7]),
]
LAYERS = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": 40, "num_labels": 1, "pad_token_id": 0}
LORA = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["score"], "init_lora_weights": False}


def _model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = {"num_key_value_heads": 2, **LAYERS, **COMMON}
    made = {
        "llama": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config)),
        "qwen2": lambda: transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**config)),
        "gpt2": lambda: transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **COMMON)
        ),
        "windowed": lambda: transformers.MistralForSequenceClassification(
            transformers.MistralConfig(sliding_window=4, **config)
        ),
    }
    return made[kind]().eval()  # without GPT-2's dropout, as in training with TRL


def _examples(**columns) -> list[dict]:
    return [
        {"chosen_ids": chosen, "rejected_ids": rejected} | {name: values[i] for name, values in columns.items()}
        for i, (chosen, rejected) in enumerate(PAIRS)
    ]


def _batch(packed: bool, **columns) -> dict:
    return SoftPreferenceCollator(pad_token_id=0, packed=packed)(_examples(**columns))


@pytest.fixture(params=["rows", "groups"])
def layout(request, monkeypatch):
    """How packed pairs reach the model: concatenated in one row, as on a CPU, or as rows of a batch, as elsewhere."""
    if request.param == "groups":
        monkeypatch.setattr(scoring, "_reads_rows", lambda _inner: False)
    return request.param


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "row"),
    [
        ([1, 2, 3], [1, 2, 4, 5], None, ([1, 2, 3, 4, 5], [0, 1, 2, 2, 3], [0, 0, 1, 2, 2], (1, 2, 4))),
        ([1, 2, 3], [1, 2, 4, 5], 1, ([1, 2, 3, 4, 5], [0, 1, 2, 2, 3], [0, 0, 1, 2, 2], (0, 2, 4))),
        ([1, 2], [1, 2, 4], None, ([1, 2, 2, 4], [0, 1, 1, 2], [0, 1, 2, 2], (0, 1, 3))),  # one is the other's prefix
        ([1, 2], [1, 2], None, ([1, 2, 2], [0, 1, 1], [0, 1, 2], (0, 1, 2))),
        ([3], [4], None, ([3, 4], [0, 0], [1, 2], (0, 0, 1))),  # nothing is shared
    ],
)
def test_a_pair_becomes_one_row(chosen, rejected, prompt, row):
    assert PackedRow.of(chosen, rejected, prompt) == PackedRow(*row)


def test_everybody_sees_their_own_sequence_alone():
    segments = pack([PackedRow.of(*pair) for pair in PAIRS], 0)["segments"]
    mask = packed_mask(segments)[:, 0]
    for row, kinds in zip(mask.tolist(), segments.tolist(), strict=True):
        for i, by in enumerate(kinds):
            for j, kind in enumerate(kinds):
                own = kind == by or (kind == 0 and by != PADDING)
                assert row[i][j] == (own and j <= i)


@pytest.mark.parametrize("budget", [10**6, 24])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_packed_scores_and_gradients_are_those_of_plain_sequences(kind, lora, budget, layout):
    model = _model(kind).double()
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **LORA)).double()
    add_expected(model)
    torch.nn.init.normal_(model.base_model.score.modules_to_save["default"].weight if lora else model.score.weight)
    found, weights = {}, torch.randn(3 * len(PAIRS), dtype=torch.float64)
    for packed in (True, False):
        scorer = PairScorer(model, model, budget)
        scores = scorer(**_batch(packed)).logits[:, 0]
        found[packed] = torch.cat((scores, scorer.expected))
        model.zero_grad()
        (found[packed] * weights).sum().backward()
        found[packed, "gradients"] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found[True], found[False], rtol=1e-10, atol=1e-12)
    assert len(found[True, "gradients"]) > 4
    for ours, plain in zip(found[True, "gradients"], found[False, "gradients"], strict=True):
        assert (ours - plain).norm() < 2e-6 * plain.norm()  # transformers' RMSNorm is always float32
    with torch.no_grad():
        for i, pair in enumerate(PAIRS):
            for j, ids in enumerate(pair):
                alone = _alone(model, ids)
                assert found[True][j * len(PAIRS) + i].item() == pytest.approx(alone[-1, 0].item(), abs=1e-10)
                end = PackedRow.of(*pair).ends[0]
                if j == 0 or pair[0][: end + 1] == pair[1][: end + 1]:  # the third pair shares nothing
                    assert found[True][2 * len(PAIRS) + i].item() == pytest.approx(alone[end, 1].item(), abs=1e-10)


def _alone(model, ids) -> torch.Tensor:
    scorer = PairScorer(model, model, 1)
    return scorer._head(scorer._hidden(input_ids=torch.tensor([ids])))[0]


def test_on_an_nf4_base(tmp_path, layout):
    _model("llama").save_pretrained(tmp_path)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    base = keep_gradients(load(tmp_path, dtype=torch.float32, quantization_config=nf4))
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **LORA))
    assert can_pack(model)
    packed, padded = (PairScorer(model, model, 10**6)(**_batch(way)).logits for way in (True, False))
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "windowed"])
def test_what_can_be_packed(kind, layout):
    model = _model(kind).train()
    assert can_pack(model) == (kind != "windowed" or layout == "rows")
    assert model.training


def test_windows_are_not_packed_for_another_device():
    model = _model("windowed")
    assert can_pack(model, torch.device("cpu")) and not can_pack(model, torch.device("cuda"))


def test_groups_refuse_windows(monkeypatch):
    model = _model("windowed")
    monkeypatch.setattr(scoring, "_reads_rows", lambda _inner: False)
    with pytest.raises(UserError, match="sliding windows"):
        PairScorer(model, model, 10**6)(**_batch(True))


def test_windows_hold_in_packed_rows():
    model = _model("windowed").double()
    scorer = PairScorer(model, model, 10**6)
    found = scorer(**_batch(True)).logits[:, 0].view(2, -1)
    assert scorer.windows == [4, 4]
    for i, pair in enumerate(PAIRS):
        for j, ids in enumerate(pair):
            assert found[j, i].item() == pytest.approx(_alone(model, ids)[-1, 0].item(), abs=1e-10)
    plain = _model("llama").double()
    plain.load_state_dict(model.state_dict())
    assert (PairScorer(plain, plain, 10**6)(**_batch(True)).logits[:, 0] - found.flatten()).abs().max() > 1e-6


@pytest.mark.parametrize("change", ["window", "soft cap", "chunks"])
def test_attention_that_is_not_known_is_not_packed(change, monkeypatch):
    model = _model("llama")
    if change == "window":  # in the config, but not passed to the attention
        model.config.sliding_window = 4096
    if change == "chunks":
        model.config.attention_chunk_size = 4096
    if change == "soft cap":
        original = attention.refuse_unknown
        monkeypatch.setattr(attention, "refuse_unknown", lambda more: original({**more, "softcap": 30.0}))
    assert not scoring._reads_rows(model)
    assert can_pack(model) == (change == "soft cap")  # groups use the model's own attention


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_eager_attention_packs_too(kind):
    model = _model(kind)
    model.set_attn_implementation("eager")
    assert can_pack(model)


def test_an_attention_that_ignores_the_mask_is_found_out(monkeypatch):
    model = _model("llama")
    model.set_attn_implementation("eager")
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda self, *a, attention_mask=None, **k: forward(self, *a, **k))
    assert not can_pack(model)


def _trainer(folder, model, **kwargs):
    tokenizer = make_tokenizer()
    data = Dataset.from_list(_examples(prompt_length=[2, 1, 1, 3]))
    return RewardTrainer(
        model=model, args=small_config(folder), train_dataset=data, processing_class=tokenizer, **kwargs
    )


def test_what_cannot_be_packed_is_said_once(tmp_path, caplog):
    model = _model("windowed")
    model.set_attn_implementation("eager")
    with caplog.at_level(logging.INFO, "trl_rlaif"):
        trainer = _trainer(tmp_path, model)
    assert not trainer.data_collator.packed
    assert [record.message for record in caplog.records if record.name.startswith("trl_rlaif.reward")] == [
        "MistralForSequenceClassification cannot be trained on packed pairs; every prompt is computed twice."
    ]
    with pytest.raises(UserError, match="cannot be trained on packed pairs"):
        _trainer(tmp_path, model, packing=True)
    assert not _trainer(tmp_path, _model("llama"), packing=False).data_collator.packed


def test_the_datasets_prompt_length_reaches_the_row(tmp_path):
    trainer = _trainer(tmp_path, make_scorer(40))
    assert trainer.data_collator.packed
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch["ends"][:, 0].tolist()) == [0, 0, 1, 2]


def test_the_second_output_begins_at_zero_and_is_saved_with_the_first(tmp_path):
    model = _model("llama")
    before = model.score.weight.detach().clone()
    add_expected(model)
    assert torch.equal(model.score.weight, torch.cat((before, torch.zeros_like(before))))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.score.weight, model.score.weight)


def test_a_head_that_is_not_trained_takes_no_second_output():
    model = get_peft_model(_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="not trained"):
        add_expected(model)
    with pytest.raises(UserError, match="no linear head"):
        add_expected(torch.nn.Linear(2, 1))
