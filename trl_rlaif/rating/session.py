"""One rater's session: the next pair, votes, skips and undo."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from trl_rlaif.rating.pairs import Comparison, blind_order, trained_is_left
from trl_rlaif.rating.votes import Vote, VoteFile

SIDES = ("left", "right", "tie")


class Session:
    """The pairs of one rater: a queue of pairs to rate, and a trail for undo.

    It resumes after the votes on disk. Its methods are thread-safe.

    Args:
        comparisons: The pairs; those with equal responses are not shown.
        votes: Saves every vote before it is acknowledged.
        rater: The rater's name.
        seed: Seed of the blinded order.
    """

    def __init__(self, comparisons: Iterable[Comparison], votes: VoteFile, rater: str, seed: int = 0) -> None:
        self.rater = rater
        ordered = blind_order(comparisons, rater, seed)
        self._pairs = [c for c in ordered if not c.is_equal]
        self.equal = len(ordered) - len(self._pairs)
        self._trained_left = [trained_is_left(c, rater, seed) for c in self._pairs]
        self._several_sets = len({c.set for c in self._pairs}) > 1
        self._votes = votes
        self._lock = threading.Lock()
        numbers = {c.name: number for number, c in enumerate(self._pairs)}
        before = votes.standing().get(rater, {})
        self._trail = [numbers[name] for name in before if name in numbers]
        self._queue = sorted(set(numbers.values()) - set(self._trail))
        self._skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self._pairs)

    def state(self) -> dict[str, Any]:
        """State of the page: ``rater``, ``total`` and ``done`` pairs, ``can_undo``, the next ``pair`` or None, and how
        many pairs are ``equal`` and not shown.

        It does not reveal which policy wrote which response.
        """
        with self._lock:
            return self._state()

    def vote(self, number: Any, side: Any) -> dict[str, Any]:
        """Save a choice: "left", "right" or "tie" for the pair with this number; return the new state.

        Raises:
            ValueError: There is no such pair or choice.
            OSError: The vote could not be saved.
        """
        self._check(number)
        if side not in SIDES:
            raise ValueError(f"a choice is one of {', '.join(SIDES)}")
        choice = 0.5 if side == "tie" else float((side == "left") == self._trained_left[number])
        with self._lock:
            self._votes.add(Vote(self._pairs[number].name, self.rater, choice))
            if number in self._queue:
                self._queue.remove(number)
            self._skipped.discard(number)
            self._trail.append(number)
            return self._state()

    def skip(self, number: Any) -> dict[str, Any]:
        """Move a pair to the end of the queue, without a vote; return the new state.

        Raises:
            ValueError: There is no such pair.
        """
        self._check(number)
        with self._lock:
            if number in self._queue:
                self._queue.remove(number)
                self._queue.append(number)
                self._skipped.add(number)
                self._trail.append(number)
            return self._state()

    def undo(self) -> dict[str, Any]:
        """Take back the last skip or vote, even a vote of an earlier start, and show its pair; return the new state.

        Raises:
            OSError: The withdrawal could not be saved, so the vote still counts.
        """
        with self._lock:
            if self._trail:
                number = self._trail[-1]
                if number in self._queue:  # skipped, not voted on
                    self._queue.remove(number)
                else:
                    self._votes.add(Vote(self._pairs[number].name, self.rater, None))
                self._trail.pop()
                self._skipped.discard(number)
                self._queue.insert(0, number)
            return self._state()

    def _check(self, number: Any) -> None:
        if type(number) is not int or not 0 <= number < len(self._pairs):
            raise ValueError("there is no such pair")

    def _state(self) -> dict[str, Any]:
        return {
            "rater": self.rater,
            "total": len(self._pairs),
            "done": len(self._pairs) - len(self._queue),
            "equal": self.equal,
            "can_undo": bool(self._trail),
            "pair": self._shown(self._queue[0]) if self._queue else None,
        }

    def _shown(self, number: int) -> dict[str, Any]:
        pair = self._pairs[number]
        left, right = (pair.trained, pair.start) if self._trained_left[number] else (pair.start, pair.trained)
        return {
            "number": number,
            "set": pair.set if self._several_sets else None,
            "category": pair.category,
            "prompt": pair.messages,
            "left": left,
            "right": right,
            "skipped": number in self._skipped,
        }
