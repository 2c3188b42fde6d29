"""The first section of the report: what adaptive sampling buys, from frontier.json and the records of live runs.

A figure and sentences first, then every competitor at every budget, then what the policies cost, what each idea adds, who
gets the tokens, and whether the probability given with an answer is honest. Numbers are selected and formatted here, never
computed. Parts of the record that are missing leave out their part of the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ziprc.pages import figures
from ziprc.pages.figures import accuracy_at, best_rivals, in_order, rivals
from ziprc.pages.html import as_interval, bullets, cards, esc, found, interval, number, panels, say, section, table
from ziprc.sampling.families import PLUS, PUBLISHED

Record = Mapping[str, Any]

MAJORITY = "majority"
OURS = (PLUS, PUBLISHED)
PARALLEL = f"{PLUS}: four at a time"
NARROW = ("2", "4", "8")  # budgets of the tables that show several numbers for each
MIDDLE = 4.0  # the budget by which families are ordered, and whose reliability is drawn
SERIAL = "serial"

# What each ablation takes away, and what that means.
ABLATIONS = {
    f"{PLUS}: head alone": ("the token log-probabilities", "The score of a branch is read from the joint alone."),
    f"{PLUS}: log-probs alone": ("the head", "The score of a branch is read from its tokens' statistics alone."),
    f"{PLUS}: no latent difficulty": (
        "the latent difficulty",
        "A failed sample says nothing about the next one of its prompt.",
    ),
    f"{PLUS}: threshold instead of utility": (
        "the utility",
        "One whole sample after the other until the probability of the answer reaches a threshold.",
    ),
    f"{PLUS}: whole samples": (
        "decisions on the way",
        "It decides only when a sample has ended; none is paused or left behind.",
    ),
    f"{PLUS}: no pause": ("pausing", "A branch that is not continued is dropped for good instead of waiting."),
    f"{PLUS}: no vote": ("the vote", "The sample with the best score is the answer, whatever the others say."),
    PARALLEL: ("taking one branch at a time", "Four branches of a prompt may run at once: faster, with less choice."),
    f"{PUBLISHED}: marginals": (
        "the joint",
        "Reward and remaining length are taken as independent: the two marginals only.",
    ),
    f"{PUBLISHED}: no horizon": (
        "horizons",
        "A set of samples is worth what it is worth when all of them run to the end.",
    ),
    f"{PUBLISHED}: own horizons": (
        "the shared horizon (each sample has its own instead)",
        "Each sample of a set has its own horizon.",
    ),
    f"{PUBLISHED}: no pause": ("pausing", "A sample that is not continued is dropped for good instead of waiting."),
    f"{PUBLISHED}: smoothed": (
        "the latest joint (the last ones are averaged instead)",
        "The joint is averaged over the last readings.",
    ),
    f"{PUBLISHED}: calibrated": (
        "the raw joint (it is calibrated instead)",
        "Two numbers fitted on validation correct the joint.",
    ),
    f"{PUBLISHED}: uncalibrated": ("the calibration", "The joint is read as the head gives it."),
}


# --- numbers in words ------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share in per cent, without the sign."""
    return "–" if value is None else f"{100 * value:.1f}"


def signed(value: float | None) -> str:
    """A difference of shares in points; never a negative zero."""
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"


def _ends(record: Record, form: Any) -> str:
    return "" if record["low"] is None else f" [{form(record['low'])}, {form(record['high'])}]"


def _below(record: Record, ends: str) -> str:
    """The ends of an interval under its value, as HTML."""
    return "" if record["low"] is None else f"<small>{ends}</small>"


def _spread(record: Record | float | None) -> str:
    result = as_interval(record)
    return percent(result["value"]) + _below(result, f"{percent(result['low'])} … {percent(result['high'])}")


def _gap(record: Record | None, better: int) -> str:
    """A paired difference: red when it lies on the wrong side of zero (`better` is the sign of the right one)."""
    if record is None:
        return "–"
    text = signed(record["value"]) + _below(record, f"{signed(record['low'])} … {signed(record['high'])}")
    side = _side(record)
    kind = "tied" if side == 0 else "lost" if side == -better else ""
    return f'<span class="{kind}">{text}</span>' if kind else text


def _side(record: Record) -> int:
    """On which side of zero an interval lies; 0 when it holds zero, or has no ends."""
    if record["low"] is None:
        return 0
    return int(record["low"] > 0) - int(record["high"] < 0)


def _named(name: str) -> str:
    """A family, ours in bold, as HTML."""
    return f"<b>{esc(name)}</b>" if name in OURS else esc(name)


def _columns(record: Record) -> list[str]:
    """The heads of the columns, one per budget: samples' worth, and tokens."""
    return [f"{k} ({tokens:,.0f})" for k, tokens in record["budgets"].items()]


