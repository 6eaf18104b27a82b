"""Figures of runs and searches, narrow enough that their words can be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from nuciseg.reporting.parameters import Importance, Parameter
from nuciseg.reporting.records import Row, SearchRecord

WIDTH_IN = 4.8
FONT_PT = 9.0
# Okabe & Ito (2008), so that colour-blind readers can tell them apart; the first one is kept for what is best.
BEST, OTHERS = "#d55e00", ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
FULL, STOPPED, SOFT = "#0072b2", "#a3adba", "#5b6675"
DASHES = ("-", "--", ":")
LABEL_LENGTH = 26


@dataclass(frozen=True)
class Curve:
    """One line over the epochs; `label` None leaves it out of the legend."""

    history: Sequence[Row]
    label: str | None
    color: str
    width: float = 1.2
    style: str = "-"
    layer: int = 1


def literal(name: str) -> str:
    """`name` for Matplotlib to draw as it is given.

    It would read what stands between two `$` as mathematics, and leave out of the legend what begins with `_`.
    """
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def learning_curves(curves: Sequence[Curve], key: str, title: str) -> Figure:
    """The figure `key` of every epoch, a dot where a line ends. Epochs without the figure leave a gap."""
    figure, axes = _figure(2.9)
    for curve in curves:
        epochs = [int(row["epoch"]) for row in curve.history]
        values = [math.nan if row.get(key) is None else float(row[key]) for row in curve.history]
        if not any(map(math.isfinite, values)):
            continue
        color, layer = curve.color, 2 + curve.layer
        label = None if curve.label is None else literal(curve.label)
        axes.plot(epochs, values, label=label, color=color, linewidth=curve.width, linestyle=curve.style, zorder=layer)
        axes.plot(epochs[-1:], values[-1:], "o", markersize=2 + 1.5 * curve.width, color=color, zorder=layer)
    axes.set_title(title, loc="left", fontsize=FONT_PT + 1)
    axes.set_xlabel("epoch", fontsize=FONT_PT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if key.startswith("train_"):
        axes.set_ylim(bottom=0)
    _legend_below(figure, axes)
    return figure


def search_curves(search: SearchRecord) -> list[Curve]:
    """One curve a trial: the best in its own colour, those stopped early in grey, the winner's final run dashed."""
    curves = []
    named: set[str] = set()
    best = search.best
    for each in search.trials:
        if each is best:
            curves.append(Curve(each.history, f"best: {each.trial.id}", BEST, 2.4, layer=3))
            continue
        words = {"done": "ran to the end", "stopped": "stopped early"}.get(each.state, each.state)
        color = FULL if each.state == "done" else STOPPED
        style = "-" if each.state in ("done", "stopped") else ":"
        curves.append(
            Curve(each.history, None if words in named else words, color, 1.2, style, 2 if color == FULL else 1)
        )
        named.add(words)
    if search.final is not None and not _is_continued(search):
        curves.append(Curve(search.final.history, "winner, trained to the end", BEST, 1.6, "--", 4))
    return curves


def parallel_coordinates(search: SearchRecord, parameters: Sequence[Parameter]) -> Figure:
    """Each trial a line from its settings, one axis a row, down to its score; the darker the better, the best in red.

    Axes lie rather than stand, so that their names fit beside each other on a narrow screen.
    """
    trials = [each for each in search.trials if each.trial.score is not None and each.state != "failed"]
    figure, axes = _figure(0.62 * (len(parameters) + 1) + 0.3)
    lowest, highest = min(_scores(search)), max(_scores(search))
    score = Parameter("score", (), lowest, highest, False, {})
    rows = [*parameters, score]
    shades = colormaps["Blues"](np.linspace(0.95, 0.3, max(len(trials), 2)))
    for at, each in reversed(list(enumerate(trials))):
        values = [each.trial.sample.get(parameter.key) for parameter in parameters] + [each.trial.score]
        places = [parameter.position(value) for parameter, value in zip(rows, values, strict=True)]
        # Trials with the same word are fanned out a little, or one line would hide the others.
        fan = 0.1 * (at / max(len(trials) - 1, 1) - 0.5)
        xs = [place + fan if parameter.categories else place for place, parameter in zip(places, rows, strict=True)]
        look = (BEST, 2.2) if at == 0 else (shades[at], 1.2)
        style = "-" if each.state == "done" else (0, (4, 1.5))
        axes.plot(xs, range(len(rows)), color=look[0], linewidth=look[1], linestyle=style, zorder=3 + (at == 0))
    for at, parameter in enumerate(rows):
        _draw_axis(axes, at, parameter, search.metric if at == len(parameters) else parameter.key)
    axes.set_ylim(len(rows) - 0.55, -0.6)
    axes.set_xlim(-0.06, 1.06)
    axes.set_axis_off()
    handles = [
        Line2D([], [], color=BEST, linewidth=2.2, label="best trial"),
        Line2D([], [], color=shades[0], label="ran to the end"),
        Line2D([], [], color=shades[0], linestyle=(0, (4, 1.5)), label="stopped early"),
    ]
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False, fontsize=FONT_PT
    )
    return figure


