"""Finds plugins by entry point, keeps what they register, and says whose fault a failure is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from pydantic import BaseModel, ValidationError

from trl_rlaif import hookspecs
from trl_rlaif.components import Component, DataSelector, Labeler, RewardTransform
from trl_rlaif.errors import Problem, RunError, UserError

ENTRY_POINT_GROUP = "trl_rlaif"

KINDS: dict[str, type[Component]] = {
    "labeler": Labeler,
    "reward_transform": RewardTransform,
    "data_selector": DataSelector,
}


@dataclass(frozen=True)
class Registered:
    """A component, and the distribution that brought it."""

    kind: str
    name: str
    component: type[Component]
    distribution: str
    version: str


class Registry:
    """Every component by kind and name. Two of one name are an error, never a silent choice."""

    def __init__(self) -> None:
        self._components: dict[tuple[str, str], Registered] = {}

    def add(self, kind: str, name: str, component: Any, distribution: str, version: str) -> None:
        """Take in a component.

        Raises:
            UserError: It is not of its kind, or its name is taken; the distribution is named.
        """
        base = KINDS[kind]
        if not (isinstance(component, type) and issubclass(component, base)):
            raise UserError(
                f"The plugin {distribution} registers the {kind} '{name}' as {component!r}, "
                f"which is not a subclass of trl_rlaif.{base.__name__}."
            )
        if (kind, name) in self._components:
            other = self._components[kind, name].distribution
            raise UserError(
                f"Two plugins register the {kind} '{name}': {other} and {distribution}.",
                fix="Uninstall one of them, or ask its author for another name.",
            )
        self._components[kind, name] = Registered(kind, name, component, distribution, version)

    def names(self, kind: str) -> list[str]:
        """Names of all components of a kind, sorted."""
        return sorted(name for k, name in self._components if k == kind)

    def find(self, kind: str, name: str) -> Registered:
        """The component of that name; a UserError with the nearest names if there is none."""
        if (kind, name) not in self._components:
            near = difflib.get_close_matches(name, self.names(kind), n=1)
            known = ", ".join(self.names(kind)) or "none is installed"
            raise UserError(
                f"There is no {kind.replace('_', ' ')} '{name}'.",
                fix=f"Did you mean '{near[0]}'?" if near else f"Known: {known}.",
            )
        return self._components[kind, name]

    def options_model(self, kind: str, name: str) -> type[BaseModel]:
        """The pydantic model of a component's options."""
        return self.find(kind, name).component.Options

    def create(self, kind: str, name: str, options: dict[str, Any] | None = None) -> Any:
        """An instance of a component with its options.

        Raises:
            UserError: An option is unknown or of the wrong type.
        """
        found = self.find(kind, name)
        try:
            return found.component(**(options or {}))
        except ValidationError as error:
            problems = [
                Problem(f"{found.distribution}: {kind} '{name}', option "
                        f"'{'.'.join(map(str, e['loc']))}': {e['msg']}")
                for e in error.errors()
            ]  # fmt: skip
            raise UserError.from_problems(problems) from None

    def __iter__(self) -> Iterable[Registered]:
        return iter(sorted(self._components.values(), key=lambda r: (r.kind, r.name)))


class Plugins:
    """The plugin manager and the registry it filled."""

    def __init__(self, manager: pluggy.PluginManager, registry: Registry) -> None:
        self.manager = manager
        self.registry = registry

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call an observing hook. One that raises stops the run and is named.

        Raises:
            RunError: With the plugin's name and hook; its cause is the plugin's own exception.
        """
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            accepted = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(*accepted.values())
            except Exception as error:
                raise RunError(
                    f"The plugin {implementation.plugin_name} failed in its hook {hook}: "
                    f"{type(error).__name__}: {error}"
                ) from error


def _load(entry_point: EntryPoint, label: str) -> Any:
    try:
        return entry_point.load()
    except Exception as error:
        raise UserError(
            f"The plugin {label} cannot be imported ({entry_point.value}): {type(error).__name__}: {error}",
            fix=f"Mend or uninstall the distribution {label}.",
        ) from error


def _register_components(manager: pluggy.PluginManager, registry: Registry) -> None:
    """Call each plugin's register_* hooks by itself, so that an error names the one to blame."""
    for name, plugin in manager.list_name_plugin():
        distribution, _, version = name.partition(" ")
        for kind in KINDS:
            hook = getattr(plugin, f"register_{kind}s", None)
            if hook is None or manager.parse_hookimpl_opts(plugin, f"register_{kind}s") is None:
                continue

            def register(
                component_name: str, component: type, kind: str = kind,
                distribution: str = distribution, version: str = version,
            ) -> None:  # fmt: skip
                registry.add(kind, component_name, component, distribution, version)

            try:
                hook(register)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"The plugin {distribution} failed in register_{kind}s: {type(error).__name__}: {error}"
                ) from error


def build_plugins(points: Iterable[EntryPoint]) -> Plugins:
    """Load the given entry points into a fresh manager and registry.

    Raises:
        UserError: A plugin does not import, implements a hook that does not exist, or clashes with
            another; the message names the distribution.
    """
    manager = pluggy.PluginManager("trl_rlaif")
    manager.add_hookspecs(hookspecs)
    for point in points:
        dist = point.dist
        label = f"{dist.name} {dist.version}" if dist else point.value
        plugin = _load(point, label)
        # One distribution may bring several plugins: the entry point's name keeps them apart.
        name = f"{label} ({point.name})"
        if manager.get_plugin(name) is not None or manager.is_registered(plugin):
            raise UserError(f"The plugin {name} is installed twice.", fix="Uninstall one of the two.")
        try:
            manager.register(plugin, name=name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise UserError(f"The plugin {label} does not fit: {error}") from error
    registry = Registry()
    _register_components(manager, registry)
    return Plugins(manager, registry)


@cache
def installed_plugins() -> Plugins:
    """All plugins that are installed in this environment, loaded once per process."""
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: (p.dist.name if p.dist else "", p.name))
    return build_plugins(points)
