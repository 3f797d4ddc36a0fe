"""Exported models give the run's own numbers in programs that do not know this library."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.families import save_family
from helpers.templates import CHANNELS, OPENED, QWEN
from helpers.tiny import CHAT_TEMPLATE, make_tokenizer, save_tiny_model
from helpers.trained import add_trained, make_run
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from trl_rlaif import RunError, UserError, load_reward_model
from trl_rlaif.encoding import encode_prompt, encode_response, set_template_kwargs
from trl_rlaif.export import ExportOptions, export_model, merging
from trl_rlaif.export.templates import conversation_template
from trl_rlaif.models.loading import load_tokenizer
from trl_rlaif.stopping import end_of_turn

TURNS = [
    [{"role": "user", "content": "what is a city?"}, {"role": "assistant", "content": "the quick brown fox"}],
    [
        {"role": "system", "content": "You are a dog."},
        {"role": "user", "content": "1 or 2?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "no.\n\nthe lazy dog jumps over it, again and again"},
    ],
]
ROWS = [[5, 9, 4, 7, 8, 30, 2], [5, 3, 60, 2]]


def run_scores(folder, turns=TURNS, **options):
    """Scores from the run's own reward model, one conversation at a time, tokenized as in training."""
    model, tokenizer = load_reward_model(folder, **options), load_tokenizer(str(folder))
    rows = [encode_prompt(tokenizer, each[:-1]) + encode_response(tokenizer, each[-1]["content"]) for each in turns]
    with torch.no_grad():
        ids = [torch.tensor([row]) for row in rows]
        return torch.tensor([model(input_ids=x, attention_mask=torch.ones_like(x)).logits[0, 0].item() for x in ids])


def plain_scores(folder, side="right"):
    """The same scores from plain transformers: the chat template's text, in a padded batch."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert type(model).__module__.startswith("transformers.") and model.config.num_labels == 1
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in TURNS]
    inputs = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        return model(**inputs).logits[:, 0].float()


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}

    def path(kind):
        folder = tmp_path_factory.mktemp(kind)
        if kind not in made:
            made[kind] = save_tiny_model(folder) if kind == "llama" else save_family(kind, folder)
        return made[kind]

    return path


# ---- Reward models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_a_classifier_of_transformers_gives_the_runs_scores(families, kind, tmp_path):
    run = add_trained(make_run(tmp_path, families(kind)), "reward")
    found = export_model(run.path, "reward", ExportOptions(merge=True, output=tmp_path / "new"))
    assert found.folder == tmp_path / "new" and found.difference < 1e-5
    expected = run_scores(run / "reward")
    assert expected.abs().min() > 0.01 and expected.std() > 0.01
    for side in ("left", "right"):
        torch.testing.assert_close(plain_scores(found.folder, side), expected, rtol=1e-4, atol=1e-5)


def test_pipelines_give_scores_and_no_probabilities(families, tmp_path):
    run = add_trained(make_run(tmp_path, families("llama")), "reward")
    folder = export_model(run.path, "reward", ExportOptions(merge=True)).folder
    assert folder == run / "exports" / "reward-merged"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in TURNS]
    found = pipeline("text-classification", model=str(folder), tokenizer=tokenizer)(texts, batch_size=2)
    expected = run_scores(run / "reward")
    assert not ((0 <= expected) & (expected <= 1)).all()  # so they are not probabilities
    assert [each["score"] for each in found] == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_advantage_models_score_is_kept_and_its_expectation_left_out(families, tmp_path):
    run = add_trained(make_run(tmp_path, families("llama")), "reward", advantage=True)
    assert len(load_file(run / "reward" / "adapter_model.safetensors")["base_model.model.score.weight"]) == 2
    folder = export_model(run.path, "reward", ExportOptions(merge=True)).folder
    torch.testing.assert_close(plain_scores(folder), run_scores(run / "reward"), rtol=1e-4, atol=1e-5)


def test_a_base_in_four_bits_is_dequantized_first(families, tmp_path):
    model = save_tiny_model(tmp_path / "model", hidden_size=64)
    sections = {"model": {"dtype": "float32", "quantization": "nf4"}}
    run = add_trained(make_run(tmp_path, model, **sections), "reward", quantization="nf4")
    folder = export_model(run.path, "reward", ExportOptions(merge=True)).folder
    expected = run_scores(run / "reward", dtype="float32", quantization="nf4")
    torch.testing.assert_close(plain_scores(folder), expected, rtol=1e-4, atol=1e-4)
    assert (run_scores(run / "reward", dtype="float32") - expected).abs().max() > 0.01  # unquantized, it differs
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert "It was trained on the base in 4 bits (NF4)." in (folder / "README.md").read_text()


def test_bfloat16_stays_bfloat16(families, tmp_path):
    run = add_trained(make_run(tmp_path, families("llama"), model={"dtype": "bfloat16"}), "reward")
    folder = export_model(run.path, "reward", ExportOptions(merge=True)).folder
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    torch.testing.assert_close(plain_scores(folder), run_scores(run / "reward", dtype="bfloat16"), rtol=0.1, atol=0.05)


def test_a_tokenizer_without_a_token_for_padding_gets_one(tmp_path):
    """Otherwise the end-of-turn token, where the score is read, would be taken for padding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["a city"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template="{{ messages[0]['content'] }}: "
    )
    model = save_tiny_model(tmp_path / "model")
    shutil.copytree(model, tmp_path / "other", dirs_exist_ok=True)
    small = AutoModelForCausalLM.from_pretrained(model)
    small.resize_token_embeddings(len(tokenizer))
    small.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert load_tokenizer(str(tmp_path / "other")).pad_token == "<|end|>"

    run = add_trained(make_run(tmp_path, str(tmp_path / "other")), "reward")
    folder = export_model(run.path, "reward", ExportOptions(merge=True)).folder
    assert AutoTokenizer.from_pretrained(folder).pad_token == merging.PAD
    short = [turns[-2:] for turns in TURNS]
    expected = run_scores(run / "reward", short)
    found = AutoModelForSequenceClassification.from_pretrained(folder)
    exported = AutoTokenizer.from_pretrained(folder)
    texts = [exported.apply_chat_template(turns, tokenize=False) for turns in short]
    with torch.no_grad():
        scores = found(**exported(texts, padding=True, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_family_without_a_classifier_is_refused(families, tmp_path):
    run = add_trained(make_run(tmp_path, families("granite")), "reward")
    with pytest.raises(UserError, match="no sequence classifier of the family 'granite'.*load_reward_model loads"):
        export_model(run.path, "reward", ExportOptions(merge=True))
    assert not (run / "exports" / "reward-merged").exists()
    folder = export_model(run.path, "reward").folder
    torch.testing.assert_close(run_scores(folder), run_scores(run / "reward"), rtol=0, atol=0)


# ---- Policies and judges --------------------------------------------------------------------------------


def logits(model):
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1].float() for ids in ROWS])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_merged_policy_is_base_plus_adapter(families, kind, tmp_path):
    run = add_trained(make_run(tmp_path, families(kind)), "policy")
    folder = export_model(run.path, "policy", ExportOptions(merge=True)).folder
    base = AutoModelForCausalLM.from_pretrained(families(kind))
    weights, before = load_file(folder / "model.safetensors"), dict(base.state_dict())
    adapter = load_file(run / "policy" / "adapter_model.safetensors")
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    for name in changed:
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{layer}.lora_{side}.weight"].double() for side in "AB")
        expected = before[name].double() + 8 / 4 * b @ a
        assert (weights[name].double() - expected).abs().max() < 4e-7 * expected.abs().max()
    assert len(changed) == len(adapter) // 2 == 6
    adapted = PeftModel.from_pretrained(base, run / "policy").eval()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder)), logits(adapted), rtol=1e-4, atol=1e-4
    )
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE


