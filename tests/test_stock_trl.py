"""docs/stock_trl.md: its examples train unchanged with TRL's own trainers on tiny models."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers.pages import Reader, python_blocks

from trl_rlaif.testing import make_pairs

pytestmark = pytest.mark.trl

GIVEN, *EXAMPLES = python_blocks("docs/stock_trl.md")


def _logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    return Reader(tmp_path, monkeypatch)


@pytest.fixture
def given(reader):
    """The names of the page's first block, with more pairs: of its two, the tiny judge may be sure about none."""
    names = {}
    reader.run(GIVEN, names)
    return names | {"pairs": [*names["pairs"], *make_pairs(6)]}


def test_every_example_is_short_and_of_its_own_trainer():
    assert all(len(example.splitlines()) < 30 for example in EXAMPLES)
    for trainer in ("GRPOTrainer", "RLOOTrainer", "RewardTrainer", "DPOTrainer"):
        assert any(re.search(rf"from trl import .*\b{trainer}\b", example) for example in EXAMPLES)


def test_they_train(reader, given):
    names, judge, grpo, ranking, rubric, dpo, reward, rloo = dict(given), *EXAMPLES
    torch.manual_seed(0)
    reader.run(judge, names)
    reader.run(grpo, names)
    ratings = _logged(names["trainer"], "rewards/direct/mean")
    assert len(ratings) == 2 and all(-1 <= rating <= 1 for rating in ratings)

    reader.run(ranking, names)
    means = _logged(names["trainer"], "rewards/ranking/mean")
    assert means == pytest.approx([0, 0], abs=1e-6) and max(_logged(names["trainer"], "rewards/ranking/std")) > 0

    reader.run(rubric, names)
    shares = _logged(names["trainer"], "rewards/rubric/mean")
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)

    reader.run(dpo, names)
    rows = {row["prompt"][0]["content"]: row for row in names["rows"]}
    assert rows and len(_logged(names["trainer"], "loss")) == 2
    for pair in given["pairs"]:
        prompt = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0]["content"]
        if prompt in rows:
            preferred = pair.response_1 if names["p"][pair.id] > 0.5 else pair.response_2
            assert rows[prompt]["chosen"][0]["content"] == preferred

    reader.run(reward, names)
    assert all(math.isfinite(loss) for loss in _logged(names["trainer"], "loss"))

    reader.run(rloo, names)
    prompt = [{"role": "user", "content": "What is a fox?"}]
    completions = [[{"role": "assistant", "content": text}] for text in ("A dog.", "It is a city of the lazy fox.")]
    (first, second) = names["advantage"]([prompt, prompt], completions)
    assert first != second and max(abs(first), abs(second)) <= 4


def test_the_advantage_loss_is_the_librarys(reader, given):
    """On the same batch, the example's trainer and trl_rlaif.RewardTrainer compute the same loss."""
    from trl import RewardConfig
    from trl_rlaif_advantage import AdvantageModel

    from trl_rlaif import RewardTrainer

    reader.run(EXAMPLES[5], given)
    ours = RewardTrainer(
        given["policy"],
        args=RewardConfig("other", **given["settings"]),
        train_dataset=given["comparisons"],
        reward_transforms=[AdvantageModel(margin=4.0)],
        packing=False,
        score_at_end=False,  # as in TRL
    )
    ours.model.load_state_dict(given["trainer"].model.state_dict())
    losses = []
    for trainer in (given["trainer"], ours):
        trainer.model.eval()
        examples = [trainer.train_dataset[i] for i in range(4)]
        losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(examples)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
