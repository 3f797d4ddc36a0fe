"""Which versions of TRL this package works with."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from trl_rlaif.errors import UserError

# As in pyproject.toml. CI tests no earlier one; TRL announces for 2.0 the removal of what 1.x deprecates.
LOWEST, TOO_HIGH = "1.12", "2"
_FIX = f"Run: pip install 'trl>={LOWEST},<{TOO_HIGH}'."


def check_trl(version: str | None = None) -> None:
    """Refuse a TRL that this package does not work with, before anything of it is imported.

    Args:
        version: Its version; None asks what is installed.

    Raises:
        UserError: It is older than 1.12, is 2.0 or later, or is not installed.
    """
    if version is None:
        try:
            version = metadata.version("trl")
        except metadata.PackageNotFoundError:
            raise UserError("trl is not installed.", fix=_FIX) from None
    # The release alone: a development version of 2.0 has what 2.0 will have.
    release = Version(version).release
    if release < Version(LOWEST).release:
        raise UserError(f"trl {version} is installed, which is too old; trl-rlaif needs {LOWEST} or later.", fix=_FIX)
    if release >= Version(TOO_HIGH).release:
        raise UserError(f"trl {version} is installed; trl-rlaif works with versions below {TOO_HIGH}.", fix=_FIX)
