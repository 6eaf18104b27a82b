"""What the folder layouts share: which folder a split is, which image belongs to which label file and which field."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from nuciseg.data.synthetic import SPLITS, SplitName
from nuciseg.errors import DataError
from nuciseg.types import Record

GROUPS = "groups.csv"
MAX_NAMED = 3  # names in a message; the rest are counted

Holds = Callable[[Path], bool]  # whether a folder holds the files of one split
StemOf = Callable[[Path], str | None]  # the name that an image and its labels have in common; None: neither of them


@dataclass(frozen=True)
class LeftOut:
    """A file that a tolerant reader passed over, and why."""

    path: Path
    reason: str


def listed(names: Iterable[str]) -> str:
    """The first names of a list, then how many more: "a, b, c and 4 more"."""
    ordered = sorted(names)
    more = len(ordered) - MAX_NAMED
    return ", ".join(ordered[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def own_folder(root: Path, split: str) -> Path | None:
    """The folder of a split alone: `root/split`, else `root/stage1_split`, as the Data Science Bowl 2018 calls it."""
    folders = (root / f"{prefix}{split}" for prefix in ("", "stage1_"))
    return next((folder for folder in folders if folder.is_dir()), None)


def split_folder(root: Path, split: str, holds: Holds) -> Path:
    """The split's `own_folder`; where there is none, `root` itself if it holds the files of a split.

    Such a `root` serves as any split: whoever scores "test" has to see that these are not the images trained on.
    Raises `DataError` where there is neither.
    """
    if not root.is_dir():
        raise DataError(f"The data folder {root} does not exist; check data.root.")
    if (folder := own_folder(root, split)) is not None:
        return folder
    if holds(root):
        return root
    raise DataError(f"The folder {root / split} does not exist; make it for the split '{split}' or name another split.")


def splits_there(root: Path, holds: Holds) -> tuple[SplitName, ...]:
    """The splits that have a folder of their own; a `root` that holds files itself is the first other one."""
    own = [split for split in SPLITS if own_folder(root, split) is not None]
    if holds(root):
        own += [split for split in SPLITS if split not in own][:1]
    return tuple(split for split in SPLITS if split in own)


def file_stem(path: Path) -> str:
    """The file's name without its last suffix."""
    return path.stem


