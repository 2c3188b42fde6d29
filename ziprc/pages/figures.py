"""Every figure, as an SVG string that can stand inside a page. The only module that imports matplotlib.

Text and axes are drawn in `currentColor` and heat in one hue with varying opacity, so that figures follow the page into
dark mode. Figures are drawn without pyplot (no global state), with fixed ids and no date: equal input, equal bytes.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from ziprc.joint.distribution import JointDistribution
from ziprc.sampling.families import PLUS, PUBLISHED

INK = "#010203"  # replaced by currentColor
ACCENT = "#2f7fd1"
VIOLET, ORANGE, GREEN, GREY = "#8f6fd6", "#d9822b", "#3a9d6a", "#8a8f98"
COLOURS = {"ziprc": ACCENT, "lite": VIOLET, "probe": ORANGE, "logprob": GREEN, "length": "#c0567f", "constant": GREY}
SIBLINGS = {"critic": ACCENT, "trie": ORANGE, "lookup": GREEN, "mean": GREY}
POLICIES = {PLUS: ACCENT, PUBLISHED: VIOLET, "majority": ORANGE}  # the families that have a colour
DASHES = ("-", "--", ":")
ARMS = (ACCENT, ORANGE, GREEN, VIOLET, "#c0567f", GREY, "#8c6d31", "#2a9d9d")  # of on-policy training, in their order
RIVAL = GREY  # all others
ENVELOPE = "#c0567f"  # the best of the competitors at each budget
NEAR_EDGE = 0.9  # of the longest line: those that end before have no name beside them
LABEL_GAP = 0.034  # of the height of the axes: nearer than that, labels at the ends of lines overlap
DASHED = {"color": INK, "linewidth": 0.6, "linestyle": (0, (4, 4))}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "legend.frameon": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "axes.titlesize": 10, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
PNG: dict[str, Any] = {"dpi": 160, "facecolor": "white", "bbox_inches": "tight", "metadata": {"Software": None}}


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """Inline SVG: ids made unique by `name`, no metadata, no size, ink in the colour of the text; templates do not escape it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(?<= )id="|(?<=url\(#)|(?<=href="#)', lambda m: f"{m[0]}{name}-", text)  # ids are global in a page
    width = re.search(r'width="([0-9.]+)pt" height="[0-9.]+pt"', text)
    assert width is not None, "matplotlib's SVG has a size"
    style = f'role="img" aria-label="{escape(title)}" style="width:{float(width[1]) * 1.35:.0f}px;max-width:100%;height:auto"'
    return Markup(text.replace(width[0], style, 1).replace(INK, "currentColor"))


