"""Reading a source tree by `ast`, without importing it: modules, what a name in one refers to, members of classes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Release = tuple[int, int]


@dataclass(frozen=True)
class Imported:
    """What an import statement binds: `name` of `module`, or the module itself where `name` is None."""

    module: str
    name: str | None
    line: int


Definition = Function | ast.ClassDef | ast.Assign | ast.AnnAssign | Imported


@dataclass
class Module:
    """One parsed module."""

    name: str
    path: Path
    body: ast.Module
    is_package: bool
    release: Release

    @cached_property
    def names(self) -> dict[str, Definition]:
        """What the module's top level binds, also below `if` and `try`; of several definitions the last one."""
        return dict(bindings(self.body.body, self))

    @cached_property
    def stars(self) -> list[str]:
        """Modules of which the module imports everything."""
        return [
            self.absolute(node)
            for node in statements(self.body.body, self.release)
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        ]

    def absolute(self, node: ast.ImportFrom) -> str:
        """The full name of the module that `node` imports from."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])


@dataclass(frozen=True)
class Found:
    """A definition and the module that has it; a whole module where `node` is None."""

    module: Module
    node: Function | ast.ClassDef | ast.Assign | ast.AnnAssign | None


@dataclass
class Tree:
    """The modules of `package` below the folder `root`, read as release `release` of vLLM would run them."""

    root: Path
    package: str
    release: Release
    _modules: dict[str, Module | None] = field(default_factory=dict)

    def module(self, name: str) -> Module | None:
        """None where there is no such module."""
        if name not in self._modules:
            base = self.root.joinpath(*name.split("."))
            paths = [base / "__init__.py", base.with_suffix(".py")]
            path = next((p for p in paths if p.is_file()), None)
            self._modules[name] = None
            if path is not None:
                body = ast.parse(path.read_text(), str(path))
                self._modules[name] = Module(name, path, body, path.name == "__init__.py", self.release)
        return self._modules[name]

    def __iter__(self) -> Iterator[Module]:
        for path in sorted((self.root / self.package).rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            module = self.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            assert module is not None
            yield module

    def find(self, module_name: str, path: str | None, seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        """What `path`, such as Class.method, is in a module, through re-exports; None where it is missing."""
        module = self.module(module_name)
        if module is None or path is None:
            return Found(module, None) if module is not None else None
        first, *rest = path.split(".")
        if (module_name, first) in seen:
            return None
        seen |= {(module_name, first)}
        found: Found | None
        definition = module.names.get(first)
        if isinstance(definition, Imported):
            found = self.find(definition.module, definition.name, seen)
        elif definition is not None:
            found = Found(module, definition)
        else:
            found = self.find(f"{module_name}.{first}", None)
            for star in module.stars:
                found = found or self.find(star, first, seen)
        for name in rest:
            found = self.member(found, name) if found is not None else None
        return found

    def member(self, owner: Found, name: str) -> Found | None:
        """A method, class attribute or instance attribute of a class, its own or inherited; None where missing."""
        if owner.node is None:
            return self.find(owner.module.name, name)
        if not isinstance(owner.node, ast.ClassDef):
            return None
        if (node := members(owner.node, owner.module).get(name)) is not None:
            return Found(owner.module, node)
        for base in owner.node.bases:
            if (parent := self.find_expression(owner.module, base)) is not None and parent.node is not owner.node:
                if (found := self.member(parent, name)) is not None:
                    return found
        return None

    def find_expression(self, module: Module, node: ast.expr | None) -> Found | None:
        """The class that a base or an annotation names: a name, a dotted name, a quoted one, X[...] or X | None."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            sides = [side for side in (node.left, node.right) if ast.unparse(side) != "None"]
            return self.find_expression(module, sides[0]) if len(sides) == 1 else None
        if isinstance(node, ast.Subscript):
            node = node.value
        if not isinstance(node, ast.Name | ast.Attribute):
            return None
        found = self.find(module.name, ast.unparse(node))
        return found if found is not None and isinstance(found.node, ast.ClassDef) else None


def statements(body: list[ast.stmt], release: Release) -> Iterator[ast.stmt]:
    """The statements of `body` and of the `if`, `try` and `with` in it, not those of functions and classes.

    Of `if RELEASE >= (0, 33)` only the branch that runs on `release`.
    """
    for node in body:
        yield node
        if isinstance(node, ast.If) and (guard := runs_on(node, release)) is not None:
            yield from statements(node.body if guard else node.orelse, release)
        elif not isinstance(node, Function | ast.ClassDef):
            for inner in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, inner, []), release)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, release)


def runs_on(node: ast.If, release: Release) -> bool | None:
    """Whether the body of `if RELEASE >= (0, 33)` runs on `release`; None for any other condition."""
    test = node.test
    if not (isinstance(test, ast.Compare) and ast.unparse(test.left) == "RELEASE" and isinstance(test.ops[0], ast.GtE)):
        return None
    return bool(release >= ast.literal_eval(test.comparators[0]))


def walk(node: ast.AST, release: Release) -> Iterator[ast.AST]:
    """`ast.walk`, without the branches that do not run on `release`."""
    yield node
    for child in children(node, release):
        yield from walk(child, release)


def children(node: ast.AST, release: Release) -> Iterator[ast.AST]:
    """`ast.iter_child_nodes`, without the branches that do not run on `release`."""
    if isinstance(node, ast.If) and (guard := runs_on(node, release)) is not None:
        yield from node.body if guard else node.orelse
    else:
        yield from ast.iter_child_nodes(node)


def imported(node: ast.stmt | ast.AST, module: Module) -> Iterator[tuple[str, Imported]]:
    """(local name, what it refers to) of an import statement; nothing for any other."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or top, Imported(top, None, node.lineno)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            if alias.name != "*":
                yield alias.asname or alias.name, Imported(module.absolute(node), alias.name, node.lineno)


def bindings(body: list[ast.stmt], module: Module) -> Iterator[tuple[str, Definition]]:
    """(name, definition) of everything that `body` binds."""
    for node in statements(body, module.release):
        yield from imported(node, module)
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(each, ast.Name):
                        yield each.id, node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def members(node: ast.ClassDef, module: Module) -> dict[str, Function | ast.ClassDef | ast.Assign | ast.AnnAssign]:
    """What a class binds itself: methods, class attributes, and attributes that its methods set on `self`."""
    own = {name: found for name, found in bindings(node.body, module) if not isinstance(found, Imported)}
    for method in [m for m in own.values() if isinstance(m, Function)]:
        for statement in walk(method, module.release):
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in targets:
                    for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                        if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self":
                            own.setdefault(each.attr, statement)
    return own


def signature(node: Function) -> str:
    """The parameters of a function as source text: names, order, kinds and defaults, no annotations."""
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0].args  # type: ignore[attr-defined]
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    return ast.unparse(arguments).replace(" ", "").replace(",", ", ")


def is_property(node: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
