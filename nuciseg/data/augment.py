"""Random changes of training images: the only file that imports albumentations.

Shape legend: H rows, W columns, C channels, S side of the square canvas.

Photometric parts are albumentations' own. Flip, rotation, scale, elastic deformation, crop and padding are ONE warp
(`PlaceOnCanvas`, an albumentations transform of ours): image and labels are interpolated once. Measured on a 160 px
grey image and one core: albumentations' D4 + Affine + ElasticTransform(approximate=True) 1.2 ms, this warp 0.2 ms.
"""

from __future__ import annotations

import math
import os
import random
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nuciseg.section import Section

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for a newer version
import albumentations as A

FREE, ZEROED, SATURATED, OUTSIDE = range(4)
"""What a pixel is: changeable; zeroed background; drawn border; not part of the image."""

# Photometric transforms want [0, 1] and clip to it. The normalised image has its nuclei in [0, 1] and tails on both
# sides, so this wider range is mapped onto [0, 1].
UNIT_LOW, UNIT_WIDTH = -0.25, 1.5
BACKGROUND_NODES = 3  # along each side of the image: slower than nuclei are large
MOST_COVERED = 0.25  # of a nucleus' area, by copies of others
COPIES = 2  # tells the random numbers of copies from those of the other augmentation
ELASTIC_GRID_PX = 32  # distance of the random displacements; half a nucleus of the nucleus data set


class ClusterChanges(NamedTuple):
    """The parts of `AugmentConfig` that only cut-out clusters can take; 0 is off."""

    join: float = 0.0
    marking_dropped: float = 0.0
    marking_shift_px: int = 0
    drawn_borders: float = 0.0


class AugmentConfig(Section):
    """Random changes of training images. A strength of 0 switches that part off.

    Intensities are in units of the normalised image, where 0 and 1 are the low and the high percentile.
    """

    enabled: bool = Field(True, description="one switch for all parts below")
    flips: bool = Field(True, description="mirror at random along both axes")
    rotation_deg: float = Field(180.0, ge=0, le=180, description="largest rotation to either side, degrees")
    scale: float = Field(0.2, ge=0, le=1, description="0.2 scales by 1/1.2 to 1.2")
    elastic_px: float = Field(2.0, ge=0, le=20, description="standard deviation of the local displacements, px")
    brightness: float = Field(0.15, ge=0, le=1, description="largest change of the brightness")
    contrast: float = Field(0.2, ge=0, lt=1, description="largest relative change of the contrast")
    gamma: float = Field(0.2, ge=0, le=1, description="0.2 takes exponents of 1/1.2 to 1.2")
    blur_px: float = Field(1.0, ge=0, le=10, description="largest standard deviation of the Gaussian blur, px")
    background: float = Field(
        0.0, ge=0, le=1, description="largest uneven light that is added: out-of-focus haze, bright medium"
    )
    noise: float = Field(0.05, ge=0, le=1, description="largest standard deviation of the Gaussian noise")
    copies: float = Field(
        0.0, ge=0, le=1, description="chance that nuclei of the image are laid among its others once more (fields only)"
    )
    join: float = Field(
        0.0, ge=0, le=1, description="chance that another training cluster is laid against it (cut-out clusters only)"
    )
    marking_dropped: float = Field(
        0.0, ge=0, le=1, description="chance that the drawn border is erased (cut-out clusters only)"
    )
    marking_shift_px: int = Field(
        0,
        ge=0,
        le=16,
        description="farthest that the drawn border is moved along an axis, px (cut-out clusters only)",
    )
    drawn_borders: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance that parts of the true borders are drawn on the image, for inference.rounds "
        "(cut-out clusters only)",
    )
    probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="chance of each of elastic, brightness and contrast, gamma, background, blur and noise",
    )

    @property
    def of_clusters(self) -> ClusterChanges:
        """What is done to cut-out clusters before all else; nothing where `enabled` is off."""
        strengths = {name: getattr(self, name) for name in ClusterChanges._fields}
        return ClusterChanges(**strengths) if self.enabled else ClusterChanges()


