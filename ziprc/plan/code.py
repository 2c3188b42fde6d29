"""Which code a stage runs, as a digest: a param of its rule, so that a change of code reruns what it touches.

The digest covers the stage's imports inside the package, transitively, as syntax trees: comments, layout and docstrings do
not count. Modules that change no result are left out. Imports no torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# These change no result.
UNDIGESTED = {
    f"ziprc{name}"
    for name in (
        "",
        ".cli",
        ".code",
        ".config",
        ".engines.watchdog",
        ".errors",
        ".progress",
        ".provenance",
        ".stages.context",
    )
}


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


@functools.cache
def code_digest(stage: str, task: str = "") -> str:
    """Digest of the code that stage module `ziprc.stages.<stage>` can run: its imports inside ziprc, transitively.

    Tasks are found by name at run time, so a stage that uses tasks runs the module of the experiment's `task` too.
    """
    waiting, digests = {f"ziprc.stages.{stage}"}, {}
    while waiting:
        module = waiting.pop()
        if module == "ziprc.tasks.base" and task:
            waiting.add(f"ziprc.tasks.{task}")
        if module in digests or module in UNDIGESTED:
            continue
        digests[module], imports = _parse(module)
        waiting |= imports
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16]
