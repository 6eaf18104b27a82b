"""One look at every image: its figures, and the faults of its labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from nuciseg.data.formats import CLUSTER_FORMATS, nucleus
from nuciseg.errors import DataError
from nuciseg.exploring.duplicates import small_picture
from nuciseg.exploring.faults import Fault, Finding
from nuciseg.exploring.label_faults import (
    Line,
    broken_nuclei,
    dark_nuclei,
    line_of,
    straight_contacts,
    straight_outlines,
    tiny_nuclei,
)
from nuciseg.exploring.light import Light, measure_light
from nuciseg.exploring.line_faults import line_faults
from nuciseg.exploring.overlaps import Marks, window_marks
from nuciseg.exploring.reading import Broken, DataSet, Part, printable
from nuciseg.exploring.shapes import Nuclei, find_contacts, measure_nuclei, nuclei_per_cluster
from nuciseg.images import read_image
from nuciseg.targets import FullBorderConfig, TouchingBorderConfig, build_target
from nuciseg.types import Record, Sample

BORDERS = {config.kind: build_target(config) for config in (TouchingBorderConfig(), FullBorderConfig())}


@dataclass(frozen=True)
class Look:
    """What is known of one image. `contacts_px` and `lines` have an entry for each two nuclei that touch;
    `border_px` counts the border pixels of each target at its default width, `valid_px` those that are not ignored;
    `small` and `marks` are what near-duplicates and crops of one field are found by."""

    split: str
    position: int
    id: str
    file: str
    height: int
    width: int
    light: Light
    nuclei: Nuclei
    clusters: tuple[int, ...]
    contacts_px: tuple[float, ...]
    lines: tuple[Line, ...]
    border_px: dict[str, int]
    valid_px: int
    small: NDArray[np.float32]
    marks: Marks


def look_at(data: DataSet, part: Part) -> Iterator[tuple[Look, list[Fault]]]:
    """The figures of each image of `part`, and the faults that it shows without comparing it with others."""
    for position, (record, sample) in enumerate(part):
        labels_HW, image_HW = sample.labels_HW, sample.image_HWC[..., 0]
        nuclei, contacts = measure_nuclei(labels_HW), find_contacts(labels_HW)
        look = Look(
            split=part.split,
            position=position,
            id=record.id,
            file=data.file_of(record),
            height=labels_HW.shape[0],
            width=labels_HW.shape[1],
            light=measure_light(image_HW, labels_HW),
            nuclei=nuclei,
            clusters=tuple(nuclei_per_cluster(len(nuclei), contacts)),
            contacts_px=tuple(contact.length_px for contact in contacts),
            lines=tuple(map(line_of, contacts)),
            border_px={
                kind: int(np.count_nonzero(target.encode(labels_HW)[target.border_index]))
                for kind, target in BORDERS.items()
            },
            valid_px=int(np.count_nonzero(labels_HW >= 0)),
            small=small_picture(image_HW),
            marks=window_marks(image_HW),
        )
        findings = chain(straight_contacts(contacts), _findings(data, record, sample, nuclei))
        yield look, [_fault(part.split, record.id, look.file, finding) for finding in findings]


def faults_among(data: DataSet, looks: list[Look]) -> Iterator[Fault]:
    """Faults that show only beside the other images: nuclei far smaller than usual."""
    areas = np.concatenate([look.nuclei.area_px for look in looks]) if looks else np.zeros(0)
    if not areas.size:
        return
    parts = {part.split: part for part in data.parts}
    for look in looks:
        labels_HW = parts[look.split].sample(look.position).labels_HW
        for finding in tiny_nuclei(labels_HW, look.nuclei, float(np.median(areas))):
            yield _fault(look.split, look.id, look.file, finding)


def faults_of_broken(data: DataSet, broken: Broken) -> Iterator[Fault]:
    """The fault that a file cannot be used, and where its drawn lines can be read, what is wrong with them."""
    id = broken.record.id if broken.record else broken.path.stem if broken.path else broken.split
    file = data.relative(broken.path) if broken.path else broken.split
    yield Fault("unusable file", broken.split, printable(id), file, printable(broken.reason))
    if broken.record is None or data.format_name != nucleus.NAME:
        return
    assert broken.record.image_path is not None
    try:
        image_HW = read_image(broken.record.image_path)
        solution_HW = nucleus.read_solution(broken.record.label_paths[0])
    except DataError:
        return  # which is the fault that was reported above
    if image_HW.shape == solution_HW.shape and solution_HW.any():
        labels_HW = nucleus.labels_from_solution(image_HW, solution_HW)
        for finding in line_faults(image_HW, solution_HW, labels_HW):
            yield _fault(broken.split, id, file, finding)


def _findings(data: DataSet, record: Record, sample: Sample, nuclei: Nuclei) -> Iterator[Finding]:
    labels_HW, image_HW = sample.labels_HW, sample.image_HWC[..., 0]
    if not len(nuclei):
        yield Finding("no nucleus", "the labels are empty")
    yield from straight_outlines(labels_HW)
    if data.format_name == nucleus.NAME:
        solution_HW = nucleus.read_solution(record.label_paths[0])
        yield from line_faults(image_HW, solution_HW, labels_HW)
        # Nuclei are regions there, each in one piece; what its share of the line looks like is no fault.
        yield from (each for each in broken_nuclei(labels_HW) if each.kind == "nucleus within another")
    else:
        yield from broken_nuclei(labels_HW)
    if data.format_name not in CLUSTER_FORMATS:  # their surroundings are zeroed
        yield from dark_nuclei(image_HW, labels_HW, nuclei)


def _fault(split: str, id: str, file: str, finding: Finding) -> Fault:
    return Fault(finding.kind, split, id, file, finding.what, finding.box, float(finding.severity))