def _shown(record: Record) -> list[str]:
    """Budgets for the tables that have little room: 2, 4 and 8, or what there is."""
    return [k for k in NARROW if k in record["budgets"]] or list(record["budgets"])[:3]


def _middle(record: Record) -> str:
    """The budget nearest to four samples."""
    return min(record["budgets"], key=lambda k: abs(float(k) - MIDDLE))


# --- findings --------------------------------------------------------------------------------------------------------


def sampling_findings(record: Record) -> list[str]:
    """What did not work, in sentences: missed targets, competitors that are not beaten, ideas that change nothing."""
    record = in_order(record)
    return [*_missed(record), *_unbeaten(record), *_slower(record), *_idle(record)]


def _missed(record: Record) -> Iterator[str]:
    for row in record.get("headline", ()):
        result = as_interval(row["result"])["value"]
        if row["met"] is None:
            yield f"Sampling, {row['name']}: cannot be said, the budgets or prompts for it are missing."
        elif not row["met"]:
            yield f"Sampling, {row['name']}: {found(result)}, wanted {row['direction']} {row['target']:.3g}."


def _unbeaten(record: Record) -> Iterator[str]:
    """Families with the same verdict at the same budgets share a sentence."""
    difference = record.get("difference", {})
    for side, verdict in ((-1, f"better than {PLUS}"), (0, f"not to be told from {PLUS}")):
        groups: dict[str, list[str]] = {}
        for name in record["families"]:
            budgets = [k for k, gaps in difference.items() if name in gaps and _side(gaps[name]) == side]
            if budgets:
                groups.setdefault(", ".join(budgets), []).append(name)
        for budgets_text, names in groups.items():
            yield f"With tokens for {budgets_text} samples, {verdict}: {', '.join(names)}."


def _slower(record: Record) -> Iterator[str]:
    """Budgets at which the shipped policy makes one wait longer than voting does."""
    steps = {name: family.get("points", {}) for name, family in record["families"].items() if name in (PLUS, MAJORITY)}
    if len(steps) < 2:
        return
    pairs = ((k, *(steps[name].get(k, {}).get("latency") for name in (PLUS, MAJORITY))) for k in _shown(record))
    longer = [(k, a, b) for k, a, b in pairs if a is not None and b is not None and a > b]
    if longer:
        words = "; ".join(
            f"{number(a, 0)} serial steps against {number(b, 0)} with tokens for {k} samples" for k, a, b in longer
        )
        yield f"{PLUS} makes one wait longer than majority: {words}."


def _idle(record: Record) -> Iterator[str]:
    """Ideas without which the policy is no worse."""
    for name, ablation in _by_policy(record.get("ablations", {})):
        sides = {k: _side(gap) for k, gap in ablation.get("difference", {}).items()}
        policy, _, what = _taken(name)
        better = [k for k, side in sides.items() if side > 0]
        if better:
            yield f"{policy}: taking away {what} makes it better with tokens for {', '.join(better)} samples."
        elif sides and not any(sides.values()):
            yield f"{policy}: taking away {what} changes nothing that can be told at any budget."


def _by_policy(ablations: Record) -> list[tuple[str, Record]]:
    """Ablations in the order of the table above; those that it does not know come last."""
    known = list(ABLATIONS)
    return sorted(ablations.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known))


def _taken(name: str) -> tuple[str, str, str]:
    """The policy, the short name of the ablation, and what it takes away."""
    policy, _, short = name.partition(": ")
    return policy, short, ABLATIONS.get(name, (f"what “{short}” leaves out", ""))[0]


# --- parts -----------------------------------------------------------------------------------------------------------


def _setting(record: Record) -> str:
    """How the numbers came about."""
    counts = record.get("prompts", {})
    size = ", ".join(f"{number(counts[key], 0)} {what}" for key, what in (
        ("test", "held-out prompts"), ("rollouts", "recorded samples of each"), ("orders", "orders of replay"),
    ) if key in counts)  # fmt: skip
    chosen = f"{number(counts['validation'], 0)} other prompts" if "validation" in counts else "other prompts"
    return (
        f"Every policy is replayed on the same recorded samples ({size}). A budget is a multiple of the tokens of one plain "
        "sample; abandoned samples count, and a family spends exactly the budget, or less where it has no use for more. "
        f"Settings were chosen on {chosen}; only the best competitor at a budget is picked with hindsight. Intervals are "
        "bootstrapped over prompts, and differences are paired."
    )


