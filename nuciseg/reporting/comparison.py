"""Several runs and searches beside each other, as far as their figures are of the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nuciseg.pages import Block, Chapter, Note, Pictures, Table, Text, drawing
from nuciseg.reporting.evaluations import evaluation_table
from nuciseg.reporting.figures import BEST, DASHES, OTHERS, Curve, learning_curves
from nuciseg.reporting.records import EvaluationRecord, RunRecord, SearchRecord

SHARED_METRIC = "cluster_score"  # where runs were ranked by different scores
TABLE_METRICS = ("cluster_score", "ap50_per_image", "ap_mean_per_image", "border_dice")
OF_BORDER = ("border_iou", "border_dice")  # of the border that the run's own target draws
NO_SETTINGS = ("run", "tracking", "search", "scale", "data.cache_dir", "data.num_loader_threads")


def comparison_chapters(subjects: Sequence[RunRecord | SearchRecord]) -> list[Chapter]:
    """Scores, curves and settings of all runs, those of searches by their winner.

    Validation figures are ranked among runs of the same split only: on other images the same network scores otherwise.
    """
    runs = [run for run in map(_representative, subjects) if run is not None]
    by_split: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_split.setdefault(run.split_hash, []).append(run)
    blocks: list[Block] = [
        Note(f"{subject.name} has no {_lacking(subject)}, so it is not compared.")
        for subject in subjects
        if _representative(subject) is None
    ]
    if len(by_split) > 1:
        sides = "; ".join(f"{split}: {', '.join(run.name for run in group)}" for split, group in by_split.items())
        blocks.append(
            Note(
                f"Not all of these were validated on the same images, so their validation figures are not compared "
                f"across splits ({sides}).",
                "warning",
            )
        )
    for split, group in by_split.items():
        blocks += _validation_blocks(split, group)
    return [
        Chapter("Compared on validation images", blocks),
        Chapter("Compared by evaluation", _evaluation_blocks(runs)),
        Chapter("What differs", [_differences(runs)] if len(runs) > 1 else [Text("There is one run only.")]),
    ]


def _representative(subject: RunRecord | SearchRecord) -> RunRecord | None:
    """A run itself; of a search the winner trained to the end or, before that, the best trial."""
    if isinstance(subject, RunRecord):
        return subject
    if subject.final is not None:
        return subject.final
    return subject.best.run if subject.best is not None else None


def _lacking(subject: RunRecord | SearchRecord) -> str:
    if isinstance(subject, SearchRecord) and len(subject.split_hashes) > 1:
        return "best trial, since its trials were validated on several splits"
    return "run with figures yet"


def _validation_blocks(split: str, runs: Sequence[RunRecord]) -> list[Block]:
    borders = {(run.config.target.kind, run.config.target.width_px) for run in runs}
    metrics = {run.config.train.metric for run in runs}
    metric = metrics.pop() if len(metrics) == 1 else SHARED_METRIC
    if metric in OF_BORDER and len(borders) > 1:
        metric = SHARED_METRIC
    ranked = sorted(runs, key=lambda run: -1.0 if run.scores is None else float(run.scores[metric]), reverse=True)
    columns = [name for name in dict.fromkeys((metric, *TABLE_METRICS)) if len(borders) == 1 or name not in OF_BORDER]
    rows = [
        (
            run.name,
            run.state,
            f"{len(run.history)} of {run.config.train.epochs}",
            *("-" if run.scores is None else f"{float(run.scores[name]):.3f}" for name in columns),
        )
        for run in ranked
    ]
    table = Table(
        ("run", "state", "epochs", *columns),
        rows,
        f"best checkpoint of each, calibrated where it was, validation images of split {split}",
    )
    curves = [Curve(run.history, run.name, *_look(at)) for at, run in enumerate(ranked) if run.history]
    figures = [
        drawing(learning_curves(curves, metric, f"validation {metric}"), f"{metric}, split {split}"),
        drawing(learning_curves(curves, "train_loss", "training loss"), "loss; comparable where the loss is the same"),
    ]
    return [table, Pictures(figures)] if curves else [table]


def _look(place: int) -> tuple[str, float, str]:
    """Colour, width and dashes of the run in this place."""
    if place == 0:
        return BEST, 2.2, "-"
    dash = (place - 1) // len(OTHERS)
    return OTHERS[(place - 1) % len(OTHERS)], 1.4, DASHES[dash % len(DASHES)]


def _evaluation_blocks(runs: Sequence[RunRecord]) -> list[Block]:
    by_images: dict[tuple[str, str, str], dict[str, EvaluationRecord]] = {}
    for run in runs:
        for each in run.evaluations:
            group = by_images.setdefault(each.images_scored, {})
            name = run.name if run.name not in group else f"{run.name}/{each.folder.name}"
            group[name] = each
    blocks: list[Block] = []
    if len(by_images) > 1:
        blocks.append(Note("These evaluations are of different images: compare within a table only.", "warning"))
    for group in by_images.values():
        best_first = sorted(group.items(), key=lambda pair: -pair[1].figures["ap_mean_per_image"])
        best_first.sort(key=lambda pair: -pair[1].figures["clusters_separated"])
        blocks.append(evaluation_table(dict(best_first)))
    without = [run for run in runs if not run.evaluations]
    blocks += [
        Note(f"{run.name} has not been evaluated: python -m nuciseg.evaluate --checkpoint {run.folder}")
        for run in without
    ]
    return blocks


def _differences(runs: Sequence[RunRecord]) -> Block:
    settings = [_flat(run.config.model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    # What only one kind of network or loss has is no difference between two of them: their kinds are.
    rows = [
        (key, *(each.get(key, "-") for each in settings))
        for key in keys
        if len({each[key] for each in settings if key in each}) > 1
    ]
    if not rows:
        return Text("They have the same settings.")
    return Table(("setting", *(run.name for run in runs)), rows, "settings that are not the same in all of them")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings that can matter to a result, by dotted key."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in NO_SETTINGS:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = f"{value:.6g}" if isinstance(value, float) else str(value)
    return flat
