"""Supervised fine-tuning learns the tokens of assistant turns only, with any chat template."""

from __future__ import annotations

import json

import pytest
from helpers.recipes import tiny_recipe
from helpers.tiny import make_llama, make_tokenizer
from trl import chat_template_utils

from trl_rlaif import UserError
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work import sft
from trl_rlaif.plugins import installed_plugins

pytestmark = pytest.mark.trl

MARKED = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Marked, but without the end of the turn: a model would not learn to stop.
ENDLESS = MARKED.replace(" + '<|end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|end|>' }}")
QWEN = chat_template_utils.qwen2_5_chat_template
TEMPLATES = {"marked": MARKED, "known to TRL": QWEN, "unknown": None, "its marks end too early": ENDLESS}

ASKED = [("user", "what is it?"), ("assistant", "a fox"), ("user", "which?"), ("assistant", "the lazy dog")]
TALKS = [
    [("system", "judge"), *ASKED],
    [("user", "the capital?"), ("assistant", "a city")],
    [("user", "nobody answers")],
]


@pytest.fixture
def trained(tmp_path):
    """A function that makes the stage's trainer for given rows and a given chat template."""

    def trained(rows, template=None, **options):
        tokenizer = make_tokenizer()
        if template == QWEN:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(tmp_path / "model")
        make_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
        (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {"data": "sft.jsonl", "max_steps": 1, "per_device_train_batch_size": 2, **options}
        recipe = tiny_recipe(tmp_path, str(tmp_path / "model"), sft=section)
        return sft.build_trainer(Context(recipe, RunFolder(tmp_path / "out"), installed_plugins()))

    return trained


def talks():
    return [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in TALKS]


def learned(trainer):
    """The decoded text of each contiguous run of labels, over all rows."""
    found = []
    for labels in trainer.train_dataset["labels"]:
        runs = [[]]
        for label in labels:
            if label != -100:
                runs[-1].append(label)
            elif runs[-1]:
                runs.append([])
        found += [trainer.processing_class.decode(run) for run in runs if run]
    return sorted(found)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_the_assistant_says_is_learned_and_nothing_else(trained, template, capsys):
    trainer = trained(talks(), template)
    end = "<|im_end|>" if template == QWEN else "<|end|>"
    # TRL's Qwen template also marks the line break before an answer.
    texts = [text.strip() for text in learned(trainer)]
    assert texts == [f"{said}{end}" for said in ("a city", "a fox", "the lazy dog")]
    marked = template in (MARKED, QWEN)
    assert trainer.args.assistant_only_loss == marked and len(trainer.train_dataset) == (2 if marked else 3)
    assert "1 of 3 conversations are left out" in capsys.readouterr().err


def test_a_recipe_decides_otherwise(trained):
    texts = learned(trained(talks(), MARKED, assistant_only_loss=False))
    assert len(texts) == 3 and any("nobody answers" in text for text in texts)


def test_completions_are_learned_and_their_prompts_are_not(trained):
    texts = learned(trained([{"prompt": "what is it?", "completion": " a fox"}]))
    assert texts == [" a fox<|end|>"]


def test_nothing_to_learn(trained):
    with pytest.raises(UserError, match="No conversation has an assistant turn"):
        trained(talks()[2:])


def test_the_results_say_what_the_loss_is_on(trained, tmp_path):
    trained(talks(), MARKED)
    nothing = dict.fromkeys(("sample", "label", "reward", "rl", "evaluate", "report"))
    section = {"data": "sft.jsonl", "max_steps": 1, "per_device_train_batch_size": 2}
    recipe = tiny_recipe(tmp_path, str(tmp_path / "model"), sft=section, **nothing)
    numbers = run_recipe(recipe, installed_plugins(), tmp_path / "run").results()["sft"]
    assert (numbers["rows"], numbers["loss_on"]) == (2, "assistant turns")
