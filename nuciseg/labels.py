"""Operations on label images: int32 (H, W), 0 background, positive ids nuclei, negative ids ignored pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

LabelImage = NDArray[np.int32]
Mask = NDArray[np.bool_]


def relabel(labels_HW: LabelImage) -> LabelImage:
    """Positive ids renumbered 1..N in their order; 0 and negative ids stay."""
    ids, index = np.unique(labels_HW, return_inverse=True)
    new_ids = np.where(ids > 0, np.cumsum(ids > 0), ids)
    return np.asarray(new_ids[index].reshape(labels_HW.shape), np.int32)


def regrow(labels_HW: LabelImage, into_HW: Mask, max_distance_px: float = np.inf) -> LabelImage:
    """Each unlabelled pixel of `into_HW` gets the id of the nearest nucleus (Euclidean), if that is near enough.

    Nothing changes where there is no nucleus to grow. Ignored pixels (negative ids) neither grow nor are grown over.
    """
    if not np.any(labels_HW > 0):
        return labels_HW.copy()
    distance_HW, (rows_HW, columns_HW) = ndimage.distance_transform_edt(labels_HW <= 0, return_indices=True)
    grown_HW = into_HW & (labels_HW == 0) & (distance_HW <= max_distance_px)
    result_HW = labels_HW.copy()
    result_HW[grown_HW] = labels_HW[rows_HW[grown_HW], columns_HW[grown_HW]]
    return result_HW


def enclosed_regions(border_HW: Mask, min_area_px: int = 1) -> LabelImage:
    """The 4-connected regions that `border_HW` encloses, numbered 1..N from the top left.

    Regions that reach the image's edge, or have fewer than `min_area_px` pixels, are background.
    """
    regions_HW, num_regions = ndimage.label(~border_HW)
    enclosed = np.bincount(regions_HW.ravel(), minlength=num_regions + 1) >= min_area_px
    enclosed[0] = False
    for edge in (regions_HW[0], regions_HW[-1], regions_HW[:, 0], regions_HW[:, -1]):
        enclosed[edge] = False
    return relabel(np.where(enclosed[regions_HW], regions_HW, 0).astype(np.int32))


def median_diameter(labels_HW: LabelImage) -> float | None:
    """Median diameter in px of the circles that have the nuclei's areas; None without nuclei."""
    areas_px = np.bincount(np.maximum(labels_HW, 0).ravel())[1:]
    areas_px = areas_px[areas_px > 0]
    return float(np.median(2 * np.sqrt(areas_px / np.pi))) if areas_px.size else None
