"""Creates new plugins from templates: pip-installable distributions with a passing test."""

from trl_rlaif.scaffold.create import KINDS, create_plugin

__all__ = ["KINDS", "create_plugin"]
