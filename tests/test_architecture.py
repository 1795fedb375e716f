"""What holds the picture of docs/architecture.md: who may import whom, and what nobody may ask."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jobq"

#: A room (a module, or a folder with all in it) imports from its own layer and from those before it.
LAYERS = (
    {"errors", "faults", "report", "events"},
    {"arena", "handover", "options", "outcome", "shapes", "stage", "wire", "backend", "load"},
    {
        "annotations",
        "validation",
        "backends",
        "claims",
        "failure",
        "files",
        "graph",
        "lineage",
        "ordering",
        "outbox",
        "pictures",
        "policy",
        "results",
        "retirement",
        "scheduler",
        "shares",
    },
    {
        "feed",
        "inlet",
        "inputs",
        "keeper",
        "ladder",
        "lanes",
        "letters",
        "listener",
        "locks",
        "replay",
        "shared",
        "work",
    },
    {"allotment", "pool", "driver"},
    {"running"},
    {"mapstream", "session", "stream"},
    {"pipeline"},
    {"mapping"},
    {"cli", "testing"},
    {"__main__"},
)
#: Rooms that may import less than their layer may, and those that they may import (besides themselves).
NARROW = {
    "observe": {"errors", "report", "events", "options"},
    "backends": {"arena", "errors", "faults", "options", "stage", "wire", "backend", "load"},
    "policy": {"errors", "report", "events", "options", "outcome", "stage", "wire", "backend"},
}
#: Rooms that may set observers up; `work` and `keeper` do for their own process's log.
HOSTS = {"work", "keeper", "running", "pipeline", "cli", "testing"}
#: Looks upwards, each in a function: what a target names is checked to be a Pipeline; a worker with
#: lanes is built upon the one without, which opens it (and pays for asyncio only then).
UPWARD = {("jobq.load", "jobq.pipeline"), ("jobq.work", "jobq.lanes")}
#: Rooms that decide and do nothing: what they must not have at hand.
PURE = {"lineage", "ordering", "policy", "scheduler", "shares"}
OUTSIDE_WORLD = {
    "multiprocessing",
    "os",
    "random",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
}
#: Rooms whose thread touches no user data.
DECIDING = {"allotment", "driver", "pool", "scheduler"}

BACKENDS = {"joinable", "sentinel", "pipe", "thread", "inline", "ray"}
SLOW = {"asyncio", "click", "multiprocessing.managers", "numpy", "ray", "rich", "sqlite3", "structlog"}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """Return the first name below ``jobq``; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), file)


MODULES = {module_name(file): file for file in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Give the modules that the code imports, wherever it does; relative imports are ruff's business."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else str(node.module) for name in names)


def imported_when_run(file: Path) -> Iterator[str]:
    """Give the modules that the file imports, those for the type checker alone left out."""
    for statement in parsed(file).body:
        if not (isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING")):
            yield from imported(statement)


def rooms_open_to(name: str) -> set[str]:
    if name in NARROW:
        return NARROW[name] | {name}
    depth = next(number for number, layer in enumerate(LAYERS) if name in layer)
    return set().union({"observe"} if name in HOSTS else (), *LAYERS[: depth + 1])


def test_every_room_has_its_layer() -> None:
    known = set().union(*LAYERS) | {"observe", ""}

    assert {room(module) for module in MODULES} - known == set()


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_imports_run_one_way(module: str) -> None:
    names = {name for name in imported(parsed(MODULES[module])) if name.split(".")[0] == "jobq"}
    rooms = {room(name) for name in names if (module, name) not in UPWARD}

    # The package itself ("") only re-exports: who imports it imports everything.
    assert rooms - rooms_open_to(room(module)) == set()


def test_no_module_is_imported_by_what_it_imports() -> None:
    graph = {
        module: {
            name
            for name in imported_when_run(file)
            if name in MODULES and name != module and (module, name) not in UPWARD
        }
        for module, file in MODULES.items()
    }

    TopologicalSorter(graph).prepare()  # raises CycleError, which names the ring


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in PURE])
def test_what_decides_has_no_clock_and_no_io_at_hand(module: str) -> None:
    assert set(imported_when_run(MODULES[module])) & OUTSIDE_WORLD == set()


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in DECIDING])
def test_the_deciding_thread_can_unpickle_nothing(module: str) -> None:
    assert set(imported(parsed(MODULES[module]))) & {"pickle", "cloudpickle", "dill"} == set()


def strings_compared(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Give each string that decides: compared with, matched, or the key of a table."""
    for node in ast.walk(tree):
        deciding: list[ast.AST] = []
        if isinstance(node, ast.Compare | ast.MatchValue):
            deciding = [node]
        elif isinstance(node, ast.Dict):
            deciding = [key for key in node.keys if key is not None]
        for part in deciding:
            for inner in ast.walk(part):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.value, inner.lineno


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) != "backends"])
def test_nobody_asks_which_backend_it_is(module: str) -> None:
    asked = [(name, line) for name, line in strings_compared(parsed(MODULES[module])) if name in BACKENDS]

    assert asked == []


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            yield node


def is_declaration_only(node: ast.AST) -> bool:
    """Whether it is an overload, or a property's setter: the docstring stands at its fellow."""
    decorators = map(ast.unparse, getattr(node, "decorator_list", []))
    return any(text.endswith(("overload", ".setter")) for text in decorators)


@cache
def methods_of_seams() -> frozenset[str]:
    """Return the methods that a Protocol documents, so that its implementations need not."""
    return frozenset(
        method.name
        for file in FILES
        for protocol in public(parsed(file).body)
        if isinstance(protocol, ast.ClassDef) and "Protocol" in map(ast.unparse, protocol.bases)
        for method in public(protocol.body)
        if ast.get_docstring(method)
    )


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_says_what_it_is(module: str) -> None:
    tree = parsed(MODULES[module])
    silent = [] if ast.get_docstring(tree) or not tree.body else [module]
    for node in public(tree.body):
        if not ast.get_docstring(node) and not is_declaration_only(node):
            silent.append(node.name)
        if isinstance(node, ast.ClassDef):
            silent += [
                f"{node.name}.{method.name}"
                for method in public(node.body)
                if not ast.get_docstring(method)
                and not is_declaration_only(method)
                and method.name not in methods_of_seams()
            ]

    assert silent == []


@pytest.mark.parametrize(("module", "allowed"), [("jobq", set()), ("jobq.cli", {"click"})])
def test_importing_loads_no_slow_module(module: str, allowed: set[str]) -> None:
    code = f"import {module}, sys, json; print(json.dumps(sorted(sys.modules)))"

    output = subprocess.check_output([sys.executable, "-c", code], timeout=60)

    assert set(json.loads(output)) & (SLOW - allowed) == set()
