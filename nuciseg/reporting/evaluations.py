"""What evaluations found: figures beside the baselines, pictures of the worst and the best images, hard images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nuciseg.pages import Block, Note, Picture, Pictures, Table, Text, picture_file
from nuciseg.reporting.records import EvaluationRecord, Row, RunRecord

NUM_PICTURES = 6  # of the worst, and of the best
NUM_HARD = 12
PICTURE_SCALE = 0.5  # a triptych of `evaluate` is about 960 px wide
SHARES = ("ap_mean_per_image", "mean_matched_iou", "border_dice")
BORDER = "border Dice"
COLUMNS = ("", "clusters separated", "AP .5 per image", "mean AP per image", "matched IoU", BORDER)


def evaluation_blocks(run: RunRecord) -> list[Block]:
    """Figures and pictures of every evaluation of `run`, or the command that makes one."""
    if not run.evaluations:
        return [
            Note(
                f"{run.name} has not been evaluated, so there are no pictures of its best and worst images. To make "
                f"them: python -m nuciseg.evaluate --checkpoint {run.folder}"
            )
        ]
    blocks: list[Block] = []
    for each in run.evaluations:
        blocks.append(evaluation_table({run.name: each}))
        blocks += _picture_blocks(each)
    return blocks


def evaluation_table(evaluations: Mapping[str, EvaluationRecord]) -> Table:
    """One row a network, by its name, then the baselines; `evaluations` are of the same images.

    The border is what the network's own target draws: with several targets its scores cannot be compared.
    """
    first = next(iter(evaluations.values()))
    drawn = [each.figures["target"] for each in evaluations.values()]
    targets = {(target["kind"], target.get("width_px")) for target in drawn}
    rows = [_figures(name, each.figures) for name, each in evaluations.items()]
    rows += [_figures(name.replace("_", " "), figures) for name, figures in first.figures["baselines"].items()]
    caption = f"{first.figures['images']} {first.split} images, beside what no network would score"
    if len(targets) > 1:
        return Table(COLUMNS[:-1], [row[:-1] for row in rows], f"{caption}; {BORDER} left out: they draw other borders")
    return Table(COLUMNS, rows, caption)


def hard_images(runs: Iterable[RunRecord]) -> list[Block]:
    """The validation images that most of the runs did not separate, of those runs that were validated on them."""
    seen: dict[str, list[Row]] = {}
    for run in runs:
        for row in run.images:
            seen.setdefault(str(row["id"]), []).append(row)
    num_wrong = {id: sum(map(_is_wrong, rows)) for id, rows in seen.items()}
    mean_ap = {id: sum(float(row["ap50"]) for row in rows) / len(rows) for id, rows in seen.items()}
    hard = sorted(
        (id for id in seen if num_wrong[id]), key=lambda id: (-num_wrong[id] / len(seen[id]), mean_ap[id], id)
    )
    if not seen:
        return []
    if not hard:
        return [Note("Every validation cluster was separated.", "good")]
    rows = [
        (
            id,
            str(seen[id][0]["nuclei_true"]),
            _range(row["nuclei_found"] for row in seen[id]),
            f"{mean_ap[id]:.3f}",
            f"{num_wrong[id]} of {len(seen[id])}",
        )
        for id in hard[:NUM_HARD]
    ]
    shown = f"the hardest {NUM_HARD} of {len(hard)} images" if len(hard) > NUM_HARD else f"{len(hard)} images"
    caption = f"{shown} that were not separated, of {len(seen)}, at the best epoch"
    columns = ("validation image", "nuclei", "found", "AP .5", "not separated by")
    if max(map(len, seen.values())) == 1:  # of one run there is nothing to count
        return [Table(columns[:-1], [row[:-1] for row in rows], caption)]
    return [Table(columns, rows, f"{caption} of each trial")]


def _figures(name: str, figures: Row) -> tuple[str, ...]:
    shares = figures["ap_per_image"]["0.50"], *(figures[key] for key in SHARES)
    separated = f"{figures['clusters_separated']} of {figures['clusters']}"
    return (name, separated, *(f"{share:.3f}" for share in shares))


def _picture_blocks(evaluation: EvaluationRecord) -> list[Block]:
    there = [row for row in evaluation.rows if (evaluation.folder / str(row["overlay"])).is_file()]
    if not there:
        return [Note(f"The pictures of {evaluation.folder} are not there any more; evaluate again to have them.")]
    num_wrong = sum(map(_is_wrong, evaluation.rows))
    num_empty = sum(map(_is_rightly_empty, evaluation.rows))
    empty = f"; {num_empty} without a nucleus, in which none was found, counted as right" if num_empty else ""
    worst = there[:NUM_PICTURES]
    best = list(reversed(there[len(worst) :]))[:NUM_PICTURES]
    blocks: list[Block] = [
        Text(
            f"{num_wrong} of {len(evaluation.rows)} {evaluation.split} images are not separated{empty}. The worst "
            "first; each picture is input, truth, prediction; red marks a nucleus without partner of IoU >= 0.5."
        ),
        Pictures(_pictures(evaluation.folder, worst)),
    ]
    if best:
        blocks += [Text("The best:"), Pictures(_pictures(evaluation.folder, best))]
    return blocks


def _pictures(folder: Path, rows: Sequence[Row]) -> list[Picture]:
    return [picture_file(folder / row["overlay"], _caption(row), PICTURE_SCALE) for row in rows]


def _is_wrong(row: Row) -> bool:
    """`row` comes from JSON or, as text, from a CSV file."""
    return str(row["separated"]) != "True" and not _is_rightly_empty(row)


def _is_rightly_empty(row: Row) -> bool:
    """Without a nucleus there is nothing to separate, but it is right to find none."""
    return int(row["nuclei_true"]) == int(row["nuclei_found"]) == 0


def _caption(row: Row) -> str:
    if _is_rightly_empty(row):
        return f"{row['id']}: no nucleus, none found"
    said = "not separated" if _is_wrong(row) else "separated"
    nuclei = f"{row['nuclei_found']} nuclei found, {row['nuclei_true']} true"
    return f"{row['id']}: {said}, {nuclei}, mean AP {float(row['ap_mean']):.3f}"


def _range(values: Iterable[Any]) -> str:
    numbers = sorted(int(value) for value in values)
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
