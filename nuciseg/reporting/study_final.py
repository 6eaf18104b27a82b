"""What an evaluation of the recommended model found, trimmed to what the study's page quotes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nuciseg.engine.evaluation import SCORES_FILE, run_of
from nuciseg.engine.shipped import PREFIX, is_shipped
from nuciseg.errors import DataError
from nuciseg.reporting.records import read_json
from nuciseg.reporting.study_records import FINAL_NAME, RECORDS_FOLDER, Figures, Kept, read_kept, write_kept


class FinalFigures(Figures):
    """The scores of a network, or of a baseline, on the images that were evaluated."""

    nuclei_found: int
    nuclei_true: int


class FinalRecord(Kept):
    """One evaluation; `by_marking` has the scores with the drawn border erased and moved, where there is one.

    `checkpoint` begins with the name of the run, without the folders above it; of weights that come with nuciseg it is
    their name.
    """

    checkpoint: str
    epoch: int
    split: str
    split_hash: str
    figures: FinalFigures
    baselines: dict[str, FinalFigures]
    by_marking: dict[str, FinalFigures]


def write_final(evaluation: Path, out: Path) -> Path:
    """Keep the scores in the folder `evaluation` among the records of `out`; returns the file.

    Raises DataError where `evaluate` has not written that folder, ResourceError.
    """
    path = evaluation / SCORES_FILE
    scores = read_json(path, "checkpoint", "epoch", "split", "split_hash", "baselines", "by_marking")
    if scores is None:
        raise DataError(f"{evaluation} holds no {SCORES_FILE}; give a folder that evaluate wrote")
    checkpoint = Path(scores["checkpoint"])
    try:
        final = FinalRecord(
            checkpoint=_name_of(checkpoint),
            epoch=scores["epoch"],
            split=scores["split"],
            split_hash=scores["split_hash"],
            figures=_figures(scores),
            baselines={name: _figures(found) for name, found in scores["baselines"].items()},
            by_marking={name: _figures(found) for name, found in scores["by_marking"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} lacks scores that are quoted ({error}); evaluate again") from None
    return write_kept(final, _path(out))


def read_final(out: Path) -> FinalRecord | None:
    """The evaluation kept among the records of `out`, None where there is none. Raises DataError."""
    path = _path(out)
    return read_kept(FinalRecord, path) if path.exists() else None


def _path(out: Path) -> Path:
    return out / RECORDS_FOLDER / f"{FINAL_NAME}.json"


def _name_of(checkpoint: Path) -> str:
    if is_shipped(checkpoint):
        return f"{PREFIX}/{checkpoint.name}"
    return checkpoint.relative_to(run_of(checkpoint).parent).as_posix()


def _figures(scores: Mapping[str, Any]) -> FinalFigures:
    return FinalFigures(
        clusters=scores["clusters"],
        clusters_separated=scores["clusters_separated"],
        border_dice=round(scores["border_dice"], 5),
        ap50_pooled=round(scores["ap_pooled"]["0.50"], 5),
        ap50_per_image=round(scores["ap_per_image"]["0.50"], 5),
        nuclei_found=scores["nuclei_found"],
        nuclei_true=scores["nuclei_true"],
    )
