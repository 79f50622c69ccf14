"""What a module's code does, as one hash: the reason for which a rule's work becomes stale.

A module's import closure is its own file and every module of this package that it imports, directly
or not. Comments, layout, docstrings, help texts and the words of user errors are left out before
hashing: a reformatted file or a better sentence keeps finished work. The modules in `BOOKKEEPING`
never count; what `config` decides is in a rule's parameters.

    python -m demo2eval.fingerprint demo2eval.training.train
"""

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path

PACKAGE = "demo2eval"
ROOT = Path(__file__).resolve().parent.parent
BOOKKEEPING = {
    f"{PACKAGE}.{name}" for name in ("cli", "config", "errors", "fingerprint", "provenance")
}


def module_file(module: str) -> Path | None:
    """Return the source file of a module of this package, or None if there is no such module."""
    base = ROOT.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Return the modules of this package that a syntax tree imports, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] == PACKAGE and module_file(name)}


@cache
def _parsed(path: Path, modified_ns: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _parse(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


def import_closure(module: str) -> dict[str, Path]:
    """Return {module: file} of a module and all that it imports of this package, `__init__` too.

    Raises:
        ModuleNotFoundError: if `module` is not part of the package.
    """
    if module_file(module) is None:
        raise ModuleNotFoundError(f"no module {module} under {ROOT}")
    closure: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = module_file(name)
        if path is None or name in closure or name in BOOKKEEPING:
            continue
        closure[name] = path
        parts = name.split(".")
        waiting.extend(".".join(parts[:n]) for n in range(1, len(parts)))
        waiting.extend(imported_modules(_parse(path), name, path.name == "__init__.py"))
    return dict(sorted(closure.items()))


class _WithoutWords(ast.NodeTransformer):
    """Drops what a reader sees and a computer does not act on."""

    def _drop_docstring(self, node):
        self.generic_visit(node)
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _drop_docstring

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "UserError":
            node.args, node.keywords = [], []
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
        return node


@cache
def _file_digest(path: Path, modified_ns: int) -> str:
    # A fresh parse: the transformer edits the tree in place, and the cached one is shared.
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return hashlib.sha256(ast.dump(_WithoutWords().visit(tree)).encode()).hexdigest()


def code_fingerprint(module: str) -> str:
    """Return a hash (16 hex digits) of what `module` and its import closure do.

    Args:
        module: dotted name, such as "demo2eval.data.dataset".
    """
    closure = import_closure(module)
    lines = [
        f"{name} {_file_digest(path, path.stat().st_mtime_ns)}" for name, path in closure.items()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(argument, code_fingerprint(argument))
        for name, path in import_closure(argument).items():
            print(f"  {name}  {path.relative_to(ROOT.parent)}")
