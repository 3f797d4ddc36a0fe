"""Finds plugins by entry point, registers their components, and names the plugin that causes an error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ValidationError

from trl_rlaif import __version__, hookspecs
from trl_rlaif.components import Component, DataSelector, Labeler, PairSampler, RewardTransform
from trl_rlaif.errors import Problem, RunError, TrlRlaifError, UserError
from trl_rlaif.interrupts import is_fault

ENTRY_POINT_GROUP = "trl_rlaif"
OWN_DISTRIBUTION = "trl-rlaif"

KINDS: dict[str, type[Component]] = {
    "labeler": Labeler,
    "reward_transform": RewardTransform,
    "data_selector": DataSelector,
    "pair_sampler": PairSampler,
}


@dataclass(frozen=True)
class Registered:
    """A component and the distribution that provides it."""

    kind: str
    name: str
    component: type[Component]
    distribution: str
    version: str


class Registry:
    """All components by kind and name. Two with the same name are an error, never a silent choice."""

    def __init__(self) -> None:
        self._components: dict[tuple[str, str], Registered] = {}

    def add(self, kind: str, name: str, component: Any, distribution: str, version: str) -> None:
        """Add a component.

        Raises:
            UserError: It is not a subclass for its kind, or its name is taken; the message names the distribution.
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

    def rewards(self) -> list[str]:
        """Names of all labelers that are also reward functions, sorted."""
        return [r.name for r in self if r.kind == "labeler" and issubclass(r.component, Callable)]  # type: ignore[arg-type]

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

    def __iter__(self) -> Iterator[Registered]:
        return iter(sorted(self._components.values(), key=lambda r: (r.kind, r.name)))


class Plugins:
    """The plugin manager and its registry."""

    def __init__(self, manager: pluggy.PluginManager, registry: Registry) -> None:
        self.manager = manager
        self.registry = registry

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call an observing hook. An exception stops the run and names the plugin.

        Raises:
            RunError: With the plugin's name and hook; its cause is the plugin's own exception.
        """
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            accepted = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(*accepted.values())
            except BaseException as error:
                if not is_fault(error):
                    raise
                raise RunError(
                    f"The plugin {implementation.plugin_name} failed in its hook {hook}: "
                    f"{type(error).__name__}: {error}"
                ) from error


@dataclass(frozen=True)
class _Origin:
    """A plugin's origin: its distribution, and the entry point that distinguishes the distribution's plugins."""

    distribution: str
    version: str
    entry_point: str

    @classmethod
    def of(cls, point: EntryPoint) -> _Origin:
        if point.dist is None:
            return cls(point.value, "", point.name)
        if point.dist.name is None:  # pip removed its metadata, or never wrote them
            return cls(f"of {getattr(point.dist, '_path', point.value)}", "(half installed)", point.name)
        return cls(point.dist.name, point.dist.version, point.name)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.distribution, self.version, f"({self.entry_point})")))


def _check_requirement(point: EntryPoint, origin: _Origin) -> None:
    """Check that the plugin's distribution supports this release, which pip checks only when installing it.

    Done before the import, which might fail for this reason with a less clear message.
    """
    for text in getattr(point.dist, "requires", None) or ():
        if not text.lower().startswith("trl"):  # few are worth parsing
            continue
        needed = Requirement(text)
        applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
        ours = canonicalize_name(needed.name) == canonicalize_name(OWN_DISTRIBUTION)
        if ours and applies and not needed.specifier.contains(__version__, prereleases=True):
            raise UserError(
                f"The plugin {origin} needs {OWN_DISTRIBUTION} {needed.specifier}, and this is {__version__}.",
                fix=f"Install such a release, or a matching one of {origin.distribution}, or uninstall it.",
            )


def _load(point: EntryPoint, origin: _Origin) -> Any:
    try:
        return point.load()
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(
            f"The plugin {origin} cannot be imported from '{point.value}': {type(error).__name__}: {error}",
            fix=f"Fix or uninstall the distribution {origin.distribution}.",
        ) from error


def _register(manager: pluggy.PluginManager, plugin: Any, origin: _Origin) -> None:
    if manager.get_plugin(str(origin)) is not None or manager.is_registered(plugin):
        raise UserError(f"The plugin {origin} is installed twice.", fix="Uninstall one of the two.")
    try:
        manager.register(plugin, name=str(origin))
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise UserError(f"The plugin {origin} is not compatible: {error}") from error


def _register_components(manager: pluggy.PluginManager, registry: Registry, plugin: Any, origin: _Origin) -> None:
    """Call one plugin's register_* hooks, so that an error can name it."""
    for kind in KINDS:
        name = f"register_{kind}s"
        own = [impl for impl in getattr(manager.hook, name).get_hookimpls() if impl.plugin is plugin]
        for implementation in own:
            try:
                implementation.function(
                    lambda component_name, component, kind=kind: registry.add(
                        kind, component_name, component, origin.distribution, origin.version
                    )
                )
            except UserError:
                raise
            except BaseException as error:
                if not is_fault(error):
                    raise
                raise UserError(f"The plugin {origin} failed in {name}: {type(error).__name__}: {error}") from error


def build_plugins(points: Iterable[EntryPoint], broken: list[Problem] | None = None) -> Plugins:
    """Load the given entry points into a fresh manager and registry.

    Args:
        points: Entry points of plugins.
        broken: List to which problems are added; plugins with problems are left out. None: raise.

    Raises:
        UserError: A plugin does not import, needs another release of this library, implements a hook that does
            not exist, or clashes with another; the message names the distribution.
    """
    manager, registry = pluggy.PluginManager("trl_rlaif"), Registry()
    manager.add_hookspecs(hookspecs)
    for point in points:
        try:
            _add(manager, registry, point)
        except TrlRlaifError as error:
            if broken is None:
                raise
            broken.extend(error.problems)
    return Plugins(manager, registry)


def _add(manager: pluggy.PluginManager, registry: Registry, point: EntryPoint) -> None:
    origin = _Origin.of(point)
    _check_requirement(point, origin)
    plugin = _load(point, origin)
    _register(manager, plugin, origin)
    _register_components(manager, registry, plugin, origin)


@cache
def installed_plugins() -> Plugins:
    """All plugins installed in this environment, loaded once per process."""
    return build_plugins(plugin_points())


def plugin_points() -> list[EntryPoint]:
    """The entry points of all installed plugins."""
    return sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: str(_Origin.of(point)))
