"""Signs that a run learned nothing, each in plain words with a remedy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from trl_rlaif.report.formatting import count, interval, label, number, percent, scores, section
from trl_rlaif.report.run_data import Run, Series
from trl_rlaif.report.summary import between

# Below this fraction of ended responses, a mean length or score describes the limit rather than the policy.
FEW_END = 0.1
# Fraction of an update's responses; fewer distinct ones leave nothing to compare.
FEW_DISTINCT = 0.1
# Fraction of an update's groups in which all rewards are equal and advantages are therefore 0.
MOST_GROUPS = 0.9
# Nats per response (PPO) or per token (GRPO); for an unchanged policy, float32 rounding stays far below it.
LEAST_KL = 1e-3
# Uniformly random labels have a mean confidence of 0.75; an undecided judge, 0.5.
LEAST_CONFIDENCE = 0.55
# Difference between two fractions of pairs.
LENGTH_PREFERENCE = 0.1
# With fewer updates, no trend can be seen.
FEWEST_UPDATES = 5
# Number of updates that count as the end of a run.
END = 5
# Scores after the reward transforms, which may hold their mean at 0, and before them; and DPO's implicit reward.
_SCORES, _RISING = ("objective/scores", "score/"), ("objective/scores", "score/", "rewards/margins")


def signs_of_no_learning(run: Run) -> list[str]:
    """One or two sentences per sign, in the order of the stages; empty if there is none."""
    series = run.series.get("rl", {})
    found = [*_labels(run), *_reward(run), _cut(run, series), _alike(run, series), _equal_rewards(series)]
    found += [_flat(run, series), _unmoved(run, series)]
    return [sign for sign in found if sign]


def _labels(run: Run) -> list[str]:
    result = section(run.results, "label")
    found = []
    confidence = number(result.get("mean_confidence"))
    if confidence is not None and confidence < LEAST_CONFIDENCE:
        found.append(
            f"The labels hardly prefer either response: their mean confidence is {percent(confidence)} (50% is a "
            "coin flip). Use a larger judge, a more detailed prompt (label.prompt), or, for a judge with a strong "
            "position bias, debias: mean_logit."
        )
    length = section(result, "length_preference")
    judge, people, ends = number(length.get("judge")), number(length.get("people")), interval(length.get("interval"))
    if judge is not None and people is not None and ends:
        difference = judge - people
        if abs(difference) >= LENGTH_PREFERENCE and not ends[0] <= 0 <= ends[1]:
            kind, cure = ("longer", "set rl.length_penalty") if difference > 0 else ("shorter", "use a larger judge")
            shares = (judge, people) if difference > 0 else (1 - judge, 1 - people)
            found.append(
                f"The judge's labels depend on length: it prefers the {kind} response in {percent(shares[0])} of "
                f"{count(number(length.get('n')), 'pair')}, people in {percent(shares[1])}. Models trained on "
                "these labels will learn this preference. Tell the judge to ignore length (label.prompt), or "
                f"{cure}."
            )
    return found


def _reward(run: Run) -> list[str]:
    ends = interval(section(run.results, "reward").get("accuracy_interval"))
    if not ends or ends[0] > 0.5:
        return []
    if ends[1] < 0.5:
        return [
            f"The reward model ranks held-out pairs against their labels (accuracy {between(ends)}). RL will make the "
            "policy's responses worse. Check which column holds the chosen response."
        ]
    return [
        "The reward model is not clearly better than chance on held-out pairs "
        f"({between(ends)}), so a higher score in RL means little. Give it more pairs, more epochs, or a higher "
        "reward.learning_rate; a larger reward.eval_fraction narrows the interval."
    ]


def _cut(run: Run, series: Series) -> str | None:
    """Most responses are cut at the limit: the reward model and the judge see only their beginnings."""
    ended = _at_end(series, "rollout/ended")
    stage, key = "rl", "response_length"
    if ended is None:
        ended, stage, key = number(section(run.results, "sample").get("ended")), "sample", "max_new_tokens"
    if ended is None or ended >= FEW_END:
        return None
    limit = number(section(run.recipe, stage).get(key))
    tokens = f" of {count(limit, 'token')}" if limit else ""
    return (
        f"Only {percent(ended)} of the responses in {stage} ended with a stop token; the others were cut off at "
        f"the limit{tokens}. Raise {stage}.{key}, or teach the policy to stop with rl.missing_eos_penalty."
    )


def _alike(run: Run, series: Series) -> str | None:
    distinct, result = _at_end(series, "rollout/distinct"), section(run.results, "rl")
    episodes, updates = number(result.get("episodes")), number(result.get("updates"))
    if distinct is None or not episodes or not updates or episodes / updates < 2:
        return None
    drawn = episodes / updates
    if distinct > max(1.0, FEW_DISTINCT * drawn):
        return None
    return (
        f"The policy gives nearly the same response to every prompt: at the end of RL there are "
        f"{count(round(distinct, 1), 'distinct response')} among the {count(drawn)} per update. Raise rl.kl_coef or "
        "rl.temperature, or lower rl.learning_rate; read the samples to see how the policy exploits the reward."
    )


def _equal_rewards(series: Series) -> str | None:
    share = _at_end(series, "frac_reward_zero_std")
    if share is None or share < MOST_GROUPS:
        return None
    return (
        f"In {percent(share)} of the groups, all responses have the same reward, so their advantages are zero and "
        "they teach nothing. Use a reward that distinguishes responses, a higher rl.temperature, or harder prompts."
    )


def _flat(run: Run, series: Series) -> str | None:
    """No score rose over the updates or on held-out prompts."""
    rising = [points for name, points in series.items() if name.startswith(_RISING)]
    if not rising or max(len(points) for points in rising) < FEWEST_UPDATES:
        return None
    sets = section(run.results, "evaluate", "sets").values()
    gains = [section(values, "reward_gain") for values in sets]
    gains += [section(of, "gain") for values in sets for of in section(values, "labeler_rewards").values()]
    held_out = [ends for gain in gains if (ends := interval(gain.get("interval")))]
    if any(ends[0] > 0 for ends in held_out) or any(_rises(points) for points in rising):
        return None
    shown = next((points for name, points in series.items() if name.startswith(_SCORES)), rising[0])
    first, last = scores(*(statistics.fmean(value for _, value in part) for part in (shown[:END], shown[-END:])))
    return (
        f"The reward did not clearly rise over {count(len(shown), 'update')} ({first} to {last}). Train for longer "
        "(rl.total_episodes) or with a higher rl.learning_rate; if scores hardly differ within an update, the reward "
        "does not distinguish the responses."
    )


def _unmoved(run: Run, series: Series) -> str | None:
    name = next((name for name in ("objective/kl", "kl") if name in series), None)
    # An update's KL is measured before the update, so the first is always 0.
    if name is None or len(series[name]) < FEWEST_UPDATES or max(abs(kl) for _, kl in series[name]) >= LEAST_KL:
        return None
    rate = label(section(run.recipe, "rl").get("learning_rate"), 20)
    return (
        f"The policy did not change: its KL to the reference stayed below {LEAST_KL:g} nats. Raise rl.learning_rate"
        f"{f' (now {rate})' if rate else ''} or rl.total_episodes."
    )


def _at_end(series: Series, name: str) -> float | None:
    points = series.get(name)
    return statistics.fmean(value for _, value in points[-END:]) if points else None


def _rises(points: Sequence[tuple[float, float]]) -> bool:
    """Whether the 95% interval of the least-squares slope is above 0."""
    if len(points) < FEWEST_UPDATES or len({value for _, value in points}) == 1:
        return False
    from scipy.stats import linregress, t

    line = linregress(*zip(*points, strict=True))
    return line.slope - t.ppf(0.975, len(points) - 2) * line.stderr > 0
