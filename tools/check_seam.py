"""Check `kvllm.engine.seam` against our source and a vLLM source tree, which need not be importable.

    python -m tools.check_seam [FOLDER]    FOLDER contains vllm/; default: the installed vLLM

Reports every declaration that this vLLM does not satisfy, every use of vLLM in our source that is undeclared or
incompatible with this vLLM, and every stale declaration. With FOLDER, also lists the functions that we depend on whose
source differs from the installed vLLM's and must be reviewed. Exits with status 1 if there are problems.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kvllm.engine.seam import OBJECTS, SEAM
from kvllm.engine.touch import RELEASES, Addition, Assignment, Import, Override, Read, Touch
from tools.syntax_tree import Found, Function, Module, World, children, is_property, parameters, signature, targets

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = "vllm.general_plugins"  # not a module name
Types = dict[str, Found | None]  # expression -> its class; None where it is not known


def installed(package: str = "vllm") -> Path:
    """The folder that contains an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed; give a folder that contains vllm/.")
    return Path(spec.origin).parent.parent


def read_version(root: Path) -> str:
    """The version that vllm/_version.py states."""
    path = root / "vllm" / "_version.py"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: the folder must contain vllm/ from a wheel, which has this file.")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and "__version__" in map(ast.unparse, node.targets):
            return str(ast.literal_eval(node.value))
    raise SystemExit(f"{path} contains no version.")


