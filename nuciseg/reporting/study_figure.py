"""All arms of a study in one picture: a row an arm, a dot a seed or fold, a tick their mean."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nuciseg.reporting.figures import FONT_PT, FULL, SOFT, STOPPED, literal
from nuciseg.reporting.study_arms import Arm, arms_of
from nuciseg.reporting.study_conclusions import conclude
from nuciseg.reporting.study_records import StudyRecord

WIDTH_IN = 8.0  # a page shows it about as wide, so that its words are as large as the page's
ROW_IN = 0.235
DOTS_PER_IN = 150
SHOWN_PERCENT = 20.0  # below the best dot; what lies lower stands at the edge, or nothing else could be told apart
LABEL_LENGTH = 44


def study_figure(records: Sequence[StudyRecord]) -> bytes:
    """The picture of `records` as PNG. Arms that the leading one of their question beats are grey."""
    shown = [(record, [arm for arm in arms_of(record) if arm.finished]) for record in records]
    num_rows = sum(len(arms) + 1 for _, arms in shown)
    percents = [percent for _, arms in shown for arm in arms for percent in _percents(arm)]
    lowest = max(min(percents, default=0.0), max(percents, default=100.0) - SHOWN_PERCENT)
    figure = Figure(figsize=(WIDTH_IN, ROW_IN * num_rows + 0.7), layout="constrained")
    axes = figure.subplots()
    row = 0
    for record, arms in shown:
        beaten = conclude(record).beaten
        axes.text(-0.01, row, literal(heading(record.name)), transform=axes.get_yaxis_transform(), ha="right",
                  va="center", fontsize=FONT_PT, fontweight="bold")  # fmt: skip
        for at, arm in enumerate(arms, start=row + 1):
            _draw_arm(axes, at, arm, STOPPED if arm.name in beaten else FULL, lowest)
        row += len(arms) + 1
    _finish(axes, num_rows, lowest)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_IN)
    return buffer.getvalue()


def heading(name: str) -> str:
    """The name of a search as words: `border_width` is `Border width`."""
    words = name.replace("_", " ").replace("-", " ").strip()
    return f"{words[:1].upper()}{words[1:]}"


def _draw_arm(axes: Axes, row: int, arm: Arm, color: str, lowest: float) -> None:
    percents = _percents(arm)
    inside = [percent for percent in percents if percent >= lowest]
    mean = 100 * arm.mean_share
    axes.axhline(row, color="#e8ebf0", linewidth=0.8, zorder=0)
    axes.plot(inside, [row] * len(inside), "o", color=color, alpha=0.75, markersize=5, markeredgewidth=0, zorder=2)
    if mean >= lowest:
        axes.plot([mean], [row], "|", color="black", markersize=10, markeredgewidth=1.4, zorder=3)
    if len(inside) < len(percents):
        axes.plot([lowest], [row], "<", color=color, markersize=5, zorder=2)
        outside = ", ".join(f"{percent:.0f}" for percent in sorted(percents) if percent < lowest)
        axes.annotate(f"{outside} %", (lowest, row), (6, 0), textcoords="offset points", va="center",
                      fontsize=FONT_PT - 1, color=SOFT)  # fmt: skip
    label = arm.name if len(arm.name) <= LABEL_LENGTH else f"{arm.name[: LABEL_LENGTH - 1]}…"
    axes.text(
        -0.01, row, literal(label), transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=FONT_PT
    )


def _finish(axes: Axes, num_rows: int, lowest: float) -> None:
    axes.set_ylim(num_rows - 0.4, -0.6)
    axes.set_xlim(lowest - 0.02 * (100 - lowest) - 0.1, 100.4)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(labelsize=FONT_PT, colors=SOFT)
    axes.set_xlabel(
        "held-out clusters separated, %   (dot: a seed or fold, tick: mean; grey: worse than the best arm)",
        fontsize=FONT_PT, loc="right",
    )  # fmt: skip


def _percents(arm: Arm) -> list[float]:
    return [100 * each.clusters_separated / each.clusters if each.clusters else 0.0 for each in arm.figures]