def importance_bars(found: Sequence[Importance]) -> Figure:
    """Shares of importance, grey where shuffled scores give as much too often to call it more than chance."""
    figure, axes = _figure(0.32 * len(found) + 0.5)
    for at, each in enumerate(found):
        color = FULL if each.is_beyond_chance else STOPPED
        axes.barh(at, each.share, color=color, height=0.62)
        axes.text(each.share + 0.01, at, f"{each.share:.0%}", va="center", fontsize=FONT_PT, color=SOFT)
    axes.set_yticks(range(len(found)), [each.parameter.key for each in found], fontsize=FONT_PT)
    axes.invert_yaxis()
    axes.set_xlim(0, max(each.share for each in found) * 1.15)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    return figure


# --- parts -----------------------------------------------------------------------------------------------------------


def _figure(height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT_PT)
    return figure, axes


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels))
        columns = 1 if longest > 2 * LABEL_LENGTH else 2 if longest > LABEL_LENGTH / 2 else 3
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=FONT_PT)


def _draw_axis(axes: Axes, row: int, parameter: Parameter, name: str) -> None:
    axes.plot([0, 1], [row, row], color="#d9dee6", linewidth=1.0, zorder=1)
    axes.text(-0.05, row - 0.16, name, fontsize=FONT_PT, fontweight="bold", va="bottom", zorder=5, bbox=_PAPER)
    for place, label in _ticks(parameter):
        axes.plot([place], [row], "|", color=SOFT, markersize=6, zorder=2)
        align = "left" if place < 0.1 else "right" if place > 0.9 else "center"
        anchor = place - 0.03 if align == "left" else place + 0.03 if align == "right" else place
        axes.text(anchor, row + 0.1, literal(label), fontsize=FONT_PT - 1, va="top", ha=align, color=SOFT, zorder=5,
                  bbox=_PAPER)  # fmt: skip


_PAPER = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5}


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    if parameter.categories:
        room = max(6, 66 // len(parameter.categories))
        count = len(parameter.categories)
        return [
            (0.5 if count == 1 else at / (count - 1), word if len(word) <= room else f"…{word[1 - room :]}")
            for at, word in enumerate(parameter.categories)
        ]
    if parameter.high <= parameter.low:
        return [(0.5, f"{parameter.low:g}")]
    locator = LogLocator(subs=(1.0, 3.0)) if parameter.is_log else MaxNLocator(4)
    inside = [x for x in locator.tick_values(parameter.low, parameter.high) if parameter.low < x < parameter.high]
    ends = [parameter.low, *inside, parameter.high]
    ticks = [(parameter.position(float(value)), f"{value:.3g}") for value in ends]
    spaced = [ticks[0]]
    for tick in ticks[1:-1]:
        if tick[0] - spaced[-1][0] > 0.16 and 1 - tick[0] > 0.16:
            spaced.append(tick)
    return [*spaced, ticks[-1]]


def _scores(search: SearchRecord) -> list[float]:
    return [each.trial.score for each in search.trials if each.trial.score is not None and each.state != "failed"]


def _is_continued(search: SearchRecord) -> bool:
    """Whether the final run is the best trial's own epochs, taken over because there were no more to train."""
    assert search.final is not None
    best = search.trials[0] if search.trials else None
    return best is not None and [dict(row) for row in best.history] == [dict(row) for row in search.final.history]
