"""OME-Zarr folders, versions 0.4 (Zarr 2) and 0.5 (Zarr 3): https://ngff.openmicroscopy.org/0.5/.

Only the chunks that a window touches are read. A chunk that is not there holds the fill value: the format leaves out
empty chunks, so unlike a TIFF's it is no sign of damage.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nuciseg.errors import DataError
from nuciseg.sources.stored import Stored, micrometres

_SIGNS = ("zarr.json", ".zgroup", ".zarray")


def is_ome_zarr(path: Path) -> bool:
    """Whether the folder `path` describes an OME-Zarr image, whatever it is called."""
    for name in ("zarr.json", ".zattrs"):
        try:
            described = json.loads((path / name).read_bytes())
            attributes = described["attributes"] if name == "zarr.json" else described
            if "multiscales" in _get(attributes, "ome", attributes):
                return True
        except (OSError, ValueError, TypeError, KeyError):  # no file, or one with something else
            continue
    return False


def open_ome_zarr(path: Path) -> Stored:
    """The finest level of the image in the folder `path`. Raises DataError, and what zarr raises on damaged files."""
    if not any((path / sign).is_file() for sign in _SIGNS):
        raise DataError(f"{path} is a folder but no OME-Zarr image; give an image file or the folder of an image.")
    import zarr

    group = zarr.open(path, mode="r")
    attributes: Any = group.attrs.asdict()
    ome = _get(attributes, "ome", attributes)  # from 0.5 on everything is under this key
    if not isinstance(group, zarr.Group) or not _get(ome, "multiscales", None):
        raise DataError(
            f"{path} describes no OME-Zarr image; give the folder of one image, such as {path / '0'} where it holds "
            "several."
        )
    image = ome["multiscales"][0]
    axes = _get(image, "axes", None)
    if not axes or not all(isinstance(axis, dict) for axis in axes):
        raise DataError(f"{path} is OME-Zarr of a version below 0.4; convert it to 0.4 or 0.5.")
    finest = image["datasets"][0]
    pixels = group[finest["path"]]
    if not isinstance(pixels, zarr.Array):
        raise DataError(f"{path} holds no array {finest['path']}, its finest image; replace it with a whole one.")
    letters = "".join(str(axis["name"]).upper() for axis in axes)
    scales = [
        each["scale"]
        for level in (image, finest)
        for each in _get(level, "coordinateTransformations", ())
        if each["type"] == "scale"
    ]

    def size_um(letter: str) -> float | None:
        axis = letters.index(letter)
        return micrometres(math.prod(float(scale[axis]) for scale in scales), str(_get(axes[axis], "unit", "")))

    channels = _get(_get(ome, "omero", {}), "channels", ())
    return Stored(
        pixels=pixels,
        axes=letters,
        least_px=math.prod(pixels.chunks),
        channel_names=tuple(str(_get(channel, "label", "")) for channel in channels),
        pixel_width_um=size_um("X"),
        pixel_height_um=size_um("Y"),
    )


def _get(mapping: Any, key: str, default: Any) -> Any:
    """`mapping[key]`, or TypeError, as a decoder would raise, where the file has another kind of value there."""
    try:
        return mapping[key]
    except KeyError:
        return default
