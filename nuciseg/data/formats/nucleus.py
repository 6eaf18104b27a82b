"""The layout of the Kaggle data set gnovis/nucleus: nucleus clusters, and solutions with the border of every nucleus.

`ROOT/{train,test}/X.png` beside `ROOT/{train,test}/solutions/X.png`, or ROOT itself being one such folder. Images are
8- or 16-bit grey: 0 outside the cluster, the cluster's outer border drawn in the highest value (255 or 65535).
Images without that line are read as well. Solutions are 8-bit and of the same size, 255 on the complete border of every
nucleus and 0 elsewhere. A file `groups.csv` (columns `id,group`) beside the images may say which of them were cut from
one field.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuciseg.data.formats.folders import LeftOut, groups_of, pair_files, refuse_other_size, split_folder
from nuciseg.errors import DataError
from nuciseg.images import read_image
from nuciseg.labels import enclosed_regions, regrow, relabel
from nuciseg.types import Record, Sample

NAME = "nucleus"
LAYOUT = "train/X.png beside train/solutions/X.png"

SOLUTIONS = "solutions"
BORDER_THRESHOLD = 127  # of 255: halfway
# A region of fewer pixels is a speck between drawn lines. The smallest nucleus of gnovis/nucleus has 561 pixels.
MIN_NUCLEUS_AREA_PX = 20
# How far a nucleus grows over the line. The drawn lines of gnovis/nucleus reach 5.8 px where several meet.
MAX_BORDER_DEPTH_PX = 8.0


def holds(folder: Path) -> bool:
    """Whether there is a folder `solutions` in `folder`."""
    return (folder / SOLUTIONS).is_dir()


def read(root: Path, split: str, left_out: list[LeftOut] | None = None) -> list[Record]:
    """The records of a split, sorted by id.

    The group is what `groups.csv` says. File names of gnovis/nucleus say nothing about the field a crop was cut from,
    so without that file each image is its own group; only images with the same bytes share one. Raises `DataError` for
    a missing or empty folder and, without a list `left_out` to note them in, for unpaired files and a bad `groups.csv`.
    """
    folder = split_folder(Path(root), split, holds)
    pairs = pair_files(folder, folder / SOLUTIONS, (".png",), "solution", left_out)
    groups = groups_of(folder, {id: image for id, image, _ in pairs}, left_out)
    return [Record(id, image, (solution,), groups[id]) for id, image, solution in pairs]


def load(record: Record) -> Sample:
    """Decode one pair: `image_HWC` uint8 or uint16 with C = 1, `labels_HW` int32 (see `labels_from_solution`).

    Raises `DataError` for a file that is not grey, a solution that is not 8-bit or of another size, and a solution that
    encloses no nucleus.
    """
    assert record.image_path is not None
    image_HW, solution_HW = read_image(record.image_path), read_solution(record.label_paths[0])
    refuse_other_size(record.label_paths[0], solution_HW.shape, image_HW.shape)
    labels_HW = labels_from_solution(image_HW, solution_HW)
    if not labels_HW.any():
        what = "encloses no nucleus" if np.any(solution_HW > BORDER_THRESHOLD) else "is all black"
        raise DataError(
            f"The solution {record.label_paths[0]} {what}; draw the closed border of every nucleus in white (255) "
            "or remove the pair."
        )
    return Sample(image_HW[..., None], labels_HW)


def labels_from_solution(image_HW: NDArray[np.generic], solution_HW: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The nuclei that a drawn border encloses: int32, 0 background, 1..N from the top left.

    A nucleus is a 4-connected region without border that does not touch the image's edge and whose median in the
    image is above 0. Background enclosed between nuclei is 0 there, and area cannot tell it from a nucleus: such
    holes reach 692 px in gnovis/nucleus, where the smallest nucleus has 561 px. Regions below `MIN_NUCLEUS_AREA_PX`
    are specks left between lines, no nuclei. Each nucleus then grows over the drawn line, which belongs to the
    nearest nucleus within `MAX_BORDER_DEPTH_PX`, so that neighbours touch.
    """
    border_HW = solution_HW > BORDER_THRESHOLD
    regions_HW = enclosed_regions(border_HW, MIN_NUCLEUS_AREA_PX)
    ids_N = np.arange(1, regions_HW.max() + 1)
    if ids_N.size == 0:
        return regions_HW
    holes_N = ids_N[np.asarray(ndimage.median(image_HW.astype(np.float32), regions_HW, ids_N)) == 0]
    labels_HW = relabel(np.where(np.isin(regions_HW, holes_N), 0, regions_HW).astype(np.int32))
    return regrow(labels_HW, border_HW, MAX_BORDER_DEPTH_PX)


def read_solution(path: Path) -> NDArray[np.uint8]:
    """The drawn borders at `path` (H, W), as they are in the file. Raises `DataError`."""
    pixels_HW = read_image(path)
    if pixels_HW.dtype != np.uint8:
        raise DataError(f"{path} holds {pixels_HW.dtype} pixels; convert it to 8 bit, with the border drawn in 255.")
    return pixels_HW.astype(np.uint8, copy=False)
