"""Checks across the sections of a recipe: each stage's requirements on the others."""

from __future__ import annotations

from typing import Any

from trl_rlaif.algorithms import ALGORITHMS, Algorithm
from trl_rlaif.recipe.sections import FORGET_SET, STAGES, SampleSection, reward_name
from trl_rlaif.recipe.source import Source


def check_together(source: Source) -> None:
    """Report each stage whose requirements are not met."""
    present = set(source.data)
    if not present & set(STAGES):
        source.report((), "the recipe has no stage.", f"Add at least one of {', '.join(STAGES)}.")
    _check_pairs(source, present)
    if "rl" in present:
        _check_rl(source, present)
        _check_selectors(source)
        _check_labelers(source)
    if "evaluate" in present:
        _check_evaluate(source, present)
    _check_taught(source, present)
    if isinstance(source.data.get("rounds"), dict):
        _check_rounds(source, present)


def _check_pairs(source: Source, present: set[Any]) -> None:
    pairs = _value(source, "data", "pairs") is not None
    if "sample" in present and _value(source, "data", "prompts") is None:
        source.report(("sample",), "'sample' has no prompts.", "Set data.prompts.")
    if "sample" in present and pairs:
        what = "data.pairs replaces sampled responses, but the recipe also has 'sample'."
        source.report(("data", "pairs"), what, "Remove one of the two.")
    if "label" in present and "sample" not in present and not pairs:
        source.report(("label",), "'label' has no pairs to judge.", "Add 'sample', or set data.pairs.")
    if _value(source, "sample", "sampler") is not None:
        _check_sampler(source)
    elif isinstance(_value(source, "label", "ranking"), dict):
        _check_ranking(source, present)
    if isinstance(_value(source, "label", "jury"), dict):
        _check_jury(source)
    if "reward" in present:
        _check_preferences(source, present, "reward", "reward")


def _check_sampler(source: Source) -> None:
    """Report keys that control sampling if a plugin makes the pairs."""
    for key in ("num_responses", "redraws", "keep_pairs"):
        if _value(source, "sample", key) not in (None, SampleSection.model_fields[key].default):
            what = f"'{key}' controls how pairs are sampled, but sample.sampler makes them."
            source.report(("sample", key), what, "Leave out one of the two.")
    if isinstance(_value(source, "label", "ranking"), dict):
        what = "'label' ranks all responses to a prompt, but sample.sampler makes its own pairs."
        source.report(("label", "ranking"), what, "Leave out one of the two.")


def _check_rounds(source: Source, present: set[Any]) -> None:
    """Check that a round samples, labels its samples, and trains the policy on these labels."""
    number, previous = _value(source, "rounds", "number"), _value(source, "rounds", "previous")
    if number in (None, 1) and previous is None:
        return
    for name in ("sample", "label", "rl"):
        if name == "sample" and _value(source, "data", "pairs") is not None:
            what = "each of the 'rounds' samples from its policy, but data.pairs replaces sampled responses."
            source.report(("data", "pairs"), what, "Remove one of the two.")
        elif name not in present:
            source.report(("rounds",), f"a round needs '{name}', which the recipe does not have.", f"Add '{name}'.")
    algorithm, rewards = _algorithm(source), _value(source, "rl", "rewards")
    names = [reward_name(entry) for entry in rewards] if isinstance(rewards, list) else ["reward"]
    if (algorithm is None or algorithm.samples) and "reward" not in names:
        what = "'rounds' labels responses for the reward model, which rl.rewards does not use."
        fix = "Add reward to rl.rewards, set rl.algorithm to dpo, or leave out rounds and train for longer."
        source.report(("rl", "rewards"), what, fix)
    if _value(source, "rounds", "earlier") is not None and "reward" not in present:
        what = "'earlier' is a fraction of the reward model's preferences, but the recipe has no 'reward'."
        source.report(("rounds", "earlier"), what, "Leave it out.")
    if _value(source, "reward", "policies"):
        what = "'policies' names the policies that wrote the responses, but each round samples its own."
        source.report(("reward", "policies"), what, "Leave out one of the two.")
    if _value(source, "rl", "precompute_ref_log_probs") and _value(source, "rounds", "reference") != "previous":
        what = "TRL precomputes log-probabilities of the policy at the start of a round, not of the initial one."
        source.report(("rl", "precompute_ref_log_probs"), what, "Leave it out, or set rounds.reference to previous.")


