"""Pages of figures: text, tables and pictures in one HTML file that needs no network and fits a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import imageio.v3 as iio
import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from nuciseg import __version__
from nuciseg.errors import DataError
from nuciseg.images import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Text:
    """A paragraph; everything on a page is plain text, so that no file name can become markup."""

    text: str
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Note:
    """A sentence that stands out: something to do, or good to know."""

    text: str
    tone: Literal["plain", "good", "warning"] = "plain"
    kind: Literal["note"] = "note"


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are to be read; a column in which one cell is no number is aligned as words."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    kind: Literal["table"] = "table"

    @property
    def is_word(self) -> tuple[bool, ...]:
        """Of each column, whether it holds words."""
        return tuple(any(not _is_number(row[at]) for row in self.rows) for at in range(len(self.columns)))


@dataclass(frozen=True)
class Picture:
    """One picture, its data in `source` (a data URI), as wide as the page where `width_px` is None."""

    source: str
    caption: str
    width_px: int | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, as many as fit."""

    pictures: Sequence[Picture]
    kind: Literal["pictures"] = "pictures"


Block = Text | Note | Table | Pictures


@dataclass(frozen=True)
class Chapter:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def drawing(figure: Figure, caption: str) -> Picture:
    """A matplotlib figure, as vectors; the same figure always gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "nuciseg"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return Picture(_data_uri("image/svg+xml", buffer.getvalue()), caption)


def photograph(rgb_HWC: NDArray[np.uint8], caption: str, scale: float = 1.0) -> Picture:
    """A picture of pixels, rgb or grey (HW), shown `scale` times as wide."""
    data = iio.imwrite("<bytes>", rgb_HWC, extension=".png", plugin="pillow")
    return Picture(_data_uri("image/png", data), caption, round(rgb_HWC.shape[1] * scale))


def picture_file(path: Path, caption: str, scale: float = 1.0) -> Picture:
    """The PNG file at `path` as it is, shown `scale` times as wide. Raises DataError where it is none."""
    try:
        data = path.read_bytes()
        width_px = iio.improps(data, extension=".png", plugin="pillow").shape[1]
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a PNG picture ({error}); make it again") from None
    return Picture(_data_uri("image/png", data), caption, round(width_px * scale))


def write_page(path: Path, title: str, chapters: Sequence[Chapter]) -> None:
    """Write the page, whole or not at all. Raises ResourceError where it cannot be written."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("nuciseg").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.render(title=title, chapters=chapters, version=__version__)
    write_bytes(path, page.encode("utf-8"))


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _is_number(cell: str) -> bool:
    if "_" in cell:  # Python reads 12345_00000 as a number, but it is the name of a trial
        return False
    try:
        float(cell.replace("%", "").replace(",", "").replace("−", "-").strip() or "0")
    except ValueError:
        return cell in ("-", "–")
    return True
