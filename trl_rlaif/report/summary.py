"""A run's results in plain words: the summary and the verdicts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trl_rlaif.report.formatting import (
    MINUS,
    count,
    interval,
    label,
    number,
    percent,
    scores,
    section,
)
from trl_rlaif.report.run_data import Run

# Characters of a longer text that are shown before it is expanded.
PREVIEW_CHARACTERS = 700
_MAX_LABELERS = 8
# From this p-value of the sign test on, a win rate is not called clear, whatever its interval.
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Measure:
    """A metric with its interval and a verdict; ``tone`` is good, bad or unclear."""

    value: float
    interval: tuple[float, float] | None
    text: str
    interval_text: str
    verdict: str
    tone: str
    detail: str


@dataclass(frozen=True)
class SetResult:
    """Evaluation results on one set of held-out prompts."""

    name: str
    prompts: float | None
    reward: Measure | None
    labelers: dict[str, Measure]
    win_rate: Measure | None
    length_ratio: float | None
    tokens: str


def set_results(run: Run) -> list[SetResult]:
    """One record for each evaluated set, in the order of results.json."""
    found = []
    for name, values in section(run.results, "evaluate", "sets").items():
        values = section(values)
        before, after = number(values.get("tokens_start")), number(values.get("tokens_trained"))
        tokens = f"{before:,.0f} → {after:,.0f} tokens" if before is not None and after is not None else ""
        found.append(
            SetResult(
                name=label(name) or "held-out",
                prompts=number(values.get("prompts")),
                reward=_gain(*(section(values, f"reward_{key}") for key in ("gain", "start", "trained"))),
                labelers=_labeler_gains(values),
                win_rate=_win_rate(values),
                length_ratio=after / before if before and after is not None else None,
                tokens=tokens,
            )
        )
    return found


def _verdict(
    value: float, ends: tuple[float, float] | None, neutral: float, words: tuple[str, str, str]
) -> tuple[str, str]:
    """Verdict and tone of a value relative to a neutral one; ``words`` are for above, below and not clear."""
    if ends is None:
        return "no interval, so this may be chance", "unclear"
    if ends[0] > neutral:
        return words[0], "good"
    if ends[1] < neutral:
        return words[1], "bad"
    return words[2], "unclear"


def _labeler_gains(values: dict[str, Any]) -> dict[str, Measure]:
    """The changes of labelers' rewards, by name."""
    found = {}
    for name, of in section(values, "labeler_rewards").items():
        of = section(of)
        gain = _gain(*(section(of, key) for key in ("gain", "start", "trained")))
        prompts, unscored = number(of.get("prompts")), number(of.get("unscored"))
        if gain is not None:
            said = [gain.detail, count(prompts, "prompt"), f"{count(unscored)} not scored" if unscored else ""]
            found[label(name, 40)] = replace(gain, detail=", ".join(filter(None, said)))
    return dict(list(found.items())[:_MAX_LABELERS])


def _gain(gain: dict[str, Any], start: dict[str, Any], trained: dict[str, Any]) -> Measure | None:
    mean, ends = number(gain.get("mean")), interval(gain.get("interval"))
    if mean is None:
        return None
    verdict, tone = _verdict(mean, ends, 0.0, ("increased", "decreased", "no clear change"))
    shown = scores(mean, *(ends or ()), sign=True)
    before, after = number(start.get("mean")), number(trained.get("mean"))
    detail = ""
    if before is not None and after is not None:
        detail = "mean {} → {}".format(*scores(before, after))
    between = f"{shown[1]} to {shown[2]}" if ends else ""
    return Measure(mean, ends, shown[0], between, verdict, tone, detail)


def _win_rate(values: dict[str, Any]) -> Measure | None:
    nouns = (("wins", "win"), ("ties", "tie"), ("losses", "loss"))
    counts = [count(number(values.get(many)), one, many) for many, one in nouns]
    return win_rate_measure(values, ", ".join(part for part in counts if part))


def win_rate_measure(values: Any, detail: str = "") -> Measure | None:
    """``win_rate`` with its ``interval``, from any judge's results; None if there is no rate."""
    values = section(values)
    words = ("preferred over the initial policy", "the initial policy is preferred", "no clear difference")
    measure, p = _share(values.get("win_rate"), values.get("interval"), words, detail), sign_test(values)
    if measure is None or p is None:
        return measure
    measure = replace(measure, detail=", ".join(filter(None, (detail, f"sign test p = {p:.2g}"))))
    if measure.tone == "unclear" or p < SIGNIFICANT:
        return measure
    return replace(measure, verdict="too few wins and losses", tone="unclear")


