"""What a fault in the labels is: its kind, its file, and where in the image it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels, the last two exclusive

KINDS: Final = {
    "unusable file": "The file cannot be read, has no partner, or does not fit its partner; training would refuse it.",
    "no nucleus": "The labels of the image are empty; right only if the image is.",
    "unclosed border": "A line ends within a nucleus, or light lies outside of all closed lines: what the line should "
    "divide counts as one nucleus, or is lost.",
    "stray pixels": "A few pixels apart from everything else.",
    "nucleus in several pieces": "One id is used in places that do not hang together.",
    "hole in a nucleus": "Background that one nucleus encloses.",
    "nucleus within another": "All that surrounds the nucleus is one other nucleus.",
    "tiny nucleus": "Far smaller than the other nuclei of the data set, and not cut by the image's edge.",
    "straight border": "Nuclei are round: a long straight line was drawn by a tool or cut by a tile's edge.",
    "lines disagree": "The border drawn on the image and that of the solution do not lie on each other.",
    "dark nucleus": "The image is no brighter within the nucleus than around it: the labels may be shifted, or belong "
    "to another image.",
}


@dataclass(frozen=True)
class Fault:
    """One fault. `file` as `DataSet.file_of` has it; `what` is one sentence with its measure; `box` None: the whole
    image, or no image that could be shown. `severity` orders the faults of one kind, worst first."""

    kind: str
    split: str
    id: str
    file: str
    what: str
    box: Box | None = None
    severity: float = 0.0

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


@dataclass(frozen=True)
class Finding:
    """A fault before it is known whose it is."""

    kind: str
    what: str
    box: Box | None = None
    severity: float = 0.0