@dataclass(frozen=True)
class NormalizedSample:
    """A sample as the augmenter takes it.

    `image_HWC` float32 normalised, `labels_HW` int32 (|id| < 4 194 304), `kind_HW` uint8 of FREE, ZEROED or
    SATURATED; `zero_value` and `saturated_value` are what raw 0 and the raw maximum are after normalisation.
    """

    image_HWC: NDArray[np.float32]
    labels_HW: NDArray[np.int32]
    kind_HW: NDArray[np.uint8]
    zero_value: float
    saturated_value: float


class Placed(NamedTuple):
    """A sample on its canvas: `valid_SS` is False outside the image and where labels are negative."""

    image_SSC: NDArray[np.float32]
    labels_SS: NDArray[np.int32]
    valid_SS: NDArray[np.bool_]


class PlaceOnCanvas(A.DualTransform):  # type: ignore[misc]  # albumentations is untyped
    """Flip, rotate, scale, deform and crop or pad to a square canvas in one warp.

    The image is interpolated linearly, the mask by the nearest pixel. An image that fits stays centred; along an
    axis where it does not, the canvas lies at random around a pixel of a nucleus, inside the image.
    """

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__(p=1.0)
        self.config = config
        self.canvas_px = 0
        self.outside_value = 0.0

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        config, rng, canvas_px = self.config, self.random_generator, self.canvas_px
        angle = math.radians(rng.uniform(-config.rotation_deg, config.rotation_deg)) if config.enabled else 0.0
        zoom = (1 + config.scale) ** rng.uniform(-1, 1) if config.enabled else 1.0
        flip_x, flip_y = rng.integers(0, 2, 2) * 2 - 1 if config.enabled and config.flips else (1, 1)
        cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
        # Maps a canvas pixel to an image pixel, as cv2.WARP_INVERSE_MAP and cv2.remap want it.
        matrix = np.array([[cosine * flip_x, -sine * flip_y, 0.0], [sine * flip_x, cosine * flip_y, 0.0]])
        centre = _canvas_centre(data["mask"], canvas_px / zoom, rng)
        matrix[:, 2] = centre - matrix[:, :2] @ np.full(2, (canvas_px - 1) / 2)
        if angle == 0.0 and zoom == 1.0:
            matrix[:, 2] = np.floor(matrix[:, 2] + 0.5)  # whole pixels: no interpolation
        bent = config.enabled and config.elastic_px > 0 and rng.random() < config.probability
        return {"matrix": matrix, "shift": _elastic_shift(canvas_px, config.elastic_px / zoom, rng) if bent else None}

    def apply(self, img: NDArray[Any], **params: Any) -> NDArray[Any]:
        warped: NDArray[Any] = self._warp(img, cv2.INTER_LINEAR, self.outside_value, params)
        return warped.reshape(self.canvas_px, self.canvas_px, -1)

    def apply_to_mask(self, mask: NDArray[Any], *args: Any, **params: Any) -> NDArray[Any]:
        return self._warp(mask, cv2.INTER_NEAREST, OUTSIDE, params)

    def _warp(self, array: NDArray[Any], interpolation: int, outside: float, params: dict[str, Any]) -> NDArray[Any]:
        matrix, shift, side = params["matrix"], params["shift"], self.canvas_px
        border = (outside,) * 4
        if shift is None:
            flags = interpolation | cv2.WARP_INVERSE_MAP
            return np.asarray(cv2.warpAffine(array, matrix, (side, side), flags=flags, borderValue=border))
        steps = np.arange(side, dtype=np.float32)
        row = matrix.astype(np.float32)
        x_SS = (row[0, 0] * steps + row[0, 2])[None, :] + (row[0, 1] * steps)[:, None] + shift[..., 0]
        y_SS = (row[1, 0] * steps + row[1, 2])[None, :] + (row[1, 1] * steps)[:, None] + shift[..., 1]
        return np.asarray(cv2.remap(array, x_SS, y_SS, interpolation, borderValue=border))


