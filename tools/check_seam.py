"""Check `kvllm.engine.seam` against our source and against a vLLM that need not be importable.

    python -m tools.check_seam [FOLDER]    FOLDER contains vllm/; left out: the installed vLLM

Names every declaration that this vLLM does not meet, everything in our source that is not declared, and every stale
declaration. With FOLDER, also lists the functions whose parameters are as declared but whose bodies differ from the
installed vLLM's: those are to be read again. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kvllm.engine.seam import SEAM
from kvllm.engine.touch import RELEASES, Addition, Import, Override, Touch
from tools.syntax_tree import (
    Found,
    Function,
    Imported,
    Module,
    Release,
    Tree,
    children,
    imported,
    is_property,
    members,
    signature,
    walk,
)

ROOT = Path(__file__).parent.parent
# Declare the seam themselves.
DECLARATIONS = ("kvllm.engine.seam", "kvllm.engine.touch")
# Where most objects are vLLM's.
ENGINE = "kvllm.engine."
# In the place of a vLLM class: an object that is certainly not vLLM's.
OURS = Found(Module("ours", ROOT, ast.Module([], []), False, (0, 0)), None)
# Bases from outside vLLM that have no attributes of interest.
PLAIN_BASES = {"ABC", "abc.ABC", "Generic", "Protocol", "object"}


def installed() -> Path:
    """The folder that contains the installed vllm/."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed; name a folder that contains vllm/.")
    return Path(spec.origin).parent.parent


def read_version(root: Path) -> str:
    """The version that vllm/_version.py states."""
    path = root / "vllm" / "_version.py"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: the folder must contain vllm/ from a wheel, which has this file.")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and "__version__" in map(ast.unparse, node.targets):
            return str(ast.literal_eval(node.value))
    raise SystemExit(f"{path} states no version.")


