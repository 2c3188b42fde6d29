"""Every figure, as an SVG string that can stand inside a page. The only module that imports matplotlib.

Text and axes are drawn in `currentColor` and heat in one hue with varying opacity, so that figures follow the page into
dark mode. Figures are drawn without pyplot (no global state), with fixed ids and no date: equal input, equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK = "#010203"  # replaced by currentColor
ACCENT = "#2f7fd1"
COLOURS = {
    "ziprc": ACCENT,
    "lite": "#8f6fd6",
    "probe": "#d9822b",
    "logprob": "#3a9d6a",
    "length": "#c0567f",
    "constant": "#8a8f98",
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


def _svg(figure: Figure, name: str, title: str) -> str:
    """Inline SVG: ids made unique by `name`, no metadata, no fixed size, ink in the colour of the page's text."""
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
    style = f'role="img" aria-label="{title}" style="width:100%;max-width:{float(width[1]) * 1.35:.0f}px;height:auto"'
    return text.replace(width[0], style, 1).replace(INK, "currentColor")


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _bars(records: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """[2, n] distances down and up to the ends of the intervals; 0 where there is none."""
    ends = [[(r["value"] if r[side] is None else r[side]) for side in ("low", "high")] for r in records]
    values = np.array([r["value"] for r in records], dtype=float)
    return np.abs(np.array(ends, dtype=float).T.reshape(2, -1) - values)


def reliability(moment: str, curve: Sequence[Mapping[str, Any]], ece: Mapping[str, Any]) -> str:
    """Observed against predicted score at one moment; areas of the dots show how many rollouts."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(2.6, 2.5)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.6, linestyle=(0, (4, 4)))
        x = [r["predicted"] for r in curve]
        y = [r["observed"] for r in curve]
        share = np.array([r["count"] for r in curve]) / max(sum(r["count"] for r in curve), 1)
        values = [r["value"] for r in y]
        axes.errorbar(x, values, yerr=_bars(y), fmt="none", ecolor=ACCENT, elinewidth=1)
        axes.scatter(x, values, s=12 + 160 * share, color=ACCENT, zorder=3)
        axes.set(
            xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="observed", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1]
        )
        axes.set_title(f"{moment}: ECE {ece['value']:.3f}", loc="left")
    return _svg(figure, f"reliability-{moment.strip('%')}", f"Reliability at {moment}")


def over_moments(metric: str, title: str, prediction: Mapping[str, Any], moments: Sequence[str]) -> str:
    """One line per predictor along the response, with intervals."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(4.2, 2.9)
        _lines(axes, metric, title, prediction, moments)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3, columnspacing=1.2, handlelength=1.4)
    return _svg(figure, f"moments-{metric}", title)


def _lines(axes: Axes, metric: str, title: str, prediction: Mapping[str, Any], moments: Sequence[str]) -> None:
    names = [name for name in COLOURS if name in prediction and name != "constant"]
    for i, name in enumerate(names):
        found = [(k, prediction[name][m][metric]) for k, m in enumerate(moments)]
        found = [(k, r) for k, r in found if r["value"] is not None]
        records = [r for _, r in found]
        at = np.array([k for k, _ in found]) + (i - len(names) / 2) * 0.05
        axes.errorbar(
            at, [r["value"] for r in records], yerr=_bars(records), label=name, color=COLOURS[name],
            marker="o", markersize=3.5, linewidth=2 if name == "ziprc" else 1, elinewidth=0.8,
        )  # fmt: skip
    axes.axhline(0.5, color=INK, linewidth=0.6, linestyle=(0, (4, 4)))
    axes.set_xticks(range(len(moments)), list(moments))
    axes.set_title(title, loc="left")


def overview(target: Path, prediction: Mapping[str, Any], moments: Sequence[str]) -> None:
    """The README's figure, a PNG on white: who tells right from wrong responses, over all prompts and within one."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.2))
        left, right = figure.subplots(1, 2, sharey=True)
        _lines(left, "auroc", "AUROC of the expected score, all responses", prediction, moments)
        _lines(right, "within_prompt_auroc", "among responses to one prompt", prediction, moments)
        figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=5, bbox_to_anchor=(0.5, -0.08))
        figure.savefig(target, dpi=160, facecolor="white", bbox_inches="tight", metadata={"Software": None})


def remaining_length(moment: str, curve: Sequence[Mapping[str, Any]], gain: Mapping[str, Any]) -> str:
    """Real remaining tokens (median, 10 to 90 %) against the predicted median, in equally large groups."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(2.6, 2.5)
        x = np.array([r["predicted"] for r in curve])
        low, middle, high = np.array([r["real"] for r in curve]).T
        top = max(float(high.max()), float(x.max())) * 1.05
        axes.plot([0, top], [0, top], color=INK, linewidth=0.6, linestyle=(0, (4, 4)))
        axes.errorbar(x, middle, yerr=[middle - low, high - middle], fmt="o", color=ACCENT, markersize=4, elinewidth=1)
        axes.set(xlim=(0, top), ylim=(0, top), xlabel="predicted median", ylabel="real")
        axes.locator_params(nbins=4)
        value = gain["value"]
        words = "" if value is None else f": MAE {abs(value):.0%} {'below' if value >= 0 else 'above'} constant"
        axes.set_title(f"{moment}{words}", loc="left")
    return _svg(figure, f"remaining-{moment.strip('%')}", f"Remaining length at {moment}")


@dataclass(frozen=True)
class Strip:
    """How the joint evolved along one rollout: marginals [m, R] and [m, L], expected score [m]."""

    name: str
    reward: NDArray[np.floating]
    length: NDArray[np.floating]
    expected_reward: NDArray[np.floating]
    reward_labels: Sequence[str]
    length_labels: Sequence[str]
    real_length_bin: NDArray[np.int64]


def _heat(axes: Axes, marginal: NDArray[np.floating], colour: str) -> None:
    image = np.zeros((marginal.shape[1], marginal.shape[0], 4))
    image[..., :3] = to_rgb(colour)
    image[..., 3] = np.sqrt(np.clip(marginal.T, 0, 1))
    extent = (-0.5, len(marginal) - 0.5, -0.5, marginal.shape[1] - 0.5)
    axes.imshow(image, aspect="auto", origin="lower", interpolation="nearest", extent=extent)


def heat_strip(strip: Strip) -> str:
    """Two strips under each other along the positions of one rollout: reward above, remaining length below."""
    with matplotlib.rc_context(STYLE | {"font.size": 7.5}):
        figure = Figure(figsize=(6.6, 2.4))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1], gridspec_kw={"hspace": 0.15})
        _heat(above, strip.reward, ACCENT)
        top = len(strip.reward_labels) - 1
        above.plot(strip.expected_reward * top, color=COLOURS["probe"], linewidth=1.2)
        _heat(below, strip.length, COLOURS["logprob"])
        below.step(np.arange(len(strip.real_length_bin)), strip.real_length_bin, where="mid", color=INK, linewidth=0.8)
        above.set_yticks([0, top], [strip.reward_labels[0], strip.reward_labels[-1]])
        shown = sorted({0, len(strip.length_labels) // 2, len(strip.length_labels) - 1})
        below.set_yticks(shown, [strip.length_labels[i] for i in shown])
        above.set_ylabel("score")
        below.set(ylabel="remaining", xlabel="response tokens so far")
    return _svg(figure, f"strip-{strip.name}", "Joint along a rollout")
