"""How large the nuclei of an image are, and at what scale the network should see them.

A network knows nuclei of the sizes that it was trained on (`Diameters`, kept in its checkpoint). Within that range an
image is shown as it is. Beyond it, it is rescaled so that its nuclei get the typical size. Where nobody says how large
they are, a threshold gives a first guess, which is right within a factor of two on most images; only where it falls out
of the range is the network asked, at several scales, what it sees most clearly.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.filters import threshold_otsu

from nuciseg.data.augment import AugmentConfig
from nuciseg.engine.fields import ArrayPixels, Grid, Pixels, assembled, find_nuclei, spread_windows
from nuciseg.engine.network import Network
from nuciseg.labels import median_diameter
from nuciseg.types import Diameters, Instances

SAMPLE_PX = 1024  # side of the part of an image by which its nuclei are measured
LOOKED_AT = 4  # windows along each side of a larger image, of which the one with most contrast is the sample
SMALLEST_PX, LARGEST_PX = 4.0, 400.0  # diameters that are believed
SCALES = (1.0, 0.5, 0.25, 2.0)  # tried beside the guess
SIZE_TOLERANCE = 1.5  # how much an answer counts falls with the size's ratio to the typical one; one standard deviation


def known_sizes(trained: Diameters, augment: AugmentConfig) -> Diameters:
    """The sizes that a network has seen often enough: smaller ones than there were, as images were reduced in training.

    Enlarging them in training made blurred nuclei, which are no large ones: with images of dsb2018 enlarged four times,
    nuclei of 60 px were found better when shown at 17 px than as they were.
    """
    factor = (1 + augment.scale) ** 0.5 if augment.enabled else 1.0
    return Diameters(trained.low_px / factor, trained.typical_px, trained.high_px)


def scale_for(diameter_px: float, known: Diameters) -> float:
    """Network pixels per image pixel for nuclei of this size: 1 within the range that the network knows."""
    return 1.0 if known.low_px <= diameter_px <= known.high_px else known.typical_px / diameter_px


def estimated_diameter(network: Network, pixels: Pixels, known: Diameters) -> float | None:
    """The median diameter in px of an image's nuclei; None where neither a threshold nor the network finds any."""
    sample_HW = _sample(pixels)
    guess = _diameter_by_threshold(sample_HW)
    if guess is not None and known.low_px <= guess <= known.high_px:
        return guess
    scales = {*SCALES, known.typical_px / guess} if guess is not None else set(SCALES)
    best, best_clarity = guess, 0.0
    for scale in sorted(scales):
        grid = Grid.at(scale)
        found = assembled(find_nuclei(network, ArrayPixels(sample_HW), grid), (sample_HW.shape[0], sample_HW.shape[1]))
        diameter = median_diameter(found.labels_HW)
        if diameter is not None and (clarity := _clarity(found, diameter * grid.scale, known)) > best_clarity:
            best, best_clarity = diameter, clarity
    return best


def _clarity(found: Instances, seen_diameter_px: float, known: Diameters) -> float:
    """How much of the image is nuclei that the network is sure of and that have the size that it was trained on."""
    areas_px = np.bincount(found.labels_HW.ravel())[1:]
    deviation = np.log(seen_diameter_px / known.typical_px) / np.log(SIZE_TOLERANCE) / 2
    return float((areas_px * found.confidences_N).sum() / found.labels_HW.size * np.exp(-0.5 * deviation**2))


def _sample(pixels: Pixels) -> NDArray[np.generic]:
    """The image, or the window of a larger one that has most contrast."""
    return max(spread_windows(pixels, SAMPLE_PX, LOOKED_AT), key=lambda window_HW: float(np.std(window_HW)))


def _diameter_by_threshold(image_HW: NDArray[np.generic]) -> float | None:
    """Twice the largest distance to the background in each region above Otsu's threshold; the median over area.

    Touching nuclei are one region, whose widest place is still one nucleus wide.
    """
    low, high = float(image_HW.min()), float(image_HW.max())
    if low == high:
        return None
    # From 0 to 1: rounding may leave less between large values than a histogram needs.
    share_HW = ((image_HW.astype(np.float64) - low) / (high - low)).astype(np.float32)
    smooth_HW = cv2.GaussianBlur(share_HW, (0, 0), 1)
    if smooth_HW.min() == smooth_HW.max():
        return None
    inside_HW = (smooth_HW > threshold_otsu(smooth_HW)).astype(np.uint8)
    num_regions, regions_HW, stats, _ = cv2.connectedComponentsWithStats(inside_HW, connectivity=4)
    distance_HW = cv2.distanceTransform(inside_HW, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    width_px = np.zeros(num_regions, np.float32)
    np.maximum.at(width_px, regions_HW.ravel(), 2 * distance_HW.ravel())
    areas_px = stats[:, cv2.CC_STAT_AREA].astype(np.float64)
    areas_px[0] = 0
    areas_px[width_px < SMALLEST_PX] = 0  # specks
    if not areas_px.any():
        return None
    order = np.argsort(width_px)
    middle = np.searchsorted(np.cumsum(areas_px[order]), areas_px.sum() / 2)
    diameter = float(width_px[order[middle]])
    return diameter if diameter <= LARGEST_PX else None
