"""What the folder layouts share: which folder a split is, which image belongs to which label file and which field."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

from nuciseg.data.synthetic import SPLITS, SplitName
from nuciseg.errors import DataError

GROUPS = "groups.csv"
MAX_NAMED = 3  # names in a message; the rest are counted


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


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files of `folder` with one of `suffixes` by their stem, sorted; hidden files are left out."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in files:
            raise DataError(f"{path} and {files[path.stem].name} have the same stem; keep one of them.")
        files[path.stem] = path
    return files


def pair_files(
    images_folder: Path, labels_folder: Path, suffixes: Sequence[str], labels_word: str
) -> list[tuple[str, Path, Path]]:
    """(stem, image, label file) for every image, sorted by stem; `labels_word` says in messages what labels are."""
    images, labels = files_by_stem(images_folder, suffixes), files_by_stem(labels_folder, suffixes)
    if not images and not labels:
        raise DataError(f"{images_folder} holds no images ({', '.join(suffixes)}); put the images there.")
    if without := images.keys() - labels.keys():
        raise DataError(
            f"{len(without)} of {len(images)} images in {images_folder} have no {labels_word} of the same name in "
            f"{labels_folder}: {listed(without)}; add the {labels_word}s or remove the images."
        )
    if alone := labels.keys() - images.keys():
        raise DataError(
            f"{len(alone)} of {len(labels)} {labels_word}s in {labels_folder} have no image of the same name in "
            f"{images_folder}: {listed(alone)}; add the images or remove the {labels_word}s."
        )
    return [(stem, images[stem], labels[stem]) for stem in images]


def groups_of(folder: Path, images: dict[str, Path]) -> dict[str, str]:
    """The field that each image was cut from: what `folder/groups.csv` says, else `groups_of_duplicates`.

    Raises `DataError` for a table that cannot be read, contradicts itself or leaves an image out.
    """
    table = folder / GROUPS
    return _read_groups(table, images) if table.is_file() else groups_of_duplicates(images)


def groups_of_duplicates(images: dict[str, Path]) -> dict[str, str]:
    """A group for each id: its own id, or the first id whose image file has the very same bytes."""
    first_by_digest: dict[bytes, str] = {}
    return {
        id: first_by_digest.setdefault(blake2b(path.read_bytes(), digest_size=16).digest(), id)
        for id, path in images.items()
    }


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