def _check_taught(source: Source, present: set[Any]) -> None:
    """Check that a taught judge has a stage that teaches it, and contrasts have responses."""
    asked = [("label", "judge"), ("evaluate", "judge")]
    for section, key in (("label", "compare"), ("evaluate", "judges")):
        several = _value(source, section, key)
        asked += [(section, key, name, "judge") for name in several] if isinstance(several, dict) else []
    for path in asked:
        value: Any = source.data
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value == "taught" and "judge" not in present:
            source.report(
                path, "the judge is 'taught', but the recipe has no section 'judge' to teach it.", "Add 'judge'."
            )
    if "judge" not in present:
        return
    contrasts = _value(source, "judge", "contrasts")
    if contrasts != [] and "sample" not in present and _value(source, "data", "pairs") is None:
        what = "'judge' has no responses to make contrasts from."
        source.report(("judge",), what, "Add 'sample', set data.pairs, or set judge.contrasts to [].")


def _check_ranking(source: Source, present: set[Any]) -> None:
    path, ranking = ("label", "ranking"), _value(source, "label", "ranking")
    many = _value(source, "sample", "num_responses") or 2
    if "sample" in present and isinstance(many, int) and many < 3:
        source.report(
            path, "'label' ranks responses, but 'sample' draws only two.", "Set sample.num_responses, for example to 4."
        )
    elif "sample" in present and _value(source, "sample", "keep_pairs") != "all":
        what = "'label' ranks all responses, but 'sample' keeps only the first two."
        source.report(path, what, "Set sample.keep_pairs to all.")
    if _value(source, "label", "calibration") is not None:
        what = "label.calibration calibrates single labels, but a ranking combines them."
        source.report(("label", "calibration"), what, "Leave out one of the two.")
    for key in ("questions", "at_once", "confidence"):
        if ranking.get("method") == "all_pairs" and ranking.get(key) is not None:
            source.report((*path, key), f"{key} is for tournaments; all_pairs asks all questions.", "Leave it out.")


def _check_jury(source: Source) -> None:
    if not _value(source, "label", "compare"):
        what = "'label' has a jury of one: its members are the labeler and those in label.compare."
        source.report(("label", "jury"), what, "Name two or more in label.compare, or leave out jury.")
    if _value(source, "label", "ranking") is not None:
        what = "label.ranking uses the answers of one labeler, but label.jury combines several."
        source.report(("label", "jury"), what, "Leave out one of the two.")


def _check_preferences(source: Source, present: set[Any], section: str, who: str) -> None:
    """Check that a section that trains on preferences has them, from ``label`` or in the pairs."""
    if "label" in present:
        return
    layout = _value(source, "data", "format") or "auto"
    if _value(source, "data", "pairs") is None:
        source.report((section,), f"'{who}' has no preferences to learn from.", "Add 'label'.")
    elif layout == "auto":
        what = f"'{who}' has no preferences to learn from: without 'label', the pairs must have their own."
        fix = "Add 'label', or set data.format to preference, responses, hh, kto or scored."
        source.report((section,), what, fix)


def _check_rl(source: Source, present: set[Any]) -> None:
    algorithm = _algorithm(source)
    if algorithm is not None and not algorithm.samples:
        _check_preferences(source, present, "rl", _value(source, "rl", "algorithm"))
        for key in ("selectors", "transforms"):
            if _value(source, "rl", key):
                what = f"'{_value(source, 'rl', 'algorithm')}' samples no responses for {key}."
                source.report(("rl", key), what, "Leave them out, or choose another algorithm.")
        return
    _check_batches(source)
    if _value(source, "data", "prompts") is None:
        source.report(("rl",), "'rl' has no prompts.", "Set data.prompts.")
    rewards = _value(source, "rl", "rewards")
    rewards = ["reward"] if rewards is None else rewards
    rewards = [reward_name(entry) for entry in rewards] if isinstance(rewards, list) else []
    if "reward" not in present and "reward" in rewards:
        path = ("rl", "rewards", rewards.index("reward"))
        what = "'rl' uses the reward model, but the recipe has no 'reward'."
        source.report(path, what, "Add 'reward', or set rl.rewards to [direct] or to a function.")


