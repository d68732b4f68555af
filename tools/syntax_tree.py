"""Analyse source trees with `ast`, without importing them: resolve names, members and types of objects."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Release = tuple[int, int]
# Bases that have no attributes of interest.
PLAIN_BASES = {"ABC", "Generic", "Protocol", "object", "Struct"}


@dataclass(frozen=True)
class Imported:
    """What an import statement binds: `name` of `module`, or the module itself where `name` is None."""

    module: str
    name: str | None
    line: int


Node = Function | ast.ClassDef | ast.Assign | ast.AnnAssign
Definition = Node | Imported


@dataclass(eq=False)
class Module:
    """One parsed module, as it would run with `release` of vLLM."""

    name: str
    path: Path
    body: ast.Module
    release: Release

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(walk(self.body, self.release))

    @cached_property
    def names(self) -> dict[str, Definition]:
        """Names bound at module level, including inside `if` and `try`; the last of several definitions."""
        return dict(self.bindings(self.body))

    @cached_property
    def imports(self) -> dict[str, Imported]:
        """What the module imports, also inside functions, by local name."""
        return {name: what for node in self.nodes for name, what in self.imported(node)}

    @cached_property
    def stars(self) -> list[str]:
        """Modules that are imported with `from ... import *`."""
        found = [node for node in self.body.body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
        return [self.absolute(node) for node in found]

    def absolute(self, node: ast.ImportFrom) -> str:
        """The full name of the module that `node` imports from."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + (self.path.name == "__init__.py")]
        return ".".join([*base, *([node.module] if node.module else [])])

    def imported(self, node: ast.AST) -> Iterator[tuple[str, Imported]]:
        """(local name, what it refers to) of an import statement; nothing for any other."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or top, Imported(top, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name != "*":
                    yield alias.asname or alias.name, Imported(self.absolute(node), alias.name, node.lineno)

    def bindings(self, body: ast.AST) -> Iterator[tuple[str, Definition]]:
        """(name, definition) of everything that the statements in `body` bind, not those of functions and classes."""
        for node in children(body, self.release):
            yield from self.imported(node)
            if isinstance(node, Function | ast.ClassDef):
                yield node.name, node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                yield from ((each.id, node) for each in targets(node) if isinstance(each, ast.Name))
            elif isinstance(node, ast.stmt | ast.ExceptHandler):
                yield from self.bindings(node)

    def members(self, cls: ast.ClassDef) -> dict[str, Node]:
        """What a class binds itself: methods, class attributes, and attributes that its methods set on `self`."""
        own = {name: found for name, found in self.bindings(cls) if not isinstance(found, Imported)}
        for method in [m for m in own.values() if isinstance(m, Function)]:
            for node in walk(method, self.release):
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    for each in targets(node):
                        if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self":
                            own.setdefault(each.attr, node)
        return own


@dataclass(frozen=True)
class Found:
    """A definition and the module that has it; a whole module where `node` is None."""

    module: Module
    node: Node | None


class World:
    """Packages, each below a folder of its own; an import of any other package is not followed.

    declared_bases: (module:Class -> classes) bases that a class's source does not tell
    """

    def __init__(self, roots: Mapping[str, Path], release: Release) -> None:
        self.roots, self.release = roots, release
        self.declared_bases: dict[str, list[Found]] = {}
        self._modules: dict[str, Module | None] = {}
        self._members: dict[ast.ClassDef, dict[str, Node]] = {}

    def module(self, name: str) -> Module | None:
        """None where there is no such module."""
        if name not in self._modules:
            self._modules[name] = None
            if (root := self.roots.get(name.partition(".")[0])) is not None:
                base = root.joinpath(*name.split("."))
                for path in (base / "__init__.py", base.with_suffix(".py")):
                    if path.is_file():
                        self._modules[name] = Module(name, path, ast.parse(path.read_text()), self.release)
                        break
        return self._modules[name]

    def modules(self, package: str) -> Iterator[Module]:
        for path in sorted((self.roots[package] / package).rglob("*.py")):
            parts = path.relative_to(self.roots[package]).with_suffix("").parts
            module = self.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            assert module is not None
            yield module

    def find(self, module_name: str, path: str | None, seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        """What `path`, such as Class.method, is in a module, through re-exports; None where it is missing."""
        module = self.module(module_name)
        if module is None or not path:
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

    def members(self, cls: Found) -> dict[str, Node]:
        assert isinstance(cls.node, ast.ClassDef)
        if cls.node not in self._members:
            self._members[cls.node] = cls.module.members(cls.node)
        return self._members[cls.node]

    def member(self, owner: Found, name: str) -> Found | None:
        """A member of a class, its own or inherited, of a module, or an attribute that a function sets on an object."""
        if owner.node is None:
            return self.find(owner.module.name, name)
        if isinstance(owner.node, Function):
            for node in ast.walk(owner.node):
                if isinstance(node, ast.Assign) and any(
                    isinstance(t, ast.Attribute) and t.attr == name and ast.unparse(t.value) != "self"
                    for t in node.targets
                ):
                    return Found(owner.module, node)
        if not isinstance(owner.node, ast.ClassDef):
            return None
        if (own := self.members(owner).get(name)) is not None:
            return Found(owner.module, own)
        return next((f for base in self.bases(owner) if base is not None and (f := self.member(base, name))), None)

    def bases(self, cls: Found) -> list[Found | None]:
        """The bases of a class that may have attributes of interest; None for one that is not known."""
        assert isinstance(cls.node, ast.ClassDef)
        found = [
            self.class_named(cls.module, base)
            for base in cls.node.bases
            if ast.unparse(base).partition("[")[0].rpartition(".")[2] not in PLAIN_BASES
        ]
        declared = self.declared_bases.get(f"{cls.module.name}:{cls.node.name}", [])
        return [base for base in found if base is None or base.node is not cls.node] + declared  # type: ignore[return-value]

    def ancestors(self, cls: Found) -> Iterator[Found | None]:
        """The class and all its bases; None for each that is not known."""
        yield cls
        for base in self.bases(cls):
            yield from self.ancestors(base) if base is not None else (None,)

    def class_named(self, module: Module, node: ast.expr | None) -> Found | None:
        """The class that a base or an annotation names: a name, a quoted one, X[...], type[X] or X | None."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            sides = [side for side in (node.left, node.right) if ast.unparse(side) != "None"]
            return self.class_named(module, sides[0]) if len(sides) == 1 else None
        if isinstance(node, ast.Subscript):
            return self.class_named(module, node.slice if ast.unparse(node.value) == "type" else node.value)
        if not isinstance(node, ast.Name | ast.Attribute):
            return None
        first, _, rest = ast.unparse(node).partition(".")
        if first not in module.names and (what := module.imports.get(first)) is not None:  # inside a function
            found = self.find(what.module, f"{what.name}.{rest}".rstrip(".") if what.name else rest)
        else:
            found = self.find(module.name, ast.unparse(node))
        return found if found is not None and isinstance(found.node, ast.ClassDef) else None

    def class_of(self, found: Found | None) -> Found | None:
        """The class that a definition is, is annotated with, or is set to an instance of; None if it is not known."""
        if found is None or found.node is None or isinstance(found.node, ast.ClassDef):
            return found
        if isinstance(found.node, Function):
            return self.class_named(found.module, found.node.returns) if is_property(found.node) else None
        if isinstance(found.node, ast.AnnAssign):
            return self.class_named(found.module, found.node.annotation)
        value = found.node.value
        if isinstance(value, ast.Call):
            made = self.find(found.module.name, ast.unparse(value.func))
            if made is not None and isinstance(made.node, Function):
                return self.class_named(made.module, made.node.returns)
            return made if made is not None and isinstance(made.node, ast.ClassDef) else None
        if isinstance(value, ast.Name):  # self.x = x, of a method's parameter
            for node in found.module.nodes:
                if isinstance(node, Function) and any(inner is found.node for inner in ast.walk(node)):
                    for argument in parameters(node):
                        if argument.arg == value.id:
                            return self.class_named(found.module, argument.annotation)
        return None


