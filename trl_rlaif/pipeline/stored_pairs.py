"""The pairs of pairs.jsonl, read from disk on access."""

from __future__ import annotations

from trl_rlaif.data import Pair
from trl_rlaif.files import parse_line
from trl_rlaif.pipeline.rows import PairRow
from trl_rlaif.stored_lines import Stored


class StoredPairs(Stored[Pair]):
    """Pairs in the order of their file."""

    def _read(self, line: bytes, where: str) -> Pair:
        """Raises UserError if the line is damaged."""
        row, known = parse_line(line, where), PairRow.__annotations__
        return Pair(**{k: row.get(k) for k in known}, extra={k: v for k, v in row.items() if k not in known})
