"""The drawings of the page: how sizes, light and nuclei spread, in each split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nuciseg.exploring.findings import Findings
from nuciseg.exploring.inspection import Look
from nuciseg.pages import Picture, drawing

SIZE_INCHES = (4.2, 2.8)  # two side by side on a desktop, one on a phone, with letters that can be read there
COLORS = {"train": "#0072b2", "test": "#d55e00"}  # Okabe & Ito (2008)
NUM_BINS = 40
LEAST_BEND_PX = 0.02  # on a logarithmic axis 0 has no place
COUNTED_MOST = 24  # numbers of nuclei above share one bar


def draw_sizes(findings: Findings) -> Picture:
    """Height against width of every image."""
    figure, axes = _empty("width, px", "height, px")
    for split in findings.splits:
        looks = findings.of(split)
        axes.plot(
            [look.width for look in looks], [look.height for look in looks], ".", ms=4, alpha=0.6,
            color=COLORS[split], label=split,
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _legend(axes, findings)
    return drawing(figure, "Size of each image")


def draw_light(findings: Findings) -> list[Picture]:
    """Histograms of brightness and focus."""
    return [
        _spread(findings, lambda look: [look.light.brightness], "brightness, share of full scale",
                "Median brightness of the nuclei of each image"),
        _spread(findings, lambda look: [look.light.focus], "focus", "Focus of each image; further left is more blurred",
                logarithmic=True),
    ]  # fmt: skip


def draw_nuclei(findings: Findings) -> list[Picture]:
    """Histograms of everything that is known of single nuclei and where they touch."""
    return [
        _numbers(findings, lambda look: look.clusters, "nuclei", "clusters", "Nuclei that hang together in a cluster"),
        _nuclei_of_images(findings),
        _spread(findings, lambda look: look.nuclei.area_px, "area, px", "Area of each nucleus", logarithmic=True),
        _spread(findings, lambda look: look.nuclei.elongation, "long / short axis", "Elongation of each nucleus"),
        _spread(findings, lambda look: look.contacts_px, "length, px", "Length along which two nuclei touch"),
        _spread(findings, _bends, "bend, px",
                "How far the long lines between two nuclei bend; 0.2 px and less is straight", logarithmic=True),
    ]  # fmt: skip


def draw_ceilings(findings: Findings) -> Picture:
    """The ceiling of each target by width, all splits together."""
    figure, axes = _empty("width of the line, px", "AP pooled")
    styles = ["-", "--", ":", "-."]
    totals = findings.ceiling_totals
    kinds = list(dict.fromkeys(target.kind for target, _ in totals))
    for style, kind in zip(styles, kinds, strict=False):
        own = [(target.width_px, scores.flat_summary()) for target, scores in totals if target.kind == kind]
        for (key, name), color in zip(
            (("ap50_pooled", "AP .5"), ("ap90_pooled", "AP .9")), ("#009e73", "#cc79a7"), strict=True
        ):
            widths, figures = [width for width, _ in own], [flat[key] for _, flat in own]
            axes.plot(widths, figures, style, color=color, marker="o", ms=4, label=f"{kind.replace('_', ' ')}, {name}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7)
    return drawing(figure, "The ceiling of each target by the width of its line")


def _nuclei_of_images(findings: Findings) -> Picture:
    caption = "Nuclei in an image"
    if max((len(look.nuclei) for look in findings.looks), default=0) > COUNTED_MOST:
        return _spread(findings, lambda look: [len(look.nuclei)], "nuclei", caption, logarithmic=True)
    return _numbers(findings, lambda look: [len(look.nuclei)], "nuclei", "images", caption)


def _bends(look: Look) -> list[float]:
    return [max(line.bend_px, LEAST_BEND_PX) for line in look.lines if line.is_long]


def _spread(
    findings: Findings,
    values: Callable[[Look], Iterable[float | None]],
    unit: str,
    caption: str,
    logarithmic: bool = False,
) -> Picture:
    """Shares by value, one outline a split, so that splits of different size can be compared."""
    figure, axes = _empty(unit, "share, %")
    known = {
        split: np.array([value for look in findings.of(split) for value in values(look) if value is not None], float)
        for split in findings.splits
    }
    known = {split: each[each > 0] if logarithmic else each for split, each in known.items()}
    everything = np.concatenate([np.zeros(0), *known.values()])
    if everything.size:
        low, high = np.percentile(everything, (0.1, 99.9))
        space = np.geomspace if logarithmic else np.linspace
        bins = space(low, max(high, 1.01 * low, low + 1e-9), NUM_BINS)
        for split, each in known.items():
            weights = np.full(len(each), 100 / max(len(each), 1))
            axes.hist(np.clip(each, bins[0], bins[-1]), bins=bins.tolist(), weights=weights, histtype="step", lw=1.4,
                      color=COLORS[split], label=split)  # fmt: skip
        if logarithmic:
            axes.set_xscale("log")
    _legend(axes, findings)
    return drawing(figure, caption)


def _numbers(
    findings: Findings, values: Callable[[Look], Sequence[int]], unit: str, what: str, caption: str
) -> Picture:
    """A bar for each number, as the share of the split."""
    figure, axes = _empty(unit, f"share of {what}, %")
    counted = {
        split: np.array([number for look in findings.of(split) for number in values(look)], int)
        for split in findings.splits
    }
    most = min(max((int(each.max(initial=0)) for each in counted.values()), default=0), COUNTED_MOST)
    width = 0.8 / max(len(counted), 1)
    for at, (split, each) in enumerate(counted.items()):
        shares = 100 * np.bincount(np.minimum(each, most), minlength=most + 1) / max(len(each), 1)
        axes.bar(np.arange(most + 1) + (at - (len(counted) - 1) / 2) * width, shares, width, color=COLORS[split],
                 label=split)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    least = min((int(each.min(initial=most)) for each in counted.values()), default=0)
    axes.set_xlim(least - 0.6, most + 0.6)
    _legend(axes, findings)
    more = f"; {most} stands for {most} and more" if most == COUNTED_MOST else ""
    return drawing(figure, caption + more)


def _empty(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes, findings: Findings) -> None:
    if len(findings.splits) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