def _bars(records: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """[2, n] distances down and up to the ends of the intervals; 0 where there is none."""
    ends = [[(r["value"] if r[side] is None else r[side]) for side in ("low", "high")] for r in records]
    values = np.array([r["value"] for r in records], dtype=float)
    return np.abs(np.array(ends, dtype=float).T.reshape(2, -1) - values)


@matplotlib.rc_context(STYLE)
def reliability(moment: str, curve: Sequence[Mapping[str, Any]], ece: Mapping[str, Any]) -> Markup:
    """Observed against predicted score at one moment or budget; areas of the dots show how many rollouts."""
    axes = Figure(figsize=(2.6, 2.5)).add_subplot()
    axes.plot([0, 1], [0, 1], **DASHED)
    x, y = [r["predicted"] for r in curve], [r["observed"] for r in curve]
    share = np.array([r["count"] for r in curve]) / max(sum(r["count"] for r in curve), 1)
    values = [r["value"] for r in y]
    axes.errorbar(x, values, yerr=_bars(y), fmt="none", ecolor=ACCENT, elinewidth=1)
    axes.scatter(x, values, s=12 + 160 * share, color=ACCENT, zorder=3, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="observed", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    error = "" if ece["value"] is None else f": ECE {ece['value']:.3f}"
    axes.set_title(f"{moment}{error}", loc="left")
    slug = re.sub(r"[^\w.-]+", "-", moment).strip("-")
    return _svg(axes.figure, f"reliability-{slug}", f"Reliability at {moment}")


@matplotlib.rc_context(STYLE)
def over_moments(metric: str, title: str, prediction: Mapping[str, Any], moments: Sequence[str]) -> Markup:
    """One line per predictor along the response, with intervals."""
    axes = Figure(figsize=(4.2, 2.9)).add_subplot()
    _lines(axes, metric, title, prediction, moments)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3, columnspacing=1.2, handlelength=1.4)
    return _svg(axes.figure, f"moments-{metric}", title)


def _lines(axes: Axes, metric: str, title: str, prediction: Mapping[str, Any], moments: Sequence[str]) -> None:
    rivals = [name for name in prediction if name not in COLOURS]
    names = [*(name for name in COLOURS if name in prediction and name != "constant"), *rivals]
    colours = COLOURS | {name: f"C{i}" for i, name in enumerate(rivals)}
    for i, name in enumerate(names):
        found = [(k, prediction[name][m][metric]) for k, m in enumerate(moments)]
        records = [r for _, r in found if r["value"] is not None]
        at = np.array([k for k, r in found if r["value"] is not None]) + (i - len(names) / 2) * 0.05
        axes.errorbar(
            at, [r["value"] for r in records], yerr=_bars(records), label=name, color=colours[name],
            marker="o", markersize=3.5, linewidth=2 if name == "ziprc" else 1, elinewidth=0.8,
        )  # fmt: skip
    axes.axhline(0.5, **DASHED)
    axes.set_xticks(range(len(moments)), list(moments))
    axes.set_title(title, loc="left")


@matplotlib.rc_context(STYLE)
def over_siblings(metric: str, title: str, curve: Mapping[str, Any], moment: str) -> Markup:
    """One line per predictor over the number of graded siblings that it has read, with intervals."""
    axes = Figure(figsize=(3.6, 2.9)).add_subplot()
    for i, (name, colour) in enumerate(SIBLINGS.items()):
        found = {int(k): record[metric] for k, record in curve[name][moment].items()}
        found = {k: record for k, record in found.items() if record["value"] is not None}
        axes.errorbar(
            np.log2(np.array(list(found)) + 1) + (i - 1.5) * 0.04, [r["value"] for r in found.values()],
            yerr=_bars(list(found.values())), label=name, color=colour,
            marker="o", markersize=3.5, linewidth=2 if name == "critic" else 1, elinewidth=0.8,
        )  # fmt: skip
    siblings = [int(k) for k in curve["critic"][moment]]
    axes.set_xticks(np.log2(np.array(siblings) + 1), [str(k) for k in siblings])
    axes.set_xlabel("graded siblings read")
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=4, columnspacing=1.2, handlelength=1.4)
    return _svg(axes.figure, f"siblings-{metric}-{moment.strip('%')}", title)


@matplotlib.rc_context(STYLE)
def over_training(
    title: str, across: str, lines: Mapping[str, tuple[Sequence[float], Sequence[Any]]], arms: Sequence[str] = ()
) -> Markup:
    """One line per arm: what it is drawn over, and numbers (a step a rollout) or intervals (a dot a judgement).

    `arms` are all there are, where some figures show a part of them: each keeps its colour.
    """
    names = list(arms or lines)
    colours = dict(zip(names, itertools.cycle(ARMS), strict=False))
    dashes = {name: DASHES[i // len(ARMS) % len(DASHES)] for i, name in enumerate(names)}  # where colours come again
    axes = Figure(figsize=(4.4, 2.9)).add_subplot()
    for name, (x, y) in lines.items():
        colour = colours[name]
        if y and isinstance(y[0], Mapping):
            axes.errorbar(
                x, [r["value"] for r in y], yerr=_bars(y), label=name, color=colour, marker="o", markersize=3,
                linestyle=dashes[name], linewidth=1.4, elinewidth=0.6, capsize=1.5,
            )  # fmt: skip
        else:
            axes.step(
                x,
                [np.nan if v is None else v for v in y],
                where="mid",
                label=name,
                color=colour,
                linestyle=dashes[name],
                linewidth=1.4,
            )
    axes.set_xlabel(across)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3, columnspacing=1.2, handlelength=1.4)
    return _svg(axes.figure, "training-" + re.sub(r"\W+", "-", f"{title} {across}").lower(), title)


@matplotlib.rc_context(STYLE)
def overview(target: Path, prediction: Mapping[str, Any], moments: Sequence[str]) -> None:
    """The README's figure, a PNG on white: who tells right from wrong responses, over all prompts and within one."""
    figure = Figure(figsize=(8.4, 3.2))
    left, right = figure.subplots(1, 2, sharey=True)
    _lines(left, "auroc", "AUROC of the expected score, all responses", prediction, moments)
    _lines(right, "within_prompt_auroc", "among responses to one prompt", prediction, moments)
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=5, bbox_to_anchor=(0.5, -0.08))
    figure.savefig(target, **PNG)


