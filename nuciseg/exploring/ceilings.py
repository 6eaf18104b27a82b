"""What the labels allow: the score of a perfect pixel classifier for each target, and of no classifier at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from nuciseg.baselines import BASELINES
from nuciseg.exploring.reading import DataSet
from nuciseg.metrics import ImageScores, Scores, score_image
from nuciseg.targets import DepthConfig, FullBorderConfig, TargetConfig, TouchingBorderConfig, build_target

TargetSettings = TouchingBorderConfig | FullBorderConfig

WIDTH_STEP_PX = 2  # each target is tried at its default width, narrower and wider by this
MAX_PIXELS = 40_000_000  # more are sampled: decoding takes about a second for a million


@dataclass(frozen=True)
class Ceiling:
    """The scores of `decode(encode(labels))` on one split: what is lost before any network makes a mistake."""

    target: TargetSettings
    is_default: bool
    split: str
    scores: Scores


@dataclass(frozen=True)
class BaselineScores:
    """What a trivial method scores on one split, against the default target's border."""

    name: str
    split: str
    scores: Scores


def targets_to_try() -> list[tuple[TargetSettings, bool]]:
    """Every target that there is and whether it is its default; at three widths where nuclei are cut along a line."""
    union, _ = get_args(TargetConfig)
    return [
        (kind(width_px=max(1, kind().width_px + step)), step == 0)
        for kind in get_args(union)
        for step in ((0,) if kind is DepthConfig else (-WIDTH_STEP_PX, 0, WIDTH_STEP_PX))
    ]


def choose_images(data: DataSet, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Positions by split: all images, or of large data sets as many, drawn by seed, as have `MAX_PIXELS` together."""
    shapes = {part.split: part.samples.shapes if part.samples else () for part in data.parts}
    num_pixels = sum(height * width for each in shapes.values() for height, width in each)
    share = min(1.0, MAX_PIXELS / max(num_pixels, 1))
    rng = np.random.default_rng(seed)
    chosen = {}
    for split, each in shapes.items():
        order = rng.permutation(len(each))[: max(1, round(share * len(each)))]
        chosen[split] = tuple(int(position) for position in sorted(order))
    return chosen


def measure_ceilings(data: DataSet, chosen: Mapping[str, Sequence[int]]) -> Iterator[Ceiling]:
    """The ceiling of each target, width and split on the images at `chosen` positions."""
    for settings, is_default in targets_to_try():
        target = build_target(settings)
        for part in data.parts:
            image_scores: list[ImageScores] = []
            for position in chosen[part.split]:
                labels_HW = part.sample(position).labels_HW
                maps_KHW = target.encode(labels_HW)
                found_HW = target.decode(maps_KHW).labels_HW
                border_HW = maps_KHW[target.border_index] > 0
                id = part.records[position].id
                image_scores.append(score_image(id, found_HW, labels_HW, border_HW, border_HW))
            if image_scores:
                yield Ceiling(settings, is_default, part.split, Scores.total(image_scores))


def measure_baselines(data: DataSet, chosen: Mapping[str, Sequence[int]]) -> Iterator[BaselineScores]:
    """The scores of each trivial method and split on the images at `chosen` positions."""
    target = build_target(TouchingBorderConfig())
    for name, baseline in BASELINES.items():
        for part in data.parts:
            image_scores: list[ImageScores] = []
            for position in chosen[part.split]:
                sample = part.sample(position)
                image_HW: NDArray[Any] = sample.image_HWC[..., 0]
                instances, border_HW = baseline(image_HW, target)
                true_HW = target.border_of(sample.labels_HW)
                id = part.records[position].id
                image_scores.append(score_image(id, instances.labels_HW, sample.labels_HW, border_HW, true_HW))
            if image_scores:
                yield BaselineScores(name, part.split, Scores.total(image_scores))