def _sentences(record: Record) -> Iterator[str]:
    best = best_rivals(record)
    for budget in _shown(record):
        point = record["families"].get(PLUS, {}).get("points", {}).get(budget)
        if point is None:
            continue
        result = point["accuracy"]
        parts = [
            f"At {budget} samples' worth of tokens ({record['budgets'][budget]:,.0f} per prompt) {PLUS} answers "
            f"{percent(result['value'])} %{_ends(result, percent)} right"
        ]
        if accuracy_at(record, MAJORITY, budget) is not None:
            parts.append(f"majority {percent(accuracy_at(record, MAJORITY, budget))} %")
        if budget in best:
            parts.append(_rival(record, budget, best[budget]))
        yield ", ".join(parts) + "."


def _rival(record: Record, budget: str, name: str) -> str:
    count = sum(accuracy_at(record, other, budget) is not None for other in rivals(record))
    gap = record.get("difference", {}).get(budget, {}).get(name)
    paired = f"; paired difference {signed(gap['value'])} points{_ends(gap, signed)}" if gap else ""
    return f"the best of {count} competitors ({name}) {percent(accuracy_at(record, name, budget))} %{paired}"


def _targets(record: Record) -> str:
    rows = record.get("headline", ())
    if not rows:
        return ""
    met = sum(bool(row["met"]) for row in rows)
    text = f"{met} of {len(rows)} targets of adaptive sampling reached. They belong to the toy scale."
    return "<h3>Targets</h3>" + say(text) + cards(rows)


def _by_accuracy(record: Record) -> list[str]:
    """Families by falling accuracy at the middle budget; ours first among equals, what cannot keep to it last."""
    middle = _middle(record)
    return sorted(record["families"], key=lambda name: (-(accuracy_at(record, name, middle) or -1.0), name not in OURS))


def _accuracies(record: Record) -> str:
    best = {k: max(filter(None, (accuracy_at(record, n, k) for n in record["families"])), default=None)
            for k in record["budgets"]}  # fmt: skip

    def cell(name: str, budget: str) -> str:
        value = accuracy_at(record, name, budget)
        text = f"<b>{percent(value)}</b>" if name in OURS else percent(value)
        return f"<u>{text}</u>" if value is not None and value == best[budget] else text

    rows = [[_named(name), *(cell(name, k) for k in record["budgets"])] for name in _by_accuracy(record)]
    caption = (
        f"Prompts answered right, %, by budget in samples' worth (tokens); ordered at {_middle(record)} samples. Bold: ours; "
        "underlined: the highest of a column. A family that has nothing more to spend on stays where it is."
    )
    return "<h3>Every family at every budget</h3>" + table(["family", *_columns(record)], rows, caption)


def _differences(record: Record) -> str:
    difference = record.get("difference", {})
    names = [n for n in _by_accuracy(record) if any(n in gaps for gaps in difference.values())]
    if not names:
        return ""
    rows = [[_named(n), *(_gap(difference.get(k, {}).get(n), 1) for k in record["budgets"])] for n in names]
    caption = (
        f"{PLUS} minus each family, points, paired over prompts, by budget in samples' worth (tokens). Red: the interval "
        "lies below zero; grey: it holds zero."
    )
    return table([f"{PLUS} minus …", *_columns(record)], rows, caption)


def _costs(record: Record) -> str:
    """What the same budget means in other units."""
    families = {**record["families"], **record.get("ablations", {})}
    header = ["samples' worth", "policy", "accuracy, %", "tokens", "normalised cost", "serial steps", "samples"]
    rows = []
    for budget in _shown(record):
        for name in (PLUS, PARALLEL, PUBLISHED, MAJORITY):
            point = families.get(name, {}).get("points", {}).get(budget)
            if point:
                columns = (number(point.get(key), digits) for key, digits in COSTS.items())
                rows.append([esc(budget), _named(name), _spread(point["accuracy"]), *columns])
    text = (
        "Means per prompt. Serial steps are decoding steps one after the other, so samples side by side count once. The "
        "normalised cost is the paper's mixture of tokens and serial steps, in units of one sample."
    )
    return "<h3>The same budgets in other costs</h3>" + say(text) + table(header, rows) if rows else ""


COSTS = {"tokens": 1, "cost": 2, "latency": 1, "samples": 2}


def _ablations(record: Record) -> str:
    ablations = record.get("ablations", {})
    if not ablations:
        return ""
    rows = []
    for name, ablation in _by_policy(ablations):
        told = ABLATIONS.get(name, ("", ""))[1]
        gaps = ablation.get("difference", {})
        rows.append([f"{esc(name)}<small>{esc(told)}</small>", *(_gap(gaps.get(k), -1) for k in record["budgets"])])
    caption = (
        "Without one idea minus with it, points, paired, by budget in samples' worth (tokens). Below zero the idea helps; "
        "red: it is better without; grey: cannot be told."
    )
    return "<h3>What each idea adds</h3>" + table(["without", *_columns(record)], rows, caption)


