"""Small pictures for the page: examples, faults with a frame around them, pairs that show the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.data.formats import nucleus
from nuciseg.errors import DataError
from nuciseg.exploring.duplicates import Place
from nuciseg.exploring.faults import Box, Fault
from nuciseg.exploring.inspection import Look
from nuciseg.exploring.reading import DataSet
from nuciseg.images import read_image
from nuciseg.pages import Picture, photograph
from nuciseg.plots import RGB, overlay_rgb, stretch
from nuciseg.types import Record

SIDE_PX = 168  # of a picture: two side by side on a phone
WINDOW_PX = 96  # least side of what is shown around a fault
WINDOW_BOXES = 3  # and so many times the fault
FRAME = (255, 64, 64)
LINE = (255, 170, 40)


def example(data: DataSet, look: Look) -> Picture:
    """An image with its nuclei outlined."""
    sample = _part(data, look.split).sample(look.position)
    light = look.light.brightness
    caption = f"{look.file}: {len(look.nuclei)} nuclei, {look.height} x {look.width} px"
    caption += f", brightness {light:.3f}" if light is not None else ""
    scale = SIDE_PX / max(sample.labels_HW.shape)
    return photograph(overlay_rgb(sample.image_HWC, sample.labels_HW, scale=scale, dim=1), caption)


def same(data: DataSet, first: Place, second: Place, caption: str) -> Picture:
    """Two images side by side."""
    sides = []
    for place in (first, second):
        rgb = stretch(_part(data, place.split).sample(place.position).image_HWC)
        sides.append(_fitted(rgb, (0, 0, *rgb.shape[:2])))
    height = max(side.shape[0] for side in sides)
    padded = [np.pad(side, ((0, height - side.shape[0]), (0, 4), (0, 0))) for side in sides]
    return photograph(np.hstack(padded), caption)


def fault_picture(data: DataSet, faults: Sequence[Fault]) -> Picture | None:
    """The surroundings of the worst of the faults of one file, all of them framed; None where nothing can be shown."""
    worst = faults[0]
    more = f" (and {len(faults) - 1} more there)" if len(faults) > 1 else ""
    shown = _marked(data, worst)
    if shown is None:
        return None
    window = _window(worst.box, shown.shape[:2])
    scale = SIDE_PX / max(window[2] - window[0], window[3] - window[1])
    picture = _fitted(shown, window)
    for fault in faults:
        if fault.box is not None:
            _frame(picture, fault.box, window, scale)
    return photograph(picture, f"{worst.file}: {worst.what}{more}")


def _marked(data: DataSet, fault: Fault) -> RGB | None:
    """The whole image, its drawn lines (`nucleus` layout) or nuclei marked; where it cannot be opened with its labels,
    the plain image."""
    part = _part(data, fault.split) if any(part.split == fault.split for part in data.parts) else None
    if part is not None:
        for position, record in enumerate(part.records):
            if record.id == fault.id:
                sample = part.sample(position)
                if data.format_name != nucleus.NAME:
                    return overlay_rgb(sample.image_HWC, sample.labels_HW, dim=1, fill=0.1)
                return _with_lines(sample.image_HWC[..., 0], nucleus.read_solution(record.label_paths[0]))
    for broken in data.broken:
        if broken.split == fault.split and broken.path is not None and data.relative(broken.path) == fault.file:
            return _what_can_be_read(broken.record, broken.path)
    return None


def _what_can_be_read(record: Record | None, path: Any) -> RGB | None:
    try:
        image_HW = read_image(path)
    except DataError:
        return None  # the page names the file and says why
    return stretch(image_HW) if record is None or image_HW.max(initial=0) else stretch(np.zeros_like(image_HW))


def _with_lines(image_HW: NDArray[Any], solution_HW: NDArray[np.uint8]) -> RGB:
    rgb = stretch(image_HW)
    rgb[solution_HW > nucleus.BORDER_THRESHOLD] = LINE
    return rgb


def _window(box: Box | None, shape: tuple[int, ...]) -> Box:
    """What is shown: the fault and its surroundings; the whole image where it is small or the fault has no place."""
    height, width = shape[:2]
    if box is None or max(height, width) <= 2 * WINDOW_PX:
        return 0, 0, height, width
    side = max(WINDOW_PX, WINDOW_BOXES * max(box[2] - box[0], box[3] - box[1]))
    top = int(np.clip((box[0] + box[2] - side) // 2, 0, max(height - side, 0)))
    left = int(np.clip((box[1] + box[3] - side) // 2, 0, max(width - side, 0)))
    return top, left, min(top + side, height), min(left + side, width)


def _fitted(rgb: RGB, window: Box) -> RGB:
    top, left, bottom, right = window
    cut = rgb[top:bottom, left:right]
    scale = SIDE_PX / max(cut.shape[:2])
    size = (max(1, round(cut.shape[1] * scale)), max(1, round(cut.shape[0] * scale)))
    way = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
    return np.ascontiguousarray(cv2.resize(cut, size, interpolation=way), np.uint8)


def _frame(picture: RGB, box: Box, window: Box, scale: float) -> None:
    """A frame a little outside of the fault, so that it can be seen."""
    top, left = (round((box[axis] - window[axis]) * scale) - 4 for axis in (0, 1))
    bottom, right = (round((box[axis + 2] - window[axis]) * scale) + 4 for axis in (0, 1))
    cv2.rectangle(picture, (left, top), (right, bottom), FRAME, 1)


def _part(data: DataSet, split: str) -> Any:
    return next(part for part in data.parts if part.split == split)
