"""Records of searches with figures of one's choice, and folders of questions, for the tests of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from written_runs import search_config, write_search

from nuciseg.reporting.study_records import Figures, StudyRecord, StudySplit, StudyTrial

SPLIT = StudySplit(hash="67f083a1e9724492", num_train_images=150, num_held_out_images=100)
HEADER = """\
# Question   How much does the border's width matter?
#            And does it at all?
# Command    python -m nuciseg.tune --config tune_configs/NAME.yaml --data.root DIR
# Takes      9 minutes on 2 cores
"""


def trial(
    arm: Mapping[str, Any], seed: int, separated: int | None, *, clusters: int = 100, fold: int | None = None,
    ap50: float = 0.9, split: str = SPLIT.hash, train_s: float = 60.0,
) -> StudyTrial:  # fmt: skip
    """One trial that separated so many clusters; None: it failed."""
    figures = None
    if separated is not None:
        figures = Figures(
            clusters=clusters, clusters_separated=separated, border_dice=0.7, ap50_pooled=ap50, ap50_per_image=0.95
        )
    failure = None if separated is not None else "the loss is not finite in step 3"
    return StudyTrial(
        arm=dict(arm), seed=seed, fold=fold, split=split, figures=figures, epochs=4, train_s=train_s,
        num_parameters=1_062_298, failure=failure,
    )  # fmt: skip


def record(trials: Sequence[StudyTrial], name: str = "border_width", num_folds: int | None = None) -> StudyRecord:
    return StudyRecord(
        name=name, epochs=4, crop_px=128, batch_size=8, cpus_per_trial=1, num_folds=num_folds, same_border=True,
        splits=(SPLIT,), trials=tuple(trials),
    )  # fmt: skip


def seeds(**arms: Sequence[int | None]) -> StudyRecord:
    """A search over `optim.kind` whose arms separated so many of 100 clusters with seeds 0, 1, ..."""
    return record([trial({"optim.kind": name}, seed, count) for name in arms for seed, count in enumerate(arms[name])])


def folds(num_folds: int = 5, **arms: Sequence[int | None]) -> StudyRecord:
    """A cross-validation whose arms separated so many of the 20 clusters of each fold, each fold a split."""
    trials = [
        trial({"optim.kind": name}, 0, count, clusters=20, fold=fold, split=f"split{fold}")
        for name in arms
        for fold, count in enumerate(arms[name])
    ]
    return record(trials, "crossvalidation", num_folds)


def write_question(folder: Path, name: str, header: str = HEADER) -> Path:
    """The YAML of a search in `folder`."""
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{header}search:  {{sampler: grid}}   # as it is\n", encoding="utf-8")
    return path


def write_grid(
    folder: Path, trials: Sequence[tuple[Mapping[str, Any], Sequence[int]]], *, ranked: bool = True, **settings: Any
) -> Path:
    """A search as `tune` leaves it: samples, by default of every point of the grid, and what each epoch separated."""
    keys = dict.fromkeys(key for sample, _ in trials for key in sample)
    space = {}
    for key in keys:
        values = [sample[key] for sample, _ in trials]
        space[key] = {"choice": [value for at, value in enumerate(values) if value not in values[:at]]}
    config = search_config(space, epochs=2).replaced(
        {"search.sampler": "grid", "search.scheduler": "none", "search.final": False, **settings}
    )
    return write_search(folder, config, trials, ranked=ranked)


SIX_TRIALS = [({"optim.kind": kind, "seed": seed}, [9, 5 + 3 * (kind == "adam") + seed // 2])
              for seed in (0, 1, 2) for kind in ("adam", "sgd")]  # fmt: skip
"""Of the last epoch 8, 8, 9 with adam and 5, 5, 6 with sgd; of the best one 9 with either."""
