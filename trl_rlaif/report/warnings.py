"""Reasons to doubt the results: the warnings, and the caveat about the judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_rlaif.recipe.sections import FORGET_SET
from trl_rlaif.report.formatting import count, hundredths, label, number, percent, scores, section
from trl_rlaif.report.judge_figures import JudgedSet
from trl_rlaif.report.run_data import Run, Sample
from trl_rlaif.report.summary import SetResult, judge_name, judge_was_asked, kl_last

POSITION_BIAS_LIMIT = 0.3
MASS_LIMIT = 0.5
KL_LIMIT = 10.0
LONGER_LIMIT, SHORTER_LIMIT = 1.5, 0.5
MAX_DRIFTING = 12
# Of an evaluated set; results on fewer hardly generalize, whatever the interval.
FEWEST_PROMPTS = 30
# A win rate that falls by this much at equal length is largely due to length.
LENGTH_SHARE = 0.1
# From here on, a rank correlation is called moderate; with fewer samples it is noise.
LENGTH_CORRELATION, FEWEST_FOR_CORRELATION = 0.3, 20
# Landis and Koch 1977 call agreement up to this slight.
KAPPA_LIMIT = 0.2
LOW_MASS_SHARE = 0.1
# Beyond this ratio of spreads, the smaller of two summed rewards hardly counts.
UNLIKE_SCALES = 10.0
# Beyond this fraction of responses that one of several rewards leaves unscored, sums are not comparable.
MISSING_SHARE = 0.1
# The distribution regulator's alarm for a category is regulator/<category>/drift, 1 if raised.
_DRIFT = ("regulator/", "/drift")


def warnings(run: Run, sets: list[SetResult], judged: list[JudgedSet]) -> list[str]:
    """Reasons to doubt the results, one sentence or more each."""
    found = [
        *_overlap_warnings(run),
        *_label_warnings(run),
        *_suspicious_warnings(run),
        *_training_warnings(run),
        *_score_warnings(run),
    ]
    found += _drift_warnings(run)
    kl = kl_last(run)
    if kl is not None and kl > KL_LIMIT:
        found.append(
            f"The policy moved far from the reference: the final KL is {scores(kl)[0]} nats (more than "
            f"{KL_LIMIT:.0f}). Check the samples for repetition and reward hacking; a higher rl.kl_coef keeps it "
            "closer."
        )
    for result in sets:
        found.extend(_set_warnings(result, [sample for sample in run.samples if sample.set == result.name]))
    for of_set in judged:
        found.extend([*_length_warnings(of_set), *_judge_warnings(of_set), *_harm_warnings(of_set)])
    found.extend(_stop_warnings(run))
    found.extend(_disagreements(run))
    extra = run.results.get("warnings")
    if isinstance(extra, list):
        found.extend(text for text in (label(item, 500) for item in extra[:50]) if text)
    return found + run.notes


def _label_warnings(run: Run) -> list[str]:
    result = section(run.results, "label")
    found = []
    calibration = section(result, "calibration")
    if calibration.get("used") is False:
        found.append(
            f"The calibration was not used: {label(calibration.get('reason'), 300)}. The labels have the "
            "judge's uncalibrated confidence. More pairs in label.calibration may help."
        )
    bias = number(section(result, "position_bias").get("rate"))
    if bias is not None and bias > POSITION_BIAS_LIMIT:
        found.append(
            f"The judge is position-biased: in {percent(bias)} of the pairs, the same position wins in both "
            "orders, so these labels reflect the order more than the responses."
        )
    mass = number(section(result, "mass").get("mean"))
    if mass is not None and mass < MASS_LIMIT:
        found.append(
            f"The judge puts only {percent(mass)} of its probability on the two answers it can choose "
            "from: it may not have understood the question. Check the judge prompt."
        )
    elif (low := number(section(result, "mass").get("low"))) and (labeled := number(result.get("labeled"))):
        # Each pair is asked twice, in both orders.
        if low / (2 * labeled) > LOW_MASS_SHARE:
            found.append(
                f"In {count(low)} answers, the judge puts little of its probability on the answers it can choose from: "
                "it may not have understood the question for these pairs. Check the judge prompt."
            )
    return found


def _suspicious_warnings(run: Run) -> list[str]:
    """Responses that address their judge."""
    texts = []
    found, of, kinds = _suspicious(section(run.results, "label", "suspicious"))
    if found:
        texts.append(
            f"In {count(found)} of {count(of, 'labeled pair')}, a response addresses the judge ({kinds}). Their labels "
            "may follow the response's instructions (prompt injection). Read these pairs, or remove them."
        )
    for name, values in section(run.results, "evaluate", "sets").items():
        of_set = section({"x": values}, "x")
        (before, *_), (after, of, kinds) = (
            _suspicious(section(of_set, f"suspicious_{side}")) for side in ("start", "trained")
        )
        if after:
            texts.append(
                f"On {label(name) or 'held-out'}, {count(after)} of {count(of, 'response')} of the trained policy "
                f"address the judge ({kinds}), versus {count(before)} of the initial policy. This may inflate the win "
                "rate. Read the samples."
            )
    return texts


def _suspicious(values: Mapping[str, Any]) -> tuple[float, float, str]:
    found, of = number(values.get("found")) or 0, number(values.get("of")) or 0
    kinds = [f"{label(kind)}: {count(n)}" for kind in section(values, "kinds") if (n := number(values["kinds"][kind]))]
    return found, of, ", ".join(kinds)


def _overlap_warnings(run: Run) -> list[str]:
    """Prompts that are both held out and trained on."""
    found = []
    for stage in ("label", "evaluate"):
        overlaps = section(run.results, stage).get("overlaps")
        for overlap in overlaps[:20] if isinstance(overlaps, list) else []:
            shared, prompts = (number(section({"x": overlap}, "x").get(key)) for key in ("shared", "prompts"))
            if shared and prompts:
                held_out, training = (label(overlap.get(key)) for key in ("held_out", "training"))
                found.append(
                    f"{count(shared)} of the {count(prompts, 'prompt')} of {held_out} are also in {training}. Results "
                    "on these may not generalize to new prompts. Remove them from one of the two."
                )
    return found


def _training_warnings(run: Run) -> list[str]:
    """Training data of fine-tuning, reward model or DPO that was probably not intended."""
    found, labels = [], section(run.results, "rl", "labels")
    if section(run.results, "sft").get("loss_on") == "all tokens" and "assistant_only_loss" in section(
        run.recipe, "sft"
    ):
        found.append("Fine-tuning also trained on the users' turns. Remove assistant_only_loss: false from sft.")
    pairs, wanted = (
        number(section(parent, "reward").get(key))
        for parent, key in ((run.results, "eval_pairs"), (run.recipe, "eval_fraction"))
    )
    if pairs == 0 and wanted:
        found.append(
            "No pairs were held out, so the reward model's accuracy is unknown. Provide pairs on more prompts, or "
            "raise reward.eval_fraction."
        )
    confidence = number(labels.get("mean_confidence"))
    if labels.get("soft") is False and confidence is not None and confidence < 1:
        found.append(
            f"DPO treated soft labels (mean confidence {percent(confidence)}) as certain. With rl.loss_type: "
            "[sigmoid], it uses their probabilities."
        )
    return found


def _score_warnings(run: Run) -> list[str]:
    """Responses without a reward, and rewards on different scales."""
    result, found = section(run.results, "rl"), []
    unscored, episodes = number(result.get("unscored")), number(result.get("episodes"))
    if unscored and episodes:
        found.append(
            f"{count(unscored)} of {count(episodes, 'response')} had no reward and were not trained on. The run's "
            "first warning gives the reason. Fix the cause, or add a reward that covers them."
        )
    rewards = section(result, "rewards")
    weighted = {
        name: abs(weight) * spread
        for name in rewards
        for weight, spread in [[number(section(rewards, name).get(key)) for key in ("weight", "std_last")]]
        if weight and spread
    }
    if len(weighted) > 1 and section(run.recipe, "rl").get("reward_normalization") in (None, "none"):
        large, small = max(weighted, key=weighted.get), min(weighted, key=weighted.get)
        ratio = weighted[large] / weighted[small]
        if ratio > UNLIKE_SCALES:
            found.append(
                f"The reward '{label(large)}' varies {count(round(ratio))} times as much as '{label(small)}', which "
                "has hardly any effect. Set rl.reward_normalization: std, or weights in rl.rewards."
            )
    for key, points in run.series.get("rl", {}).items():
        if key.startswith("rewards/") and key.endswith("/none") and points[-1][1] > MISSING_SHARE and len(rewards) > 1:
            name = key.removeprefix("rewards/").removesuffix("/none")
            found.append(f"The reward '{label(name)}' scored only {percent(1 - points[-1][1])} of the last responses.")
    return found


def _drift_warnings(run: Run) -> list[str]:
    """The distribution regulator's alarms: each category with the step of its first one."""
    first: dict[str, float] = {}
    for key, points in run.series.get("rl", {}).items():
        if key.startswith(_DRIFT[0]) and key.endswith(_DRIFT[1]):
            steps = [step for step, value in points if value == 1]
            if steps:
                first[key.removeprefix(_DRIFT[0]).removesuffix(_DRIFT[1])] = min(steps)
    if not first:
        return []
    named = sorted(first.items(), key=lambda item: (item[1], item[0]))
    kinds = {"unnamed": "no category"}
    shown = _some_of([f"{kinds.get(name, name)} (from step {count(step)})" for name, step in named])
    return [
        f"Scores rose significantly while the policy was far from the reference on prompts of {shown}: it may be "
        "exploiting the reward there (reward hacking). Fewer than 5% of runs without a rise raise this alarm. Read "
        "these samples before you trust their scores."
    ]


