"""A folder of labelled fields cut into a folder of clusters: train from train, test from test, whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import numpy as np

from nuciseg.data.cutting import Cuts, CutSettings, LeftOut, cut_field, median_diameter_px
from nuciseg.data.formats import CLUSTER_FORMATS, DataFormat
from nuciseg.data.formats.folders import GROUPS, splits_there
from nuciseg.data.markings import erase_marking
from nuciseg.data.synthetic import SplitName, write_nucleus_pair
from nuciseg.errors import ConfigError, DataError, writing
from nuciseg.images import write_bytes
from nuciseg.types import Record, Sample

OnBadField = Callable[[DataError], None]
SCALES = (0.05, 20.0)  # beyond these a mistyped number is likelier than a microscope


@dataclass
class CutCounts:
    """What became of the fields of one split."""

    num_fields: int = 0
    num_bad_fields: int = 0
    num_16_bit_fields: int = 0
    num_fields_with_clusters: int = 0
    num_clusters: int = 0
    num_nuclei: int = 0
    left_out: Counter[LeftOut] = field(default_factory=Counter)

    def add(self, sample: Sample, cuts: Cuts) -> None:
        self.num_16_bit_fields += sample.image_HWC.dtype != np.uint8
        self.num_fields_with_clusters += bool(cuts.clusters)
        self.num_clusters += len(cuts.clusters)
        self.num_nuclei += sum(int(cluster.labels_HW.max()) for cluster in cuts.clusters)
        self.left_out += cuts.left_out


def read_fields(layout: DataFormat, root: Path) -> dict[SplitName, list[Record]]:
    """The labelled fields of each split that `root` has. Raises `DataError` where there are none."""
    splits = splits_there(root, layout.holds)
    if not splits:
        raise DataError(f"{root} has neither a folder train nor a folder test; arrange it as {layout.LAYOUT}.")
    return {split: layout.read(root, split) for split in splits}


def scale_for_diameter(layout: DataFormat, fields: dict[SplitName, list[Record]], diameter_px: float) -> float:
    """By how much to enlarge fields so that the median nucleus becomes `diameter_px` wide.

    Measured on the training fields, since nothing is chosen by the test. Fields that cannot be read are left out here;
    cutting reports them. Raises `DataError` where no field has a whole nucleus.
    """
    split = next(iter(fields))
    median_px = median_diameter_px(sample for _, sample in _loaded(layout, fields[split], lambda error: None))
    if median_px is None:
        raise DataError(f"No field of {split} has a nucleus that is not cut by the edge; give a scale, no diameter.")
    return diameter_px / median_px


def cut_folder(
    layout: DataFormat,
    fields: dict[SplitName, list[Record]],
    out: Path,
    settings: CutSettings,
    report: OnBadField,
) -> dict[SplitName, CutCounts]:
    """Write the clusters of all fields to the new folder `out`, in the `nucleus` format; says what became of them.

    `out/{train,test}/FIELD_NUMBER.png` with `solutions`, and `groups.csv`, which says which clusters share a field.
    A field that cannot be read is reported and left out. `out` appears when all is done. Raises `ConfigError` for a
    scale out of range, `DataError` where `out` is not empty or nothing was cut, `ResourceError` where it cannot be
    written.
    """
    if not SCALES[0] <= settings.scale <= SCALES[1]:
        raise ConfigError(f"the scale would be {settings.scale:.3g}; it must be from {SCALES[0]:g} to {SCALES[1]:g}")
    if layout.NAME in CLUSTER_FORMATS:
        settings = replace(settings, keep_edge=True)  # such images end where their cluster does
    with _new_folder(out) as folder:
        counts = {
            split: _cut_split(layout, records, folder / split, settings, report) for split, records in fields.items()
        }
        _refuse_nothing(counts)
    return counts


def _cut_split(
    layout: DataFormat, records: Sequence[Record], folder: Path, settings: CutSettings, report: OnBadField
) -> CutCounts:
    counts = CutCounts(num_fields=len(records))
    groups: list[tuple[str, str]] = []

    def report_bad(error: DataError) -> None:
        counts.num_bad_fields += 1
        report(error)

    for record, sample in _loaded(layout, records, report_bad):
        cuts = cut_field(sample, settings)
        counts.add(sample, cuts)
        for number, cluster in enumerate(cuts.clusters):
            name = f"{record.id}_{number:03d}"
            write_nucleus_pair(folder, name, cluster)
            groups.append((name, record.group))
    if groups:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("id", "group"), *groups])
        write_bytes(folder / GROUPS, table.getvalue().encode())
    return counts


def _loaded(layout: DataFormat, records: Sequence[Record], report: OnBadField) -> Iterator[tuple[Record, Sample]]:
    """The fields that can be read; of clusters that were cut out before, without the line that was drawn on them."""
    for record in records:
        try:
            sample = layout.load(record)
        except DataError as error:
            report(error)
            continue
        if layout.NAME in CLUSTER_FORMATS:
            sample = Sample(erase_marking(sample.image_HWC), sample.labels_HW)
        yield record, sample


def _refuse_nothing(counts: dict[SplitName, CutCounts]) -> None:
    if any(each.num_clusters for each in counts.values()):
        return
    num_fields = sum(each.num_fields for each in counts.values())
    if num_fields == sum(each.num_bad_fields for each in counts.values()):
        raise DataError(f"None of {num_fields} fields could be read; nothing was written.")
    left_out = sum((each.left_out for each in counts.values()), Counter[LeftOut]())
    reasons = "; ".join(f"{number} {reason}" for reason, number in left_out.most_common()) or "no field has a nucleus"
    raise DataError(f"None of {num_fields} fields has a cluster to cut out ({reasons}); nothing was written.")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when all went well and vanishes otherwise."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise DataError(f"The folder {out} {what}; choose a new one for the clusters.")
    temporary = out.with_name(f".{out.name}.{uuid4().hex[:8]}.tmp")
    with writing(out):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with writing(out):
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
