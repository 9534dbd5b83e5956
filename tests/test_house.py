"""Invariant: rooms import downwards only, without a circle, and two alone know vLLM; a file is short and named well."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from conftest import ROOT

ROOMS = {"vllm_dwdp": "vllm_dwdp", "kernels": "vllm_dwdp.kernels", "entrypoints": "vllm_dwdp.entrypoints"}
PURE = {"config", "errors", "placement", "layout", "schedule", "budget", "counters", "costs", "manifests"}
MEMORY = {"kernels", "channel", "checkpoint", "descriptors", "launcher", "store", "records", "meeting", "inboxes", "slots", "weights",
          "prefetch", "dispatch", "convoy", "rendezvous", "handover", "experts", "limits", "large_steps", "profiling"}
LEVELS = {"pure": 0, "memory": 1, "assembly": 2, "integration": 3, "entrypoints": 4}


def modules() -> dict[str, Path]:
    """Every module of the package by the name under which it is installed."""
    found = {}
    for folder, package in ROOMS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """What a module imports, at its top or in a function, but not for type checkers only."""
    tree = ast.parse(MODULES[name].read_text())
    typing_only = {id(node) for branch in ast.walk(tree) if isinstance(branch, ast.If)
                   and ast.unparse(branch.test) == "TYPE_CHECKING" for node in ast.walk(branch)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative imports hide the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    nearest = {found if found in MODULES else found.rpartition(".")[0] for found in imports(name)}
    return {found for found in nearest if found in MODULES and found not in ("vllm_dwdp", name)}


def level(name: str) -> int:
    room = name.split(".")[1]
    return LEVELS["pure" if room in PURE else "memory" if room in MEMORY else room]


def test_only_two_rooms_know_vllm() -> None:
    knowing = {name for name in MODULES if any(found.split(".")[0] == "vllm" for found in imports(name))}
    assert knowing and not {n for n in knowing if n.split(".")[1:2] not in (["integration"], ["entrypoints"])}


def test_no_arrow_upwards() -> None:
    arrows = [(name, used) for name in MODULES if name != "vllm_dwdp" for used in ours(name)]
    assert len(arrows) > 30 and not [(name, used) for name, used in arrows if level(used) > level(name)]


def test_pure_modules_know_no_torch() -> None:
    """Nor what knows it, but as a type."""
    pure = {f"vllm_dwdp.{room}" for room in PURE}
    assert pure <= set(MODULES)
    assert not {(name, found) for name in pure for found in imports(name) if found.split(".")[0] == "torch"}
    assert not {(name, used) for name in pure for used in ours(name) - pure}


def test_no_circle() -> None:
    """TopologicalSorter raises CycleError naming the modules of one."""
    assert len(list(TopologicalSorter({name: ours(name) for name in MODULES}).static_order())) == len(MODULES)


FILES = sorted(path for folder in (*ROOMS, "tests", "examples", ".ci") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_says_what_it_owns(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300 or path.is_relative_to(ROOT / "tests")
    first = (ast.get_docstring(ast.parse(text)) or "").splitlines()[:1]
    assert first and len(first[0]) > 20, "the first line says what the file owns"
