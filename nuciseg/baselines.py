"""What can be had without learning: scores are reported beside these, so that a figure shows what it is worth.

- `drawn_border`: the border drawn on the image (saturated pixels) is the answer; what it encloses are the nuclei. On
  the nucleus layout that is the cluster's outline alone: high pixel accuracy, and nothing separated.
- `all_black`: no border and no nucleus.
- `otsu_watershed`: Otsu's threshold (1979), holes filled, then a watershed from the peaks of the distance to the
  background.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.segmentation import watershed

from nuciseg.labels import enclosed_regions, regrow, relabel
from nuciseg.targets import Target
from nuciseg.types import Instances

Image = NDArray[np.uint8] | NDArray[np.uint16]
Mask = NDArray[np.bool_]
Baseline = Callable[[Image, Target], tuple[Instances, Mask]]

MIN_AREA_PX = 20  # of a nucleus; also drops the specks that are left within a drawn line
LINE_DEPTH_PX = 8.0  # a nucleus takes half the drawn line; such lines reach 5.8 px where several meet
# Chosen on an eighth of gnovis/nucleus' train images and a fifth of the Data Science Bowl's.
PEAK_DISTANCE_PX = 10
SMOOTHING_PX = 2.0  # standard deviation


def drawn_border(image_HW: Image, target: Target) -> tuple[Instances, Mask]:
    """Saturated pixels (255 or 65535) are the border, the regions they enclose are nuclei that grow over it."""
    border_HW = _saturated(image_HW)
    return _instances(regrow(enclosed_regions(border_HW, MIN_AREA_PX), border_HW, LINE_DEPTH_PX)), border_HW


def all_black(image_HW: Image, target: Target) -> tuple[Instances, Mask]:
    """No nucleus and no border."""
    return _instances(np.zeros(image_HW.shape, np.int32)), np.zeros(image_HW.shape, bool)


def otsu_watershed(image_HW: Image, target: Target) -> tuple[Instances, Mask]:
    """Otsu's threshold, holes filled, then a watershed on the distance transform from peaks `PEAK_DISTANCE_PX` apart.

    A drawn border is no intensity: saturated pixels count as foreground and do not move the threshold. The border
    mask is what `target` draws for the nuclei found.
    """
    saturated_HW = _saturated(image_HW)
    values = image_HW[~saturated_HW]
    if values.size == 0 or values.min() == values.max():  # no threshold divides one value
        return all_black(image_HW, target)
    foreground_HW = ndimage.binary_fill_holes(saturated_HW | (image_HW > threshold_otsu(values)))
    distance_HW = ndimage.distance_transform_edt(foreground_HW)
    regions_HW, _ = ndimage.label(foreground_HW)
    peaks_N2 = peak_local_max(
        gaussian(distance_HW, SMOOTHING_PX), min_distance=PEAK_DISTANCE_PX, labels=regions_HW, exclude_border=False
    )
    seeds_HW = np.zeros(image_HW.shape, np.int32)
    seeds_HW[tuple(peaks_N2.T)] = np.arange(1, len(peaks_N2) + 1)
    labels_HW = watershed(-distance_HW, seeds_HW, mask=foreground_HW).astype(np.int32)
    labels_HW[np.isin(labels_HW, np.flatnonzero(np.bincount(labels_HW.ravel()) < MIN_AREA_PX))] = 0
    instances = _instances(labels_HW)
    return instances, target.border_of(instances.labels_HW)


BASELINES: dict[str, Baseline] = {
    "drawn_border": drawn_border,
    "all_black": all_black,
    "otsu_watershed": otsu_watershed,
}


def _saturated(image_HW: Image) -> Mask:
    return np.asarray(image_HW == np.iinfo(image_HW.dtype).max)


def _instances(labels_HW: NDArray[np.int32]) -> Instances:
    labels_HW = relabel(labels_HW)
    return Instances(labels_HW, np.ones(int(labels_HW.max(initial=0)), np.float32))
