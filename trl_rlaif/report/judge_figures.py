"""Which policy each judge of an evaluation prefers, people included, and how far the judges agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl_rlaif.report.figures import MAX_CATEGORIES, Figure, win_rates
from trl_rlaif.report.formatting import count, hundredths, interval, label, number, percent, section
from trl_rlaif.report.run_data import Run
from trl_rlaif.report.summary import Measure, between, judge_name, win_rate_measure

# The judge whose metrics are the set's top-level ones; ``judge_agreement`` uses this name, too.
MAIN = "judge"
PEOPLE = "people"
_DRAWN_JUDGES = 10


@dataclass(frozen=True)
class JudgeRow:
    """One judge's results on a set; ``controlled`` is the win rate at equal length, None if it was not fitted."""

    name: str
    model: str
    rate: Measure
    controlled: Measure | None
    judged: float | None
    unjudged: float | None


@dataclass(frozen=True)
class Agreement:
    """How often judges agree; ``kappa`` corrects for chance, None if unknown."""

    judges: str
    rate: float
    ends: tuple[float, float] | None
    kappa: float | None
    kappa_ends: tuple[float, float] | None
    n: float | None

    @property
    def interval_text(self) -> str:
        """The rate's interval, in percent."""
        return between(self.ends)

    @property
    def kappa_text(self) -> str:
        """Kappa with its interval; empty if unknown."""
        if self.kappa is None:
            return ""
        ends = " ({} to {})".format(*map(hundredths, self.kappa_ends)) if self.kappa_ends else ""
        return hundredths(self.kappa) + ends


@dataclass(frozen=True)
class JudgedSet:
    """The judges' results on one evaluated set.

    ``together`` is the agreement of all judges, ``pairs`` that of each two, ``people`` that of the judge with people.
    ``harmless`` holds rate and interval for "start" (the initial policy) and "trained".
    """

    name: str
    rows: list[JudgeRow]
    together: Agreement | None = None
    pairs: list[Agreement] = field(default_factory=list)
    people: Agreement | None = None
    lengths: dict[str, Any] = field(default_factory=dict)
    harmless: dict[str, tuple[float, tuple[float, float] | None]] = field(default_factory=dict)


def judged_sets(run: Run) -> list[JudgedSet]:
    """One record for each set with a result of a judge or a person, in the order of results.json."""
    sets = section(run.results, "evaluate", "sets")
    named = dict.fromkeys([*sets, *run.people])
    found = [_judged_set(run, name, section(sets.get(name)), section(run.people.get(name))) for name in named]
    return [judged for judged in found if judged.rows or judged.harmless]


def judge_part(sets: list[JudgedSet]) -> dict[str, Any] | None:
    """For each set, its table, figures, facts and agreements; None without sets."""
    if not sets:
        return None
    return {
        "sets": [
            {
                "name": judged.name,
                "rows": judged.rows[:MAX_CATEGORIES],
                "figures": _drawn(judged),
                "facts": _facts(judged),
                "agreements": [*judged.pairs, *([judged.people] if judged.people else [])][:MAX_CATEGORIES],
            }
            for judged in sets
        ],
        "controlled": any(row.controlled for judged in sets for row in judged.rows),
    }


# ---- Reading ------------------------------------------------------------------------------------------------


def _judged_set(run: Run, name: Any, values: dict[str, Any], votes: dict[str, Any]) -> JudgedSet:
    judges = section(values, "judges")
    rows = [] if MAIN in judges else [_row(MAIN, values, judge_name(run, "evaluate"))]
    rows += [_row(label(key), found, label(section(found).get("judge"))) for key, found in judges.items()]
    rows.append(_people_row(votes))
    agreement = section(values, "judge_agreement")
    return JudgedSet(
        name=label(name) or "held-out",
        rows=[row for row in rows if row],
        together=_agreement("all judges", agreement.get("all")),
        pairs=_each_two(agreement.get("pairs")),
        people=_agreement(f"{PEOPLE} and {MAIN}", votes.get("judge")),
        lengths=section(values, "lengths"),
        harmless=_harmless(section(values, "harmless")),
    )


