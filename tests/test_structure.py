"""The structure of the code: no import cycles, no long functions, no duplicated code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root in (ROOT, ROOT / "plugins")
    for path in sorted(root.glob("trl_rlaif*/**/*.py"))
}
LONGEST = 60
TWICE = 6


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# ---- Imports --------------------------------------------------------------------------------------------


def at_run_time(body):
    """The statements that run when a module is imported: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_run_time(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            for block in ("body", "orelse", "finalbody"):
                yield from at_run_time(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from at_run_time(handler.body)


def imported(body):
    """The dotted names that a module's statements import; a name imported from a module may be a module itself."""
    for node in at_run_time(body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph_of(bodies):
    """What each module imports at run time; importing a module first imports its parent packages."""
    graph = {name: set() for name in bodies}
    for name, body in bodies.items():
        for target in imported(body):
            parts = target.split(".")
            around = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
            # The importing module's own parent packages are already being imported.
            graph[name] |= {m for m in around if m in bodies and m != name and not name.startswith(f"{m}.")}
    return graph


def circle(bodies):
    """The modules of an import cycle, or None."""
    try:
        TopologicalSorter(graph_of(bodies)).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def reached(graph, name):
    """Every module that a module imports, directly or indirectly."""
    found, todo = set(), [name]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_no_import_circles():
    assert circle({name: tree(path).body for name, path in FILES.items()}) is None


@pytest.mark.parametrize(
    ("back", "found"),
    [
        ("from a import f", True),
        ("import a", True),
        ("try:\n    import a\nexcept ImportError:\n    pass", True),
        ("class B:\n    import a", True),
        ("def g():\n    import a", False),
        ("if TYPE_CHECKING:\n    import a", False),
    ],
)
def test_a_circle_is_seen(back, found):
    sources = {"a": "from b import g", "b": back}
    assert (circle({name: ast.parse(text).body for name, text in sources.items()}) is not None) == found


def test_evaluation_does_not_import_rl():
    graph = graph_of({name: tree(path).body for name, path in FILES.items()})
    reaching = {
        name: [module for module in reached(graph, name) if module.startswith("trl_rlaif.rl")]
        for name in graph
        if name.startswith("trl_rlaif.evaluation")
    }
    assert len(reaching) > 5 and {name: found for name, found in reaching.items() if found} == {}


def test_stages_do_not_import_each_other():
    graph = graph_of({name: tree(path).body for name, path in FILES.items()})
    for room in ("trl_rlaif.pipeline.stages.", "trl_rlaif.pipeline.work."):
        stages = [name for name in graph if name.startswith(room)]
        assert len(stages) > 5
        assert {name: graph[name] & set(stages) for name in stages if graph[name] & set(stages)} == {}


def test_rl_does_not_know_the_pipeline():
    """Except for the names of two files that a selection writes."""
    graph = graph_of({name: tree(path).body for name, path in FILES.items()})
    known = {module for name in graph if name.startswith("trl_rlaif.rl") for module in graph[name]}
    pipeline = {module for module in known if module.startswith("trl_rlaif.pipeline")}
    assert pipeline <= {"trl_rlaif.pipeline", "trl_rlaif.pipeline.artifacts"}


def test_one_module_knows_what_the_files_of_a_run_are_called():
    artifacts = importlib.import_module("trl_rlaif.pipeline.artifacts")
    named = {v for k, v in vars(artifacts).items() if k.isupper() and isinstance(v, str) and "." in v.strip(".")}
    assert len(named) > 12
    found = {
        (name, node.value)
        for name, path in FILES.items()
        if name != artifacts.__name__
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and node.value in named
    }
    assert found == set()


def test_every_section_of_a_stage_has_a_stage():
    from trl_rlaif.pipeline.stages import STAGES
    from trl_rlaif.recipe import STAGES as SECTIONS

    assert [*STAGES] == [*SECTIONS] == [stage.name for stage in STAGES.values()]


# ---- Functions ------------------------------------------------------------------------------------------


def test_functions_are_short():
    found = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in FILES.items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in found.items() if lines >= LONGEST} == {}


# ---- Duplication ----------------------------------------------------------------------------------------


def code_lines(module):
    """The lines of a module's code as unparsed by ast: no imports, docstrings, signatures or comments."""
    for node in ast.walk(module):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not isinstance(part, ast.Import | ast.ImportFrom)]
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
            node.body = node.body or [ast.Pass()]
    text = ast.unparse(module).splitlines()
    skipped = ("def ", "async def ", "class ", "@", "pass")
    return [line.strip() for line in text if line and not line.strip().startswith(skipped)]


def repeated(modules):
    """Runs of ``TWICE`` lines that occur more than once, with their modules."""
    seen = defaultdict(list)
    for name, module in modules.items():
        lines = code_lines(module)
        for start in range(len(lines) - TWICE + 1):
            seen[tuple(lines[start : start + TWICE])].append(name)
    return {lines: names for lines, names in seen.items() if len(names) > 1}


def test_nothing_is_written_twice():
    assert repeated({name: tree(path) for name, path in FILES.items()}) == {}


def test_repetition_is_seen():
    lines = [f"x{i} = f({i})" for i in range(TWICE)]
    one, another = "\n".join(lines), "def f():\n    'Doc.'\n" + "\n".join(f"    {line}  # why" for line in lines)
    assert repeated({"a": ast.parse(one), "b": ast.parse(another)})
    assert not repeated({"a": ast.parse(one), "b": ast.parse("\n".join(lines[:-1]))})


# ---- Names ----------------------------------------------------------------------------------------------


def imports_of(path):
    """(module, name) of every name that a file imports from the package, also in functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl_rlaif":
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_imports_what_there_is(path):
    """Most of them take too long to run here."""
    missing = []
    for module, name in imports_of(path):
        found = importlib.import_module(module)
        if not hasattr(found, name) and importlib.util.find_spec(f"{module}.{name}") is None:
            missing.append(f"{module}.{name}")
    assert missing == []
