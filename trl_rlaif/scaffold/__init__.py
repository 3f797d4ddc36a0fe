"""New plugins from templates: a folder that is a pip-installable distribution with a test that passes."""

from trl_rlaif.scaffold.create import KINDS, create_plugin

__all__ = ["KINDS", "create_plugin"]
