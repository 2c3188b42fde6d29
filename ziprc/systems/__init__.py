"""What is made from what: one torch-free declaration per stage, one module per system."""

from __future__ import annotations

from collections.abc import Sequence

from ziprc.config.load import Config
from ziprc.plan.graph import Graph
from ziprc.plan.stage import Ref
from ziprc.store.layout import Layout
from ziprc.systems import shared
from ziprc.systems.countdown_rl import COUNTDOWN_RL
from ziprc.systems.icl_v import ICL_V
from ziprc.systems.reasoning_vocabulary import REASONING_VOCABULARY
from ziprc.systems.rubric import RUBRIC
from ziprc.systems.zip_rc import ZIP_RC

SYSTEMS = (ZIP_RC, ICL_V, COUNTDOWN_RL, REASONING_VOCABULARY, RUBRIC)
OWN = [stage for system in SYSTEMS for stage in system.stages]
STAGES = (*shared.responses(SYSTEMS), *OWN, *shared.results(SYSTEMS))


def graph_of(config: Config, layout: Layout) -> Graph:
    """The plan of one experiment."""
    return Graph(STAGES, config, layout)


def goals_of(config: Config, only: Sequence[str] = ()) -> list[Ref]:
    """What building an experiment means: its report, or what the section of some systems in it is made from."""
    if not only or set(config.systems) <= set(only):
        return [Ref("report", "report")]
    return [ref for system in SYSTEMS if system.name in only for ref in system.shows(config).values()]
