"""report: the page results/<experiment>/report.html, a list of the sections of the systems that the experiment builds.

Each system has a module that makes its sections from what it reads (`System.page`; for ZIP-RC pages/zip_rc.py).
"""

from __future__ import annotations

import importlib

from ziprc.pages import report
from ziprc.stages.context import Context, run_stage
from ziprc.store.files import write_text
from ziprc.systems import SYSTEMS, shared


def run(context: Context) -> str:
    """Write the page; the closing line."""
    config, layout, reads = context.config, context.graph.layout, context.reads
    pages = [importlib.import_module(system.page) for system in shared.of_experiment(SYSTEMS, config)]
    provenance = report.read_provenance(layout)
    sections = [section for page in pages for section in page.sections(config, layout, reads)]
    sections += report.making(context.params, layout, provenance)
    facts = report.facts(context.params, layout, provenance)
    questions = [page.QUESTION for page in pages]
    write_text(context.target, report.render(layout.experiment, questions, facts, sections))
    context.write_manifest()
    return f"wrote {context.target}"


if __name__ == "__main__":
    run_stage("report", run)