def sign_test(values: dict[str, Any]) -> float | None:
    """Two-sided p-value of the exact sign test of ``wins`` against ``losses``; None if either is unknown.

    Ties narrow a win rate's interval but are no evidence for either side: 4 wins, 8 ties and no loss give p = 0.125.
    """
    wins, losses = number(values.get("wins")), number(values.get("losses"))
    if wins is None or losses is None:
        return None
    from scipy.stats import binomtest

    return binomtest(round(wins), round(wins + losses)).pvalue if wins + losses else 1.0


def reward_accuracy(run: Run) -> Measure | None:
    """The reward model's ranking accuracy on held-out pairs; None if it was not measured."""
    result = section(run.results, "reward")
    words = ("better than chance", "worse than chance", "no clear difference")
    return _share(result.get("accuracy"), result.get("accuracy_interval"), words)


def _share(rate: Any, ends: Any, words: tuple[str, str, str], detail: str = "") -> Measure | None:
    """A proportion compared with one half, as shown on the page."""
    rate, ends = number(rate), interval(ends)
    if rate is None:
        return None
    verdict, tone = _verdict(rate, ends, 0.5, words)
    return Measure(rate, ends, percent(rate), between(ends), verdict, tone, detail)


def between(ends: tuple[float, float] | None) -> str:
    """A proportion's interval as ``52.1% to 60.0%``; empty for None."""
    return f"{percent(ends[0])} to {percent(ends[1])}" if ends else ""


def summary(run: Run, sets: list[SetResult]) -> list[str]:
    """The results, then how they were obtained, in a few plain sentences, one for each known fact."""
    sentences = [_about_set(result) for result in sets]
    if not sets:
        sentences.append(
            "The trained policy was not evaluated on held-out prompts, so it is unknown whether it improved: a rising "
            "training score does not prove that."
        )
    sentences += [_about_model(run), _about_labels(run), _about_reward(run), _about_rl(run)]
    return [sentence for sentence in sentences if sentence]


def page_head(run: Run) -> dict[str, Any]:
    """Values common to the pages of a run and of a comparison."""
    model = label(section(run.recipe, "model").get("path"), 120)
    return {
        "run": run,
        "title": run.name,
        "subtitle": " · ".join(part for part in (model, model_settings(run)) if part),
        "preview": PREVIEW_CHARACTERS,
        "versions": [(label(key), label(value)) for key, value in section(run.recipe, "versions").items()],
        "seed": label(section(run.recipe, "run").get("seed")),
        "command": label(run.recipe.get("command"), 2000),
    }


def model_settings(run: Run) -> str:
    """The model's precision and adapter, such as ``bfloat16, NF4 base, LoRA rank 16``."""
    model = section(run.recipe, "model")
    quantization = label(model.get("quantization"), 20)
    lora = section(model, "lora")
    rank = label(lora.get("r", lora.get("rank")), 10)
    parts = [
        label(model.get("dtype"), 20),
        f"{quantization.upper()} base" if quantization and quantization.lower() != "none" else "",
        f"LoRA rank {rank}" if rank else "",
    ]
    return ", ".join(part for part in parts if part and part != "None")


def algorithm(run: Run) -> str:
    """The usual name of the RL algorithm."""
    name = label(section(run.recipe, "rl").get("algorithm"), 30)
    return name.upper() if name.isalpha() and len(name) <= 5 else name or "RL"


def _about_model(run: Run) -> str:
    model = label(section(run.recipe, "model").get("path"), 120)
    settings = model_settings(run)
    return f"The initial policy is {model}{f' ({settings})' if settings else ''}." if model else ""


def judge_name(run: Run, stage: str) -> str:
    """The judge of ``label`` or ``evaluate``, from the results, else from the recipe; empty if neither names it."""
    named = run.results and label(section(run.results, stage).get("judge"), 120)
    if named:
        return named
    judge = section(run.recipe, stage).get("judge")
    return label(judge.get("path") if isinstance(judge, dict) else judge, 120)


def labeler_name(run: Run) -> str:
    """The labeler of the recipe; empty if it names none."""
    labeler = section(run.recipe, "label").get("labeler")
    return label(next(iter(labeler), "") if isinstance(labeler, dict) else labeler)


