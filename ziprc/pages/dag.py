"""The drawing of an experiment's artifacts: what was made from what, as the manifests say.

A manifest records the digest of each parent's manifest, so the graph is read from the files themselves and shows what
really happened, not what the workflow meant to do. Columns are longest paths from the start.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from ziprc.store.digests import digest_file
from ziprc.store.files import read_json
from ziprc.store.layout import CHECKPOINT_MANIFEST, MANIFEST_SUFFIX, Layout
from ziprc.store.manifest import find_manifests

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 138, 24, 46, 12
Parents = Mapping[str, Sequence[str]]


def _name(home: Path, manifest: Path) -> str:
    if manifest.name == CHECKPOINT_MANIFEST:
        return str(manifest.parent.relative_to(home))
    return str(manifest.relative_to(home)).removesuffix(MANIFEST_SUFFIX)


def read_graph(layout: Layout) -> dict[str, list[str]]:
    """Parents of every artifact by name; a parent that has been made again since is left out."""
    home = layout.home
    found = find_manifests(home)
    name_of = {digest_file(path): _name(home, path) for path in found}
    graph = {}
    for path in found:
        parents = read_json(path).get("parents", {})
        graph[_name(home, path)] = sorted({name_of[digest] for digest in parents.values() if digest in name_of})
    return graph


def columns(graph: Parents) -> list[list[str]]:
    """Artifacts by the length of the longest path to them."""
    depth: dict[str, int] = {}

    def depth_of(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((depth_of(parent) for parent in graph.get(name, ())), default=-1)
        return depth[name]

    out: list[list[str]] = [[] for _ in range(1 + max(map(depth_of, graph), default=-1))]
    for name in sorted(graph):
        out[depth[name]].append(name)
    return out


def _implied(graph: Parents) -> dict[str, list[str]]:
    """The graph without edges that a longer path implies, for fewer lines."""
    above: dict[str, set[str]] = {}

    def ancestors(name: str) -> set[str]:
        if name not in above:
            above[name] = set(graph.get(name, ())).union(*(ancestors(p) for p in graph.get(name, ())))
        return above[name]

    return {
        name: [p for p in parents if not any(p in ancestors(q) for q in parents if q != p)]
        for name, parents in graph.items()
    }


def draw(graph: Parents) -> str:
    """An inline SVG in the colours of the page."""
    place = {
        name: (x * (BOX_WIDTH + GAP_X) + 1, y * (BOX_HEIGHT + GAP_Y) + 1)
        for x, column in enumerate(columns(graph))
        for y, name in enumerate(column)
    }
    width = max((x for x, _ in place.values()), default=0) + BOX_WIDTH + 2
    height = max((y for _, y in place.values()), default=0) + BOX_HEIGHT + 2
    shapes = []
    for name, parents in sorted(_implied(graph).items()):
        x, y = place[name]
        for parent in parents:
            px, py = place[parent]
            a, b, bend = (px + BOX_WIDTH, py + BOX_HEIGHT / 2), (x, y + BOX_HEIGHT / 2), GAP_X * 0.6
            path = f"M{a[0]} {a[1]}C{a[0] + bend} {a[1]} {b[0] - bend} {b[1]} {b[0]} {b[1]}"
            shapes.append(f'<path class="edge" d="{path}"/>')
    for name, (x, y) in sorted(place.items()):
        kind = "model" if name.startswith("checkpoints/") else "table"
        shapes.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5"/>')
        label = html.escape(name.removeprefix("checkpoints/"))
        shapes.append(f'<text x="{x + BOX_WIDTH / 2}" y="{y + 16}">{label}</text>')
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    opening = f'<svg class="dag" role="img" aria-label="Artifacts and what they were made from" {size}>'
    return opening + "".join(shapes) + "</svg>"
