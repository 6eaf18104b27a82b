"""The nuclei of images that belong to no data set, whatever their size and that of their nuclei."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from nuciseg.data.formats import CLUSTER_FORMATS
from nuciseg.engine.checkpoint import find_checkpoint
from nuciseg.engine.fields import TILE_PX, ArrayPixels, Grid, Pixels, assembled, find_nuclei
from nuciseg.engine.folding import folded
from nuciseg.engine.network import Network, load_network
from nuciseg.engine.nucleus_size import estimated_diameter, known_sizes, scale_for
from nuciseg.engine.precision import local_device
from nuciseg.errors import DataError
from nuciseg.images import saturated_value
from nuciseg.types import Diameters, Instances, Window

MOST_CUT_OUT_PX = 1 << 20  # larger images are no clusters cut out of a field
MOST_LIT = 0.9  # share of pixels that are not 0; of the images of gnovis/nucleus no more are
LEAST_DRAWN = 0.5  # of those that lie beside a 0, a drawn border has more; in that data set it has 0.99
ONE_PIECE = 0.99  # of those, the least that lie together
LEAST_PART = 0.01  # of those; what is smaller is a speck, such as noise that was cut off at 0 leaves
# So many times `tile_px` a tile may have along its side in the image: where large nuclei are reduced for the network,
# the image's pixels fill the memory. With 2 the peak is 1.9 GB on 12,000 x 12,000 pixels, with 4 it was 3.8 GB:
# /usr/bin/time -v python -m nuciseg.predict IMAGE --diameter 160 --no-overlay
MOST_REDUCED = 2
LARGEST_IN_SIDES = 4  # a diameter above so many times the image's longer side is a mistake, in its unit for example
BRIDGED_PX = 8  # `cut --gap` lets nuclei of one cluster lie apart


@dataclass(frozen=True)
class Plan:
    """How an image will be shown to the network. `diameter_px` is None where it is not known and was not needed."""

    grid: Grid
    diameter_px: float | None
    estimated: bool


@dataclass(frozen=True)
class Predictor:
    """A network with what its checkpoint says of the images that it is for."""

    network: Network
    checkpoint: Path
    trained_on: Diameters | None
    for_clusters: bool | None  # None: the checkpoint does not say

    @staticmethod
    def load(checkpoint: Path, device: torch.device) -> Predictor:
        """The best checkpoint that `checkpoint` means. Raises CheckpointError."""
        folder = find_checkpoint(checkpoint)
        network, loaded = load_network(folder, device)
        network = replace(network, model=folded(network.model, network.in_channels, network.stride))
        trained_on = loaded.diameters and known_sizes(loaded.diameters, loaded.config.augment)
        for_clusters = None if loaded.data_format is None else loaded.data_format in CLUSTER_FORMATS
        return Predictor(network, folder, trained_on, for_clusters)

    def plan(self, pixels: Pixels, name: str, diameter_px: float | None = None, tile_px: int = TILE_PX) -> Plan:
        """How to show an image whose nuclei have this diameter, or one that is estimated.

        The network sees tiles of `tile_px` x `tile_px` pixels; smaller ones, down to 256, where nuclei are so large
        that these would be more than `MOST_REDUCED` times as many pixels of the image along a side.

        Raises DataError, which calls the image `name`, where the network is for another sort of image: for clusters
        that were cut out on black, or for whole fields; and where `diameter_px` is beyond the image, by far.
        """
        height, width = pixels.shape
        if diameter_px is not None and diameter_px > LARGEST_IN_SIDES * max(height, width):
            raise DataError(
                f"nuclei of {diameter_px:g} px are larger than {name} ({height} x {width} px); check --diameter and "
                "the size of a pixel"
            )
        self._refuse_another_sort(pixels, name)
        if self.for_clusters:
            whole = max(height, width)
            scale = 1.0 if diameter_px is None or self.trained_on is None else scale_for(diameter_px, self.trained_on)
            return Plan(Grid.at(scale, max(tile_px, _multiple(whole * scale))), diameter_px, estimated=False)
        if self.trained_on is None:
            return Plan(Grid.at(1.0, tile_px), diameter_px, estimated=False)
        estimated = diameter_px is None
        if diameter_px is None:
            diameter_px = estimated_diameter(self.network, pixels, self.trained_on)
        scale = 1.0 if diameter_px is None else scale_for(diameter_px, self.trained_on)
        return Plan(Grid.at(scale, min(tile_px, _multiple(MOST_REDUCED * tile_px * scale))), diameter_px, estimated)

    def windows(self, pixels: Pixels, plan: Plan) -> Iterator[Window]:
        """The nuclei, window by window; see `find_nuclei`."""
        return find_nuclei(self.network, pixels, plan.grid, count_open_borders=bool(self.for_clusters))

    def instances(self, image_HW: NDArray[Any], name: str = "image", diameter_px: float | None = None) -> Instances:
        """All nuclei of an image in memory. Raises DataError as `plan` does."""
        pixels = ArrayPixels(image_HW)
        windows = list(self.windows(pixels, self.plan(pixels, name, diameter_px)))
        found = assembled(iter(windows), pixels.shape)
        return replace(found, num_open_borders=windows[0].num_open_borders if len(windows) == 1 else None)

    def _refuse_another_sort(self, pixels: Pixels, name: str) -> None:
        if self.for_clusters is None:
            return
        if self.for_clusters and not looks_cut_out(pixels):
            raise DataError(
                f"{name} is no cluster of nuclei cut out on black, which {self.checkpoint} was trained on; for whole "
                "fields take --checkpoint nuciseg/fields"
            )
        if not self.for_clusters and looks_cut_out(pixels, and_marked=True):
            raise DataError(
                f"{name} is a cluster of nuclei cut out on black, but {self.checkpoint} was trained on whole fields; "
                "take --checkpoint nuciseg/separator"
            )


def loaded_predictor(checkpoint: Path) -> Predictor:
    """The predictor of `checkpoint` on the first GPU or the CPU, kept in memory as long as its files stay as they are.

    Raises CheckpointError.
    """
    folder = find_checkpoint(checkpoint).resolve()
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return _loaded_predictor(folder, tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in files))


@lru_cache(maxsize=2)
def _loaded_predictor(folder: Path, files: tuple[tuple[str, int, int], ...]) -> Predictor:
    return Predictor.load(folder, local_device())


def refuse_unusable(image_HW: NDArray[Any]) -> None:
    """Raise DataError for what is no grey image of finite numbers."""
    if image_HW.ndim != 2 or image_HW.size == 0 or image_HW.dtype.kind not in "uif":
        raise DataError(
            f"an image of shape {image_HW.shape} and type {image_HW.dtype} cannot be predicted; give one grey plane of "
            "numbers, rows x columns"
        )
    if image_HW.dtype.kind == "f" and not np.isfinite(image_HW).all():
        num_wrong = int(np.count_nonzero(~np.isfinite(image_HW)))
        raise DataError(f"{num_wrong} pixels of the image are NaN or infinite; replace them, by 0 for example")


def looks_cut_out(pixels: Pixels, *, and_marked: bool = False) -> bool:
    """Whether the image is a cluster cut out on black: a part is exactly 0, and the rest is in one piece, or in a few
    that lie close together, or has its border drawn in the largest value.

    With `and_marked` only where it is in one piece and its border is drawn, too: one nucleus in a field from which the
    background was subtracted is no cluster.
    """
    height, width = pixels.shape
    if height * width > MOST_CUT_OUT_PX:
        return False
    image_HW = pixels.read(0, 0, height, width)
    lit_HW = image_HW != 0
    if not 0 < np.count_nonzero(lit_HW) <= MOST_LIT * lit_HW.size:
        return False
    rim_HW = lit_HW & (cv2.dilate((~lit_HW).view(np.uint8), np.ones((3, 3), np.uint8)) > 0)
    is_marked = np.count_nonzero(image_HW[rim_HW] == saturated_value(image_HW)) >= LEAST_DRAWN * np.count_nonzero(
        rim_HW
    )
    if and_marked:
        return bool(is_marked and _in_one_piece(lit_HW))
    return bool(is_marked or _in_one_piece(lit_HW))


def _in_one_piece(lit_HW: NDArray[np.bool_]) -> bool:
    """Whether hardly anything of a mask lies apart from the rest, or is a speck."""
    num_lit = np.count_nonzero(lit_HW)
    parts = cv2.connectedComponentsWithStats(lit_HW.view(np.uint8), connectivity=8)[2][1:, cv2.CC_STAT_AREA]
    if parts[parts >= LEAST_PART * num_lit].sum() < ONE_PIECE * num_lit:
        return False
    bridged_HW = cv2.dilate(lit_HW.view(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (BRIDGED_PX + 1,) * 2))
    pieces_HW = cv2.connectedComponents(bridged_HW, connectivity=8)[1]
    return bool(np.bincount(pieces_HW[lit_HW]).max() >= ONE_PIECE * num_lit)


def _multiple(length_px: float) -> int:
    """The smallest multiple of 256 that is not below: tiles begin on whole strides of every network."""
    return 256 * max(1, -(-int(np.ceil(length_px)) // 256))
