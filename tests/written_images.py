"""Image files for the tests of nuciseg.sources, written with the libraries that microscopists use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from nuciseg.sources import open_source

GREY8 = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
GREY16 = np.random.default_rng(1).integers(0, 4096, (40, 60), dtype=np.uint16)
RGB = np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8)
STACK = np.random.default_rng(3).integers(0, 65536, (5, 40, 60), dtype=np.uint16)
CHANNELS = np.random.default_rng(4).integers(0, 65536, (2, 40, 60), dtype=np.uint16)


def whole(path: Path, **options: Any) -> np.ndarray:
    with open_source(path, **options) as source:
        return source.read(0, 0, *source.shape)


def save_tiff(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, pixels, **{"photometric": "minisblack", **options})
    return path


def save_zarr(
    path: Path, pixels: np.ndarray, letters: str, version: str = "0.5", chunk: int = 16, **image: Any
) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    group.create_array("0", data=pixels, chunks=(*(1,) * (pixels.ndim - 2), chunk, chunk))
    kinds = {"t": "time", "c": "channel"}
    scale = [0.5 if axis in "yx" else 2.0 for axis in letters]
    names = [{"label": name} for name in image.pop("names", ())]
    described = {
        "axes": [{"name": axis, "type": kinds.get(axis, "space"), "unit": "micrometer"} for axis in letters],
        "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}],
        **image,
    }
    attributes = {"multiscales": [described], "omero": {"channels": names}}
    group.attrs.update(attributes if version == "0.4" else {"ome": {"version": "0.5", **attributes}})
    return path


def read_by_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on small images are read as whole slides are."""
    for module in ("nuciseg.sources", "nuciseg.sources.tiff", "nuciseg.sources.stored"):
        monkeypatch.setattr(f"{module}.WHOLE_PX", 32 * 32)
