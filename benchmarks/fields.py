"""What prediction of whole fields rests on: decodings, sizes and tiles, measured on validation images.

    python benchmarks/fields.py DATA [--checkpoint nuciseg/fields]

DATA holds train/images and train/masks, of which StarDist's examples hold out some for validation; the test images are
not touched. Prints, and gives in the last line as one JSON object:

- `ceiling_NAME`: pooled AP at IoU .5, .7 and .9 of what the true maps of the validation images decode to
- `decoded_NAME`: the same and the mean of .5 to .9 of the network's maps, decoded by depth as the checkpoint has it,
  and by foreground and border alone (the best of six settings)
- `found_from_PX`: of the true nuclei whose diameter is that or more (and less than the next), the share that was found
  at IoU .5, and their number
- `decode_ms_per_megapixel`: of the 16 densest validation images of 256 x 256 pixels side by side, on one core
- `size_FACTOR`: pooled AP at .5 of every ninth validation image, enlarged so and made 16-bit, sizes estimated
- `same_in_tiles`: nuclei of a mosaic of twelve training images that are the same to the pixel, by width of the rim

About 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from nuciseg.config import DataConfig
from nuciseg.data.splits import held_out_by_stardist
from nuciseg.engine.datasets import open_samples
from nuciseg.engine.fields import ArrayPixels, Grid, assembled, find_nuclei
from nuciseg.engine.inference import predict_probabilities
from nuciseg.engine.prediction import Predictor
from nuciseg.metrics import Scores, score_image
from nuciseg.targets import DecodeConfig, DepthConfig, Target, TouchingBorderConfig, build_target
from nuciseg.types import Sample

Labels = NDArray[np.int32]
PERCENTS = (50, 70, 90)
DIAMETERS_PX = (0, 5, 10, 15, 20, 25, 30, 40)
FACTORS = (1.0, 0.5, 2.0, 4.0)
FIELD_SHAPE = (520, 696)  # of the images that the mosaic is made of
RIMS = {"128": 1024, "256": 2048}  # width of the rim, px: side of the tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train/images and train/masks")
    parser.add_argument("--checkpoint", type=Path, default=Path("nuciseg/fields"), help="of nuciseg (nuciseg/fields)")
    arguments = parser.parse_args()
    predictor = Predictor.load(arguments.checkpoint, torch.device("cpu"))
    samples = open_samples(DataConfig(root=arguments.data, format="labels"), "train")
    held_out = set(held_out_by_stardist(samples.ids))
    validation = [index for index, id in enumerate(samples.ids) if id in held_out]
    true = [samples[index].labels_HW for index in validation]
    found = {each.index: each.maps_KHW for each in predict_probabilities(predictor.network, samples, validation)}
    maps = [found[index] for index in validation]
    result = {**ceilings(true), **decodings(predictor.network.target, maps, true)}
    result |= found_by_diameter(predictor.network.target, maps, true)
    result["decode_ms_per_megapixel"] = decode_ms(predictor.network.target, maps, true)
    result |= sizes(predictor, [samples[index] for index in validation[::9]])
    fields = [each for each in (samples[i].image_HWC[..., 0] for i in range(len(samples))) if each.shape == FIELD_SHAPE]
    result["same_in_tiles"] = tiles(predictor, fields[:12])
    for name, figure in result.items():
        print(f"{name}: {figure}")
    print(json.dumps(result))


def aps(pairs: Iterable[tuple[Labels, Labels]]) -> list[float]:
    """Pooled AP at .5, .7 and .9, and the mean of .5 to .9, of pairs (found, true)."""
    scores = Scores()
    for found_HW, true_HW in pairs:
        nothing_HW = np.zeros(true_HW.shape, bool)
        scores += Scores.of(score_image("", found_HW, true_HW, nothing_HW, nothing_HW))
    flat = scores.flat_summary()
    names = [*(f"ap{percent}_pooled" for percent in PERCENTS), "ap_mean_to_90_pooled"]
    return [round(flat[name], 3) for name in names]


def ceilings(true: Sequence[Labels]) -> dict[str, Any]:
    targets = {
        "touching_border": TouchingBorderConfig(width_px=2),
        "depth": DepthConfig(decode=DecodeConfig(core_rise=0.2, min_area_px=12)),
    }
    return {f"ceiling_{name}": aps(decoded_true(build_target(config), true)) for name, config in targets.items()}


def decoded_true(target: Target, true: Sequence[Labels]) -> Iterable[tuple[Labels, Labels]]:
    return ((target.decode(target.encode(true_HW)).labels_HW, true_HW) for true_HW in true)


def decodings(target: Target, maps: Sequence[NDArray[np.float32]], true: Sequence[Labels]) -> dict[str, Any]:
    def by_border(threshold: float, gap_closing: float) -> list[float]:
        changes = {"border_threshold": threshold, "gap_closing": gap_closing, "min_width_share": 0.0}
        decode = target.config.decode.model_copy(update=changes)
        border = build_target(TouchingBorderConfig(width_px=target.config.width_px, decode=decode))
        return aps(
            (border.decode(maps_KHW[:2]).labels_HW, true_HW) for maps_KHW, true_HW in zip(maps, true, strict=True)
        )

    tried = [by_border(threshold, gap) for threshold in (0.1, 0.3) for gap in (0.0, 0.3, 0.55)]
    by_depth = aps((target.decode(maps_KHW).labels_HW, true_HW) for maps_KHW, true_HW in zip(maps, true, strict=True))
    return {"decoded_depth": by_depth, "decoded_touching_border": max(tried, key=lambda figures: figures[-1])}


def found_by_diameter(
    target: Target, maps: Sequence[NDArray[np.float32]], true: Sequence[Labels]
) -> dict[str, tuple[float, int]]:
    diameters, overlaps = [], []
    for maps_KHW, true_HW in zip(maps, true, strict=True):
        areas_px, iou = best_overlaps(np.maximum(true_HW, 0), target.decode(maps_KHW).labels_HW)
        diameters.append(np.sqrt(4 / np.pi * areas_px))
        overlaps.append(iou)
    diameter_N, iou_N = np.concatenate(diameters), np.concatenate(overlaps)
    in_bin_N = np.digitize(diameter_N, DIAMETERS_PX) - 1
    shares = {}
    for number, least_px in enumerate(DIAMETERS_PX):
        inside_N = in_bin_N == number
        if inside_N.any():
            share = round(float(np.mean(iou_N[inside_N] > 0.5)), 3)
            shares[f"found_from_{least_px}"] = (share, int(np.count_nonzero(inside_N)))
    return shares


def best_overlaps(true_HW: Labels, found_HW: Labels) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The area of each true nucleus, and its largest IoU with a nucleus that was found."""
    pairs_P2, shared_px = np.unique(np.stack([true_HW.ravel(), found_HW.ravel()], axis=1), axis=0, return_counts=True)
    true_px, found_px = np.bincount(true_HW.ravel()), np.bincount(found_HW.ravel())
    both = (pairs_P2 > 0).all(axis=1)
    true_P, found_P = pairs_P2[both].T
    best = np.zeros(len(true_px))
    np.maximum.at(best, true_P, shared_px[both] / (true_px[true_P] + found_px[found_P] - shared_px[both]))
    exists = np.flatnonzero(true_px[1:]) + 1
    return true_px[exists], best[exists]