def _check_batches(source: Source) -> None:
    """Check that a batch divides into minibatches. For RLOO and GRPO it depends on processes, too; TRL checks these."""
    parts = _value(source, "rl", "num_mini_batches")
    rows = _value(source, "rl", "per_device_train_batch_size") or 8  # the defaults of TrainingArguments
    steps = _value(source, "rl", "gradient_accumulation_steps") or 1
    if not all(isinstance(number, int) and number > 0 for number in (parts, rows, steps)):
        return
    if rows * steps % parts:
        what = f"a batch of {rows} x {steps} responses cannot be divided into num_mini_batches: {parts}."
        source.report(("rl", "num_mini_batches"), what, "Choose a divisor of the batch.")


def _algorithm(source: Source) -> Algorithm | None:
    """The recipe's algorithm; None if its name is unknown, which is reported elsewhere."""
    name = _value(source, "rl", "algorithm")
    return ALGORITHMS.get(name) if isinstance(name, str) else None


def _check_selectors(source: Source) -> None:
    algorithm = _algorithm(source)
    if algorithm is not None and algorithm.needs_selector and not _value(source, "rl", "selectors"):
        what = f"'{_value(source, 'rl', 'algorithm')}' needs a selector in rl.selectors that accepts responses."
        source.report(("rl", "algorithm"), what, "Set rl.selectors, for example to [rejection_sampling].")


def _check_labelers(source: Source) -> None:
    """Check that each entry is for a reward in use, and none is repeated."""
    labelers, rewards = (_value(source, "rl", key) for key in ("labelers", "rewards"))
    if not isinstance(labelers, list) or not isinstance(rewards, list | None):
        return
    names = [reward_name(entry) for entry in labelers]
    for i, name in enumerate(names):
        if name in names[:i]:
            source.report(("rl", "labelers", i), f"the options of '{name}' are listed twice.", "Write them once.")
        elif name not in map(reward_name, rewards or ["reward"]):
            what = f"'labelers' has options of '{name}', which is not in rl.rewards."
            source.report(("rl", "labelers", i), what, f"Add {name} to rl.rewards, or remove its options.")


def _check_evaluate(source: Source, present: set[Any]) -> None:
    if "rl" not in present:
        source.report(("evaluate",), "'evaluate' has no trained policy to judge.", "Add 'rl'.")
    if not _value(source, "evaluate", "sets") and _value(source, "data", "eval_prompts") is None:
        source.report(("evaluate",), "'evaluate' has no prompts.", "Set data.eval_prompts or evaluate.sets.")
    many = _value(source, "evaluate", "num_responses")
    if isinstance(many, int) and many > 1 and not _value(source, "evaluate", "temperature"):
        what = f"'evaluate' draws {many} responses per prompt at temperature 0, which are all the same."
        source.report(("evaluate", "num_responses"), what, "Set evaluate.temperature above 0, or leave the key out.")
    if _value(source, "evaluate", "stop_on_forgetting") is not None:
        _check_stop(source)


def _check_stop(source: Source) -> None:
    path, sets = ("evaluate", "stop_on_forgetting"), _value(source, "evaluate", "sets")
    if not isinstance(sets, dict) or FORGET_SET not in sets:
        what = f"'stop_on_forgetting' needs a set '{FORGET_SET}' in evaluate.sets."
        source.report(path, what, f"Set evaluate.sets.{FORGET_SET} to prompts that the initial policy is good at.")
    if _value(source, "evaluate", "track_every") == 0:
        what = "'stop_on_forgetting' needs measurements, but track_every is 0."
        source.report(path, what, "Leave out track_every, or set it to 1 or more.")


def _value(source: Source, section: str, key: str) -> Any:
    keys = source.data.get(section)
    return keys.get(key) if isinstance(keys, dict) else None