class Check:
    """Find the problems of `seam`, for our package kvllm below `source` and the vLLM below `vllm`."""

    def __init__(
        self, vllm: Path, source: Path, seam: Sequence[Touch], objects: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        major, minor, *_ = read_version(vllm).split(".")
        # For a release that is not supported yet, expect the same as for the newest supported one.
        self.release = f"{major}.{minor}" if f"{major}.{minor}" in RELEASES else RELEASES[-1]
        roots = {"vllm": vllm, "kvllm": source, "tests": ROOT, "tools": ROOT, "torch": installed("torch")}
        self.world = World(roots, (int(major), int(minor)))
        self.seam = [touch for touch in seam if self.release in touch.releases]
        self.objects = objects or {}
        self.problems: list[str] = []
        self.called: set[tuple[str, str]] = set()  # (module, path) of vLLM's functions
        # The modules that declare the seam do not count as its users.
        self.modules = [m for m in self.world.modules("kvllm") if not re.search(r"engine\.(seam|touch)$", m.name)]

    def run(self) -> list[str]:
        for touch in self.seam:
            for path, expected in touch.paths.items():
                self.check_declaration(touch, path, expected)
            if isinstance(touch, Override) and (base := self.world.find(*split(touch.owner))) is not None:
                self.world.declared_bases.setdefault(touch.ours, []).append(base)
        for module in self.modules:
            self.check_imports(module)
            _Source(self, module).run()
        for name in sorted(self.objects.keys() - {module.name for module in self.modules}):
            self.problems.append(f"OBJECTS {name}: stale, there is no such module")
        self.check_stale()
        return self.problems

    def check_declaration(self, touch: Touch, path: str, expected: str | None) -> None:
        name = f"{touch.kind} {touch.module}:{path}"
        found, owner = self.world.find(touch.module, path), path.rpartition(".")[0]
        function = found is not None and isinstance(found.node, Function) and not is_property(found.node)
        if self.world.find(touch.module, None) is None:
            self.problems.append(f"{name}: this vLLM has no module {touch.module}")
        elif isinstance(touch, Addition):
            if self.world.find(touch.module, owner) is None:
                self.problems.append(f"{name}: this vLLM has no {owner}")
            elif found is not None:
                self.problems.append(f"{name}: this vLLM has one of its own; choose another name")
        elif found is None:
            self.problems.append(f"{name}: this vLLM does not have it")
        elif expected is not None and not function:
            self.problems.append(f"{name}: declared as a function with ({expected}), which it is not")
        elif function and not (expected is None and isinstance(touch, Read | Import)):  # our calls of these are checked
            assert isinstance(found.node, Function)  # type: ignore[union-attr]
            actual = signature(found.node)  # type: ignore[union-attr]
            if expected is None:
                self.problems.append(f"{name}: a function; declare it with its parameters ({actual})")
            elif actual != expected:
                self.problems.append(f"{name}: parameters changed from ({expected}) to ({actual})")

    def check_imports(self, module: Module) -> None:
        """Imports from vLLM must exist; private ones must be declared with a reason."""
        for source, name, line in imports_of(module, self.world):
            what = f"imports {source}:{name}" if name else f"imports {source}"
            if self.world.find(source, name) is None:
                self.problems.append(f"{place(module, line)}: {what}, which this vLLM does not have")
            elif is_private(f"{source}.{name}") and module.package == "kvllm" and (source, name) not in self.declared:
                self.problems.append(f"{place(module, line)}: {what}, which is private, and no Import declares it")

    @cached_property
    def declared(self) -> set[tuple[str, str]]:
        """(module, name) of the declared imports."""
        imports = [touch for touch in self.seam if isinstance(touch, Import)]
        return {(touch.module, path) for touch in imports for path in (*touch.paths, "")}

    @cached_property
    def declared_members(self) -> dict[str, list[tuple[Found | None, Found | None]]]:
        """Last part of the declared names of attributes and methods -> (owner, definition) of each."""
        found: dict[str, list[tuple[Found | None, Found | None]]] = {}
        for touch in self.seam:
            for path in touch.paths:
                owner, _, name = path.rpartition(".")
                if owner:
                    pair = self.world.find(touch.module, owner), self.world.find(touch.module, path)
                    found.setdefault(name, []).append(pair)
        return found

    def is_declared(self, found: Found | None, name: str) -> bool:
        """Whether the member is declared; if its class is unknown, by name only."""
        declared = self.declared_members.get(name, [])
        return bool(declared) if found is None else any(d is not None and d.node is found.node for _, d in declared)

    @cached_property
    def own_names(self) -> set[str]:
        """Names that our source defines: functions, classes, attributes."""
        names: set[str] = set()
        for module in self.modules:
            names |= module.names.keys()
            for node in module.nodes:
                if isinstance(node, Function | ast.ClassDef):
                    names.add(node.name)
                if isinstance(node, ast.ClassDef):
                    names |= self.world.members(Found(module, node)).keys()
        return names

    def check_stale(self) -> None:
        used, methods = set(), set()
        for module in self.modules:
            for source, name, _ in imports_of(module, self.world):
                used.add(f"{source}:{name}")
            for node in module.nodes:
                if isinstance(node, ast.Attribute):
                    used.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    used.add(node.value)  # getattr and hasattr
                elif isinstance(node, ast.ClassDef):
                    methods |= {(f"{module.name}:{node.name}", m) for m in self.world.members(Found(module, node))}
        for touch in self.seam:
            for path in touch.paths:
                name = path.rpartition(".")[2]
                what = f"{touch.kind} {touch.module}:{path}: stale"
                if isinstance(touch, Override) and (touch.ours, name) not in methods:
                    self.problems.append(f"{what}, {touch.ours} does not have it")
                elif isinstance(touch, Import) and f"{touch.module}:{path}" not in used:
                    self.problems.append(f"{what}, nothing imports it")
                elif isinstance(touch, Read | Assignment | Addition) and name not in used:
                    self.problems.append(f"{what}, nothing uses it")


class _Source:
    """One module of our source against vLLM and the declarations."""

    def __init__(self, check: Check, module: Module) -> None:
        self.check, self.module, self.world = check, module, check.world
        # Names of functions and copies of ours, whose attributes are ours as well.
        self.own = {node.name for node in module.nodes if isinstance(node, Function)}
        # Whether objects of vLLM may occur in the module.
        self.engine = module.name.startswith("kvllm.engine.")
        self.hints: Types = {}
        self.unused = set(check.objects.get(module.name, ()))
        for text in self.unused:
            owner = check.objects[module.name][text]
            self.hints[text] = self.world.find(*split(owner))
            if self.hints[text] is None:
                check.problems.append(f"OBJECTS {module.name} {text}: this vLLM has no {owner}")
        imports = module.imports.values()
        self.uses_vllm = self.engine or bool(self.hints) or any(is_vllms(what.module) for what in imports)

    def run(self) -> None:
        self.scope(self.module.body, dict(self.hints))
        for text in sorted(self.unused):
            self.check.problems.append(f"OBJECTS {self.module.name} {text}: stale, no member of it is used")

    def report(self, node: ast.expr | ast.stmt, message: str) -> None:
        self.check.problems.append(f"{place(self.module, node.lineno)}: {message}")

    def scope(self, node: ast.AST, types: Types) -> None:
        """Check `node` and what is in it."""
        if isinstance(node, ast.ClassDef):
            cls = Found(self.module, node)
            types = types | {"self": cls, "super()": self.check_class(cls)}
        elif isinstance(node, Function | ast.Lambda):
            types = types | {a.arg: self.annotated(a) for a in parameters(node) if a.arg != "self"}
        elif isinstance(node, ast.Assign):
            self.assign(node, types)
        elif isinstance(node, ast.Attribute):
            self.check_attribute(node, types)
        elif isinstance(node, ast.Call):
            self.check_call(node, types)
        elif isinstance(node, ast.Constant | ast.Tuple):
            self.check_string(node)
        elif isinstance(node, ast.If):
            match node.test:
                case ast.Call(func=ast.Name("isinstance"), args=[ast.Name(name), kind]):
                    for statement in node.body:
                        self.scope(statement, types | {name: self.type_of(kind, types)})
                    node = ast.If(ast.Constant(True), [], node.orelse)
        if isinstance(node, ast.stmt):
            for target in targets(node):
                if isinstance(target, ast.Attribute):
                    self.check_assignment(target, types)
        for child in children(node, self.module.release):
            self.scope(child, types)

    # ------------------------------------------------------------------ inference

    def annotated(self, argument: ast.arg) -> Found | None:
        if argument.annotation is None or ast.unparse(argument.annotation) == "Any":
            return self.hints.get(argument.arg)
        return self.world.class_named(self.module, argument.annotation)

    def assign(self, node: ast.Assign, types: Types) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    if isinstance(value, ast.Call) and ast.unparse(value.func) == "copy.copy":
                        self.own.add(name.id)
                    types[name.id] = self.type_of(value, types) or self.hints.get(name.id)

    def type_of(self, node: ast.expr, types: Types) -> Found | None:
        """The class of an expression of ours, or the class that it names; None where it is not known."""
        return self.world.class_of(self.definition(node, types))

    def definition(self, node: ast.expr, types: Types) -> Found | None:
        text = ast.unparse(node)
        if text in types:
            self.unused.discard(text)
            return types[text]
        if isinstance(node, ast.Name):
            if (what := self.module.imports.get(text)) is not None:
                return self.world.find(what.module, what.name)
            return self.world.find(self.module.name, text)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value, types)
            return self.world.member(owner, node.attr) if owner is not None else None
        if isinstance(node, ast.Call):
            found = self.definition(node.func, types)
            if found is not None and isinstance(found.node, Function):
                return self.world.class_named(found.module, found.node.returns)
            return found if found is not None and isinstance(found.node, ast.ClassDef) else None
        return None

    # ------------------------------------------------------------------ checks

    def check_class(self, cls: Found) -> Found | None:
        """Overridden or hidden members of a vLLM base class must be declared; returns the base."""
        assert isinstance(cls.node, ast.ClassDef)
        ours = f"{self.module.name}:{cls.node.name}"
        declared = self.world.declared_bases.get(ours, [])
        for expression in cls.node.bases:
            first = re.split(r"\W", ast.unparse(expression))[0]
            known = isinstance(self.module.names.get(first), ast.ClassDef) or first in self.module.imports
            if not (known or declared or hasattr(builtins, first)):
                self.report(cls.node, f"class {cls.node.name}: its base {first} is not known; declare its overrides")
        base = next((a for a in self.world.ancestors(cls) if a is not None and is_vllms(a.module.name)), None)
        if base is None:
            return None
        overrides = {
            path.rpartition(".")[2]
            for touch in self.check.seam
            if isinstance(touch, Override) and touch.ours == ours
            for path in touch.paths
        }
        for name, definition in self.world.members(cls).items():
            found = self.world.member(base, name)
            if found is None or is_dunder(name) and name != "__init__":
                continue
            method = isinstance(definition, Function)
            if not (name in overrides if method else self.check.is_declared(found, name)):
                where = f"{found.module.name}:{base.node.name}.{name}"  # type: ignore[union-attr]
                self.report(
                    definition,
                    f"{cls.node.name} {'overrides' if method else 'sets'} {where}, which the seam does not declare",
                )
        return base

    def check_attribute(self, node: ast.Attribute, types: Types) -> None:
        name, text = node.attr, ast.unparse(node)
        if is_dunder(name) or text.startswith("super()."):  # an override: `check_class` looks at these
            return
        owner = self.type_of(node.value, types)
        found = self.world.member(owner, name) if owner is not None else None
        if found is not None and not is_vllms(found.module.name):
            return
        if is_private(name) and self.uses_vllm and (found is not None or name not in self.check.own_names):
            if not self.check.is_declared(found, name):
                self.report(node, f"{text} is a private member that the seam does not declare")
        elif owner is not None and found is None and self.is_complete(owner) and not self.is_declared_for(owner, name):
            self.report(node, f"{text}: this vLLM's {owner.module.name}:{owner.node.name} has no {name}")  # type: ignore[union-attr]

    def is_complete(self, cls: Found) -> bool:
        """Whether a class is vLLM's, or derived from one, and all its attributes can be seen in its source."""
        if not isinstance(cls.node, ast.ClassDef):
            return False
        every = list(self.world.ancestors(cls))
        return (
            None not in every
            and any(is_vllms(each.module.name) for each in every if each is not None)
            and not any(
                "__getattr__" in self.world.members(each)
                for each in every
                if each is not None and each.module.package != "torch"
            )
        )

    def is_declared_for(self, owner: Found, name: str) -> bool:
        """Whether the member is declared for a subclass of `owner`, or as what a function sets on an object."""
        for declared, _ in self.check.declared_members.get(name, []):
            if declared is not None and isinstance(declared.node, ast.ClassDef):
                if any(each is not None and each.node is owner.node for each in self.world.ancestors(declared)):
                    return True
            elif declared is not None:
                return True
        return False

    def check_assignment(self, node: ast.Attribute, types: Types) -> None:
        """An attribute that is set on anything but our own objects must be declared."""
        value = ast.unparse(node.value)
        if not self.uses_vllm or value == "self" or value in self.own:  # of `self`, see `check_class`
            return
        owner = self.type_of(node.value, types)
        found = self.world.member(owner, node.attr) if owner is not None else None
        if found is not None and found.module.package == "kvllm":
            return
        if owner is None and node.attr in self.check.own_names and not self.engine:
            return  # outside the engine, an object with an attribute of ours is taken for ours
        if not self.check.is_declared(found, node.attr) and not (owner and self.is_declared_for(owner, node.attr)):
            self.report(node, f"sets {ast.unparse(node)}, which the seam does not declare")

    def check_call(self, node: ast.Call, types: Types) -> None:
        """A function of vLLM must take the arguments that we pass."""
        if ast.unparse(node.func).rpartition(".")[2] == "replace" and len(node.args) == 1 and node.keywords:
            for name in (keyword.arg for keyword in node.keywords if keyword.arg):  # dataclasses.replace
                self.check_attribute(ast.copy_location(ast.Attribute(node.args[0], name), node), types)
            return
        found = self.definition(node.func, types)
        if found is not None and isinstance(found.node, ast.ClassDef):
            found = self.world.member(found, "__init__")
        if found is None or not isinstance(found.node, Function) or not is_vllms(found.module.name):
            return
        if isinstance(node.func, ast.Attribute) and (owner := self.type_of(node.func.value, types)) is not None:
            prefix = f"{owner.node.name}." if isinstance(owner.node, ast.ClassDef) else ""
            self.check.called.add((owner.module.name, prefix + node.func.attr))
        elif isinstance(found.node, Function):
            self.check.called.add((found.module.name, found.node.name))
        if not is_property(found.node) and (problem := call_problem(node, found.node)):
            where = f"{found.module.name}:{found.node.name}({signature(found.node)})"
            self.report(node, f"{ast.unparse(node.func)}(...) does not fit this vLLM's {where}: {problem}")

    def check_string(self, node: ast.Constant | ast.Tuple) -> None:
        """A string that names a module, class or private member of vLLM."""
        match node:
            case ast.Tuple(elts=[ast.Constant(value=str(module)), ast.Constant(value=str(name))]) if is_vllms(module):
                if self.world.find(module, name) is None:
                    self.report(node, f"names {module}:{name}, which this vLLM does not have")
            case ast.Constant(value=str(text)) if re.fullmatch(r"vllm(\.\w+)+", text) and text != ENTRY_POINTS:
                module, _, name = text.rpartition(".")
                if self.world.find(text, None) is None and self.world.find(module, name) is None:
                    self.report(node, f"names {text}, which this vLLM does not have")
            case ast.Constant(value=str(text)) if self.uses_vllm and re.fullmatch(r"_[a-z]\w+", text):
                if text not in self.check.own_names and not self.check.is_declared(None, text):
                    self.report(node, f"names {text}, a private member that the seam does not declare")


