"""What a page says of single images: hard ones, and those in which there is nothing to separate."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from written_runs import images, write_run

from nuciseg.distributed.worker import IMAGES_FILE as VALIDATION_FILE
from nuciseg.engine.checkpoint import write_json
from nuciseg.engine.evaluation import IMAGES_FILE, SCORES_FILE, image_row
from nuciseg.images import write_png
from nuciseg.metrics import IOU_PERCENTS, ImageScores, Scores
from nuciseg.pages import Note, Pictures, Table, Text
from nuciseg.reporting.evaluations import evaluation_blocks, hard_images
from nuciseg.reporting.records import RunRecord, read_folder

NOTHING = (0,) * len(IOU_PERCENTS)
EMPTY = ImageScores("empty", 0, 0, False, NOTHING, 0, 0, 0, 0)
INVENTED = ImageScores("invented", 0, 1, False, NOTHING, 0, 0, 0, 0)
RIGHT, MERGED = images(["right", "merged"], 1)


def run_of(folder: Path, scored: Sequence[ImageScores]) -> RunRecord:
    """A run validated and evaluated on these images, the worst first."""
    write_run(folder, [3])
    rows = [image_row(each, (40, 30)) for each in scored]
    write_json({"checkpoint": "epoch-0001", "images": rows}, folder / VALIDATION_FILE)
    figures = {"split": "test", "split_hash": "", "data": {"content_hash": ""}, "target": {"kind": "touching_border"}}
    scores = {**figures, **Scores.total(scored).summary(), "baselines": {}}
    write_json(scores, folder / "evaluation" / SCORES_FILE)
    with (folder / "evaluation" / IMAGES_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "overlay"])
        writer.writeheader()
        writer.writerows({**row, "overlay": f"{row['id']}.png"} for row in rows)
    for row in rows:
        write_png(folder / "evaluation" / f"{row['id']}.png", np.zeros((8, 24, 3), np.uint8))
    found = read_folder(folder)
    assert isinstance(found, RunRecord)
    return found


def test_an_image_without_a_nucleus_in_which_none_was_found_is_not_hard(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [MERGED, INVENTED, RIGHT, EMPTY])
    [table] = hard_images([run])
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["invented", "merged"]
    assert table.caption == "2 images that were not separated, of 4, at the best epoch"
    [note] = hard_images([run_of(tmp_path / "empty", [EMPTY])])
    assert isinstance(note, Note)


def test_an_image_without_a_nucleus_is_said_to_be_one(tmp_path: Path) -> None:
    _, said, worst = evaluation_blocks(run_of(tmp_path / "run", [MERGED, INVENTED, RIGHT, EMPTY]))
    assert isinstance(said, Text)
    assert isinstance(worst, Pictures)
    assert said.text.startswith(
        "2 of 4 test images are not separated; 1 without a nucleus, in which none was found, counted as right. "
    )
    assert [picture.caption for picture in worst.pictures] == [
        "merged: not separated, 1 nuclei found, 2 true, mean AP 0.000",
        "invented: not separated, 1 nuclei found, 0 true, mean AP 0.000",
        "right: separated, 2 nuclei found, 2 true, mean AP 1.000",
        "empty: no nucleus, none found",
    ]
