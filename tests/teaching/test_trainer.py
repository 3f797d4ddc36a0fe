"""JudgeTrainer: its loss is the cross-entropy of the answers read by the labeler, and training changes the labels."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from helpers.judges import MODELS, TOKENIZERS, make_prompt
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments
from trl.trainer.utils import disable_dropout_in_model
from trl_rlaif_direct import DirectLabeler
from trl_rlaif_distilled import DistilledLabeler

from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.models.shared_model import active_adapter
from trl_rlaif.teaching import Lesson
from trl_rlaif.teaching.trainer import JudgeTrainer, tokenized
from trl_rlaif.testing import make_pairs

LABELERS = {"distilled": DistilledLabeler(), "one order": DistilledLabeler(orders="21"), "direct": DirectLabeler()}


def make_judge(model="llama", tokenizer="split digits"):
    torch.manual_seed(0)
    return LocalJudge(MODELS[model](), TOKENIZERS[tokenizer](), make_prompt(), "tiny")


def lessons_of(pairs, p, ratings=None):
    ratings = ratings or [None] * len(pairs)
    return [Lesson(*of[:2], "labels", of[2]) for of in zip(pairs, p, ratings, strict=True)]


def make_trainer(judge, labeler, pairs, p, folder, ratings=None, **arguments):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft = get_peft_model(judge.model, config, adapter_name="judge")
    rows, left_out = tokenized(lessons_of(pairs, p, ratings), labeler, judge)
    assert not left_out
    dataset = Dataset.from_list(rows)
    ending = labeler.questions(pairs[0], judge.prompt)[0].ending
    options = {"use_cpu": True, "report_to": "none", "remove_unused_columns": False, "disable_tqdm": True}
    return JudgeTrainer(
        peft,
        TrainingArguments(str(folder), **options | arguments),
        train_dataset=dataset,
        eval_dataset=dataset,
        labeler=labeler,
        candidates=judge.candidates(labeler.candidates, ending),
        pad_id=judge.pad_id,
    )


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def plainly(judge, labeler, pairs, p, ratings=None):
    """The mean loss, from the judge's own answers, in which a candidate's probability covers all its tokenizations."""
    total = 0.0
    for pair, target, rated in zip(pairs, p, ratings or [None] * len(pairs), strict=True):
        answers = []
        for question in labeler.questions(pair, judge.prompt):
            ((_, (answer,)),) = judge.ask([[question]], labeler.candidates)
            odds = [math.exp(x) for x in answer.logprobs[0]]
            answers.append([x / sum(odds) for x in odds])
        if rated is not None:
            logs = [(q, math.log(x)) for known, said in zip(rated, answers, strict=True)
                    for q, x in zip(known, said, strict=True)]  # fmt: skip
            total -= sum(q * log for q, log in logs) / 2
        elif isinstance(labeler, DirectLabeler):
            first, second = answers
            higher = sum(a * ((i > j) + (i == j) / 2) * b for i, a in enumerate(first) for j, b in enumerate(second))
            total -= target * math.log(higher) + (1 - target) * math.log(1 - higher)
        else:
            orders = {"both": "12 21", "21": "21"}[labeler.options.orders].split()
            for order, (one, two) in zip(orders, answers, strict=True):
                right = target if order == "12" else 1 - target
                total -= (right * math.log(one) + (1 - right) * math.log(two)) / len(orders)
    return total / len(pairs)


@pytest.mark.parametrize("labeler", LABELERS.values(), ids=LABELERS)
@pytest.mark.parametrize("tokenizer", ["split digits", "joined digits"])
def test_the_loss_is_the_cross_entropy_of_what_the_labeler_reads(tmp_path, labeler, tokenizer):
    judge, pairs = make_judge(tokenizer=tokenizer), make_pairs()
    p = [0.1 + 0.8 * i / len(pairs) for i in range(len(pairs))]
    trainer = make_trainer(judge, labeler, pairs, p, tmp_path)
    trainer.model.eval()
    found = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    assert found == pytest.approx(plainly(judge, labeler, pairs, p), abs=2e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_the_loss_on_another_judges_ratings_is_the_cross_entropy_with_them(tmp_path, every):
    """Also together with pairs of which only p is known."""
    judge, pairs, labeler = make_judge(), make_pairs(), DirectLabeler()
    draws = torch.rand(len(pairs), 2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    draws[0, 0] = torch.eye(10, dtype=torch.float64)[3]
    drawn = (draws / draws.sum(-1, keepdim=True)).tolist()
    ratings = [of if i % every == 0 else None for i, of in enumerate(drawn)]
    p = [0.1 + 0.8 * i / len(pairs) for i in range(len(pairs))]
    trainer = make_trainer(judge, labeler, pairs, p, tmp_path, ratings)
    trainer.model.eval()
    found = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    assert found == pytest.approx(plainly(judge, labeler, pairs, p, ratings), abs=2e-6)


def gradients_of(folder, name, packs=True, **arguments):
    """The adapter's gradients in float64, from a backward pass in a separate thread, as on a GPU."""
    judge, pairs, found = make_judge(name), make_pairs(), {}

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **more):
            found.update({n: x.grad.clone() for n, x in model.named_parameters() if x.requires_grad})

    arguments |= {"max_steps": 1, "per_device_train_batch_size": len(pairs), "max_grad_norm": 0.0}
    trainer = make_trainer(judge, DistilledLabeler(), pairs, [0.9] * len(pairs), folder, **arguments)
    disable_dropout_in_model(trainer.model.double())
    trainer.scorer.packs &= packs
    trainer.add_callback(Take())
    backward = trainer.accelerator.backward
    with ThreadPoolExecutor(1) as pool:
        trainer.accelerator.backward = lambda loss, **more: pool.submit(backward, loss, **more).result()
        trainer.train()
    return found


