"""A small simulator of DAPI-stained nuclei under a fluorescence microscope: the default input of every command.

Outlines are ellipses bent by low Fourier terms. Neighbours overlap by a set share of their radius; there the light
of both adds up in part, and a pixel belongs to the nucleus that it lies deeper in. Chromatin is band-passed noise
with bright chromocentres and dark nucleoli. The picture is blurred by the optics and read by an 8-bit camera with
shot noise (Poisson) and read noise (Gaussian).

Shape legend: H rows, W columns, C channels. Intensities are shares of the camera's full scale until it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from nuciseg.images import write_labels_tiff, write_png
from nuciseg.section import Section
from nuciseg.types import Sample

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "test")

# Measured on the pictures of the nucleus data set that this format imitates.
BORDER_PX = 3  # width of the drawn line
OUTER_PX = 1  # the line reaches this far out of the nuclei and hides their blurred edge
BACKGROUND = 12 / 255  # camera offset and stray light
MIN_HOLE_PX = 80  # background enclosed by nuclei; the lines around a smaller hole would fill it

HARMONICS = np.arange(2, 6)  # of an outline; the first would only shift it
MAX_TRIES = 60


class SyntheticConfig(Section):
    """How nuclei are drawn. Lengths in pixels, intensities as shares of the camera's full scale."""

    num_train: int = Field(240, ge=2, description="clusters drawn for training and validation")
    num_test: int = Field(40, ge=1, description="clusters drawn for the test")
    seed: int = Field(0, ge=0, description="seed of all that is drawn")
    nuclei_per_cluster: tuple[int, int] = Field((2, 4), description="fewest and most nuclei of a cluster")
    mean_diameter_px: float = Field(50.0, ge=10, le=300, description="mean diameter of a nucleus, px")
    size_variation: float = Field(0.15, ge=0, le=0.5, description="relative standard deviation of the diameter")
    elongation: float = Field(1.8, ge=1, le=3, description="mean ratio of the long to the short axis")
    outline_roughness: float = Field(0.07, ge=0, le=0.2, description="bends of the outline, share of the radius")
    overlap: float = Field(0.4, ge=0, le=0.6, description="mean overlap of neighbours, share of the smaller radius")
    brightness: float = Field(0.18, gt=0, le=0.9, description="median brightness of a nucleus")
    brightness_variation: float = Field(0.22, ge=0, le=1, description="relative spread of brightness between nuclei")
    texture: float = Field(0.18, ge=0, le=0.5, description="relative standard deviation of the chromatin")
    blur_sigma_px: float = Field(1.0, ge=0, le=10, description="mean standard deviation of the optical blur, px")
    photons: float = Field(3000.0, gt=0, description="photons that make the camera's full scale; fewer: more noise")
    read_noise: float = Field(0.003, ge=0, le=0.2, description="standard deviation of the camera's read noise")

    @field_validator("nuclei_per_cluster")
    @classmethod
    def _in_order(cls, bounds: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= bounds[0] <= bounds[1] <= 30:
            raise ValueError(f"nuclei_per_cluster {bounds} must be two numbers in order, from 1 to 30")
        return bounds


@dataclass(frozen=True)
class _Nucleus:
    """A star-shaped outline around (x, y): an ellipse times a Fourier sum."""

    x: float
    y: float
    long_px: float
    short_px: float
    angle: float
    bends: NDArray[np.float64]
    phases: NDArray[np.float64]
    level: float

    def radius_px(self, direction: NDArray[np.float32] | float) -> NDArray[np.float64]:
        turned = np.asarray(direction) - self.angle
        ellipse = self.long_px * self.short_px / np.hypot(self.short_px * np.cos(turned), self.long_px * np.sin(turned))
        bend = sum(
            bend * np.cos(harmonic * turned + phase)
            for harmonic, bend, phase in zip(HARMONICS, self.bends, self.phases, strict=True)
        )
        return np.asarray(ellipse * (1 + bend))

    @property
    def reach_px(self) -> float:
        return self.long_px * (1 + float(np.abs(self.bends).sum()))

    @property
    def area_px(self) -> float:
        return math.pi * self.long_px * self.short_px

    def moved(self, x: float, y: float) -> _Nucleus:
        return _Nucleus(x, y, self.long_px, self.short_px, self.angle, self.bends, self.phases, self.level)


# ------------------------------------------------------------------------------------------------- geometry
def _draw_nucleus(config: SyntheticConfig, level: float, rng: np.random.Generator) -> _Nucleus:
    diameter_px = config.mean_diameter_px * max(0.4, 1 + config.size_variation * rng.standard_normal())
    ratio = 1 + (config.elongation - 1) * rng.uniform(0, 2)
    # Higher harmonics are weaker, so that outlines are smooth.
    bends = config.outline_roughness * rng.standard_normal(HARMONICS.size) * (2 / HARMONICS)
    return _Nucleus(
        x=0.0, y=0.0,
        long_px=diameter_px / 2 * math.sqrt(ratio),
        short_px=diameter_px / 2 / math.sqrt(ratio),
        angle=rng.uniform(0, math.pi),
        bends=bends,
        phases=rng.uniform(0, 2 * math.pi, HARMONICS.size),
        level=level * math.exp(config.brightness_variation * rng.standard_normal()),
    )  # fmt: skip


def _draw_nuclei(config: SyntheticConfig, num_nuclei: int, rng: np.random.Generator) -> list[_Nucleus]:
    """Nuclei each of which overlaps one before it by the set amount, and others not by much more."""
    level = config.brightness * math.exp(0.3 * rng.standard_normal())
    nuclei = [_draw_nucleus(config, level, rng)]
    while len(nuclei) < num_nuclei:
        new = _draw_nucleus(config, level, rng)
        for _ in range(MAX_TRIES):
            neighbour = nuclei[rng.integers(len(nuclei))]
            direction = rng.uniform(-math.pi, math.pi)
            radii = float(neighbour.radius_px(direction)), float(new.radius_px(direction + math.pi))
            overlap_px = max(2.0, config.overlap * rng.uniform(0.5, 1.5) * min(radii))
            distance_px = sum(radii) - overlap_px
            x, y = distance_px * math.cos(direction), distance_px * math.sin(direction)
            new = new.moved(neighbour.x + x, neighbour.y + y)
            if all(_gap_px(new, other) >= -1.5 * overlap_px for other in nuclei):
                break
        nuclei.append(new)
    return nuclei


def _gap_px(a: _Nucleus, b: _Nucleus) -> float:
    """Distance between two outlines along the line of their centres; negative where they overlap."""
    direction = math.atan2(b.y - a.y, b.x - a.x)
    reach = float(a.radius_px(direction)) + float(b.radius_px(direction + math.pi))
    return math.hypot(b.x - a.x, b.y - a.y) - reach


# --------------------------------------------------------------------------------------------------- light
def _noise(shape: tuple[int, int], sigma_px: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Smooth noise of mean 0 and standard deviation 1."""
    step = max(1, int(sigma_px))  # coarse noise needs few samples
    coarse = rng.standard_normal((shape[0] // step + 2, shape[1] // step + 2), dtype=np.float32)
    smooth = np.asarray(cv2.GaussianBlur(coarse, (0, 0), max(sigma_px / step, 0.3)))
    fine = np.asarray(cv2.resize(smooth, shape[::-1], interpolation=cv2.INTER_CUBIC))
    return np.asarray((fine - fine.mean()) / (fine.std() + 1e-6), dtype=np.float32)


def _light_of(nucleus: _Nucleus, depth: NDArray[np.float32], config: SyntheticConfig, rng: np.random.Generator,
              x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:  # fmt: skip
    """Light of one nucleus on its own box; `depth` is 1 in its middle, 0 at its outline."""
    diameter_px = nucleus.long_px + nucleus.short_px
    inside = np.clip(depth, 0, 1)
    # Thin at the rim: a flattened body of which most is equally thick.
    light = 1 - (1 - np.minimum(inside / 0.35, 1)) ** 2 * 0.45
    chromatin = 0.6 * _noise(depth.shape, 0.03 * diameter_px, rng) + 0.8 * _noise(depth.shape, 0.08 * diameter_px, rng)
    light *= 1 + config.texture * chromatin
    slope = rng.normal(0, 0.12, 2) * 2 / diameter_px
    light *= 1 + slope[0] * x + slope[1] * y
    # Chromocentres shine, nucleoli are not stained.
    for strength, num_spots, size in ((2.5, rng.poisson(3), 0.035), (-2.0, rng.poisson(1.5), 0.06)):
        for _ in range(num_spots):
            angle, share = rng.uniform(0, 2 * math.pi), 0.8 * math.sqrt(rng.uniform())
            at = share * float(nucleus.radius_px(angle))
            sigma = size * diameter_px * rng.uniform(0.7, 1.3)
            spot = np.exp(((x - at * math.cos(angle)) ** 2 + (y - at * math.sin(angle)) ** 2) / (-2 * sigma**2))
            light *= 1 + config.texture * strength * rng.uniform(0.4, 1) * spot
    return np.asarray(nucleus.level * np.maximum(light, 0.15) * (depth > 0), dtype=np.float32)


def _render(
    nuclei: Sequence[_Nucleus], shape: tuple[int, int], config: SyntheticConfig, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Light and labels of all nuclei. Where two overlap the weaker adds a part of its light to the stronger."""
    light_HW = np.zeros(shape, np.float32)
    depth_HW = np.zeros(shape, np.float32)
    labels_HW = np.zeros(shape, np.int32)
    transparency = rng.uniform(0.0, 0.5)
    for label, nucleus in enumerate(nuclei, start=1):
        reach = math.ceil(nucleus.reach_px) + 1
        rows = slice(max(0, int(nucleus.y) - reach), max(0, min(shape[0], int(nucleus.y) + reach + 1)))
        columns = slice(max(0, int(nucleus.x) - reach), max(0, min(shape[1], int(nucleus.x) + reach + 1)))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(nucleus.y)
        x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(nucleus.x)
        radius = nucleus.radius_px(np.arctan2(y, x)).astype(np.float32)
        depth = 1 - np.hypot(x, y) / radius
        own = _light_of(nucleus, depth, config, rng, x, y)
        there = light_HW[rows, columns]
        light_HW[rows, columns] = np.maximum(own, there) + transparency * np.minimum(own, there)
        deeper = (depth > depth_HW[rows, columns]) & (depth > 0)
        depth_HW[rows, columns][deeper] = depth[deeper]
        labels_HW[rows, columns][deeper] = label
    return light_HW, labels_HW


def _photograph(light_HW: NDArray[np.float32], config: SyntheticConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blur, stray light, camera: 8-bit values of 1 to 254 (0 and 255 have a meaning in the nucleus format)."""
    sigma_px = config.blur_sigma_px * rng.uniform(0.6, 1.4)
    sharp_HW = light_HW if sigma_px == 0 else np.asarray(cv2.GaussianBlur(light_HW, (0, 0), sigma_px))
    # Light from above and below the focus: a wide, weak halo around everything bright.
    halo_HW = np.asarray(cv2.GaussianBlur(light_HW, (0, 0), config.mean_diameter_px / 4))
    seen_HW = BACKGROUND + 0.85 * sharp_HW + 0.15 * halo_HW
    counted_HW = rng.poisson(np.clip(seen_HW, 0, None) * config.photons) / config.photons
    read_HW = counted_HW + config.read_noise * rng.standard_normal(light_HW.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(read_HW * 255), 1, 254), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------- pictures
def draw_cluster(config: SyntheticConfig, seed: np.random.SeedSequence) -> Sample:
    """One cluster as the `nucleus` format has it: cut out tightly, 0 outside, its outer border drawn in 255.

    `image_HWC` uint8 with C = 1; `labels_HW` int32 1..N, each nucleus one region, the drawn line part of the nuclei.
    """
    rng = np.random.default_rng(seed)
    fewest, most = config.nuclei_per_cluster
    while True:
        # Pairs are the most frequent clusters in the data set that this imitates.
        nuclei = _draw_nuclei(config, fewest + rng.binomial(most - fewest, 0.3), rng)
        margin = OUTER_PX + BORDER_PX + math.ceil(3 * config.blur_sigma_px)
        left = math.floor(min(nucleus.x - nucleus.reach_px for nucleus in nuclei)) - margin
        top = math.floor(min(nucleus.y - nucleus.reach_px for nucleus in nuclei)) - margin
        width = math.ceil(max(nucleus.x + nucleus.reach_px for nucleus in nuclei)) + margin - left
        height = math.ceil(max(nucleus.y + nucleus.reach_px for nucleus in nuclei)) + margin - top
        nuclei = [nucleus.moved(nucleus.x - left, nucleus.y - top) for nucleus in nuclei]
        light_HW, labels_HW = _render(nuclei, (height, width), config, rng)
        labels_HW = _grown(labels_HW)
        if _is_cluster(labels_HW, nuclei):
            break
    image_HW = _photograph(light_HW, config, rng)
    inside_HW = (labels_HW > 0).astype(np.uint8)
    image_HW[inside_HW == 0] = 0
    image_HW[outer_border(labels_HW)] = 255
    x, y, columns, rows = cv2.boundingRect(inside_HW)
    window = slice(y, y + rows), slice(x, x + columns)
    return Sample(np.ascontiguousarray(image_HW[window])[..., None], np.ascontiguousarray(labels_HW[window]))


def draw_field(config: SyntheticConfig, seed: np.random.SeedSequence, height: int, width: int) -> Sample:
    """A plain microscope field: clusters and single nuclei on uneven background, some cut by the edge, no lines.

    `image_HWC` uint8 with C = 1; `labels_HW` int32 1..N.
    """
    rng = np.random.default_rng(seed)
    placed: list[_Nucleus] = []
    for _ in range(max(1, round(height * width / (3 * config.mean_diameter_px) ** 2))):
        single = rng.uniform() < 0.5
        nuclei = _draw_nuclei(config, 1 if single else int(rng.integers(2, config.nuclei_per_cluster[1] + 1)), rng)
        for _ in range(MAX_TRIES // 4):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            moved = [nucleus.moved(nucleus.x + x, nucleus.y + y) for nucleus in nuclei]
            if all(_gap_px(a, b) > 0.1 * config.mean_diameter_px for a in moved for b in placed):
                placed += moved
                break
    light_HW, labels_HW = _render(placed, (height, width), config, rng)
    light_HW += np.maximum(_noise((height, width), max(height, width) / 3, rng) + 2, 0) * np.float32(BACKGROUND / 3)
    ids, index = np.unique(labels_HW, return_inverse=True)  # a nucleus may lie outside: number those that are seen
    numbers = np.cumsum(ids > 0, dtype=np.int32)
    return Sample(_photograph(light_HW, config, rng)[..., None], numbers[index].reshape(labels_HW.shape))


def _grown(labels_HW: NDArray[np.int32]) -> NDArray[np.int32]:
    """Nuclei grown outwards by `OUTER_PX`; each pixel takes the largest id next to it."""
    size = 2 * OUTER_PX + 1
    kernel = np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    grown_HW = np.asarray(cv2.dilate(labels_HW.astype(np.uint8), kernel)).astype(np.int32)
    return np.where(labels_HW > 0, labels_HW, grown_HW)


def _is_cluster(labels_HW: NDArray[np.int32], nuclei: Sequence[_Nucleus]) -> bool:
    """Whether all nuclei hang together, each is one region also between the lines, and none is mostly hidden."""
    inside_HW = labels_HW > 0
    holes = cv2.connectedComponentsWithStats((~inside_HW).astype(np.uint8), connectivity=8)[2][1:, cv2.CC_STAT_AREA]
    if _num_regions(inside_HW) != 1 or holes.min(initial=MIN_HOLE_PX) < MIN_HOLE_PX:
        return False
    inner_HW = ~solution_border(labels_HW)
    for label, nucleus in enumerate(nuclei, start=1):
        own_HW = labels_HW == label
        if own_HW.sum() < 0.6 * nucleus.area_px or _num_regions(own_HW) != 1 or _num_regions(own_HW & inner_HW) != 1:
            return False
    return True


def _num_regions(mask_HW: NDArray[np.bool_]) -> int:
    return int(cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=4)[0]) - 1


def outer_border(labels_HW: NDArray[np.int32]) -> NDArray[np.bool_]:
    """The line inside the edge of all nuclei together, `BORDER_PX` wide; beyond the picture there is background."""
    inside_HW = np.pad((labels_HW > 0).astype(np.uint8), BORDER_PX)
    size = 2 * BORDER_PX + 1
    kernel = np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    line_HW = (inside_HW > 0) & (np.asarray(cv2.erode(inside_HW, kernel)) == 0)
    return np.asarray(line_HW[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX])


def solution_border(labels_HW: NDArray[np.int32]) -> NDArray[np.bool_]:
    """The complete border of every nucleus: the outer line, and the line between nuclei that touch."""
    ids_HW = labels_HW.astype(np.uint16)
    kernel = np.ones((3, 3), np.uint8)
    beyond_all = np.iinfo(np.uint16).max
    largest_HW = np.asarray(cv2.dilate(ids_HW, kernel))
    smallest_HW = np.asarray(cv2.erode(np.where(ids_HW == 0, beyond_all, ids_HW).astype(np.uint16), kernel))
    return np.asarray(outer_border(labels_HW) | ((ids_HW > 0) & (largest_HW != smallest_HW)))


# --------------------------------------------------------------------------------------------------- folders
def cluster_seed(config: SyntheticConfig, split: SplitName, index: int) -> np.random.SeedSequence:
    """The seed of one cluster of a split."""
    return np.random.SeedSequence([config.seed, SPLITS.index(split), index])


def num_samples(config: SyntheticConfig, split: SplitName) -> int:
    return config.num_train if split == "train" else config.num_test


def write_nucleus_folder(config: SyntheticConfig, root: Path) -> None:
    """Draw `root/{train,test}/NAME.png` with `solutions/NAME.png`, the layout of the nucleus data set."""
    for split, name, seed in _planned(config):
        write_nucleus_pair(root / split, name, draw_cluster(config, seed))


def write_nucleus_pair(folder: Path, name: str, cluster: Sample) -> None:
    """Write a cluster, uint8 with C = 1, as `NAME.png`, and the complete border of its nuclei in `solutions`."""
    write_png(folder / f"{name}.png", cluster.image_HWC[..., 0].astype(np.uint8))
    write_png(folder / "solutions" / f"{name}.png", solution_border(cluster.labels_HW).astype(np.uint8) * 255)


def write_labels_folder(config: SyntheticConfig, root: Path, height: int = 256, width: int = 256) -> None:
    """Draw fields: `root/{train,test}/images/NAME.png` with `masks/NAME.tif` (int32 ids)."""
    for split, name, seed in _planned(config):
        sample = draw_field(config, seed, height, width)
        write_png(root / split / "images" / f"{name}.png", sample.image_HWC[..., 0].astype(np.uint8))
        write_labels_tiff(root / split / "masks" / f"{name}.tif", sample.labels_HW)


def _planned(config: SyntheticConfig) -> Iterator[tuple[SplitName, str, np.random.SeedSequence]]:
    for split in SPLITS:
        for index in range(num_samples(config, split)):
            yield split, f"drawn_{index:05d}", cluster_seed(config, split, index)