def _disagreements(run: Run) -> list[str]:
    """Prompt categories in which the reward rose but the judge prefers the initial policy."""
    found = []
    for name, values in section(run.results, "evaluate", "sets").items():
        judged = section(values, "by_category")
        drifting = sorted(label(c, 200) for c in judged if section(judged, c).get("drift") is True)
        if drifting:
            found.append(
                f"On {label(name) or 'held-out'}, the reward rose on prompts of {_some_of(drifting)}, but the judge "
                "prefers the initial policy there: the policy may be exploiting the reward."
            )
    return found


def _some_of(names: list[str]) -> str:
    more = [f"{len(names) - MAX_DRIFTING:,} more"] if len(names) > MAX_DRIFTING else []
    return ", ".join(names[:MAX_DRIFTING] + more)


def _set_warnings(result: SetResult, samples: list[Sample]) -> list[str]:
    found = []
    ratio, win = result.length_ratio, result.win_rate
    if ratio is not None and (ratio > LONGER_LIMIT or ratio < SHORTER_LIMIT):
        rho = length_correlation(samples)
        exploited = rho is not None and rho * (ratio - 1) > 0 and abs(rho) >= LENGTH_CORRELATION
        why = (
            f"The reward correlates with length (rank correlation {hundredths(rho)}), so the policy may have "
            "learned length instead of the task; see the win rate at equal length."
            if exploited
            else "Judges and reward models often favor a certain length, so part of the change may be due to length "
            "alone."
        )
        found.append(f"On {result.name}, the responses became {ratio:.1f} times as long ({result.tokens}). {why}")
    if win and win.tone == "unclear":
        reason = "its interval contains 50%" if win.interval else "it has no interval"
        if win.interval and not win.interval[0] <= 0.5 <= win.interval[1]:
            reason = f"so few wins and losses may be due to chance ({win.detail})"
        found.append(f"The win rate on {result.name} is inconclusive: {reason}. Evaluate on more prompts.")
    if result.prompts is not None and result.prompts < FEWEST_PROMPTS:
        found.append(
            f"Only {count(result.prompts, 'prompt')} of {result.name} {'was' if result.prompts == 1 else 'were'} "
            f"evaluated: with fewer than {FEWEST_PROMPTS}, other prompts may give a different result."
        )
    if win and win.tone == "bad" and result.name == FORGET_SET:
        found.append(
            f"The policy forgot: on {result.name}, whose prompts the initial policy answered well, the judge prefers "
            f"the initial policy (win rate {win.text}, interval {win.interval_text}). Rehearse pairs of this kind "
            "(rl.selectors, rl.rehearsal), or keep the policy closer to the reference (rl.kl_coef)."
        )
    elif win and win.tone == "bad":
        found.append(f"On {result.name}, the judge prefers the initial policy: training made the policy worse there.")
    if result.reward and result.reward.tone == "good" and win and win.tone != "good":
        found.append(
            f"On {result.name}, the reward rose, but the judge does not clearly prefer the new responses: the policy "
            "may have learned to exploit the reward model rather than to answer better."
        )
    return found