class Usage(NamedTuple):
    module: str
    name: str
    line: int


def imports_of(module: Module, world: World) -> Iterator[Usage]:
    """What a module imports of vLLM; of an imported module, the attributes that it uses ("" if it uses none)."""
    modules: dict[str, str] = {}
    for node in module.nodes:
        if isinstance(node, ast.Import):  # of which `imported` tells what it binds, the top package
            yield from (Usage(alias.name, "", node.lineno) for alias in node.names if is_vllms(alias.name))
        for local, what in module.imported(node):
            if is_vllms(what.module):
                found = world.find(what.module, what.name)
                if found is not None and found.node is None:
                    modules[local] = found.module.name
                yield Usage(modules.get(local, what.module), "" if local in modules else what.name or "", what.line)
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if node.attr != "__name__":
                yield Usage(modules[node.value.id], node.attr, node.lineno)


def call_problem(call: ast.Call, function: Function) -> str:
    """Why a call does not match a function's parameters; "" if it does, as far as can be determined."""
    arguments = ast.parse(f"lambda {signature(function)}: 0", mode="eval")
    spec = arguments.body.args  # type: ignore[attr-defined]
    spec.defaults = [ast.Constant(None) for _ in spec.defaults]
    spec.kw_defaults = [each and ast.Constant(None) for each in spec.kw_defaults]
    static = any("staticmethod" in ast.unparse(decorator) for decorator in function.decorator_list)
    bound = not static and [each.arg for each in parameters(function)[:1]] in (["self"], ["cls"])
    given = [each for each in call.args if not isinstance(each, ast.Starred)]
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    expected = inspect.signature(eval(compile(ast.fix_missing_locations(arguments), "", "eval")))
    partial = len(given) < len(call.args) or len(named) < len(call.keywords)
    try:
        (expected.bind_partial if partial else expected.bind)(*[None] * (bound + len(given)), **named)
    except TypeError as error:
        return str(error)
    return ""


