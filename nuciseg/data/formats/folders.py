"""What the folder layouts share: which folder a split is, which image belongs to which label file and which field."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from nuciseg.data.synthetic import SPLITS, SplitName
from nuciseg.errors import DataError

GROUPS = "groups.csv"
MAX_NAMED = 3  # names in a message; the rest are counted


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


def split_folder(root: Path, split: str, parts: Sequence[str]) -> Path:
    """`root/split`; where there is none, `root` itself if it holds the sub-folders `parts`.

    Such a `root` serves as any split: whoever scores "test" has to see that these are not the images trained on.
    """
    if not root.is_dir():
        raise DataError(f"The data folder {root} does not exist; check data.root.")
    folder = root / split
    if not folder.is_dir() and all((root / part).is_dir() for part in parts):
        return root
    if not folder.is_dir():
        raise DataError(f"The folder {folder} does not exist; make it for the split '{split}' or name another split.")
    for part in parts:
        if not (folder / part).is_dir():
            raise DataError(f"The folder {folder / part} does not exist; put the files of '{part}' there.")
    return folder


def splits_there(root: Path, parts: Sequence[str]) -> tuple[SplitName, ...]:
    """The splits that have a folder of their own; a `root` that holds `parts` itself is the first other one."""
    own = [split for split in SPLITS if (root / split).is_dir()]
    if all((root / part).is_dir() for part in parts):
        own += [split for split in SPLITS if split not in own][:1]
    return tuple(split for split in SPLITS if split in own)


def files_by_stem(folder: Path, suffixes: Sequence[str], left_out: list[LeftOut] | None = None) -> dict[str, Path]:
    """Files of `folder` with one of `suffixes` by their stem, sorted; hidden files are left out.

    Of two files with the same stem the second one is added to `left_out`; without that list a DataError is raised.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in files:
            message = f"{path} and {files[path.stem].name} have the same stem; keep one of them."
            _refuse(message, [(path, message)], left_out)
            continue
        files[path.stem] = path
    return files


def pair_files(
    images_folder: Path,
    labels_folder: Path,
    suffixes: Sequence[str],
    labels_word: str,
    left_out: list[LeftOut] | None = None,
) -> list[tuple[str, Path, Path]]:
    """(stem, image, label file) for every image, sorted by stem; `labels_word` says in messages what labels are.

    Files without a partner are added to `left_out`; without that list a DataError is raised for them.
    """
    images = files_by_stem(images_folder, suffixes, left_out)
    labels = files_by_stem(labels_folder, suffixes, left_out)
    if not images and not labels:
        raise DataError(f"{images_folder} holds no images ({', '.join(suffixes)}); put the images there.")
    if without := images.keys() - labels.keys():
        _refuse(
            f"{len(without)} of {len(images)} images in {images_folder} have no {labels_word} of the same name in "
            f"{labels_folder}: {listed(without)}; add the {labels_word}s or remove the images.",
            [(images[stem], f"{images[stem]} has no {labels_word} in {labels_folder}.") for stem in sorted(without)],
            left_out,
        )
    if alone := labels.keys() - images.keys():
        _refuse(
            f"{len(alone)} of {len(labels)} {labels_word}s in {labels_folder} have no image of the same name in "
            f"{images_folder}: {listed(alone)}; add the images or remove the {labels_word}s.",
            [(labels[stem], f"{labels[stem]} has no image in {images_folder}.") for stem in sorted(alone)],
            left_out,
        )
    return [(stem, images[stem], labels[stem]) for stem in images if stem in labels]


def _refuse(message: str, files: Iterable[tuple[Path, str]], left_out: list[LeftOut] | None) -> None:
    """Raise DataError, or note each of `files` (path, reason) in `left_out`."""
    if left_out is None:
        raise DataError(message)
    left_out += [LeftOut(path, reason) for path, reason in files]


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