def length_correlation(samples: list[Sample]) -> float | None:
    """Spearman's rank correlation of length and reward over the trained policy's responses.

    None with too few responses, or if all lengths or all rewards are equal.
    """
    known = [
        (len(sample.trained.text) + sample.trained.cut, sample.reward_trained)
        for sample in samples
        if sample.reward_trained is not None
    ]
    if len(known) < FEWEST_FOR_CORRELATION:
        return None
    from scipy.stats import spearmanr

    sizes, rewards = zip(*known, strict=True)
    if len(set(sizes)) == 1 or len(set(rewards)) == 1:
        return None
    return number(float(spearmanr(sizes, rewards).statistic))


def _length_warnings(judged: JudgedSet) -> list[str]:
    """Judges whose clear preference is much weaker, or not clear, at equal length."""
    found = []
    for row in judged.rows:
        rate, controlled = row.rate, row.controlled
        if rate.tone != "good" or controlled is None:
            continue
        gone = controlled.tone != "good"
        if gone and controlled.value < rate.value or rate.value - controlled.value >= LENGTH_SHARE:
            kept = "is no longer clear" if gone else "is weaker"
            found.append(
                f"On {judged.name}, the preference of {row.name} is largely due to length: the win rate is "
                f"{rate.text}, but {controlled.text} at equal length, where the preference {kept}. A length "
                "penalty (rl.length_penalty) counteracts this."
            )
    return found