def _row(name: str, values: Any, model: str = "") -> JudgeRow | None:
    values = section(values)
    rate = win_rate_measure(values)
    if rate is None:
        return None
    controlled = win_rate_measure(values.get("length_controlled"))
    counts = [number(values.get(key)) for key in ("wins", "ties", "losses")]
    judged = number(values.get("n")) if None in counts else sum(counts)
    return JudgeRow(name, model, rate, controlled, judged, number(values.get("unjudged")))


def _people_row(votes: dict[str, Any]) -> JudgeRow | None:
    pairs, rated = number(votes.get("pairs")), number(votes.get("rated"))
    values = votes | {"n": rated, "unjudged": pairs - rated if pairs is not None and rated is not None else None}
    return _row(PEOPLE, values, count(number(votes.get("raters")), "rater"))


def _agreement(judges: str, values: Any) -> Agreement | None:
    values = section(values)
    rate, kappa, n = (number(values.get(key)) for key in ("rate", "kappa", "n"))
    ends, kappa_ends = interval(values.get("interval")), interval(values.get("kappa_interval"))
    return None if rate is None else Agreement(judges, rate, ends, kappa, kappa_ends, n)


def _each_two(rows: Any) -> list[Agreement]:
    found = []
    for row in rows if isinstance(rows, list) else []:
        two = section(row).get("judges")
        names = [label(name) for name in two] if isinstance(two, (list, tuple)) else []
        found.append(_agreement(" and ".join(names), section(row).get("agreement")))
    return [agreement for agreement in found if agreement]


def _harmless(values: dict[str, Any]) -> dict[str, tuple[float, tuple[float, float] | None]]:
    sides = {side: section(values, side) for side in ("start", "trained")}
    rates = {side: number(found.get("rate")) for side, found in sides.items()}
    return {side: (rate, interval(sides[side].get("interval"))) for side, rate in rates.items() if rate is not None}


# ---- Showing ------------------------------------------------------------------------------------------------


def _drawn(judged: JudgedSet) -> list[Figure]:
    """Every judge's win rate and interval; empty for a single judge without a win rate at equal length."""
    rows = judged.rows
    if len(rows) < 2 and not any(row.controlled for row in rows):
        return []
    # People come last, and must not be left out.
    drawn = rows if len(rows) <= _DRAWN_JUDGES else [*rows[: _DRAWN_JUDGES - 1], rows[-1]]
    caption = "Right of the dashed line, judges prefer the trained policy; bars are 95% intervals."
    if len(drawn) < len(rows):
        caption += f" Shows {len(drawn)} of {len(rows)} judges."
    named = [(row.name, row.rate, row.controlled) for row in drawn]
    title = f"Win rate on {judged.name}, by judge"
    return [win_rates(named, "Win rate by judge", title, caption, "win rate over the initial policy")]


def _facts(judged: JudgedSet) -> list[tuple[str, str]]:
    together, lengths = judged.together, judged.lengths
    found = []
    if together:
        text = f"{percent(together.rate)} of {count(together.n, 'pair')}"
        text += f" (interval {together.interval_text})" if together.ends else ""
        text += f", Fleiss' kappa {together.kappa_text}" if together.kappa is not None else ""
        found.append(("all judges agree", text))
    ratio, ends = number(lengths.get("ratio")), interval(lengths.get("ratio_interval"))
    if ratio is not None:
        text = f"{ratio:.2f}×" + (f" (interval {ends[0]:.2f} to {ends[1]:.2f})" if ends else "")
        found.append(("length of the trained policy's responses relative to the initial policy's", text))
    longer = number(lengths.get("longer"))
    if longer is not None:
        found.append(("prompts with a longer response by the trained policy", percent(longer)))
    for side, (rate, ends) in judged.harmless.items():
        policy = "initial" if side == "start" else side
        found.append((f"harmless, {policy} policy", percent(rate) + (f" (interval {between(ends)})" if ends else "")))
    return found
