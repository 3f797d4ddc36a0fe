"""Proximal policy optimization in short, overridable steps."""

from trl_rlaif.compat.trl_version import check_trl

check_trl()  # here, since this comes before any import of TRL in this package