def files_by_stem(
    folder: Path, suffixes: Sequence[str], left_out: list[LeftOut] | None = None, stem_of: StemOf = file_stem
) -> dict[str, Path]:
    """Files of `folder` with one of `suffixes` by their stem, sorted by name; hidden files, and those of which
    `stem_of` is None, are passed over.

    Of two files with the same stem the second one is added to `left_out`; without that list a DataError is raised, as
    it is for a folder that does not exist.
    """
    if not folder.is_dir():
        raise DataError(f"The folder {folder} does not exist; put the files of '{folder.name}' there.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.is_file():
            continue
        stem = stem_of(path)
        if stem in files:
            message = f"{path} and {files[stem].name} have the same stem '{stem}'; keep one of them."
            refuse(message, [(path, message)], left_out)
        elif stem is not None:
            files[stem] = path
    return files


def pair_files(
    images_folder: Path,
    labels_folder: Path,
    suffixes: Sequence[str],
    labels_word: str,
    left_out: list[LeftOut] | None = None,
    image_stem: StemOf = file_stem,
    labels_stem: StemOf = file_stem,
) -> list[tuple[str, Path, Path]]:
    """(stem, image, label file) for every image, sorted by stem; `labels_word` says in messages what labels are.

    Where both lie in one folder, `image_stem` and `labels_stem` tell them apart. Files without a partner are added to
    `left_out`; without that list a DataError is raised for them.
    """
    images = files_by_stem(images_folder, suffixes, left_out, image_stem)
    labels = files_by_stem(labels_folder, suffixes, left_out, labels_stem)
    if not images and not labels:
        raise DataError(f"{images_folder} holds no images ({', '.join(suffixes)}); put the images there.")
    if without := images.keys() - labels.keys():
        refuse(
            f"{len(without)} of {len(images)} images in {images_folder} have no {labels_word} of the same name in "
            f"{labels_folder}: {listed(without)}; add the {labels_word}s or remove the images.",
            [(images[stem], f"{images[stem]} has no {labels_word} in {labels_folder}.") for stem in sorted(without)],
            left_out,
        )
    if alone := labels.keys() - images.keys():
        refuse(
            f"{len(alone)} of {len(labels)} {labels_word}s in {labels_folder} have no image of the same name in "
            f"{images_folder}: {listed(alone)}; add the images or remove the {labels_word}s.",
            [(labels[stem], f"{labels[stem]} has no image in {images_folder}.") for stem in sorted(alone)],
            left_out,
        )
    return [(stem, images[stem], labels[stem]) for stem in images if stem in labels]


def refuse(message: str, files: Iterable[tuple[Path, str]], left_out: list[LeftOut] | None) -> None:
    """Raise DataError, or note each of `files` (path, reason) in `left_out`."""
    if left_out is None:
        raise DataError(message)
    left_out += [LeftOut(path, reason) for path, reason in files]


def refuse_other_size(path: Path, shape: tuple[int, ...], image_shape: tuple[int, ...]) -> None:
    """Raise DataError where the labels at `path` are not (height, width) as large as their image."""
    if shape != image_shape:
        raise DataError(
            f"{path} is {shape[0]} x {shape[1]} pixels (height x width) and its image {image_shape[0]} x "
            f"{image_shape[1]}; make both the same size."
        )


def groups_of(folder: Path, images: dict[str, Path], left_out: list[LeftOut] | None = None) -> dict[str, str]:
    """The field that each image was cut from: what `folder/groups.csv` says, else `groups_of_duplicates`.

    A table that cannot be read, contradicts itself or leaves an image out is added to `left_out`; without that list a
    DataError is raised.
    """
    table = folder / GROUPS
    if table.is_file():
        try:
            return _read_groups(table, images)
        except DataError as error:
            if left_out is None:
                raise
            left_out.append(LeftOut(table, str(error)))
    return groups_of_duplicates(images)


def groups_of_duplicates(images: dict[str, Path]) -> dict[str, str]:
    """A group for each id: its own id, or the first id whose image file has the very same bytes.

    A file that cannot be read is a group of its own; whoever loads it says why.
    """
    first_by_digest: dict[bytes, str] = {}
    groups = {}
    for id, path in images.items():
        try:
            digest = blake2b(path.read_bytes(), digest_size=16).digest()
        except OSError:
            groups[id] = id
        else:
            groups[id] = first_by_digest.setdefault(digest, id)
    return groups


def with_fields_joined(records: Sequence[Record]) -> list[Record]:
    """Records of several splits, whose groups were told for each alone: groups with an image of the very same bytes
    in common become one, called by the first of their names."""
    files = {str(number): record.image_path for number, record in enumerate(records) if record.image_path is not None}
    became: dict[str, str] = {}

    def name_of(group: str) -> str:
        while group in became:
            group = became[group]
        return group

    for number, first in groups_of_duplicates(files).items():
        names = sorted({name_of(records[int(each)].group) for each in (number, first)})
        became.update(dict.fromkeys(names[1:], names[0]))
    return [replace(record, group=name_of(record.group)) for record in records]


def _read_groups(table: Path, images: dict[str, Path]) -> dict[str, str]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a CSV table ({error}); save it as UTF-8.") from error
    groups: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        id, group = row.get("id"), row.get("group")
        if not id or not group:
            raise DataError(f"{table} line {number} lacks an id or a group; the header is 'id,group'.")
        if groups.setdefault(id, group) != group:
            raise DataError(f"{table} puts '{id}' into both '{groups[id]}' and '{group}'; keep one of the lines.")
    if missing := images.keys() - groups.keys():
        raise DataError(f"{table} has no group for {listed(missing)}; add a line 'id,group' for each image.")
    return groups
