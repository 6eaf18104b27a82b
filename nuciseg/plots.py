"""Pictures of results, all rgb_HWC uint8: nuclei outlined on their image, input | truth | prediction, contact sheets.

A nucleus keeps its colour from truth to prediction, and red is kept for what is wrong: a true nucleus that was not
found and a predicted one that matches none. The colours are those of Okabe & Ito (2008, jfly.uni-koeln.de/color)
lightened for a black ground, without their red, so that neighbours differ for colour-blind readers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nuciseg.metrics import without_ignored

RGB = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]

COLORS = np.array(
    [(86, 180, 233), (240, 228, 66), (0, 200, 140), (230, 159, 0), (204, 140, 200), (150, 235, 235), (190, 220, 110)],
    dtype=np.uint8,
)
WRONG = np.array((255, 64, 64), dtype=np.uint8)
PAPER = np.array((255, 255, 255), dtype=np.uint8)
INK = (30, 30, 30)
GREY = (110, 110, 110)
FAILED = (200, 20, 20)
MATCH_IOU = 0.5  # the cluster score's
STRETCH_PERCENTILES = (1.0, 99.8)
GAP_PX = 4
FRAME_PX = 3


def stretch(image: NDArray[Any]) -> RGB:
    """`image` (HW, HW1 or HWC; any number type) as rgb_HWC uint8, its percentiles 1 and 99.8 made black and white.

    Pixels that are exactly 0 (outside a cut-out cluster) or the brightest value (its drawn border, saturation) are left
    out of the percentiles. The first three channels are shown, or the first where there are fewer.
    """
    image_HWC = image[..., None] if image.ndim == 2 else image
    image_HWC = image_HWC[..., :3] if image_HWC.shape[2] >= 3 else image_HWC[..., :1]
    channels = []
    for plane_HW in np.moveaxis(image_HWC.astype(np.float32), 2, 0):
        inside = plane_HW[(plane_HW != 0) & (plane_HW < plane_HW.max(initial=0))]
        low, high = np.percentile(inside, STRETCH_PERCENTILES) if inside.size else (0.0, 1.0)
        channels.append(np.clip((plane_HW - low) / max(high - low, 1e-6), 0, 1))
    grey_or_rgb_HWC = (255 * np.stack(channels, axis=2)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(grey_or_rgb_HWC, (*grey_or_rgb_HWC.shape[:2], 3)))


def overlay_rgb(
    image: NDArray[Any],
    labels_HW: Labels,
    colors_N3: RGB | None = None,
    *,
    scale: float = 1.0,
    fill: float = 0.15,
    dim: float = 0.75,
    outline_px: int = 1,
) -> RGB:
    """The stretched image with each nucleus outlined in its colour, `scale` times as large.

    `colors_N3` gives the colour of label i in row i - 1 (default: a cycle of COLORS). The outline is drawn inside the
    nucleus after the enlargement, so that it stays `outline_px` wide; `fill` in [0, 1] tints the inside; `dim` darkens
    the image where a white border is drawn on it, so that the outlines stand out. Labels that are not positive are
    left alone.
    """
    return outlined_rgb(stretch(image), labels_HW, colors_N3, scale=scale, fill=fill, dim=dim, outline_px=outline_px)


def outlined_rgb(
    rgb_HWC: RGB,
    labels_HW: Labels,
    colors_N3: RGB | None = None,
    *,
    scale: float = 1.0,
    fill: float = 0.15,
    dim: float = 0.75,
    outline_px: int = 1,
) -> RGB:
    """`overlay_rgb` of an image that is stretched already, as where it is drawn in parts."""
    size = (max(1, round(labels_HW.shape[1] * scale)), max(1, round(labels_HW.shape[0] * scale)))
    rgb = cv2.resize(rgb_HWC, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    rgb = dim * rgb.astype(np.float32)
    drawn_HW = _enlarge_labels(np.maximum(labels_HW, 0), size)
    if colors_N3 is None:
        colors_N3 = cycle_colors(int(drawn_HW.max(initial=0)))
    table = np.vstack([np.zeros((1, 3), np.uint8), colors_N3])
    color_HWC = table[drawn_HW].astype(np.float32)
    inside_HW1 = (drawn_HW > 0)[..., None]
    tinted = np.where(inside_HW1, (1 - fill) * rgb + fill * color_HWC, rgb)
    edge_HW1 = _inner_edge(drawn_HW, outline_px)[..., None]
    return np.where(edge_HW1, color_HWC, tinted).astype(np.uint8)


def cycle_colors(num_labels: int) -> RGB:
    """Colours of labels 1 to `num_labels`."""
    return COLORS[np.arange(num_labels) % len(COLORS)]


def matched_colors(truth_HW: Labels, prediction_HW: Labels) -> tuple[RGB, RGB]:
    """Colours of the true and of the predicted labels: the same for a pair with IoU >= 0.5, WRONG without partner.

    Labels that are not positive are background, so what the scores ignore has to be taken out of the prediction before.
    At IoU above one half a nucleus has one partner at most; a tie at exactly one half goes to the pair met first.
    """
    truth_HW, prediction_HW = np.maximum(truth_HW, 0), np.maximum(prediction_HW, 0)
    num_true, num_predicted = int(truth_HW.max(initial=0)), int(prediction_HW.max(initial=0))
    overlap = np.zeros((num_true + 1, num_predicted + 1), dtype=np.int64)
    np.add.at(overlap, (truth_HW, prediction_HW), 1)
    union = overlap.sum(axis=1, keepdims=True) + overlap.sum(axis=0, keepdims=True) - overlap
    iou = (overlap / np.maximum(union, 1))[1:, 1:]
    true_colors = np.tile(WRONG, (num_true, 1))
    predicted_colors = np.tile(WRONG, (num_predicted, 1))
    palette = cycle_colors(num_true)
    taken: set[int] = set()
    for true, predicted in np.argwhere(iou >= MATCH_IOU):
        if predicted not in taken and (true_colors[true] == WRONG).all():
            taken.add(int(predicted))
            true_colors[true] = predicted_colors[predicted] = palette[true]
    return true_colors, predicted_colors


def triptych(
    image: NDArray[Any],
    truth_HW: Labels,
    prediction_HW: Labels,
    caption: str = "",
    *,
    failed: bool | None = None,
    cell_px: int = 160,
) -> RGB:
    """Input, truth and prediction side by side, each fitted into a square of `cell_px`, under a line of text.

    The line gives `caption` and how many nuclei were found. `failed` turns frame and line red; None decides by the
    colours: failed where any nucleus has no partner. Where the truth is negative, and so ignored by the scores, nothing
    is drawn.
    """
    prediction_HW = without_ignored(prediction_HW.astype(np.int32), truth_HW >= 0)
    true_colors, predicted_colors = matched_colors(truth_HW, prediction_HW)
    present_true, present_predicted = _present(truth_HW), _present(prediction_HW)
    num_missed = int((true_colors[present_true] == WRONG).all(axis=1).sum())
    num_extra = int((predicted_colors[present_predicted] == WRONG).all(axis=1).sum())
    note = f"{len(present_true) - num_missed} of {len(present_true)} nuclei"
    note += f", {num_extra} wrong" if num_extra else ""
    if failed is None:
        failed = num_missed + num_extra > 0
    scale = cell_px / max(truth_HW.shape)
    nothing_HW = np.zeros_like(truth_HW)
    outlined = [
        overlay_rgb(image, labels_HW, colors, scale=scale, outline_px=2 if cell_px < 320 else 3)
        for labels_HW, colors in ((truth_HW, true_colors), (prediction_HW, predicted_colors))
    ]
    cells = [_centered(cell, cell_px) for cell in (overlay_rgb(image, nothing_HW, scale=scale, dim=1), *outlined)]
    divider = np.tile(PAPER, (cell_px, GAP_PX // 2, 1))
    row = np.hstack([cells[0], divider, cells[1], divider, cells[2]])
    return _framed(row, caption, note, failed)


def contact_sheet(panels: Sequence[RGB], columns: int, title: str = "", legend: str = "") -> RGB:
    """Panels in rows of `columns` on white paper, left to right, top to bottom; panels may differ in size.

    `title` stands above in large letters, `legend` under it in small grey ones. No panel gives a sheet with the title
    alone.
    """
    height = max((panel.shape[0] for panel in panels), default=1)
    width = max((panel.shape[1] for panel in panels), default=320)
    columns = max(1, min(columns, len(panels)))
    margin, pitch_y, pitch_x = 3 * GAP_PX, height + 2 * GAP_PX, width + 2 * GAP_PX
    head = margin + (30 if title else 0) + (20 if legend else 0)
    rows = -(-len(panels) // columns)
    sheet = np.tile(PAPER, (head + rows * pitch_y + margin, columns * pitch_x + 2 * margin - 2 * GAP_PX, 1))
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        top, left = head + row * pitch_y, margin + column * pitch_x
        sheet[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
    page = Image.fromarray(sheet)
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin - 2), title, fill=INK, font=_font(20))
    draw.text((margin, head - 22), legend, fill=GREY, font=_font(13))
    return np.asarray(page)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _present(labels_HW: Labels) -> NDArray[np.integer[Any]]:
    """Rows, in a table of colours, of the nuclei that have pixels; ids may have gaps."""
    return np.unique(labels_HW[labels_HW > 0]) - 1


def _enlarge_labels(labels_HW: Labels, size: tuple[int, int]) -> NDArray[np.int32]:
    """Labels at `size` (width, height). Nearest neighbour: ids cannot be mixed."""
    # OpenCV resizes float32 but not int32; ids below 2**24 survive the detour.
    resized = cv2.resize(labels_HW.astype(np.float32), size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized).astype(np.int32)


def _inner_edge(labels_HW: NDArray[np.int32], width_px: int) -> NDArray[np.bool_]:
    """Pixels of nuclei within `width_px` of another label or of the background."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width_px + 1, 2 * width_px + 1))
    values = labels_HW.astype(np.float32)
    differs = cv2.erode(values, kernel) != cv2.dilate(values, kernel)
    return np.asarray(differs & (labels_HW > 0))


