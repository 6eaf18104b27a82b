"""What a study keeps of each finished search: one small file, from which its page is written again at any time.

    OUT/study/NAME.json    a record, named after the folder of the search
    OUT/study/final.json   what an evaluation of the recommended model found, see study_final.py

The figures are those of a trial's last epoch. The best of several epochs would be chosen by the very score that trials
are compared by, and the longer an arm trains, the more it would gain by that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nuciseg.distributed.trials import searches_in
from nuciseg.distributed.worker import CONFIG_FILE, SPLIT_FILE
from nuciseg.engine.network import count_parameters
from nuciseg.errors import DataError
from nuciseg.images import write_bytes
from nuciseg.reporting.records import FOLD_KEY, SEED_KEY, RunRecord, SearchRecord, TrialRecord, read_folder, read_json

RECORDS_FOLDER = "study"
FINAL_NAME = "final"  # the one file among the records that is none
_FOLDERS = re.compile(r"(?<![\w.~])/(?:[^\s/:;,'\"()]+/)+(?=[^\s/:;,'\"()])")
_Read = TypeVar("_Read", bound=BaseModel)


class Kept(BaseModel):
    """The base of what is kept in files: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Figures(Kept):
    """Scores of the held-out images after a trial's last epoch."""

    clusters: int
    clusters_separated: int
    border_dice: float
    ap50_pooled: float
    ap50_per_image: float


class StudySplit(Kept):
    """One division of the images; `hash` names it."""

    hash: str
    num_train_images: int
    num_held_out_images: int


class StudyTrial(Kept):
    """One trial: its `arm` is the sample without seed and fold. `figures` is None where it failed.

    `unsaid` are the trial's values of settings that only other arms name, by dotted key. `split` is the hash of its
    division, None where it failed before that was made; `train_s` are seconds of training.
    """

    arm: dict[str, Any]
    unsaid: dict[str, Any] = {}
    seed: int
    fold: int | None
    split: str | None
    figures: Figures | None
    epochs: int
    train_s: float
    num_parameters: int | None
    failure: str | None


class StudyRecord(Kept):
    """One finished search, its trials in the order of the grid.

    `epochs`, `crop_px`, `batch_size` and `cpus_per_trial` are None where the trials differ in them; `num_folds` is None
    unless the search goes through the folds of a cross-validation. `same_border`: all arms draw the same true border,
    so that their border Dice can be compared. `arm_names` are in the grid's order, none where settings say it all.
    """

    name: str
    epochs: int | None
    crop_px: int | None
    batch_size: int | None
    cpus_per_trial: int | None
    num_folds: int | None
    same_border: bool
    splits: tuple[StudySplit, ...]
    trials: tuple[StudyTrial, ...]
    arm_names: tuple[str, ...] = ()


def search_folders(named: Iterable[Path]) -> list[Path]:
    """The folders of searches that `named` are or hold, each once.

    Raises DataError for a folder without a search that has begun, and for two searches of one name.
    """
    by_name: dict[str, Path] = {}
    for folder in named:
        inside = searches_in(folder)
        if inside and not any((each / CONFIG_FILE).exists() for each in inside):
            raise DataError(f"{folder} holds no search that has begun; give the folder that tune printed")
        for each in inside or [folder]:
            other = by_name.setdefault(each.resolve().name, each)
            if other.resolve() != each.resolve():
                raise DataError(f"{other} and {each} would both be kept as {each.resolve().name}; rename one")
    return list(by_name.values())


def collect(folder: Path) -> StudyRecord | None:
    """The record of the search in `folder`; None where it is not finished.

    Raises DataError for a folder that is no search, or whose trials cannot be compared by their last epochs.
    """
    if not (folder / CONFIG_FILE).exists() and folder.with_name(f"{folder.name}.yaml").exists():
        return None  # one of several searches, not begun yet
    search = read_folder(folder)
    if isinstance(search, RunRecord):
        raise DataError(f"{folder} holds a run, not a search; give a folder that tune printed")
    if not search.is_finished:
        return None
    if search.config.search.scheduler != "none":
        raise DataError(
            f"{folder}: its scheduler {search.config.search.scheduler} stops trials early, so their last epochs cannot "
            "be compared; search with search.scheduler: none"
        )
    early = [run for run in (each.run for each in search.trials) if run is not None and run.state == "stopped"]
    if early:
        length = f"{len(early[0].history)} of {early[0].config.train.epochs}"
        raise DataError(
            f"{folder}: train.patience ended {len(early)} of {len(search.trials)} trials early "
            f"({early[0].folder.name} after {length} epochs), so their last epochs cannot be compared; "
            "search without it"
        )
    if search.name == FINAL_NAME:
        raise DataError(f"{folder}: the name {FINAL_NAME} is kept for the recommended model; rename the folder")
    return _record_of(search)


