"""What an update of TRL's own trainers holds, as predicted, against the most tensors that are alive in it."""

from __future__ import annotations

import pytest
from helpers.alive import Alive
from helpers.recipes import tiny_recipe
from helpers.tiny import make_llama, make_tokenizer

from trl_rlaif.artifacts import RunFolder
from trl_rlaif.memory import plan_memory
from trl_rlaif.memory.plan import ALWAYS
from trl_rlaif.memory.settings import with_settings
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.runner import run_recipe
from trl_rlaif.stages import dpo, groups
from trl_rlaif.stages.context import Context

pytestmark = pytest.mark.trl

VOCABULARY = 6000  # so that logits are most of what there is, as in models of real size
NONE = {"sample": None, "label": None, "reward": None, "evaluate": None, "report": None}
RL = {"total_episodes": 4, "response_length": 24, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Folder of a tiny model with a large vocabulary."""
    folder = tmp_path_factory.mktemp("wide")
    make_llama(VOCABULARY).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def _measured(trainer):
    """The peak of an update's forward and backward passes, and the shapes of its input and logits."""
    model, shapes = trainer.accelerator.unwrap_model(trainer.model), []
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = parameter.detach().clone().zero_()  # counted elsewhere
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in learning)]
    alive = Alive({tensor.untyped_storage().data_ptr() for tensor in known})
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(out.shape[:2]))

    def watched(function):
        def watching(*args, **kwargs):
            shapes.clear()
            with alive:
                return function(*args, **kwargs)

        return watching

    compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward
    trainer.compute_loss = watched(compute_loss)

    def watched_backward(*args, **kwargs):
        with alive:
            return backward(*args, **kwargs)

    trainer.accelerator.backward = watched_backward
    trainer.args.max_steps = 1
    trainer.train()
    return alive.peak, shapes[0]


def _predicted(recipe):
    plan = plan_memory(recipe)
    return plan.predict("update") - sum(p.bytes for p in plan.parts if (p.stage, p.when) == ("rl", ALWAYS))


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_an_update_of_a_group_trainer(wide_model, tmp_path, algorithm):
    rl = RL | {"algorithm": algorithm, "rewards": ["helpers.rewards:length_penalty"], "num_generations": 2}
    recipe = tiny_recipe(tmp_path, wide_model, rl=rl | {"max_prompt_length": 16}, **NONE)
    trainer, _, _ = groups.build_trainer(Context(recipe, RunFolder(tmp_path / "out"), installed_plugins()))
    peak, (rows, tokens) = _measured(trainer)
    assert (rows, tokens) == (4, 25)  # and one that TRL cuts off
    assert _predicted(recipe) == pytest.approx(peak, rel=0.15)


def test_an_update_of_dpo(wide_model, tmp_path):
    rl = RL | {"algorithm": "dpo", "per_device_train_batch_size": 2, "max_length": 512}
    recipe = tiny_recipe(tmp_path, wide_model, reward=None, rl=rl, evaluate=None, report=None)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out", only=["sample", "label"])
    trainer, _ = dpo.build_trainer(Context(recipe, folder, installed_plugins()))
    peak, (rows, tokens) = _measured(trainer)
    assert rows == 4
    assert _predicted(with_settings(recipe, {("rl", "max_length"): tokens})) == pytest.approx(peak, rel=0.15)


def test_what_trls_trainers_train_and_what_is_said(tiny_model, tmp_path):
    parts, notes = {}, {}
    for algorithm in ("ppo", "grpo", "dpo"):
        folder = tmp_path / algorithm
        folder.mkdir()
        plan = plan_memory(tiny_recipe(folder, tiny_model, rl={"algorithm": algorithm}))
        parts[algorithm] = {p.name: p.bytes for p in plan.parts if (p.stage, p.when) == ("rl", ALWAYS)}
        notes[algorithm] = " ".join(plan.notes)
    adapter = parts["grpo"]["reward adapter (frozen)"]
    assert parts["grpo"]["policy adapter: weights"] == parts["dpo"]["policy adapter: weights"] == adapter
    assert parts["ppo"]["policy and value adapters: weights"] > 2 * adapter
    assert not any("reward" in name for name in parts["dpo"])
    assert "on a CPU alone" in notes["grpo"] and "on a CPU alone" in notes["dpo"] and "alone" not in notes["ppo"]