def _cells(record: Record) -> str:
    cells = record.get("cells", {})
    budgets = [k for k in _shown(record) if any(k in cell for cell in cells.values())]
    if not budgets:
        return ""

    def entry(cell: Record, budget: str, name: str) -> str:
        point = cell.get(budget, {}).get(name)
        if point is None:
            return "–"
        spent = f"{number(point.get('tokens'), 0)} · {number(point.get('samples'), 1)}"
        return f"{percent(point.get('accuracy'))}<small>{spent}</small>"

    pairs = [(k, name) for k in budgets for name in (PLUS, MAJORITY)]
    rows = [
        [esc(name), number(cell.get("prompts"), 0), *(entry(cell, *pair) for pair in pairs)]
        for name, cell in cells.items()
    ]
    header = ["difficulty", "prompts", *(f"{name}, {k}" for k, name in pairs)]
    caption = "Prompts answered right, %, by difficulty and by budget in samples' worth; below, tokens · samples spent on each."
    return "<h3>Who gets the tokens</h3>" + table(header, rows, caption)


def _answer(record: Record) -> str:
    """Reliability of the probability given with the answer."""
    known = {k: answer for k, answer in record.get("answer", {}).items() if answer}
    if not known:
        return ""
    middle = min(known, key=lambda k: abs(float(k) - MIDDLE))
    curve = figures.reliability(f"{middle} samples", known[middle]["reliability"], known[middle]["ece"])
    header = ["", *(f"{k} samples" for k in known)]
    rows = [[label, *(interval(answer[key]) for answer in known.values())] for key, label in ERRORS.items()]
    text = (
        f"{PLUS} gives a probability with every answer. Here it stands against how often the answer was right, at the "
        "setting that is played more often at that budget."
    )
    return "<h3>Is the probability of the answer honest?</h3>" + say(text) + panels([curve]) + table(header, rows)


ERRORS = {"ece": "ECE", "brier": "Brier score"}


# --- live runs -------------------------------------------------------------------------------------------------------


def _live(live: Record) -> str:
    """One row per policy and budget; runs of one prompt at a time stand in `one_by_one`, or apart under `serial`."""
    apart = live.get(SERIAL) or {}
    rows = [
        _run_row(policy, budget, run, (apart.get(policy) or {}).get(budget) or {})
        for policy, budgets in live.items()
        if policy != SERIAL
        for budget, run in budgets.items()
    ]
    if not rows:
        return ""
    header = [
        "policy",
        "budget",
        "accuracy, %",
        *MEASURED.values(),
        "wall-clock",
        "one by one",
        "deciding, %",
        "actions",
    ]
    text = (
        "Decided while the engine was decoding, not replayed. Tokens, prefill and serial steps are means per prompt. "
        "Wall-clock: all prompts in flight, then one prompt at a time; deciding is its share of the former."
    )
    return "<h3>Live on the engine</h3>" + say(text) + table(header, rows)


def _run_row(policy: str, budget: str, run: Record, serial: Record) -> Sequence[str]:
    actions = run.get("actions") or {}
    together, alone = run.get("together") or {}, run.get("one_by_one") or {}
    share = run.get("deciding_share")
    if share is None and together.get("total_s"):
        share = together["deciding_s"] / together["total_s"]
    return [
        _named(policy), esc(budget), _spread(run.get("accuracy")),
        *(number(run.get(key), 1) for key in MEASURED),
        _seconds(together.get("total_s", run.get("wall_clock_s")), run.get("prompts")),
        _seconds(alone.get("total_s", serial.get("wall_clock_s")), serial.get("prompts", run.get("alone"))),
        percent(share), "<br>".join(f"{esc(name)} {found(count, 2)}" for name, count in actions.items()) or "–",
    ]  # fmt: skip


def _seconds(seconds: float | None, prompts: int | None) -> str:
    """Time of a run, and of how many prompts."""
    if seconds is None:
        return "–"
    return f"{seconds:,.1f} s" + (f"<small>{prompts:,} prompts</small>" if prompts else "")


MEASURED = {"tokens": "tokens", "prefill": "prefill", "latency": "serial steps", "samples": "samples"}


# --- the section -----------------------------------------------------------------------------------------------------


def sampling_section(record: Record | None, live: Record | None = None) -> str:
    """The section as HTML; nothing without a record."""
    if record is None:
        return ""
    record, live = in_order(record), in_order(live or {})
    parts = [
        say(_setting(record)),
        panels([figures.frontier(record)]),
        bullets(_sentences(record)),
        _targets(record),
        _accuracies(record),
        _differences(record),
        _costs(record),
        _ablations(record),
        _cells(record),
        _answer(record),
        _live(live),
    ]
    return section("Adaptive sampling", *parts)