def write_record(record: StudyRecord, out: Path) -> Path:
    """Write `record` into the records of `out`, whole or not at all; returns its path. Raises ResourceError."""
    return write_kept(record, out / RECORDS_FOLDER / f"{record.name}.json")


def read_records(out: Path) -> list[StudyRecord]:
    """All records of `out`, by name. Raises DataError for a damaged one."""
    paths = sorted((out / RECORDS_FOLDER).glob("*.json"))
    return [read_kept(StudyRecord, path) for path in paths if path.stem != FINAL_NAME]


def write_kept(value: Kept, path: Path) -> Path:
    """Write `value` as JSON, whole or not at all; returns `path`. Raises ResourceError."""
    write_bytes(path, f"{value.model_dump_json(indent=1)}\n".encode())
    return path


def read_kept(kind: type[_Read], path: Path) -> _Read:
    """The value in `path`. Raises DataError where it is damaged."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, fault["loc"])) or "the file"
        raise DataError(f"{path} is damaged ({place}: {fault['msg']}); write it again from its folder") from None


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted key, sections taken apart."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


# --- from a search to its record -------------------------------------------------------------------------------------


def _record_of(search: SearchRecord) -> StudyRecord:
    found = sorted(search.trials, key=lambda each: each.trial.id)  # Ray numbers them in the order of the grid
    named = tuple(dict.fromkeys(key for each in found for key in flattened(each.trial.sample)))
    trials = [_trial_of(each, search, named) for each in found]
    runs = [each.run for each in found if each.run is not None]
    configs = [run.config for run in runs]
    has_folds = FOLD_KEY in search.config.search.space
    return StudyRecord(
        name=search.name,
        epochs=_common(config.train.epochs for config in configs),
        crop_px=_common(config.data.crop_px for config in configs),
        batch_size=_common(config.data.batch_size for config in configs),
        cpus_per_trial=_common(config.scale.max_workers * (config.scale.cpus_per_worker or 1) for config in configs),
        num_folds=search.config.data.num_folds if has_folds else None,
        same_border=len({(config.target.kind, config.target.width_px) for config in configs}) < 2,
        splits=_splits_of(runs),
        trials=_in_order_of_arms(trials),
    )


def _trial_of(each: TrialRecord, search: SearchRecord, named: Sequence[str]) -> StudyTrial:
    """`named` are the settings that some trial of the search names."""
    sample, run = dict(each.trial.sample), each.run
    config = run.config if run is not None else search.config
    seed = sample.pop(SEED_KEY, config.seed)
    fold = sample.pop(FOLD_KEY, None)
    failure = each.trial.failure or (run.failure if run is not None else None)
    last = each.history[-1] if each.history and each.state != "failed" else None
    return StudyTrial(
        arm=_without_folders(sample),
        unsaid=_without_folders(_unsaid(each, named)),
        seed=seed,
        fold=fold,
        split=run.split_hash if run is not None else None,
        figures=None if last is None else Figures(
            clusters=round(last["clusters"]),
            clusters_separated=round(last["clusters_separated"]),
            **{name: round(float(last[name]), 5) for name in ("border_dice", "ap50_pooled", "ap50_per_image")},
        ),
        epochs=len(each.history),
        train_s=round(sum(float(row.get("train_s") or 0) for row in each.history), 1),
        num_parameters=count_parameters(run.config) if run is not None else None,
        failure=_without_folders(failure),
    )  # fmt: skip


def _unsaid(each: TrialRecord, named: Sequence[str]) -> dict[str, Any]:
    if each.run is None:
        return {}
    values, said = flattened(each.run.config.model_dump(mode="json")), flattened(each.trial.sample)
    return {key: values[key] for key in named if key in values and key not in said}


def _splits_of(runs: Iterable[RunRecord]) -> tuple[StudySplit, ...]:
    found: dict[str, StudySplit] = {}
    for run in runs:
        sides = read_json(run.folder / SPLIT_FILE, "train", "validation")
        num_train, num_held_out = len(sides["train"]), len(sides["validation"])
        found[run.split_hash] = StudySplit(
            hash=run.split_hash, num_train_images=num_train, num_held_out_images=num_held_out
        )
    return tuple(found[hash] for hash in sorted(found))


def _in_order_of_arms(trials: Sequence[StudyTrial]) -> tuple[StudyTrial, ...]:
    """Arm by arm, in the order in which they first occur; within one by fold and seed."""
    arms: list[dict[str, Any]] = []
    for trial in trials:
        if trial.arm not in arms:
            arms.append(trial.arm)
    return tuple(sorted(trials, key=lambda trial: (arms.index(trial.arm), trial.fold or 0, trial.seed)))


def _common(values: Iterable[int]) -> int | None:
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _without_folders(value: Any) -> Any:
    """`value` with the folders of one machine left out of every path in it: records are read on others."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value