def split(owner: str) -> tuple[str, str | None]:
    module, _, name = owner.partition(":")
    return module, name or None


def is_vllms(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not is_dunder(part) for part in name.split("."))


def place(module: Module, line: int) -> str:
    path = module.path
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{line}"


def changed_functions(old: World, check: Check) -> list[str]:
    """Functions that we declare or call, and that are not the same in `old` and in the vLLM that was checked."""
    names = {(touch.module, path) for touch in check.seam for path in touch.paths} | check.called
    changed = []
    for module, path in sorted(names):
        before, after = old.find(module, path), check.world.find(module, path)
        if before is not None and after is not None and isinstance(after.node, Function) and before.node is not None:
            if ast.dump(before.node) != ast.dump(after.node):
                changed.append(f"{module}:{path}, at line {after.node.lineno} of {after.module.name}")
    return changed


def check_project(root: Path) -> Check:
    """This project, checked with the vLLM below `root`: all of src/kvllm, and the imports of tests and tools."""
    check = Check(root, ROOT / "src", SEAM, OBJECTS)
    check.run()
    for folder in ("tests", "tools"):
        for module in check.world.modules(folder):
            check.check_imports(module)
    return check


def main(arguments: Sequence[str]) -> int:
    root = Path(arguments[0]) if arguments else installed()
    check, version = check_project(root), read_version(root)
    if not version.startswith(f"{check.release}."):
        print(f"vLLM {version} is not supported yet: checked with what is declared for {check.release}.")
    print("\n".join(check.problems), end="\n" * bool(check.problems))
    num_names = sum(len(touch.paths) for touch in check.seam)
    print(f"vLLM {version}: {num_names} names declared, {len(check.problems)} problems.")
    if arguments and (changed := changed_functions(World({"vllm": installed()}, check.world.release), check)):
        print(f"To read again, since they differ from the installed vLLM {read_version(installed())}:")
        print("\n".join(f"  {name}" for name in changed))
    return 1 if check.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