def decode_ms(target: Target, maps: Sequence[NDArray[np.float32]], true: Sequence[Labels]) -> dict[str, int]:
    """The least of nine times, and how many nuclei were decoded."""
    cv2.setNumThreads(1)
    small = [index for index, labels_HW in enumerate(true) if labels_HW.shape == (256, 256)]
    densest = sorted(small, key=lambda index: -int(true[index].max()))[:16]
    rows = [np.concatenate([maps[index] for index in densest[at : at + 4]], axis=2) for at in range(0, 16, 4)]
    maps_KHW = np.ascontiguousarray(np.concatenate(rows, axis=1))
    seconds = min(timed(lambda: target.decode(maps_KHW)) for _ in range(9))
    return {"ms": round(1e3 * seconds), "nuclei": len(target.decode(maps_KHW).confidences_N)}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def sizes(predictor: Predictor, samples: Sequence[Sample]) -> dict[str, float]:
    return {f"size_{factor:g}": aps(enlarged(predictor, sample, factor) for sample in samples)[0] for factor in FACTORS}


def enlarged(predictor: Predictor, sample: Sample, factor: float) -> tuple[Labels, Labels]:
    height, width = (max(1, round(length * factor)) for length in sample.labels_HW.shape)
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    image_HW = cv2.resize(sample.image_HWC[..., 0], (width, height), interpolation=interpolation)
    true_HW = cv2.resize(sample.labels_HW.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST)
    return predictor.instances(image_HW.astype(np.uint16) * 16 + 100).labels_HW, true_HW.astype(np.int32)


def tiles(predictor: Predictor, fields: Sequence[NDArray[Any]]) -> dict[str, int]:
    mosaic_HW = np.vstack([np.hstack(fields[at : at + 4]) for at in range(0, len(fields), 4)])
    whole_HW = in_tiles(predictor, mosaic_HW, 3072)
    same = {"all": int(whole_HW.max())}
    return same | {rim: num_same(whole_HW, in_tiles(predictor, mosaic_HW, side)) for rim, side in RIMS.items()}


def in_tiles(predictor: Predictor, image_HW: NDArray[Any], side_px: int) -> Labels:
    windows = find_nuclei(predictor.network, ArrayPixels(image_HW), Grid.at(1.0, side_px))
    return assembled(windows, (image_HW.shape[0], image_HW.shape[1])).labels_HW


def num_same(one_HW: Labels, other_HW: Labels) -> int:
    """How many nuclei have the same pixels in both."""
    pairs_P2, shared_px = np.unique(np.stack([one_HW.ravel(), other_HW.ravel()], axis=1), axis=0, return_counts=True)
    one_px, other_px = np.bincount(one_HW.ravel()), np.bincount(other_HW.ravel())
    same = (shared_px == one_px[pairs_P2[:, 0]]) & (shared_px == other_px[pairs_P2[:, 1]]) & (pairs_P2 > 0).all(axis=1)
    return int(np.count_nonzero(same))


if __name__ == "__main__":
    main()
