"""All that `explore` finds out about a data set, as figures: what the page shows and the JSON holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nuciseg import __version__
from nuciseg.config import DataConfig
from nuciseg.data.dataset import canvas_side, epoch_batches, evaluation_batches, round_up
from nuciseg.exploring.ceilings import (
    BaselineScores,
    Ceiling,
    TargetSettings,
    choose_images,
    measure_baselines,
    measure_ceilings,
)
from nuciseg.exploring.duplicates import Leaks, Pair, find_leaks, find_near_duplicates, find_shared_parts
from nuciseg.exploring.faults import KINDS, Fault
from nuciseg.exploring.inspection import Look, faults_among, faults_of_broken, look_at
from nuciseg.exploring.reading import DataSet
from nuciseg.exploring.recommendation import Measured, Recommendation, recommend
from nuciseg.metrics import Scores

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
STRIDE_PX = 32
Say = Callable[[str], None]
OfSplit = TypeVar("OfSplit", Look, Ceiling)


@dataclass(frozen=True)
class Spread:
    """How one figure spreads: number of values, mean and percentiles (`QUANTILES`); empty where there is none."""

    num: int
    mean: float | None
    percentiles: dict[str, float]

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread:
        known = np.array([value for value in values if value is not None], np.float64)
        if not known.size:
            return Spread(0, None, {})
        percentiles = {str(q): float(np.percentile(known, q)) for q in QUANTILES}
        return Spread(len(known), float(known.mean()), percentiles)


@dataclass(frozen=True)
class Padding:
    """Shares of the pixels that are padding: all images at the size of the largest, training crops in batches of like
    size, and whole images in batches of like size."""

    one_size: float
    training: float
    whole_images: float
    crop_px: int
    batch_size: int


@dataclass(frozen=True)
class Findings:
    """What was found. `chosen` says how many images the ceilings and baselines rest on, by split."""

    data: DataSet
    looks: tuple[Look, ...]
    faults: tuple[Fault, ...]
    pairs: tuple[Pair, ...]
    leaks: Leaks
    ceilings: tuple[Ceiling, ...]
    baselines: tuple[BaselineScores, ...]
    chosen: dict[str, int]
    padding: Padding | None
    recommendation: Recommendation | None

    @property
    def fault_counts(self) -> dict[str, tuple[int, int]]:
        """Of each kind that occurs, the number of faults and of files."""
        counts = Counter(fault.kind for fault in self.faults)
        files = {kind: {(fault.split, fault.file) for fault in self.faults if fault.kind == kind} for kind in counts}
        return {kind: (counts[kind], len(files[kind])) for kind in KINDS if kind in counts}

    def of(self, split: str | None) -> list[Look]:
        """The images of one split; None: of all."""
        return [look for look in self.looks if split in (None, look.split)]

    def spreads(self, split: str | None = None) -> dict[str, Spread]:
        """Every measured figure by name, with its unit."""
        looks = self.of(split)
        return {
            "height_px": Spread.of(look.height for look in looks),
            "width_px": Spread.of(look.width for look in looks),
            "brightness": Spread.of(look.light.brightness for look in looks),
            "background": Spread.of(look.light.background for look in looks),
            "focus": Spread.of(look.light.focus for look in looks),
            "nuclei_per_image": Spread.of(len(look.nuclei) for look in looks),
            "nuclei_per_cluster": Spread.of(number for look in looks for number in look.clusters),
            "area_px": Spread.of(_joined(look.nuclei.area_px for look in looks)),
            "diameter_px": Spread.of(_joined(look.nuclei.diameter_px for look in looks)),
            "elongation": Spread.of(_joined(look.nuclei.elongation for look in looks)),
            "touching_px": Spread.of(length for look in looks for length in look.contacts_px),
        }

    def counts(self, split: str | None = None) -> dict[str, Any]:
        """Every figure that is counted, by name."""
        looks = self.of(split)
        valid_px = max(sum(look.valid_px for look in looks), 1)
        lines = [line for look in looks for line in look.lines]
        return {
            "images": len(looks),
            "nuclei": sum(len(look.nuclei) for look in looks),
            "nuclei_at_edge": sum(int(look.nuclei.at_edge.sum()) for look in looks),
            "images_by_nuclei": _histogram(len(look.nuclei) for look in looks),
            "clusters_by_nuclei": _histogram(number for look in looks for number in look.clusters),
            "lines": len(lines),
            "long_lines": sum(line.is_long for line in lines),
            "straight_lines": sum(line.is_straight for line in lines),
            "border_share": {
                kind: sum(look.border_px[kind] for look in looks) / valid_px
                for kind in (looks[0].border_px if looks else ())
            },
            "ignored_share": 1 - valid_px / max(sum(look.height * look.width for look in looks), 1) if looks else 0.0,
        }

    @property
    def ceiling_totals(self) -> list[tuple[TargetSettings, Scores]]:
        """The ceiling of each target and width over all splits."""
        totals: dict[tuple[str, int], tuple[TargetSettings, Scores]] = {}
        for each in self.ceilings:
            key = (each.target.kind, each.target.width_px)
            totals[key] = (each.target, totals[key][1] + each.scores if key in totals else each.scores)
        return list(totals.values())

    @property
    def splits(self) -> list[str]:
        """The splits of which an image can be read."""
        return [part.split for part in self.data.parts if len(part)]

    def examples(self, number: int) -> dict[str, list[Look]]:
        """`number` images each that are typical, largest, fullest and faintest."""
        looks = [look for look in self.looks if len(look.nuclei)]
        if not looks:
            return {}
        faint = [look for look in looks if look.light.brightness is not None]
        return {
            "typical": sorted(looks, key=_strangeness(looks))[:number],
            "largest": sorted(looks, key=lambda look: (-look.height * look.width, look.file))[:number],
            "most nuclei": sorted(looks, key=lambda look: (-len(look.nuclei), look.file))[:number],
            "faintest": sorted(faint, key=lambda look: (look.light.brightness, look.file))[:number],
        }


def explore(data: DataSet, config: DataConfig, say: Say = lambda what: None) -> Findings:
    """Look at everything; `say` hears what is being done. Takes one or two minutes for 600 clusters."""
    looks: list[Look] = []
    faults: list[Fault] = []
    for part in data.parts:
        say(f"looking at {len(part)} {part.split} images")
        for look, found in look_at(data, part):
            looks.append(look)
            faults += found
    faults += faults_among(data, looks)
    faults += [fault for broken in data.broken for fault in faults_of_broken(data, broken)]
    say("comparing the images with each other")
    pairs = find_near_duplicates(data, [look.small for look in looks])
    pairs += find_shared_parts(data, [look.marks for look in looks], pairs)
    chosen = choose_images(data)
    say(f"encoding and decoding {sum(map(len, chosen.values()))} images for each target")
    ceilings = tuple(measure_ceilings(data, chosen))
    say("scoring the trivial baselines")
    baselines = tuple(measure_baselines(data, chosen))
    recommendation = recommend(_measured(data, looks), _for_training(ceilings))
    order = list(KINDS)
    return Findings(
        data=data,
        looks=tuple(looks),
        faults=tuple(sorted(faults, key=lambda each: (order.index(each.kind), -each.severity, each.split, each.file))),
        pairs=tuple(pairs),
        leaks=find_leaks(data, pairs, config.validation_fraction, config.split_seed),
        ceilings=ceilings,
        baselines=baselines,
        chosen={split: len(positions) for split, positions in chosen.items()},
        padding=_padding(looks, recommendation),
        recommendation=recommendation,
    )


def to_json(findings: Findings) -> dict[str, Any]:
    """All figures of the page, and every fault and image, as plain values."""
    splits: list[str | None] = [None, *findings.splits]
    return {
        "nuciseg": __version__,
        "root": str(findings.data.root) if findings.data.root else None,
        "format": findings.data.format_name,
        "counts": {split or "all": findings.counts(split) for split in splits},
        "spreads": {
            split or "all": {name: asdict(spread) for name, spread in findings.spreads(split).items()}
            for split in splits
        },
        "padding": asdict(findings.padding) if findings.padding else None,
        "faults": {
            "counts": {kind: {"faults": n, "files": files} for kind, (n, files) in findings.fault_counts.items()},
            "list": [asdict(fault) for fault in findings.faults],
        },
        "near_duplicates": [_pair(pair) for pair in findings.pairs],
        "leaks": {
            "groups": list(findings.leaks.groups),
            "train_test": [_pair(pair) for pair in findings.leaks.train_test],
            "train_validation": [_pair(pair) for pair in findings.leaks.train_validation],
        },
        "images_scored": findings.chosen,
        "ceiling": [
            {
                "target": each.target.kind,
                "width_px": each.target.width_px,
                "default": each.is_default,
                "split": each.split,
                **_scores(each.scores),
            }
            for each in findings.ceilings
        ],
        "baselines": [{"name": each.name, "split": each.split, **_scores(each.scores)} for each in findings.baselines],
        "recommendation": asdict(findings.recommendation) if findings.recommendation else None,
        "examples": {name: [look.file for look in looks] for name, looks in findings.examples(4).items()},
        "images": [_image_row(look) for look in findings.looks],
    }


def score_figures(scores: Scores) -> dict[str, float]:
    """What of `scores` is shown for ceilings and baselines."""
    flat = scores.flat_summary()
    names = ("ap50_pooled", "ap70_pooled", "ap90_pooled", "ap50_per_image", "border_dice")
    return {"cluster_score": flat["cluster_score"], **{name: flat[name] for name in names}}


def _scores(scores: Scores) -> dict[str, float | int]:
    counts = {
        "images": scores.images,
        "clusters": scores.clusters,
        "clusters_separated": scores.clusters_separated,
        "nuclei_true": scores.num_true,
        "nuclei_found": scores.num_predicted,
    }
    return {**counts, **score_figures(scores)}


def _pair(pair: Pair) -> dict[str, Any]:
    return {**asdict(pair), "crosses_splits": pair.crosses_splits}


def _image_row(look: Look) -> dict[str, Any]:
    return {
        "split": look.split,
        "file": look.file,
        "height": look.height,
        "width": look.width,
        "nuclei": len(look.nuclei),
        "clusters": list(look.clusters),
        **asdict(look.light),
    }


def _joined(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0), *arrays])


def _histogram(numbers: Iterable[int]) -> dict[str, int]:
    return {str(number): count for number, count in sorted(Counter(numbers).items())}


def _strangeness(looks: Sequence[Look]) -> Callable[[Look], tuple[float, str]]:
    """How far an image lies from the medians of size, number of nuclei, brightness and their area, in their spreads."""

    def figures(look: Look) -> list[float]:
        brightness = look.light.brightness or 0.0
        return [np.sqrt(look.height * look.width), len(look.nuclei), brightness, np.median(look.nuclei.diameter_px)]

    table = np.array([figures(look) for look in looks])
    middle = np.median(table, axis=0)
    spread = np.maximum(np.median(np.abs(table - middle), axis=0), 1e-3 * np.abs(middle) + 1e-9)
    return lambda look: (float(np.abs((np.array(figures(look)) - middle) / spread).sum()), look.file)


def _for_training(of_splits: Sequence[OfSplit]) -> list[OfSplit]:
    """Those of the train split, or all where there is none: nothing is chosen by the test images."""
    return [each for each in of_splits if each.split == "train"] or list(of_splits)


def _measured(data: DataSet, looks: Sequence[Look]) -> Measured:
    train = _for_training(looks)
    return Measured(
        root=data.root,
        format_name=data.format_name,
        num_train=len(train),
        longest_sides_px=[max(look.height, look.width) for look in train],
        # Of all images: the network has to take those of the test, too.
        shortest_side_px=min((min(look.height, look.width) for look in looks), default=0),
        diameters_px=[float(each) for look in train for each in look.nuclei.diameter_px],
        fewest_nuclei=min((len(look.nuclei) for look in train), default=0),
    )


def _padding(looks: Sequence[Look], recommendation: Recommendation | None) -> Padding | None:
    """What padding takes of the images that training lays into batches: the train split, or all there is."""
    used = _for_training(looks)
    if not used:
        return None
    defaults = DataConfig()
    chosen = recommendation.settings if recommendation else {}
    crop_px = int(chosen.get("data.crop_px", defaults.crop_px))
    batch_size = int(chosen.get("data.batch_size", defaults.batch_size))
    shapes = [(look.height, look.width) for look in used]
    largest_px = max(height for height, _ in shapes) * max(width for _, width in shapes)
    num_pixels = sum(height * width for height, width in shapes)
    canvases = [canvas_side(shape, crop_px, STRIDE_PX) for shape in shapes]
    indices = range(len(shapes))
    laid = [
        (batch.canvas_px, min(shapes[index][0], batch.canvas_px) * min(shapes[index][1], batch.canvas_px))
        for batch in epoch_batches(indices, canvases, batch_size, seed=0, epoch=0)
        for index in batch.indices
    ]
    whole_px = 0
    for batch in evaluation_batches(indices, shapes, batch_size):
        sides = [round_up(max(shapes[index][axis] for index in batch), STRIDE_PX) for axis in (0, 1)]
        whole_px += len(batch) * sides[0] * sides[1]
    return Padding(
        one_size=1 - num_pixels / (largest_px * len(shapes)),
        training=1 - sum(filled for _, filled in laid) / sum(side**2 for side, _ in laid),
        whole_images=1 - num_pixels / whole_px,
        crop_px=crop_px,
        batch_size=batch_size,
    )
