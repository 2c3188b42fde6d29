"""One self-contained page that says what was run and what came out, failures included.

It is a list of sections: those of the systems that the experiment builds (pages/zip_rc.py, pages/samplers.py), then how
everything was made. A section is data and the template that lays it out. Styles and figures are inline, what a model or a
user wrote is escaped by the template engine, and nothing is fetched, so the file can be mailed or archived.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from graphlib import TopologicalSorter

from ziprc.pages.html import Record, Section, fill
from ziprc.store.digests import digest_file
from ziprc.store.files import read_json
from ziprc.store.layout import CHECKPOINT_MANIFEST, MANIFEST_SUFFIX, Layout, manifest_of
from ziprc.store.manifest import find_manifests


def read_provenance(layout: Layout) -> list[Record]:
    """How every artifact of an experiment came to be, as far as that is recorded. An older report does not count."""
    records = [read_json(path) for path in sorted((layout.home / "provenance").glob("*.json"))]
    return [record for record in records if record["stage"] != "report"]


def costs(provenance: Sequence[Record]) -> list[Record]:
    """What making every artifact took, the dearest first: seconds of work, and memory of its largest process."""
    costs = []
    for record in provenance:
        job, memory = f"{record['stage']} {record['name']}", record["peak_memory_mib"]
        peak = max(memory["process"], memory["largest_child"])
        costs.append({"job": job, "seconds": record["seconds"], "peak_mib": peak})
    return sorted(costs, key=lambda cost: -cost["seconds"])


def facts(config: Record, layout: Layout, provenance: Sequence[Record]) -> list[str]:
    """When, by which code and from which base model: the line at the top."""
    made = sorted(provenance, key=lambda record: record["started"])
    days = [record["started"][:10] for record in made]
    when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no provenance"
    codes = [record["code"] for record in reversed(made)]
    commits = [(c["commit"] or "unknown")[:12] + (" with uncommitted changes" if c["diff"] else "") for c in codes]
    manifest = manifest_of(layout.checkpoint("base"))
    base = {**config["base"], **(read_json(manifest).get("base", {}) if manifest.exists() else {})}
    model = "trained from scratch" if base["model"] == "scratch" else base["model"]
    fetched = base.get("commit") or base["revision"]  # older checkpoints hold no commit
    said = [
        when,
        f"commit {', '.join(dict.fromkeys(commits))}" if commits else "",
        f"base model {model}{f' at {fetched}' if fetched else ''}",
        f"seed {config['seed']}",
    ]
    return [fact for fact in said if fact]


def made_from(layout: Layout) -> list[tuple[str, list[str]]]:
    """Every artifact and its parents by name, parents first, as the manifests say.

    A manifest records the digest of each parent's manifest; a parent that has been made again since is left out, and so is an
    older report, so that a report which is made again is the same.
    """
    names = {
        path: str(path.relative_to(layout.home)).removesuffix(MANIFEST_SUFFIX).removesuffix(f"/{CHECKPOINT_MANIFEST}")
        for path in find_manifests(layout.home)
        if path != layout.home / f"report{MANIFEST_SUFFIX}"
    }
    by_digest = {digest_file(path): name for path, name in names.items()}
    parents = {
        name: sorted({by_digest[d] for d in read_json(path).get("parents", {}).values() if d in by_digest})
        for path, name in names.items()
    }
    return [(name, parents[name]) for name in TopologicalSorter(parents).static_order()]


def making(config: Record, layout: Layout, provenance: Sequence[Record]) -> list[Section]:
    """The sections that every report ends with: settings, artifacts, costs."""
    settings = json.dumps(config, indent=2, ensure_ascii=False)
    return [
        Section("How it was made", "made.html", {"config": settings, "made": made_from(layout)}),
        Section("Costs", "costs.html", {"costs": costs(provenance)}),
    ]


def render(experiment: str, questions: Sequence[str], facts: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page."""
    filled = [(section, fill(section.template, **section.data)) for section in sections]
    return fill("report.html", experiment=experiment, questions=questions, facts=facts, sections=filled)
