"""Runs and searches as their folders tell them: finished, still going on, killed or failed."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nuciseg.config import Config, load_config
from nuciseg.distributed.failures import noted_failure
from nuciseg.distributed.trials import RESULTS_FILE, SAMPLE_FILE, Trial, num_trials, plain_values
from nuciseg.distributed.worker import CONFIG_FILE, FINISHED_FILE, SPLIT_FILE
from nuciseg.distributed.worker import IMAGES_FILE as VALIDATION_FILE
from nuciseg.engine.evaluation import IMAGES_FILE, SCORES_FILE
from nuciseg.errors import DataError
from nuciseg.metrics import TIE_BREAK, rank
from nuciseg.tracking import METRICS_FILE, read_metrics

FINAL_FOLDER = "final"
SEED_KEY, FOLD_KEY = "seed", "data.fold"  # what repeats a trial; all else in a sample is what a search compares
State = Literal["done", "stopped", "unfinished", "failed"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationRecord:
    """What `evaluate` left in a folder: the figures of scores.json, and the rows of images.csv, worst image first."""

    folder: Path
    figures: Row
    rows: Sequence[Row]

    @property
    def split(self) -> str:
        """Which images were scored: test, train or validation."""
        return str(self.figures["split"])

    @property
    def images_scored(self) -> tuple[str, str, str]:
        """Equal where the same images were scored, so that the figures can be compared."""
        of_split = "" if self.split == "test" else str(self.figures["split_hash"])
        return self.split, str(self.figures["data"]["content_hash"]), of_split


@dataclass(frozen=True)
class RunRecord:
    """One training run. `history` has one row an epoch; `scores` are the best checkpoint's, None before there is one.

    `images` are the rows of the validation images, in no order; `failure` is the reason where one was noted.
    """

    name: str
    folder: Path
    config: Config
    split_hash: str
    history: Sequence[Row]
    scores: Row | None
    images: Sequence[Row]
    evaluations: Sequence[EvaluationRecord]
    is_finished: bool
    failure: str | None

    @property
    def state(self) -> State:
        """`stopped`: it ended in order, before its last epoch."""
        if self.failure is not None:
            return "failed"
        if not self.is_finished:
            return "unfinished"
        return "done" if len(self.history) >= self.config.train.epochs else "stopped"


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a search; `run` is None where it ended, or was looked at, before its first batch."""

    trial: Trial
    run: RunRecord | None

    @property
    def state(self) -> State:
        if self.trial.failure is not None:
            return "failed"
        return self.run.state if self.run is not None else "unfinished"

    @property
    def history(self) -> Sequence[Row]:
        return self.run.history if self.run is not None else ()


@dataclass(frozen=True)
class SearchRecord:
    """One search, its trials best first. `is_finished` where all of them were begun, have ended and were ranked."""

    name: str
    folder: Path
    config: Config
    trials: Sequence[TrialRecord]
    final: RunRecord | None
    is_finished: bool

    @property
    def metric(self) -> str:
        return self.config.train.metric

    @property
    def split_hashes(self) -> tuple[str, ...]:
        """Of the images that trials were validated on, in the order of the trials: several in a cross-validation."""
        in_order = sorted(self.trials, key=lambda each: each.trial.id)
        return tuple(dict.fromkeys(each.run.split_hash for each in in_order if each.run is not None))

    @property
    def best(self) -> TrialRecord | None:
        """The best trial; None where all failed, and where trials were validated on several splits."""
        if len(self.split_hashes) > 1:
            return None  # on other images the same network scores otherwise
        return next((each for each in self.trials if each.state != "failed"), None)


