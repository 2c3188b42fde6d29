"""Which code a stage runs, as a digest: a param of its rule, so that a change of code reruns what it touches.

The digest covers the stage's imports inside the package, transitively, and the modules that it chooses by name while it
runs, as syntax trees: comments, layout and docstrings do not count. Rooms that change no result are left out: what is made
of what, settings (their values are params), how a stage is started. Imports no torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Rooms and modules that change no result.
UNDIGESTED = (
    "cli", "config", "engines.guard", "engines.server",
    "engines.watchdog", "errors", "plan", "processor", "progress", "stages.context", "store.files",
    "store.layout", "store.manifest", "systems", "tables.pieces", "workflow",
)  # fmt: skip


def counts(module: str) -> bool:
    """Whether a module of the package is part of a digest."""
    name = module.removeprefix("ziprc").removeprefix(".")
    return bool(name) and not any(name == left or name.startswith(f"{left}.") for left in UNDIGESTED)


def _module_file(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


@functools.cache
def _parse(module: str) -> tuple[str, frozenset[str]]:
    """Digest of a module's code (comments, layout and docstrings do not count) and the ziprc modules it imports."""
    path = _module_file(module)
    tree = _WithoutDocstrings().visit(ast.parse(path.read_text())) if path else ast.Module(body=[], type_ignores=[])
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    own = frozenset(m for m in found if m.split(".")[0] == "ziprc" and _module_file(m))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), own


def modules_of(stage: str, chosen: tuple[str, ...] = ()) -> dict[str, str]:
    """Digest of every module that stage module `ziprc.stages.<stage>` can run, those `chosen` by name included."""
    waiting, digests = {f"ziprc.stages.{stage}", *chosen}, {}
    while waiting:
        module = waiting.pop()
        if module not in digests and counts(module):
            digests[module], imports = _parse(module)
            waiting |= imports
    return digests


@functools.cache
def code_digest(stage: str, chosen: tuple[str, ...] = ()) -> str:
    """One digest of `modules_of`."""
    return hashlib.sha256(repr(sorted(modules_of(stage, chosen).items())).encode()).hexdigest()[:16]