def _centered(cell: RGB, cell_px: int) -> RGB:
    """`cell` in the middle of a black square."""
    square = np.zeros((cell_px, cell_px, 3), np.uint8)
    top, left = (cell_px - cell.shape[0]) // 2, (cell_px - cell.shape[1]) // 2
    square[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return square


def _framed(row: RGB, caption: str, note: str, failed: bool) -> RGB:
    """`row` under a line of text, in a frame that is red where it failed and white otherwise."""
    font = _font(13)
    text_px = 20
    height, width = row.shape[0] + text_px + 2 * FRAME_PX, row.shape[1] + 2 * FRAME_PX
    page = Image.new("RGB", (width, height), FAILED if failed else tuple(PAPER.tolist()))
    draw = ImageDraw.Draw(page)
    color = (255, 255, 255) if failed else INK
    note = f"failed: {note}" if failed else note
    room_px = width - 2 * FRAME_PX - 20 - draw.textlength(note, font=font)
    if draw.textlength(caption, font=font) > room_px:
        while caption and draw.textlength(f"{caption}...", font=font) > room_px:
            caption = caption[:-1]
        caption = f"{caption}..."
    draw.text((FRAME_PX + 3, FRAME_PX), caption, fill=color, font=font)
    draw.text((width - FRAME_PX - 3, FRAME_PX), note, fill=color if failed else GREY, font=font, anchor="ra")
    page.paste(Image.fromarray(row), (FRAME_PX, FRAME_PX + text_px))
    return np.asarray(page)


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font: the same on every machine."""
    return ImageFont.load_default(size_px)
