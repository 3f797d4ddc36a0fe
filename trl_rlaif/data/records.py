"""Rows of a data file as records of a given type; problems are reported with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from trl_rlaif.data.rows import Problems, open_source
from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

R = TypeVar("R", bound=BaseModel)


def read_records(source: str | Path, model: type[R]) -> list[R]:
    """All rows of a file, folder or Hub dataset, in order.

    Args:
        source: As in `load_prompts`.
        model: The type of a row; its fields are the columns.

    Raises:
        UserError: The source or some of its rows are invalid, or it has none; up to ten problems with their locations.
    """
    problems, found = Problems(), []
    _, rows = open_source(source, problems)
    for row in rows:
        try:
            found.append(model.model_validate(row.values))
        except ValidationError as error:
            for detail in error.errors():
                problems.add(_described(detail), where=row.where, fix=f"Columns: {', '.join(model.model_fields)}.")
    problems.raise_if_any()
    if not found:
        raise UserError("There are no rows.", where=str(source))
    return found


def _described(detail: ErrorDetails) -> str:
    wrong = {"missing": "is missing", "extra_forbidden": "is not known"}.get(detail["type"])
    return f"The column '{'.'.join(map(str, detail['loc']))}' {wrong or 'does not fit: ' + detail['msg']}."