@dataclass
class Check:
    """What is wrong with `seam`, for our package in `source` and vLLM in `vllm`; release: whose declarations count."""

    vllm: Tree
    source: Tree
    seam: Sequence[Touch]
    release: str
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, vllm_root: Path, source_root: Path, package: str, seam: Sequence[Touch]) -> Check:
        parts = read_version(vllm_root).split(".")
        # Of a release that is not supported yet, expect what the newest one has.
        name = ".".join(parts[:2])
        release: Release = (int(parts[0]), int(parts[1]))
        return cls(
            Tree(vllm_root, "vllm", release),
            Tree(source_root, package, release),
            seam,
            name if name in RELEASES else RELEASES[-1],
        )

    def run(self) -> list[str]:
        self.check_declarations()
        for module in self.source:
            if module.name not in DECLARATIONS:
                _SourceCheck(self, module).run()
        self.check_stale()
        return self.problems

    # ------------------------------------------------------------------ declarations against vLLM

    @cached_property
    def touches(self) -> list[Touch]:
        """Those of this release."""
        return [touch for touch in self.seam if self.release in touch.releases]

    def check_declarations(self) -> None:
        for touch in self.touches:
            if self.vllm.module(touch.module) is None:
                self.problems.append(f"{touch.kind} {touch.module}: this vLLM has no such module")
                continue
            for path, expected in touch.paths.items():
                self.check_name(touch, path, expected)

    def check_name(self, touch: Touch, path: str, expected: str | None) -> None:
        name = f"{touch.kind} {touch.module}:{path}"
        found = self.find(touch.module, path)
        if isinstance(touch, Addition):
            owner = path.rpartition(".")[0]
            if self.find(touch.module, owner) is None:
                self.problems.append(f"{name}: this vLLM has no {owner}")
            elif found is not None:
                self.problems.append(f"{name}: this vLLM has one of its own; choose another name")
        elif found is None:
            self.problems.append(f"{name}: this vLLM does not have it")
        elif not isinstance(found.node, Function) or is_property(found.node):
            if expected is not None:
                self.problems.append(f"{name}: declared as a function with ({expected}), which it is not")
        elif expected is None:
            self.problems.append(f"{name}: a function; declare it with its parameters ({signature(found.node)})")
        elif signature(found.node) != expected:
            self.problems.append(f"{name}: parameters changed from ({expected}) to ({signature(found.node)})")

    def find(self, module: str, path: str) -> Found | None:
        """As `Tree.find`, and attributes that a function sets on an object, as function.attribute."""
        owner_path, _, name = path.rpartition(".")
        owner = self.vllm.find(module, owner_path) if owner_path else None
        if owner is not None and isinstance(owner.node, Function):
            for node in ast.walk(owner.node):
                if isinstance(node, ast.Assign) and any(
                    isinstance(t, ast.Attribute) and t.attr == name and ast.unparse(t.value) != "self"
                    for t in node.targets
                ):
                    return Found(owner.module, node)
            return None
        return self.vllm.find(module, path)

    # ------------------------------------------------------------------ declarations against our source

    @cached_property
    def declared_members(self) -> set[str]:
        """Last parts of the declared names of attributes and methods."""
        return {path.rpartition(".")[2] for touch in self.seam for path in touch.paths if "." in path}

    @cached_property
    def declared_definitions(self) -> set[int]:
        """Ids of the syntax nodes that the declared names are."""
        found = [self.find(touch.module, path) for touch in self.touches for path in touch.paths]
        return {id(each.node) for each in found if each is not None and each.node is not None}

    def is_declared(self, owner: Found | None, name: str) -> bool:
        """Whether a declared name is the member `name` of the class `owner`, or of a subclass.

        Where the class is not known, or does not have the member, the name alone decides.
        """
        found = self.vllm.member(owner, name) if owner is not None else None
        if found is not None:
            return id(found.node) in self.declared_definitions
        return name in self.declared_members

    @cached_property
    def imports(self) -> dict[tuple[str, str], str]:
        """(module, name) of everything that our source takes from vLLM's modules -> where."""
        found: dict[tuple[str, str], str] = {}
        for module in self.source:
            if module.name not in DECLARATIONS:
                for key, line in imports_of(module, self.vllm):
                    found.setdefault(key, self.place(module, line))
        return found

    @cached_property
    def own_names(self) -> set[str]:
        """Names that our source defines: functions, classes, attributes."""
        names: set[str] = set()
        for module in self.source:
            for node in walk(module.body, module.release):
                if isinstance(node, Function | ast.ClassDef):
                    names.add(node.name)
                if isinstance(node, ast.ClassDef):
                    names |= members(node, module).keys()
            names |= module.names.keys()
        return names

    def check_stale(self) -> None:
        declared = {(t.module, path) for t in self.touches if isinstance(t, Import) for path in t.paths}
        for key in sorted(self.imports.keys() - declared):
            self.problems.append(f"{self.imports[key]}: imports {':'.join(key)}, which no Import declares")
        for key in sorted(declared - self.imports.keys()):
            self.problems.append(f"import {':'.join(key)}: stale, nothing imports it")
        attributes, classes = set(), {}
        for module in self.source:
            for node in walk(module.body, module.release) if module.name not in DECLARATIONS else ():
                if isinstance(node, ast.Attribute):
                    attributes.add(node.attr)
                elif isinstance(node, ast.keyword) and node.arg:
                    attributes.add(node.arg)  # dataclasses.replace
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    attributes.add(node.value)  # getattr and hasattr
                elif isinstance(node, ast.ClassDef):
                    classes[f"{module.name}:{node.name}"] = members(node, module)
        for touch in self.touches:
            for path in touch.paths:
                name = path.rpartition(".")[2]
                if isinstance(touch, Override):
                    if name not in classes.get(touch.ours, {}):
                        self.problems.append(f"override {touch.module}:{path}: stale, {touch.ours} does not have it")
                elif touch.kind in ("read", "assignment", "addition") and name not in attributes:
                    self.problems.append(f"{touch.kind} {touch.module}:{path}: stale, nothing uses it")

    def place(self, module: Module, line: int) -> str:
        root = ROOT if module.path.is_relative_to(ROOT) else self.source.root
        return f"{module.path.relative_to(root)}:{line}"


def imports_of(module: Module, vllm: Tree) -> Iterator[tuple[tuple[str, str], int]]:
    """((vLLM module, name), line) of what a module imports; of an imported module, the attributes that are used."""
    modules: dict[str, str] = {}
    for node in walk(module.body, module.release):
        for local, what in imported(node, module):
            if what.module.partition(".")[0] != "vllm":
                continue
            found = vllm.find(what.module, what.name)
            if found is not None and found.node is None:
                modules[local] = found.module.name
            elif what.name is not None:
                yield (what.module, what.name), what.line
            else:
                yield (what.module, ""), what.line
    for node in walk(module.body, module.release):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if node.attr != "__name__":
                yield (modules[node.value.id], node.attr), node.lineno