def _judge_warnings(judged: JudgedSet) -> list[str]:
    """Judges that contradict each other, or hardly agree beyond chance."""
    found = []
    for_it, against = ([row.name for row in judged.rows if row.rate.tone == tone] for tone in ("good", "bad"))
    if for_it and against:
        found.append(
            f"The judges contradict each other on {judged.name}: the trained policy is preferred by "
            f"{_some_of(for_it)}, the initial policy by {_some_of(against)}. Read the samples before you trust either."
        )
    together, people = judged.together, judged.people
    if together and together.kappa is not None and together.kappa < KAPPA_LIMIT:
        found.append(
            f"The judges hardly agree on {judged.name}: they make the same choice in {percent(together.rate)} "
            f"of {count(together.n, 'pair')}, little more than by chance (kappa {together.kappa_text}). No single "
            "judge can decide which policy is better."
        )
    if people and people.ends and people.ends[0] <= 0.5:
        found.append(
            f"On {judged.name}, the judge does not clearly agree with people beyond chance: it makes the same choice "
            f"in {percent(people.rate)} of {count(people.n, 'pair')} (interval {people.interval_text})."
        )
    return found


def _harm_warnings(judged: JudgedSet) -> list[str]:
    if set(judged.harmless) < {"start", "trained"}:
        return []
    (before, before_ends), (after, after_ends) = judged.harmless["start"], judged.harmless["trained"]
    if not before_ends or not after_ends or after_ends[1] >= before_ends[0]:
        return []
    return [
        f"On {judged.name}, the responses became less harmless: {percent(before)} were harmless before training, "
        f"{percent(after)} after it."
    ]


def _stop_warnings(run: Run) -> list[str]:
    """Training stopped because of forgetting."""
    stopped = section(run.results, "rl", "stopped")
    update, rate, limit = (number(stopped.get(key)) for key in ("update", "win_rate", "limit"))
    if update is None or rate is None or limit is None:
        return []
    return [
        f"RL was stopped at update {count(update)}: on {label(stopped.get('set'))}, the win rate over the initial "
        f"policy had fallen to {percent(rate)}, below {percent(limit)} (evaluate.stop_on_forgetting)."
    ]


def judge_caveat(run: Run) -> str:
    """The limit of a win rate whose judge also gave the labels."""
    labeler, examiner = judge_name(run, "label"), judge_name(run, "evaluate")
    if not labeler or labeler != examiner or not judge_was_asked(run) or not section(run.results, "evaluate"):
        return ""
    return (
        "The same judge gave the labels and the win rate: the win rate shows how well the policy learned this judge's "
        "preferences, which may differ from those of people."
    )
