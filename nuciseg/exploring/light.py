"""How bright and how sharp an image is, marks left out: zeroed background and drawn borders are no light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.images import saturated_value

MARK_MARGIN_PX = 4  # how far the steps at a drawn line reach into the filtered image
SMOOTHING_PX = 1.0  # standard deviation; without it the noise of the camera passes for focus


@dataclass(frozen=True)
class Light:
    """`brightness`, `background`: medians as shares of full scale; None where there is no such pixel.

    `focus` is the variance of the Laplacian (Pech-Pacheco et al. 2000; LAPV in Pertuz, Puig & Garcia 2013) of the
    smoothed image inside the nuclei, divided by the squared mean there, so that brighter is not sharper.
    """

    brightness: float | None
    background: float | None
    saturated_share: float
    focus: float | None


def measure_light(image_HW: NDArray[Any], labels_HW: NDArray[np.int32]) -> Light:
    """The light of one image (H, W) of any integer type."""
    full_scale = saturated_value(image_HW)
    free_HW = (image_HW > 0) & (image_HW < full_scale)
    inside = image_HW[free_HW & (labels_HW > 0)]
    outside = image_HW[free_HW & (labels_HW == 0)]
    size = 2 * MARK_MARGIN_PX + 1
    far_HW = cv2.erode(
        (free_HW & (labels_HW > 0)).astype(np.uint8), np.ones((size, size), np.uint8), borderValue=0
    ).astype(bool)
    return Light(
        brightness=float(np.median(inside)) / full_scale if inside.size else None,
        background=float(np.median(outside)) / full_scale if outside.size else None,
        saturated_share=float(np.mean(image_HW == full_scale)),
        focus=_focus(image_HW.astype(np.float32), far_HW),
    )


def _focus(light_HW: NDArray[np.float32], where_HW: NDArray[np.bool_]) -> float | None:
    if np.count_nonzero(where_HW) < 2:
        return None
    smooth_HW = cv2.GaussianBlur(light_HW, (0, 0), SMOOTHING_PX)
    edges_HW = np.asarray(cv2.Laplacian(smooth_HW, cv2.CV_32F))
    return float(edges_HW[where_HW].var() / max(float(light_HW[where_HW].mean()), 1e-6) ** 2)