@pytest.mark.filterwarnings("ignore:Model with")  # PEFT's own warning about it
def test_an_adapter_that_cannot_be_merged_is_refused(families, tmp_path):
    """The embedding has an adapter, and is tied to the output head, which has none."""
    small = AutoModelForCausalLM.from_pretrained(families("llama"))
    small.config.tie_word_embeddings = True
    small.tie_weights()
    small.save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    run = add_trained(make_run(tmp_path, str(tmp_path / "tied")), "policy", target_modules=["embed_tokens"])
    with pytest.raises(RunError, match="outputs differ from those of base and adapter"):
        export_model(run.path, "policy", ExportOptions(merge=True))
    assert not (run / "exports" / "policy-merged").exists()


def test_nothing_of_this_machine_travels(families, tmp_path):
    run = make_run(tmp_path, families("llama"))
    for what in ("policy", "reward"):
        add_trained(run, what)
        for merge in (False, True):
            folder = export_model(run.path, what, ExportOptions(merge=merge, base="me/tiny")).folder
            for file in folder.iterdir():
                assert str(tmp_path).encode() not in file.read_bytes(), file
                assert families("llama").encode() not in file.read_bytes(), file


# ---- Chat templates of reward models --------------------------------------------------------------------

GLM = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}<|start|>"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
NAMED = (
    "{% set ns = namespace(first=true) %}{% macro turn(m) %}{{ bos_token if ns.first }}{% set ns.first = false %}"
    "{{ m.role }}:\n{{ m.content }}<|end|>\n{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}\n"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN, OPENED, CHANNELS, GLM, NAMED])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False, "effort": None, "tone": "dry \"and\" '<|x|>'"}])
def test_a_conversation_is_rendered_as_it_was_trained_on(template, kwargs):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    set_template_kwargs(tokenizer, kwargs)
    rows = [encode_prompt(tokenizer, each[:-1]) + encode_response(tokenizer, each[-1]["content"]) for each in TURNS]
    prompts = [
        tokenizer.apply_chat_template(each[:-1], tokenize=False, add_generation_prompt=True, **kwargs) for each in TURNS
    ]
    tokenizer.chat_template = conversation_template(
        template, tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)), kwargs
    )
    assert [tokenizer.apply_chat_template(each, return_dict=False) for each in TURNS] == rows
    # Prompts are unchanged, and a caller's variables override the run's.
    assert [tokenizer.apply_chat_template(t[:-1], tokenize=False, add_generation_prompt=True) for t in TURNS] == prompts
    if template == QWEN and kwargs:
        thinking = tokenizer.apply_chat_template(
            TURNS[0][:-1], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert prompts[0].endswith("</think>\n\n") and "<think>" not in thinking


def test_tokens_that_merge_where_a_response_begins_are_said(tmp_path, capsys):
    shutil.copytree(save_tiny_model(tmp_path / "model"), tmp_path / "spaced")
    template = (
        "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}answer: {% endif %}"
    )
    (tmp_path / "spaced" / "chat_template.jinja").write_text(template)
    run = add_trained(make_run(tmp_path, str(tmp_path / "spaced")), "reward")
    export_model(run.path, "reward", ExportOptions(merge=True))
    assert "rendered text has other tokens than the run's rows had" in " ".join(capsys.readouterr().err.split())