def in_order(record: Any) -> Any:
    """The record with budgets and sizes rising, wherever they are keys: JSON files are sorted as text, 16 before 2."""
    if not isinstance(record, Mapping):
        return record
    budgets = all(re.fullmatch(r"\d+(\.\d+)?", key) for key in record)
    return {key: in_order(record[key]) for key in (sorted(record, key=float) if budgets else record)}


def rivals(record: Mapping[str, Any]) -> list[str]:
    """The competitors: every family but the shipped and the published policy."""
    return [name for name in record["families"] if name not in (PLUS, PUBLISHED)]


def point_at(record: Mapping[str, Any], family: str, budget: str) -> Mapping[str, Any] | None:
    """What a family reaches at a budget; None when it cannot keep to it."""
    return record["families"].get(family, {}).get("points", {}).get(budget)


def accuracy_at(record: Mapping[str, Any], family: str, budget: str) -> float | None:
    point = point_at(record, family, budget)
    return None if point is None else point["accuracy"]["value"]


def best_rivals(record: Mapping[str, Any]) -> dict[str, str]:
    """The most accurate competitor at each budget, chosen with hindsight on the test prompts."""
    best = {}
    for budget in record["budgets"]:
        known = {name: value for name in rivals(record) if (value := accuracy_at(record, name, budget)) is not None}
        if known:
            best[budget] = max(known, key=known.__getitem__)
    return best


def _one_sample(record: Mapping[str, Any]) -> float:
    """Mean tokens of one sample."""
    multiple, tokens = next(iter(record["budgets"].items()))
    return float(tokens) / float(multiple)


def _family_line(record: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    """[4, n] by budget: tokens spent in samples' worth, accuracy in per cent, ends of its interval."""
    rows = []
    for point in record["families"][name]["points"].values():
        value, low, high = (point["accuracy"][end] for end in ("value", "low", "high"))
        if value is not None:
            ends = (value, value) if low is None else (low, high)
            rows.append((point["tokens"] / _one_sample(record), 100 * value, 100 * ends[0], 100 * ends[1]))
    return np.array(rows, dtype=np.float64).reshape(-1, 4).T


def _draw_lines(axes: Axes, record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Competitors in thin grey, the oracle dotted, the envelope dashed, then the policies; where the grey lines end."""
    ends = {}
    for name in rivals(record):
        x, y, *_ = _family_line(record, name)
        if name not in POLICIES and len(x):
            axes.plot(x, y, color=RIVAL, linewidth=0.7, alpha=0.6, zorder=1)
            ends[name] = (x[-1], y[-1])
    oracle = [(int(k), 100 * v) for k, v in record.get("oracle", {}).items() if v is not None]
    if oracle:
        axes.plot(*zip(*oracle, strict=True), color=INK, linewidth=1, linestyle=":", label="oracle: best of k")
    best = [(float(k), 100 * (accuracy_at(record, name, k) or 0.0)) for k, name in best_rivals(record).items()]
    if best:
        label = "best competitor at each budget"
        axes.plot(*zip(*best, strict=True), color=ENVELOPE, linewidth=1.5, linestyle=(0, (4, 2)), label=label, zorder=3)
    for name, colour in POLICIES.items():
        x, y, low, high = _family_line(record, name) if name in record["families"] else np.empty((4, 0))
        if len(x):
            width, size, layer = (2.6, 4.5, 5) if name == PLUS else (1.4, 3, 4)
            axes.plot(x, y, color=colour, linewidth=width, marker="o", markersize=size, label=name, zorder=layer)
        if name == PLUS and len(x):
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
    return ends


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Names at the right edge of the lines that come near it, from the top, as many as fit."""
    low, high = axes.get_ylim()
    edge = max((x for x, _ in ends.values()), default=0.0)
    last = np.inf
    for name, (x, y) in sorted(ends.items(), key=lambda item: -item[1][1]):
        if x > NEAR_EDGE * edge and last - y > LABEL_GAP * (high - low):
            place = axes.get_yaxis_transform()
            axes.text(1.005, y, name, color=RIVAL, fontsize=7, parse_math=False, transform=place, va="center")
            last = y


def _draw_frontier(record: Mapping[str, Any], size: tuple[float, float]) -> Figure:
    record, figure = in_order(record), Figure(figsize=size)
    axes = figure.add_subplot()
    ends = _draw_lines(axes, record)
    places = {"1": _one_sample(record), **record["budgets"]}
    ticks = {float(k): f"{k}\n{tokens:,.0f}" for k, tokens in places.items()}
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("budget per prompt: in samples' worth of tokens, and in tokens (log scale)")
    axes.set_ylabel("prompts answered right, %")
    axes.grid(axis="y", color=RIVAL, alpha=0.25, linewidth=0.5)
    axes.set_title("Accuracy against tokens per prompt", loc="left")
    _label_ends(axes, ends)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: [*POLICIES, labels[i]].index(labels[i]))
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper center", ncols=5,
                  bbox_to_anchor=(0.5, -0.03), columnspacing=1.4, handlelength=1.8)  # fmt: skip
    return figure


