"""Which part of the package may import which: never a higher layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
# From the ground up. A part may import those on the floors below its own, and itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("kvllm", "kvllm.errors", "kvllm.layers"),
    ("kvllm.budgets",),
    ("kvllm.groups",),
    ("kvllm.options", "kvllm.support"),
    ("kvllm.config",),
    ("kvllm.layout", "kvllm.methods"),
    ("kvllm.checks",),
    ("kvllm.compression",),
    ("kvllm.kernels", "kvllm.reference"),
    ("kvllm.engine",),
    ("kvllm.cli",),
    ("kvllm.measure",),
    ("kvllm.__main__",),
)
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
# Not commands: they know nothing of the tasks that use them.
NO_TASKS = ("plots", "report", "stats", "sweep", "samples", "problems", "programs", "traces")
TASKS = ("fidelity", "recall", "frontier", "accuracy", "tracking", "calibrate", "calibrate_layers")


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.glob("kvllm/**/*.py")}


def part_of(module: str) -> str:
    """The file at the root, or the folder, that a module belongs to."""
    return ".".join(module.split(".")[:2])


def imports(module: str, type_checking: bool = True) -> Iterator[str]:
    """The modules of the package that this one imports, wherever in the file; type_checking: for annotations too."""
    nodes: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not type_checking:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if part_of(alias.name) in FLOOR)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: import by the full name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found = name if name in MODULES else str(node.module)
                if found in MODULES:
                    yield found
        nodes += ast.iter_child_nodes(node)


def test_every_part_has_a_floor() -> None:
    assert {part_of(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_runs_upwards(module: str) -> None:
    own = part_of(module)
    upwards = [
        other for other in imports(module) if part_of(other) != own and FLOOR[part_of(other)] >= FLOOR[own]
    ]  # fmt: skip
    assert not upwards, f"{module} imports {', '.join(upwards)}, which are not below {own}"


def test_only_the_command_reaches_what_measures_and_only_when_it_runs() -> None:
    """`kvllm.measure` is a package of its own, which servers do not have."""
    others = [module for module in MODULES if part_of(module) != "kvllm.measure"]
    importing = [module for module in others if any(part_of(other) == "kvllm.measure" for other in imports(module))]
    assert importing == ["kvllm.__main__"]
    for module in importing:  # none outside of a function
        nodes: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            assert not (isinstance(node, ast.Import | ast.ImportFrom) and "kvllm.measure" in ast.unparse(node)), module
            nodes += ast.iter_child_nodes(node)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Annotations aside, which are not evaluated, and packages, whose faces collect what is in them."""
    edges = {module: {m for m in imports(module, type_checking=False) if m != module} for module in MODULES}
    edges = {module: others for module, others in edges.items() if MODULES[module].name != "__init__.py"}
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == 1:
            return
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        for other in edges.get(module, ()):
            visit(other, (*path, module))
        state[module] = 1

    for module in edges:
        visit(module, ())


def test_what_tasks_share_imports_no_task() -> None:
    for name in NO_TASKS:
        found = set(imports(f"kvllm.measure.eval.{name}")) & {f"kvllm.measure.eval.{task}" for task in TASKS}
        assert not found, f"{name} imports {found}"


def test_a_module_that_breaks_the_rule_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "config.py"
    broken.write_text("def f():\n    from kvllm.methods import make_method\n    from kvllm import engine\n")
    monkeypatch.setitem(MODULES, "kvllm.config", broken)
    with pytest.raises(AssertionError, match="kvllm.config imports ") as error:
        test_no_import_runs_upwards("kvllm.config")
    assert "kvllm.methods" in str(error.value) and "kvllm.engine" in str(error.value)
