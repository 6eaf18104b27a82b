"""From an array with channels, stacks and colour to the one grey plane that is wanted.

Luminance is that of ITU-R BT.601: 0.299 red + 0.587 green + 0.114 blue.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuciseg.errors import DataError
from nuciseg.images import decoding
from nuciseg.sources.stored import Stored

Projection = Literal["max", "mean"]

_STACKS = {"Z": "slices", "T": "time points"}

_SAMPLES = {2: ("grey", "alpha"), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}

COLOUR = "Colour was turned to grey (0.299 red + 0.587 green + 0.114 blue); --channel 0, 1 or 2 takes one colour alone."


@dataclass(frozen=True)
class Plane:
    """One plane of `stored`: `index` holds a number for every axis but those of rows, columns and colour samples.

    `planes` are the numbers along `stack_axis`, several where they are projected.
    """

    path: Path
    stored: Stored
    index: tuple[int | slice, ...]
    stack_axis: int | None
    planes: range
    projection: Projection | None

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.stored.pixels.shape
        return shape[self.stored.axes.index("Y")], shape[self.stored.axes.index("X")]

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the pixels are read as: uint8, uint16 or float32."""
        stored = self.stored.pixels.dtype.newbyteorder("=")
        if stored in (np.bool_, np.uint8):
            return np.dtype(np.uint8)
        return np.dtype(np.uint16 if stored == np.uint16 else np.float32)

    def possible_notices(self) -> tuple[str, ...]:
        """What may have to be said of this plane, judged by its kind alone."""
        notices = [COLOUR] if self._num_samples() > 2 else []
        if not np.can_cast(self.stored.pixels.dtype, self.dtype):
            notices.append(self._rounded())
        return tuple(notices)

    def read(self, rows: slice, columns: slice) -> tuple[NDArray[Any], tuple[str, ...]]:
        """The pixels of a window, HW, and what has to be said of them. Raises DataError.

        Pixels that are no finite numbers, or too large for float32, come out as such.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self._projected(rows, columns)

    def _projected(self, rows: slice, columns: slice) -> tuple[NDArray[Any], tuple[str, ...]]:
        total_HW, said = self._block(self.planes[0], rows, columns)
        if self.projection is None:
            return total_HW, said
        if self.projection == "mean":
            total_HW = total_HW.astype(np.float64)
        add = np.maximum if self.projection == "max" else np.add
        for number in self.planes[1:]:  # one at a time: a stack may be much larger than the memory
            block_HW, notices = self._block(number, rows, columns)
            add(total_HW, block_HW, out=total_HW)
            said += tuple(notice for notice in notices if notice not in said)
        if self.projection == "mean":
            total_HW /= len(self.planes)
            if self.dtype.kind == "u":
                np.rint(total_HW, out=total_HW)
        return total_HW.astype(self.dtype, copy=False), said

    def _block(self, number: int, rows: slice, columns: slice) -> tuple[NDArray[Any], tuple[str, ...]]:
        axes = self.stored.axes
        index = list(self.index)
        index[axes.index("Y")], index[axes.index("X")] = rows, columns
        if self.stack_axis is not None:
            index[self.stack_axis] = number
        with decoding(self.path):
            raw = np.asarray(self.stored.pixels[tuple(index)])
        kept = "".join(axis for axis, each in zip(axes, index, strict=True) if isinstance(each, slice))
        raw = raw.transpose([kept.index(axis) for axis in "YXS" if axis in kept])
        return self._grey(raw)

    def _grey(self, raw: NDArray[Any]) -> tuple[NDArray[Any], tuple[str, ...]]:
        """HW of `dtype` from HW or HWS as they are stored."""
        said: tuple[str, ...] = ()
        if raw.ndim == 3 and raw.shape[-1] in (2, 4):
            raw = _without_alpha(self.path, raw)
        pixels = raw.astype(self.dtype)
        if not np.can_cast(raw.dtype, self.dtype) and not np.array_equal(pixels, raw, equal_nan=raw.dtype.kind == "f"):
            said += (self._rounded(),)
        if pixels.ndim == 3:
            if np.any(pixels != pixels[..., :1]):
                said = (COLOUR, *said)
            pixels = _luminance(pixels) if pixels.shape[-1] == 3 else pixels[..., 0]
        return np.ascontiguousarray(pixels), said

    def _num_samples(self) -> int:
        axis = self.stored.axes.find("S")
        return self.stored.pixels.shape[axis] if axis >= 0 and isinstance(self.index[axis], slice) else 1

    def _rounded(self) -> str:
        return f"{self.stored.pixels.dtype} pixels were rounded to float32."


def choose_plane(path: Path, stored: Stored, channel: int | None, plane: int | Projection | None) -> Plane:
    """The plane that `channel` and `plane` mean.

    Raises DataError where they leave a choice or mean what is not there, and for pixels that are no real numbers.
    """
    _require_image(path, stored)
    axes, shape = stored.axes, stored.pixels.shape
    samples = axes.find("S")
    is_colour = samples >= 0 and 1 < shape[samples] <= 4
    long_axes = [axis for axis, letter in enumerate(axes) if shape[axis] > 1 and letter not in "YX"]
    channel_axes = [axis for axis in long_axes if axes[axis] == "C" or (axes[axis] == "S" and not is_colour)]
    stack_axes = [axis for axis in long_axes if axes[axis] not in "CS"]
    for several in (channel_axes, stack_axes):
        if len(several) > 1:
            counts = " and ".join(_counted(axes[axis], shape[axis]) for axis in several)
            raise DataError(f"{path} holds {counts}, too many to choose from by one number; save one of either alone.")
    index: list[int | slice] = [0] * len(axes)
    if is_colour:
        index[samples] = slice(None)
    if is_colour and channel is not None and not channel_axes:
        index[samples] = _channel(path, shape[samples], _SAMPLES[shape[samples]], channel)
    elif channel_axes:
        index[channel_axes[0]] = _channel(path, shape[channel_axes[0]], stored.channel_names, channel)
    elif channel is not None:
        _channel(path, 1, stored.channel_names, channel)
    stack_axis = stack_axes[0] if stack_axes else None
    letter, num_planes = (axes[stack_axis], shape[stack_axis]) if stack_axis is not None else ("", 1)
    planes = _planes(path, letter, num_planes, plane)
    return Plane(path, stored, tuple(index), stack_axis, planes, plane if isinstance(plane, str) else None)


def _require_image(path: Path, stored: Stored) -> None:
    axes, shape, dtype = stored.axes, stored.pixels.shape, stored.pixels.dtype
    if len(axes) != len(shape) or axes.count("Y") != 1 or axes.count("X") != 1:
        raise DataError(f"{path} has the axes {axes}, {shape}, where rows and columns are needed; save a single plane.")
    if 0 in shape:
        raise DataError(f"{path} holds no pixels; replace the file.")
    if dtype.kind not in "biuf":
        raise DataError(f"{path} holds {dtype} pixels; save whole or real numbers, such as 16-bit ones.")


def _channel(path: Path, num_channels: int, names: Iterable[str], channel: int | None) -> int:
    counted = _counted_channels(num_channels, names)
    if channel is None:
        raise DataError(
            f"{path} has {counted} where one is needed; choose it with --channel N, counted from 0 "
            f"(0 to {num_channels - 1})."
        )
    if not 0 <= channel < num_channels:
        raise DataError(
            f"{path} has no channel {channel} but {counted}; --channel is counted from 0 (0 to {num_channels - 1})."
        )
    return channel


def _planes(path: Path, letter: str, num_planes: int, plane: int | Projection | None) -> range:
    if isinstance(plane, str) or (plane is None and num_planes == 1):
        return range(num_planes)
    counted = _counted(letter, num_planes)
    if plane is None:
        raise DataError(
            f"{path} holds {counted} where one plane is needed; choose it with --plane N, counted from 0 "
            f"(0 to {num_planes - 1}), or project them with --plane max or --plane mean."
        )
    if not 0 <= plane < num_planes:
        raise DataError(
            f"{path} has no plane {plane} but {counted}; --plane is counted from 0 (0 to {num_planes - 1})."
        )
    return range(plane, plane + 1)


def _counted_channels(num_channels: int, names: Iterable[str]) -> str:
    listed = ", ".join(f"{number} {name}" for number, name in zip(range(num_channels), names, strict=False) if name)
    return _counted("C", num_channels) + (f" ({listed})" if listed else "")


def _counted(letter: str, number: int) -> str:
    name = "channels" if letter in ("C", "S") else _STACKS.get(letter, "planes")
    return f"{number} {name if number > 1 else name.removesuffix('s')}" + (f" ({letter})" if letter in _STACKS else "")


def _without_alpha(path: Path, pixels_HWS: NDArray[Any]) -> NDArray[Any]:
    """Raises DataError where alpha, the last sample, hides something: nobody can say what lies below."""
    opaque = np.iinfo(pixels_HWS.dtype).max if pixels_HWS.dtype.kind in "iu" else 1
    if num_hidden := int(np.count_nonzero(pixels_HWS[..., -1] != opaque)):
        num_samples = pixels_HWS.shape[-1]
        raise DataError(
            f"{path} has {num_hidden} transparent pixels; save it without an alpha channel, or choose one of its "
            f"{_counted_channels(num_samples, _SAMPLES[num_samples])} with --channel N."
        )
    return pixels_HWS[..., :-1]


def _luminance(rgb_HWS: NDArray[Any]) -> NDArray[Any]:
    """HW of the same type; three equal samples come back exactly."""
    is_whole = rgb_HWS.dtype.kind == "u"
    exact: NDArray[Any] = rgb_HWS.astype(np.uint32 if is_whole else np.float64)
    # In thousandths, so that whole numbers stay exact.
    thousandths_HW = 299 * exact[..., 0] + 587 * exact[..., 1] + 114 * exact[..., 2]
    grey_HW = (thousandths_HW + 500) // 1000 if is_whole else thousandths_HW / 1000
    return np.asarray(grey_HW.astype(rgb_HWS.dtype))