@pytest.mark.parametrize("name", ["llama", "narrow window", "gpt2"])
def test_packed_questions_give_the_gradients_of_padded_ones_also_where_layers_are_computed_again(tmp_path, name):
    packed, padded = (gradients_of(tmp_path, name, packs) for packs in (True, False))
    assert packed.keys() == padded.keys() and len(packed) > 4
    for key, value in packed.items():
        assert (value - padded[key]).norm() < 1e-7 * padded[key].norm(), key  # the loss is float32
    again = gradients_of(tmp_path, name, gradient_checkpointing=True)
    assert all(torch.equal(again[key], value) for key, value in packed.items())


@pytest.mark.parametrize("labeler", [DistilledLabeler(), DirectLabeler()], ids=["distilled", "direct"])
def test_what_is_learned_is_what_the_labeler_says(tmp_path, labeler):
    judge, pairs = make_judge(), make_pairs()
    p = [0.85 if i % 2 else 0.15 for i in range(len(pairs))]
    before = [label.p for label in sorted(labeler.label(pairs, judge), key=lambda label: label.id)]
    arguments = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    trainer = make_trainer(judge, labeler, pairs, p, tmp_path, **arguments)
    base = {n: x.clone() for n, x in trainer.model.named_parameters() if not x.requires_grad}
    trainer.train()
    trainer.model.eval()
    assert all(torch.equal(x, base[n]) for n, x in trainer.model.named_parameters() if not x.requires_grad)
    targets = dict(zip((pair.id for pair in pairs), p, strict=True))
    after = {label.id: label.p for label in labeler.label(pairs, judge)}
    assert max(abs(after[id] - target) for id, target in targets.items()) < 0.1
    with active_adapter(trainer.model, None):
        again = [label.p for label in sorted(labeler.label(pairs, judge), key=lambda label: label.id)]
    assert again == before


def test_the_adapter_of_the_best_evaluation_is_kept(tmp_path):
    judge, pairs = make_judge(), make_pairs()
    trainer = make_trainer(
        judge, DistilledLabeler(), pairs, [0.9] * len(pairs), tmp_path, max_steps=6, learning_rate=1e-2,
        per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    # The held-out labels say the opposite, so training makes their loss worse.
    trainer.eval_dataset = trainer.train_dataset.map(lambda row: row | {"p": 0.1})
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == min(losses) < losses[-1]


def test_questions_longer_than_allowed_are_counted_and_left_out(tmp_path):
    judge, pairs = make_judge(), make_pairs()
    lessons = lessons_of(pairs, [1.0] * len(pairs))
    rows, _ = tokenized(lessons, DistilledLabeler(), judge)
    longest = max(len(tokens) for row in rows for tokens in row["contexts"])
    kept, left_out = tokenized(lessons, DistilledLabeler(), judge, longest)
    assert left_out and len(kept) == len(pairs) - left_out
    assert all(len(tokens) + 1 <= longest for row in kept for tokens in row["contexts"])