def judge_was_asked(run: Run) -> bool:
    """Whether any label contains a judge's answers: a labeler may work without a judge."""
    result, labels = section(run.results, "label"), run.labels
    answers = [section(result, key).get(of) for key, of in (("mass", "mean"), ("position_bias", "rate"))]
    written = labels.ties or any(labels.winners.values()) or any(pair.rationales for pair in labels.pairs)
    return bool(written) or result.get("usage") is not None or any(answer is not None for answer in answers)


def _about_labels(run: Run) -> str:
    result = section(run.results, "label")
    pairs, labeled = number(result.get("pairs")), number(result.get("labeled"))
    if labeled is None:
        return ""
    judge = judge_name(run, "label")
    who = "The same model, as judge," if judge == "same" else f"The judge {judge}".rstrip()
    if not judge_was_asked(run):
        who = f"The labeler {labeler_name(run)}".rstrip()
    of = f"{count(labeled)} of {count(pairs, 'pair')}" if pairs is not None else count(labeled, "pair")
    sentence = f"{who} labeled {of}."
    agreement = section(result, "agreement")
    rate, ends = number(agreement.get("rate")), interval(agreement.get("interval"))
    if rate is not None:
        over = count(number(agreement.get("n")), "pair")
        sentence += f" It agrees with people on {percent(rate)}{f' of {over}' if over else ''}"
        sentence += f" (interval {percent(ends[0])} to {percent(ends[1])})." if ends else "."
    return sentence


def _about_reward(run: Run) -> str:
    accuracy = reward_accuracy(run)
    if accuracy is None:
        return ""
    amount = number(section(run.results, "reward").get("eval_pairs"))
    pairs = count(amount, "held-out pair") or "the held-out pairs"
    between = f" (interval {accuracy.interval_text})" if accuracy.interval_text else ""
    ranking = f"The reward model ranks {accuracy.text} of {pairs} as labeled{between}."
    without = section(run.results, "reward", "without_end")
    correlation, difference = number(without.get("correlation")), number(without.get("difference"))
    if correlation is None or difference is None:
        return ranking
    return (
        f"{ranking} Scores are read at the end-of-turn token, which is appended to responses cut off at the length "
        f"limit. Read at the token before it, scores would have a correlation of {correlation:.2f} with these, and the "
        f"end token by itself would be worth {scores(difference, sign=True)[0]}."
    )


def _about_rl(run: Run) -> str:
    result = section(run.results, "rl")
    updates, episodes = number(result.get("updates")), number(result.get("episodes"))
    first, last = number(result.get("score_first")), number(result.get("score_last"))
    if updates is None:
        return ""
    sentence = f"{algorithm(run)} ran {count(updates, 'update')}"
    sentence += f" on {count(episodes, 'response')}" if episodes is not None else ""
    if first is not None and last is not None:
        change = "{} to {}".format(*scores(first, last))
        sentence += f"; the score on the training prompts changed from {change}"
    ended = [number(result.get(f"ended_{when}")) for when in ("first", "last")]
    if None not in ended:
        sentence += "; {} of its responses ended with a stop token at first, {} at the end".format(*map(percent, ended))
    return sentence + "."


def _about_set(result: SetResult) -> str:
    named = result.name.lower().replace("-", " ") in ("held out", "eval", "test")
    where = "On held-out prompts" if named else f"On the held-out prompts of {result.name}"
    parts = []
    rewards = {"the mean reward": result.reward} | {f"the reward {name}": of for name, of in result.labelers.items()}
    for name, reward in rewards.items():
        if reward:
            between = f"interval {reward.interval_text}" if reward.interval_text else "no interval"
            amount = reward.text.lstrip("+" + MINUS)
            verb = {"good": f"rose by {amount} (", "bad": f"fell by {amount} ("}
            said = verb.get(reward.tone, f"did not clearly change ({reward.text}, ")
            parts.append(f"{name} {said}{between})")
    if result.win_rate:
        between = f" (interval {result.win_rate.interval_text})" if result.win_rate.interval_text else ""
        verdict = result.win_rate.verdict
        parts.append(f"the win rate over the initial policy is {result.win_rate.text}{between}: {verdict}")
    if not parts:
        return f"{where}, neither reward nor win rate was measured."
    return f"{where}, {' and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))}."


def kl_last(run: Run) -> float | None:
    """KL to the reference at the end of training, in nats: from results.json, else the last logged value."""
    value = number(section(run.results, "rl").get("kl_last"))
    points = run.series.get("rl", {}).get("objective/kl")
    return points[-1][1] if value is None and points else value
