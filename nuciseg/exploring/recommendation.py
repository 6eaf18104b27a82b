"""What to train with: target, crop, batch and depth from the measured data, each with its reason."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nuciseg.data.dataset import CANVAS_MARGIN, round_up
from nuciseg.data.formats import CLUSTER_FORMATS
from nuciseg.exploring.ceilings import Ceiling, TargetSettings
from nuciseg.metrics import Scores

MULTIPLE_PX = 32
CROP_PX = (64, 256)  # least and most: small crops teach no surroundings, large ones leave few images a batch
FIELD_DIAMETERS = 8  # nuclei that lie side by side in a crop of a field
PIXELS_A_STEP = 16 * 192 * 192  # what the searches of docs/results.md took a step
BATCH = (4, 32)
MAX_DEPTH = 6
SEEN_DIAMETERS = 1.5  # of nine nuclei in ten: enough of both neighbours of a border
TOLERANCE = 0.005  # of the main score: less is within what a few nuclei do
SPACE = {"optim.lr": {"loguniform": [2e-3, 1e-2]}, "loss.weights.dice": {"uniform": [0.2, 2.0]}}


@dataclass(frozen=True)
class Recommendation:
    """Settings and why: `reasons` has one sentence for each key of `settings`; `command` searches with them."""

    settings: dict[str, str | int]
    reasons: dict[str, str]
    command: str


@dataclass(frozen=True)
class Measured:
    """What the recommendation rests on; lengths in pixels."""

    root: Path | None
    format_name: str
    num_train: int
    longest_sides_px: Sequence[int]
    shortest_side_px: int
    diameters_px: Sequence[float]
    fewest_nuclei: int


def recommend(measured: Measured, ceilings: Sequence[Ceiling]) -> Recommendation | None:
    """Settings for `nuciseg tune`; None where there is no nucleus to train on."""
    if not len(measured.diameters_px) or not ceilings:
        return None
    is_clusters = measured.format_name in CLUSTER_FORMATS
    settings: dict[str, str | int] = {}
    reasons: dict[str, str] = {}

    def take(key: str, value: str | int, reason: str) -> None:
        settings[key], reasons[key] = value, reason

    target, why = _best_target(ceilings, "cluster_score" if is_clusters else "ap50_pooled")
    take("target.kind", target.kind, why)
    take("target.width_px", target.width_px, "the widest line that costs nothing: more pixels to learn from")
    if is_clusters and measured.fewest_nuclei >= 2:
        take("target.decode.min_nuclei", 2, "every image holds two nuclei or more, and decoding may know it")
    crop_px, why = _crop(measured, is_clusters)
    take("data.crop_px", crop_px, why)
    batch_size, why = _batch(measured, crop_px)
    take("data.batch_size", batch_size, why)
    depth, why = _depth(measured)
    take("model.kind", "unet", "the network whose depth the size of the nuclei settles; any encoder may follow")
    take("model.depth", depth, why)
    return Recommendation(settings, reasons, _command(measured, settings))


def _best_target(ceilings: Sequence[Ceiling], metric: str) -> tuple[TargetSettings, str]:
    """The widest line whose ceiling is within `TOLERANCE` of the best; between kinds the better ceiling counts."""
    totals: dict[tuple[str, int], tuple[TargetSettings, Scores]] = {}
    for each in ceilings:
        key = (each.target.kind, each.target.width_px)
        totals[key] = (each.target, totals.get(key, (each.target, Scores()))[1] + each.scores)
    figures = {key: (scores.flat_summary()[metric], scores.flat_summary()["ap70_pooled"])
               for key, (_, scores) in totals.items()}  # fmt: skip
    best = max(figures, key=lambda key: (round(figures[key][0], 4), round(figures[key][1], 4)))
    alike = [
        key
        for key in figures
        if key[0] == best[0] and all(a >= b - TOLERANCE for a, b in zip(figures[key], figures[best], strict=True))
    ]
    chosen = max(alike, key=lambda key: key[1])
    name = {"cluster_score": "clusters separated", "ap50_pooled": "AP .5 pooled"}[metric]
    others = {kind: max(figures[key] for key in figures if key[0] == kind) for kind, _ in figures}
    compared = ", ".join(f"{kind} {figure:.3f} / {ap70:.3f}" for kind, (figure, ap70) in others.items())
    return totals[chosen][0], f"the highest ceiling ({name} / AP .7 pooled: {compared})"


def _crop(measured: Measured, is_clusters: bool) -> tuple[int, str]:
    longest_px = max(measured.longest_sides_px)
    if is_clusters:
        wish_px = float(np.percentile(measured.longest_sides_px, 95)) * CANVAS_MARGIN
        reason = f"95 of 100 images fit, with {CANVAS_MARGIN - 1:.0%} to spare for turning"
    else:
        wish_px = FIELD_DIAMETERS * float(np.median(measured.diameters_px))
        reason = f"{FIELD_DIAMETERS} times the median nucleus, of {np.median(measured.diameters_px):.0f} px"
    wished_px = round_up(wish_px, MULTIPLE_PX)
    crop_px = min(max(wished_px, CROP_PX[0]), CROP_PX[1], round_up(longest_px, MULTIPLE_PX))
    limit = {True: "; no image is larger", False: f"; kept within {CROP_PX[0]} to {CROP_PX[1]} px"}
    if crop_px != wished_px:
        reason += limit[crop_px not in CROP_PX]
    return crop_px, reason


def _batch(measured: Measured, crop_px: int) -> tuple[int, str]:
    fitting = PIXELS_A_STEP / crop_px**2
    several_steps = max(measured.num_train / 4, 1)
    batch_size = 2 ** int(np.log2(max(min(fitting, several_steps), 1)))
    batch_size = int(np.clip(batch_size, min(BATCH[0], max(measured.num_train, 1)), BATCH[1]))
    if fitting > several_steps:
        return batch_size, f"at least 4 steps an epoch with {measured.num_train} training images"
    return batch_size, f"{batch_size} crops of {crop_px} px are about the pixels of 16 of 192 px a step"


def _depth(measured: Measured) -> tuple[int, str]:
    large_px = float(np.percentile(measured.diameters_px, 90))
    depth = 1
    while depth < MAX_DEPTH and field_of_view_px(depth) < SEEN_DIAMETERS * large_px:
        depth += 1
    wished = depth
    while depth > 1 and 2**depth > measured.shortest_side_px:
        depth -= 1
    seen = f"each pixel sees {field_of_view_px(depth)} px"
    if depth < wished:
        shortest = measured.shortest_side_px
        return depth, f"{seen}; a deeper network's stride would exceed the smallest image, {shortest} px"
    return depth, f"{seen}; nine of ten nuclei are up to {large_px:.0f} px wide, {SEEN_DIAMETERS} times that is needed"


def field_of_view_px(depth: int, num_convs: int = 2) -> int:
    """Side of what one output pixel of the encoder's deepest level sees: `num_convs` 3x3 convolutions at each
    resolution, pooling by two between."""
    side_px, step_px = 1, 1
    for level in range(depth + 1):
        side_px += 2 * num_convs * step_px
        if level < depth:
            side_px += step_px
            step_px *= 2
    return side_px


def _command(measured: Measured, settings: dict[str, str | int]) -> str:
    words = ["python", "-m", "nuciseg.tune"]
    if measured.root is not None:
        words += ["--data.root", str(measured.root), "--data.format", measured.format_name]
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    return shlex.join([*words, "--search.space", json.dumps(SPACE)])