def read_folder(folder: Path) -> RunRecord | SearchRecord:
    """The run or search in `folder`. Raises DataError where there is none, or where a file of it is damaged."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the folder of a run or a search")
    if not (folder / CONFIG_FILE).exists():
        raise DataError(
            f"{folder} holds no run and no search (it has no {CONFIG_FILE}); give a folder that train or tune printed"
        )
    return _read_run(folder) if (folder / SPLIT_FILE).exists() else _read_search(folder)


def best_row(history: Sequence[Row], metric: str) -> Row | None:
    """The epoch that counts among `history`, by `metric` and then the tie-break; None where none has a score."""
    scored = [row for row in history if row.get(metric) is not None and row.get(TIE_BREAK) is not None]
    return max(scored, key=lambda row: rank(row, metric), default=None)


def _read_run(folder: Path, name: str | None = None) -> RunRecord:
    config = load_config(folder / CONFIG_FILE)
    history = tuple(read_metrics(folder / METRICS_FILE))
    finished = read_json(folder / FINISHED_FILE, "scores")
    images = read_json(folder / VALIDATION_FILE) or ()
    split = read_json(folder / SPLIT_FILE, "hash")
    failure = noted_failure(folder)
    return RunRecord(
        name=name or folder.resolve().name,
        folder=folder,
        config=config,
        split_hash=str(split["hash"]) if split is not None else "",
        history=history,
        scores=finished["scores"] if finished is not None else best_row(history, config.train.metric),
        images=images["images"] if isinstance(images, dict) else images,  # a bare list before they named a checkpoint
        evaluations=tuple(_read_evaluations(folder)),
        is_finished=finished is not None,
        failure=None if failure is None else str(failure),
    )


def _read_evaluations(folder: Path) -> list[EvaluationRecord]:
    """Those that lie in the run's folder, the test images first."""
    found = []
    for path in sorted(folder.glob(f"*/{SCORES_FILE}")):
        figures = read_json(path, "split", "split_hash", "data", "clusters_separated", "baselines")
        assert figures is not None  # it was just listed
        images = path.with_name(IMAGES_FILE)
        try:
            with images.open(encoding="utf-8", newline="") as file:
                rows = tuple(csv.DictReader(file))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{images} cannot be read ({error}); evaluate the run again") from None
        found.append(EvaluationRecord(path.parent, figures, rows))
    return sorted(found, key=lambda each: each.split != "test")


def _read_search(folder: Path) -> SearchRecord:
    config = load_config(folder / CONFIG_FILE)
    results = _read_results(folder / RESULTS_FILE)
    begun = {path.parent.name for path in folder.glob(f"*/{SAMPLE_FILE}")}
    trials = [_read_trial(folder / id, config, results.get(id)) for id in sorted(begun | set(results))]
    trials.sort(key=lambda each: each.trial.rank, reverse=True)
    final = folder / FINAL_FOLDER
    has_final = (final / SPLIT_FILE).exists() and (final / CONFIG_FILE).exists()
    name = folder.resolve().name
    return SearchRecord(
        name=name,
        folder=folder,
        config=config,
        trials=tuple(trials),
        final=_read_run(final, f"{name}/{FINAL_FOLDER}") if has_final else None,
        # At a bound of hours or disk those that began are ranked, too.
        is_finished=len(results) >= num_trials(config) and all(each.state != "unfinished" for each in trials),
    )


def _read_results(path: Path) -> dict[str, Trial]:
    """The trials that the search ranked at its end, by id; none before that."""
    rows = read_json(path)
    try:
        trials = [Trial(**{**row, "sample": plain_values(row["sample"])}) for row in rows or ()]
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} does not list the trials of a search ({error}); restore it or remove it") from None
    return {trial.id: trial for trial in trials}


def _read_trial(folder: Path, search: Config, result: Trial | None) -> TrialRecord:
    """A trial as the search ranked it or, where that is not yet done or no longer true, as its folder tells it."""
    has_run = (folder / SPLIT_FILE).exists() and (folder / CONFIG_FILE).exists()
    run = _read_run(folder, f"{folder.resolve().parent.name}/{folder.name}") if has_run else None
    history = run.history if run is not None else ()
    if result is not None and len(history) <= result.epochs:
        return TrialRecord(result, run)
    best = best_row(history, search.train.metric)
    failure = noted_failure(folder)
    sample = read_json(folder / SAMPLE_FILE) or {}
    trial = Trial(
        id=folder.name,
        sample=plain_values(sample),
        score=None if best is None else float(best[search.train.metric]),
        tie_break=None if best is None else float(best[TIE_BREAK]),
        epochs=len(history),
        seconds=sum(float(row.get("train_s") or 0) + float(row.get("validation_s") or 0) for row in history),
        failure=None if failure is None else str(failure),
    )
    return TrialRecord(trial, run)


def read_json(path: Path, *keys: str) -> Any:
    """What lies in `path`, None where it does not exist. Raises DataError where it is damaged or lacks a key."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it or remove it") from None
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise DataError(f"{path} lacks {missing[0]!r}; restore it or remove it")
    return value
