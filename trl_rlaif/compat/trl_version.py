"""Supported versions of TRL."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from trl_rlaif.errors import UserError

# As in pyproject.toml. CI tests no earlier version; TRL has announced that 2.0 removes what 1.x deprecates.
LOWEST, TOO_HIGH = "1.12", "2"
_FIX = f"Run: pip install 'trl>={LOWEST},<{TOO_HIGH}'."


def check_trl(version: str | None = None) -> None:
    """Reject an unsupported TRL, before it is imported.

    Args:
        version: TRL's version; None: the installed one.

    Raises:
        UserError: It is older than 1.12, is 2.0 or later, or is not installed.
    """
    if version is None:
        try:
            version = metadata.version("trl")
        except metadata.PackageNotFoundError:
            raise UserError("trl is not installed.", fix=_FIX) from None
    # Only the release number: a development version of 2.0 counts as 2.0.
    release = Version(version).release
    if release < Version(LOWEST).release:
        raise UserError(f"trl {version} is installed, which is too old; trl-rlaif needs {LOWEST} or later.", fix=_FIX)
    if release >= Version(TOO_HIGH).release:
        raise UserError(f"trl {version} is installed; trl-rlaif works with versions below {TOO_HIGH}.", fix=_FIX)