@matplotlib.rc_context(STYLE)
def frontier(record: Mapping[str, Any]) -> Markup:
    """Accuracy against tokens per prompt: our policies, every competitor, their envelope, and the oracle."""
    return _svg(_draw_frontier(record, (7.4, 4.2)), "frontier", "Accuracy against tokens per prompt")


@matplotlib.rc_context(STYLE)
def frontier_figure(target: Path, record: Mapping[str, Any]) -> None:
    """The same figure as a PNG on white, for the README."""
    _draw_frontier(record, (8.4, 4.4)).savefig(target, **PNG)


@matplotlib.rc_context(STYLE)
def remaining_length(moment: str, curve: Sequence[Mapping[str, Any]], gain: Mapping[str, Any]) -> Markup:
    """Real remaining tokens (median, 10 to 90 %) against the predicted median, in equally large groups."""
    axes = Figure(figsize=(2.6, 2.5)).add_subplot()
    x = np.array([r["predicted"] for r in curve])
    low, middle, high = np.array([r["real"] for r in curve]).T
    top = max(float(high.max()), float(x.max())) * 1.05
    axes.plot([0, top], [0, top], **DASHED)
    axes.errorbar(x, middle, yerr=[middle - low, high - middle], fmt="o", color=ACCENT, markersize=4, elinewidth=1)
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="predicted median", ylabel="real")
    axes.locator_params(nbins=4)
    value = gain["value"]
    words = "" if value is None else f": MAE {abs(value):.0%} {'below' if value >= 0 else 'above'} constant"
    axes.set_title(f"{moment}{words}", loc="left")
    return _svg(axes.figure, f"remaining-{moment.strip('%')}", f"Remaining length at {moment}")


def _heat(axes: Axes, marginal: NDArray[np.floating], colour: str) -> None:
    image = np.zeros((marginal.shape[1], marginal.shape[0], 4))
    image[..., :3] = to_rgb(colour)
    image[..., 3] = np.sqrt(np.clip(marginal.T, 0, 1))
    extent = (-0.5, len(marginal) - 0.5, -0.5, marginal.shape[1] - 0.5)
    axes.imshow(image, aspect="auto", origin="lower", interpolation="nearest", extent=extent)


@matplotlib.rc_context(STYLE | {"font.size": 7.5})
def heat_strip(name: str, joint: JointDistribution, remaining: NDArray[np.int64], lengths: Sequence[str]) -> Markup:
    """The joints [m, R·L] along one rollout: reward above, remaining length (real: [m] tokens) below; `lengths` names bins."""
    figure, grid = Figure(figsize=(6.6, 2.4)), joint.grid
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1], gridspec_kw={"hspace": 0.15})
    _heat(above, joint.reward_marginal(), ACCENT)
    above.plot(joint.expected_reward() * (grid.R - 1), color=ORANGE, linewidth=1.2)
    _heat(below, joint.length_marginal(), GREEN)
    below.step(np.arange(len(remaining)), grid.length_bin(remaining), where="mid", color=INK, linewidth=0.8)
    above.set_yticks([0, grid.R - 1], [f"{np.round(grid.reward_centres[i], 2):g}" for i in (0, -1)])
    shown = sorted({0, grid.L // 2, grid.L - 1})
    below.set_yticks(shown, [lengths[i] for i in shown])
    above.set_ylabel("score")
    below.set(ylabel="remaining", xlabel="response tokens so far")
    return _svg(figure, f"strip-{name}", "Joint along a rollout")