def check_imports(vllm: Tree, module: Module) -> Iterator[str]:
    """Imports of one of our tests or tools that this vLLM does not have."""
    for (source, name), line in imports_of(module, vllm):
        if vllm.find(source, name) is None:
            yield f"{module.path.relative_to(ROOT)}:{line}: imports {source}:{name}, which this vLLM does not have"


class _SourceCheck:
    """One module of our source against vLLM and the declarations."""

    def __init__(self, check: Check, module: Module) -> None:
        self.check, self.module, self.vllm = check, module, check.vllm
        self.imports: dict[str, Imported] = {}
        self.functions: set[str] = set()
        for node in walk(module.body, module.release):
            self.imports |= dict(imported(node, module))
            if isinstance(node, Function):
                self.functions.add(node.name)

    def run(self) -> None:
        self.scope(self.module.body, {}, None)

    @cached_property
    def uses_vllm(self) -> bool:
        """Whether objects of vLLM may occur in the module."""
        return self.module.name.startswith(ENGINE) or any(
            what.module.partition(".")[0] == "vllm" for what in self.imports.values()
        )

    def report(self, node: ast.expr | ast.stmt, message: str) -> None:
        self.check.problems.append(f"{self.check.place(self.module, node.lineno)}: {message}")

    # ------------------------------------------------------------------ walking

    def scope(self, node: ast.AST, types: dict[str, Found | None], ours: ast.ClassDef | None) -> None:
        """Check `node` and what is in it.

        types: vLLM classes of local names; ours: the class of our source that `self` is an instance of
        """
        if isinstance(node, ast.ClassDef):
            bases = self.vllm_bases(node)
            for base in bases:
                self.check_overrides(node, base)
            ours, types = node, types | {"self": bases[0] if bases else None}
        elif isinstance(node, Function | ast.Lambda):
            types = types | self.parameters(node)
        elif isinstance(node, ast.Assign):
            self.assign(node, types)
        if isinstance(node, ast.Attribute):
            self.check_attribute(node, types, ours)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(each, ast.Attribute):
                        self.check_assignment(each, types, ours)
        for child in children(node, self.module.release):
            self.scope(child, types, ours)

    def parameters(self, node: Function | ast.Lambda) -> dict[str, Found | None]:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        named = {a.arg: self.annotated(a.annotation) for a in arguments if a.arg != "self"}
        return named | {a.arg: None for a in (node.args.vararg, node.args.kwarg) if a is not None}

    def annotated(self, node: ast.expr | None) -> Found | None:
        """The vLLM class that an annotation of ours names; OURS for any other class, None for Any."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            sides = [side for side in (node.left, node.right) if ast.unparse(side) != "None"]
            return self.annotated(sides[0]) if len(sides) == 1 else None
        if not isinstance(node, ast.Name) or node.id == "Any":
            return None
        return self.type_of(node, {}) or OURS

    def assign(self, node: ast.Assign, types: dict[str, Found | None]) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                copied = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "copy.copy"
                types[target.id] = OURS if copied else self.type_of(node.value, types)
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for name, value in zip(target.elts, node.value.elts, strict=True):
                    if isinstance(name, ast.Name):
                        types[name.id] = self.type_of(value, types)

    # ------------------------------------------------------------------ classes

    def vllm_bases(self, node: ast.ClassDef) -> list[Found]:
        """The vLLM classes that a class of ours derives from, as far as its bases or the declarations tell."""
        found, unknown = self.known_bases(self.module, node)
        name = f"{self.module.name}:{node.name}"
        for touch in self.check.touches:
            if isinstance(touch, Override) and touch.ours == name:
                owner = next(iter(touch.paths)).rpartition(".")[0]
                base = self.vllm.find(touch.module, owner)
                if base is not None and all(base.node is not f.node for f in found):
                    found.append(base)
        if unknown and not found:
            self.report(node, f"class {node.name}: its base {unknown} is not known here; declare what it overrides")
        return found

    def known_bases(self, module: Module, node: ast.ClassDef) -> tuple[list[Found], str]:
        """(vLLM classes among the bases, own and inherited; a base that could not be resolved, or "")."""
        found: list[Found] = []
        unknown = ""
        imports = {local: what for each in walk(module.body, module.release) for local, what in imported(each, module)}
        for base in node.bases:
            text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            first = text.partition(".")[0]
            what = imports.get(first)
            if what is not None and what.module.partition(".")[0] == "vllm":
                if (cls := self.vllm.find(what.module, what.name)) is not None:
                    found.append(cls)
            elif what is not None and what.module.partition(".")[0] == self.check.source.package:
                parent = self.check.source.find(what.module, what.name)
                if parent is not None and isinstance(parent.node, ast.ClassDef):
                    found += self.known_bases(parent.module, parent.node)[0]
            elif isinstance(parent_node := module.names.get(first), ast.ClassDef):
                found += self.known_bases(module, parent_node)[0]
            elif what is None and not hasattr(builtins, first):
                unknown = text
        return found, unknown

    def check_overrides(self, node: ast.ClassDef, base: Found) -> None:
        ours = f"{self.module.name}:{node.name}"
        overridden = {
            path.rpartition(".")[2]
            for touch in self.check.touches
            if isinstance(touch, Override) and touch.ours == ours
            for path in touch.paths
        }
        for name, definition in members(node, self.module).items():
            found = self.vllm.member(base, name)
            if found is None or (name.startswith("__") and name != "__init__"):
                continue
            method = isinstance(definition, Function)
            if not (name in overridden if method else self.check.is_declared(base, name)):
                where = f"{found.module.name}:{base.node.name}.{name}"  # type: ignore[union-attr]
                kind = "overrides" if method else "sets"
                self.report(definition, f"{node.name} {kind} {where}, which the seam does not declare")

    # ------------------------------------------------------------------ attributes

    def check_attribute(self, node: ast.Attribute, types: dict[str, Found | None], ours: ast.ClassDef | None) -> None:
        name = node.attr
        if name.startswith("__"):
            return
        if ours is not None and ast.unparse(node.value) == "self" and self.is_own(ours, name):
            return
        owner = self.type_of(node.value, types)
        found = self.vllm.member(owner, name) if owner is not None else None
        private = name.startswith("_") and self.uses_vllm
        # A private name that we define ourselves is taken for ours where the class is not known.
        if private and (found is not None or name not in self.check.own_names):
            if not self.check.is_declared(owner, name) and not self.is_super(node):
                self.report(node, f"{ast.unparse(node)} is a private member that the seam does not declare")
        elif owner is not None and found is None and self.is_closed(owner) and not self.is_of_subclass(owner, name):
            class_name = f"{owner.module.name}:{owner.node.name}"  # type: ignore[union-attr]
            self.report(node, f"{ast.unparse(node)}: this vLLM's {class_name} has no {name}")

    @staticmethod
    def is_super(node: ast.Attribute) -> bool:
        """Whether it is a member of super(): an override, which `check_overrides` looks at."""
        return isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"

    def is_of_subclass(self, owner: Found, name: str) -> bool:
        """Whether the member `name` is declared for a subclass of `owner`."""
        for touch in self.check.touches:
            for path in touch.paths:
                cls_path, _, member = path.rpartition(".")
                if member == name and (cls := self.vllm.find(touch.module, cls_path)) is not None:
                    if self.derives(cls, owner):
                        return True
        return False

    def derives(self, cls: Found, owner: Found) -> bool:
        if cls.node is owner.node:
            return True
        bases = cls.node.bases if isinstance(cls.node, ast.ClassDef) else []
        parents = [self.vllm.find_expression(cls.module, base) for base in bases]
        return any(parent is not None and self.derives(parent, owner) for parent in parents)

    def is_own(self, node: ast.ClassDef, name: str) -> bool:
        if name in members(node, self.module):
            return True
        parents = [self.module.names.get(ast.unparse(base)) for base in node.bases]
        return any(isinstance(parent, ast.ClassDef) and self.is_own(parent, name) for parent in parents)

    def is_closed(self, cls: Found) -> bool:
        """Whether all attributes of a vLLM class can be seen in its source."""
        assert isinstance(cls.node, ast.ClassDef)
        if "__getattr__" in members(cls.node, cls.module):
            return False
        for base in cls.node.bases:
            parent = self.vllm.find_expression(cls.module, base)
            text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            if text not in PLAIN_BASES and (parent is None or not self.is_closed(parent)):
                return False
        return True

    def check_assignment(self, node: ast.Attribute, types: dict[str, Found | None], ours: ast.ClassDef | None) -> None:
        """An attribute that is set on anything but our own objects must be declared."""
        if not self.uses_vllm:
            return
        if ours is not None and ast.unparse(node.value) == "self":
            return  # `check_overrides` looks at these
        if isinstance(node.value, ast.Name) and (types.get(node.value.id) is OURS or node.value.id in self.functions):
            return
        owner = self.type_of(node.value, types)
        if owner is None and node.attr in self.check.own_names and not self.module.name.startswith(ENGINE):
            return  # outside the engine, an object with an attribute of ours is taken for ours
        if not self.check.is_declared(owner, node.attr):
            self.report(node, f"sets {ast.unparse(node)}, which the seam does not declare")

    # ------------------------------------------------------------------ inference

    def type_of(self, node: ast.expr, types: dict[str, Found | None]) -> Found | None:
        """The vLLM class of an expression of ours, or the class that it names; None where it is not known."""
        found = self.definition(node, types)
        return _class_of(self.vllm, found)

    def definition(self, node: ast.expr, types: dict[str, Found | None]) -> Found | None:
        if isinstance(node, ast.Name):
            if node.id in types:
                return types[node.id] if types[node.id] is not OURS else None
            what = self.imports.get(node.id)
            if what is not None and what.module.partition(".")[0] == "vllm":
                return self.vllm.find(what.module, what.name)
        elif isinstance(node, ast.Attribute):
            owner = self.definition(node.value, types)
            if owner is not None and owner.node is None:
                return self.vllm.find(owner.module.name, node.attr)
            owner = _class_of(self.vllm, owner)
            return self.vllm.member(owner, node.attr) if owner is not None else None
        elif isinstance(node, ast.Call):
            found = self.definition(node.func, types)
            if found is not None and isinstance(found.node, Function):
                return self.vllm.find_expression(found.module, found.node.returns)
            return found
        return None


def _class_of(vllm: Tree, found: Found | None, depth: int = 0) -> Found | None:
    """The class that a definition is, is annotated with, or is set to an instance of; None where it is not known."""
    if found is None or isinstance(found.node, ast.ClassDef) or depth > 4:
        return found if depth <= 4 else None
    if isinstance(found.node, Function):
        return vllm.find_expression(found.module, found.node.returns) if is_property(found.node) else None
    if isinstance(found.node, ast.AnnAssign):
        return vllm.find_expression(found.module, found.node.annotation)
    if isinstance(found.node, ast.Assign):
        value = found.node.value
        if isinstance(value, ast.Call):
            made = vllm.find(found.module.name, ast.unparse(value.func))
            if made is not None and isinstance(made.node, Function):
                return vllm.find_expression(made.module, made.node.returns)
            return made if made is not None and isinstance(made.node, ast.ClassDef) else None
        if isinstance(value, ast.Name):  # self.x = x, of a method's parameter
            return _class_of_parameter(vllm, found, value.id)
    return None


def _class_of_parameter(vllm: Tree, found: Found, name: str) -> Found | None:
    for node in ast.walk(found.module.body):
        if isinstance(node, Function) and any(inner is found.node for inner in ast.walk(node)):
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                if argument.arg == name:
                    return vllm.find_expression(found.module, argument.annotation)
    return None


def changed_bodies(old: Tree, new: Tree, seam: Sequence[Touch]) -> list[str]:
    """Declared functions whose parameters are the same in both trees and whose bodies are not."""
    names = []
    for touch in seam:
        for path in touch.paths:
            before, after = old.find(touch.module, path), new.find(touch.module, path)
            if before is None or after is None:
                continue
            if not (isinstance(before.node, Function) and isinstance(after.node, Function)):
                continue
            if signature(before.node) == signature(after.node) and ast.dump(before.node) != ast.dump(after.node):
                names.append(f"{touch.module}:{path}, at line {after.node.lineno} of {after.module.name}")
    return sorted(set(names))


def check_project(root: Path) -> Check:
    """This project, checked with the vLLM below `root`: all of src/kvllm, and the imports of tests and tools."""
    check = Check.of(root, ROOT / "src", "kvllm", SEAM)
    check.run()
    for folder in ("tests", "tools"):
        for module in Tree(ROOT, folder, check.source.release):
            check.problems += check_imports(check.vllm, module)
    return check


def main(arguments: Sequence[str]) -> int:
    root = Path(arguments[0]) if arguments else installed()
    check = check_project(root)
    version, problems = read_version(root), check.problems
    if not version.startswith(f"{check.release}."):
        print(f"vLLM {version} is not supported yet: checked with what is declared for {check.release}.")
    for problem in problems:
        print(problem)
    num_names = sum(len(touch.names) for touch in check.touches)
    print(f"vLLM {version}: {num_names} names declared, {len(problems)} problems.")
    if arguments:
        again = changed_bodies(Tree(installed(), "vllm", check.source.release), check.vllm, SEAM)
        if again:
            print(f"Parameters as before, but the body differs from the installed vLLM {read_version(installed())}'s:")
            print("\n".join(f"  {name}" for name in again))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
