"""docs/stock_trl.md: its examples train with TRL's own trainers, as they stand, on tiny models."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch

from trl_rlaif.testing import make_pairs, make_preference_dataset, make_prompt_dataset, save_tiny_model

pytestmark = pytest.mark.trl

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "stock_trl.md").read_text(encoding="utf-8")
GIVEN, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def _run(example, namespace):
    exec(compile(example, "stock_trl.md", "exec", dont_inherit=True), namespace)


def _logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Tiny ones in place of what the page's first block gives."""
    model = save_tiny_model(tmp_path_factory.mktemp("model"), length=2048)
    small = {"max_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "report_to": "none"}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    found = {
        "policy": model,
        "judge_model": model,
        "judge_prompt": str(ROOT / "recipes" / "prompts" / "general"),
        "prompts": make_prompt_dataset(4),
        "comparisons": make_preference_dataset(8).select_columns(["prompt", "chosen", "rejected"]),
        "pairs": make_pairs(6),
        "settings": {"per_device_train_batch_size": 4, **small, **quiet},
    }
    names = {t.id for node in ast.parse(GIVEN).body if isinstance(node, ast.Assign) for t in node.targets}
    assert names == found.keys()
    return found


def test_the_first_block_gives_what_the_test_replaces(given):
    assert (ROOT / "recipes" / "prompts" / "helpfulness").is_dir()  # which it names


def test_every_example_is_short_and_of_its_own_trainer():
    assert all(len(example.splitlines()) < 30 for example in EXAMPLES)
    for trainer in ("GRPOTrainer", "RLOOTrainer", "RewardTrainer", "DPOTrainer"):
        assert any(re.search(rf"from trl import .*\b{trainer}\b", example) for example in EXAMPLES)


def test_they_train(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, judge, grpo, ranking, rubric, dpo, reward, rloo = dict(given), *EXAMPLES
    torch.manual_seed(0)
    _run(judge, names)
    _run(grpo, names)
    ratings = _logged(names["trainer"], "rewards/direct/mean")
    assert len(ratings) == 2 and all(-1 <= rating <= 1 for rating in ratings)

    _run(ranking, names)
    means = _logged(names["trainer"], "rewards/ranking/mean")
    assert means == pytest.approx([0, 0], abs=1e-6) and max(_logged(names["trainer"], "rewards/ranking/std")) > 0

    _run(rubric, names)
    shares = _logged(names["trainer"], "rewards/rubric/mean")
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)

    _run(dpo, names)
    rows = {row["prompt"][0]["content"]: row for row in names["rows"]}
    assert rows and len(_logged(names["trainer"], "loss")) == 2
    for pair in given["pairs"]:
        prompt = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0]["content"]
        if prompt in rows:
            preferred = pair.response_1 if names["p"][pair.id] > 0.5 else pair.response_2
            assert rows[prompt]["chosen"][0]["content"] == preferred

    _run(reward, names)
    assert all(math.isfinite(loss) for loss in _logged(names["trainer"], "loss"))

    _run(rloo, names)
    prompt = [{"role": "user", "content": "What is a fox?"}]
    completions = [[{"role": "assistant", "content": text}] for text in ("A dog.", "It is a city of the lazy fox.")]
    (first, second) = names["advantage"]([prompt, prompt], completions)
    assert first != second and max(abs(first), abs(second)) <= 4


def test_the_advantage_loss_is_the_librarys(given, tmp_path, monkeypatch):
    """On the same batch the example's trainer and trl_rlaif.RewardTrainer compute one loss."""
    from trl import RewardConfig
    from trl_rlaif_advantage import AdvantageModel

    from trl_rlaif import RewardTrainer

    monkeypatch.chdir(tmp_path)
    names = dict(given)
    _run(EXAMPLES[5], names)
    ours = RewardTrainer(
        given["policy"],
        args=RewardConfig("other", **given["settings"]),
        train_dataset=given["comparisons"],
        reward_transforms=[AdvantageModel(margin=4.0)],
        packing=False,
        score_at_end=False,  # as TRL's
    )
    ours.model.load_state_dict(names["trainer"].model.state_dict())
    losses = []
    for trainer in (names["trainer"], ours):
        trainer.model.eval()
        examples = [trainer.train_dataset[i] for i in range(4)]
        losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(examples)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