def runs_on(node: ast.If, release: Release) -> bool | None:
    """Whether the body of `if RELEASE >= (0, 33)` runs on `release`; None for any other condition."""
    test = node.test
    if not (isinstance(test, ast.Compare) and ast.unparse(test.left) == "RELEASE" and isinstance(test.ops[0], ast.GtE)):
        return None
    return bool(release >= ast.literal_eval(test.comparators[0]))


def children(node: ast.AST, release: Release) -> Iterator[ast.AST]:
    """`ast.iter_child_nodes`, without the branches that do not run on `release`."""
    if isinstance(node, ast.If) and (guard := runs_on(node, release)) is not None:
        yield from node.body if guard else node.orelse
    else:
        yield from ast.iter_child_nodes(node)


def walk(node: ast.AST, release: Release) -> Iterator[ast.AST]:
    """`ast.walk`, without the branches that do not run on `release`."""
    waiting = [node]
    for each in waiting:
        yield each
        waiting += children(each, release)


def targets(node: ast.stmt) -> list[ast.expr]:
    """The targets of an assignment, with tuples unpacked; nothing for any other statement."""
    if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        return []
    outer = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [each for target in outer for each in (target.elts if isinstance(target, ast.Tuple) else [target])]


def parameters(node: Function | ast.Lambda) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def signature(node: Function) -> str:
    """The parameters of a function as source text: names, order, kinds and defaults, no annotations."""
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0].args  # type: ignore[attr-defined]
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    return ast.unparse(arguments).replace(" ", "").replace(",", ", ")


def is_property(node: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