class AddBackground(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations is untyped
    """Add smooth light, from 0 to `most` at each node of a coarse grid. (`A.Illumination` multiplies: black stays.)"""

    def __init__(self, most: float, p: float) -> None:
        super().__init__(p=p)
        self.most = most

    def get_params(self) -> dict[str, Any]:
        nodes = (BACKGROUND_NODES, BACKGROUND_NODES)
        strength = self.random_generator.uniform(0, self.most)
        return {"grid": self.random_generator.uniform(0, strength, nodes).astype(np.float32)}

    def apply(self, img: NDArray[Any], grid: NDArray[np.float32], **params: Any) -> NDArray[Any]:
        light_HW = np.asarray(cv2.resize(grid, (img.shape[1], img.shape[0]), interpolation=cv2.INTER_LINEAR))
        return np.asarray(np.minimum(img + light_HW.reshape(*img.shape[:2], *(1,) * (img.ndim - 2)), 1))


def _elastic_shift(canvas_px: int, strength_px: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Smooth random displacements of shape SS2: a coarse grid of normal ones, interpolated by cubics."""
    num_nodes = max(3, math.ceil(canvas_px / ELASTIC_GRID_PX) + 1)
    grid = rng.standard_normal((num_nodes, num_nodes, 2), dtype=np.float32) * np.float32(strength_px)
    return np.asarray(cv2.resize(grid, (canvas_px, canvas_px), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def _canvas_centre(mask_HW: NDArray[Any], window_px: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """(x, y) of the image pixel that comes to lie in the middle of the canvas."""
    height, width = mask_HW.shape
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    if max(height, width) <= window_px * 1.25:  # zooming in may cut a margin off; the cluster stays in the middle
        return centre
    nuclei = np.flatnonzero(mask_HW >= 4)
    at = int(nuclei[rng.integers(nuclei.size)]) if nuclei.size else int(rng.integers(mask_HW.size))
    aim = np.array([at % width, at // width]) + rng.uniform(-0.25, 0.25, 2) * window_px
    slack = np.maximum(np.array([width, height]) - window_px, 0) / 2
    return np.clip(aim, centre - slack, centre + slack)


class Augmenter:
    """Changes samples at random and places them on their canvas; the same seed always gives the same result."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._changes_values = bool(_photometric(config))
        self._of_thread = threading.local()  # albumentations' transforms carry state, and loader threads share us

    def _transforms(self) -> tuple[PlaceOnCanvas, Any]:
        """The calling thread's transforms. Built once: composing them costs more than an image."""
        if not hasattr(self._of_thread, "transforms"):
            place = PlaceOnCanvas(self.config)
            # `strict` refuses arguments that albumentations would ignore.
            compose = A.Compose([*_photometric(self.config), place], strict=True, is_check_shapes=False)
            self._of_thread.transforms = place, compose
        transforms: tuple[PlaceOnCanvas, Any] = self._of_thread.transforms
        return transforms

    def __reduce__(self) -> tuple[type[Augmenter], tuple[AugmentConfig]]:
        return Augmenter, (self.config,)

    def __call__(self, sample: NormalizedSample, canvas_px: int, rng_seed: int) -> Placed:
        """`sample` changed at random on a canvas of `canvas_px` x `canvas_px` pixels.

        Zeroed background and the drawn border are exact at prediction time, so no change of values, blur or
        interpolation reaches them: they are filled in from their neighbours first and drawn again afterwards.
        Seeds of 63 bits are enough; one generator serves all transforms (seeding each with the same number, as
        `Compose.set_random_seed` does, would tie the angle to the gamma).
        """
        place, compose = self._transforms()
        compose.set_random_state(np.random.default_rng(rng_seed), random.Random(rng_seed))
        place.canvas_px = canvas_px
        place.outside_value = (sample.zero_value - UNIT_LOW) / UNIT_WIDTH
        image_HWC = _fill_fixed(sample.image_HWC, sample.kind_HW)
        unit_HWC = (image_HWC - np.float32(UNIT_LOW)) * np.float32(1 / UNIT_WIDTH)
        if self._changes_values:
            np.clip(unit_HWC, 0, 1, out=unit_HWC)  # albumentations takes powers of it
        # Labels and kinds travel in one mask. float32, since OpenCV 4 warps no int32; exact to 2**24.
        code_HW = (sample.labels_HW * 4 + sample.kind_HW).astype(np.float32)
        placed = compose(image=unit_HWC, mask=code_HW)
        code_SS = placed["mask"].astype(np.int32)
        image_SSC = np.asarray(placed["image"], dtype=np.float32)
        image_SSC *= np.float32(UNIT_WIDTH)
        image_SSC += np.float32(UNIT_LOW)
        kind_SS = code_SS & 3
        value_of_kind = np.array([0, sample.zero_value, sample.saturated_value, sample.zero_value], np.float32)
        np.copyto(image_SSC, value_of_kind[kind_SS][..., None], where=(kind_SS != FREE)[..., None])
        labels_SS = code_SS >> 2
        if self.config.enabled and self.config.copies:
            rng = np.random.default_rng((COPIES, rng_seed))
            if rng.random() < self.config.copies:
                _lay_copies(image_SSC, labels_SS, rng)
        return Placed(image_SSC, labels_SS, (kind_SS != OUTSIDE) & (labels_SS >= 0))


def _lay_copies(image_SSC: NDArray[np.float32], labels_SS: NDArray[np.int32], rng: np.random.Generator) -> None:
    """Lay the nuclei of the turned or mirrored canvas on it, in place, where they cover little of others.

    Fields have few nuclei that touch, and copies make more. After "Simple Copy-Paste is a Strong Data Augmentation
    Method for Instance Segmentation" (Ghiasi et al., 2021), but the brighter of both lights counts around a copy: light
    adds up, so a nucleus has no dark rim.
    """
    turns, mirrored = divmod(int(rng.integers(1, 8)), 2)  # one of the square's seven symmetries that move it
    step = -1 if mirrored else 1
    copies_SS = np.maximum(np.rot90(labels_SS, turns)[:, ::step], 0)
    light_SSC = np.rot90(image_SSC, turns)[:, ::step]
    num_ids = int(copies_SS.max(initial=0)) + 1
    most_covered = MOST_COVERED * np.bincount(copies_SS.ravel(), minlength=num_ids)  # a copy is as large as its nucleus
    shared_SS = (copies_SS > 0) & (labels_SS != 0)
    copies, beneath = copies_SS[shared_SS], np.maximum(labels_SS[shared_SS], 0)
    laid = np.bincount(copies, minlength=num_ids) <= most_covered
    hidden = np.bincount(beneath, minlength=num_ids) > most_covered
    laid[copies[hidden[beneath]]] = False
    laid[0] = False
    laid_SS = laid[copies_SS]
    light_SS = cv2.dilate(laid_SS.view(np.uint8), np.ones((5, 5), np.uint8)).view(np.bool_)
    np.maximum(image_SSC, light_SSC, out=image_SSC, where=light_SS[..., None])
    labels_SS[laid_SS] = copies_SS[laid_SS] + num_ids


def _photometric(config: AugmentConfig) -> list[Any]:
    """albumentations' transforms of values, those of strength 0 left out."""
    if not config.enabled:
        return []
    p, parts = config.probability, []
    if config.brightness or config.contrast:
        brightness = config.brightness / UNIT_WIDTH
        parts.append(A.RandomBrightnessContrast((-brightness, brightness), (-config.contrast, config.contrast), p=p))
    if config.gamma:
        parts.append(A.RandomGamma((100 / (1 + config.gamma), 100 * (1 + config.gamma)), p=p))
    if config.background:
        parts.append(AddBackground(config.background / UNIT_WIDTH, p=p))
    if config.blur_px:
        parts.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.0, config.blur_px), p=p))
    if config.noise:
        # One value per pixel and channel.
        parts.append(A.GaussNoise(std_range=(0.0, config.noise / UNIT_WIDTH), p=p))
    return parts


def _fill_fixed(image_HWC: NDArray[np.float32], kind_HW: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The image with its fixed pixels replaced by the mean of the free ones within 4 px (where there are any)."""
    free_HW = (kind_HW == FREE).astype(np.float32)
    if free_HW.all():
        return image_HWC
    size = (9, 9)
    weight_HW = cv2.boxFilter(free_HW, -1, size, borderType=cv2.BORDER_CONSTANT)
    mean_HW = cv2.boxFilter(image_HWC * free_HW[..., None], -1, size, borderType=cv2.BORDER_CONSTANT)
    mean_HWC = np.asarray(mean_HW).reshape(image_HWC.shape) / np.maximum(weight_HW, 1e-3)[..., None]
    return np.where(free_HW[..., None] > 0, image_HWC, mean_HWC)
