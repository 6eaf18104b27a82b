"""What is kept of a search: its last epochs, its failures, what its trials share, and no folder of a machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_studies import SIX_TRIALS, record, seeds, write_grid
from written_runs import NUM_IMAGES, split, write_run

from nuciseg.distributed.trials import RESULTS_FILE, SAMPLE_FILE
from nuciseg.engine.checkpoint import write_json
from nuciseg.engine.network import count_parameters
from nuciseg.errors import DataError
from nuciseg.reporting.records import read_folder
from nuciseg.reporting.study_final import read_final, write_final
from nuciseg.reporting.study_records import (
    StudyRecord,
    StudySplit,
    collect,
    read_records,
    search_folders,
    write_record,
)

EARLY = [({"optim.kind": "adam"}, [7, 8, 9]), ({"optim.kind": "sgd"}, [7, 7])]
GRID = {"optim.kind": {"choice": ["adam", "sgd"]}, "seed": {"choice": [0, 1, 2]}}


def collected(folder: Path) -> StudyRecord:
    found = collect(folder)
    assert found is not None
    return found


def change_results(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change each row of the search's results, as `tune` might have written them."""
    rows = json.loads((folder / RESULTS_FILE).read_text())
    for row in rows:
        change(row)
    write_json(rows, folder / RESULTS_FILE)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return write_grid(tmp_path / "optimizer", SIX_TRIALS)


def test_the_last_epoch_counts_and_not_the_best(grid: Path) -> None:
    found = collected(grid)
    assert found.name == "optimizer"
    reached = [(t.arm, t.seed, t.figures and t.figures.clusters_separated) for t in found.trials]
    adam, sgd = {"optim.kind": "adam"}, {"optim.kind": "sgd"}
    assert reached == [(adam, 0, 8), (adam, 1, 8), (adam, 2, 9), (sgd, 0, 5), (sgd, 1, 5), (sgd, 2, 6)]
    assert {t.figures and t.figures.clusters for t in found.trials} == {NUM_IMAGES}


def test_what_trials_share_is_kept_once(grid: Path) -> None:
    found = collected(grid)
    sides = split()
    assert found.splits == (StudySplit(hash=sides.hash, num_train_images=10, num_held_out_images=10),)
    assert (found.epochs, found.crop_px, found.batch_size, found.cpus_per_trial) == (2, 64, 4, 1)
    assert (found.num_folds, found.same_border) == (None, True)
    assert {t.train_s for t in found.trials} == {4.0}
    run_config = read_folder(grid).config
    assert {t.num_parameters for t in found.trials} == {count_parameters(run_config)}


def test_what_differs_between_trials_is_not_called_common(grid: Path) -> None:
    config = read_folder(grid / "trial00").config
    changes = {"data.batch_size": 8, "target.width_px": 7, "scale.cpus_per_worker": 3}
    write_run(grid / "trial00", [9, 8], config=config.replaced(changes))
    found = collected(grid)
    assert (found.batch_size, found.same_border, found.cpus_per_trial, found.crop_px) == (None, False, None, 64)


def test_folds_are_kept_apart_from_the_arm(tmp_path: Path) -> None:
    trials = [({"optim.kind": "adam", "data.fold": fold}, [7, 8]) for fold in (0, 1)]
    space = {"optim.kind": {"choice": ["adam"]}, "data.fold": {"choice": [0, 1]}}
    found = collected(write_grid(tmp_path / "folds", trials, **{"search.space": space, "data.num_folds": 2}))
    assert found.num_folds == 2
    assert [(t.arm, t.fold, t.seed) for t in found.trials] == [({"optim.kind": "adam"}, fold, 0) for fold in (0, 1)]


def test_a_failed_trial_is_kept_with_its_reason_and_without_the_folders_in_it(grid: Path) -> None:
    def fail_one(row: dict[str, Any]) -> None:
        if row["id"] == "trial03":
            row["failure"] = "there is no space in /scratch/of/somebody/weights.bin, free some"

    change_results(grid, fail_one)
    failed = [t for t in collected(grid).trials if t.figures is None]
    assert [(t.arm, t.seed, t.failure) for t in failed] == [
        ({"optim.kind": "sgd"}, 1, "there is no space in weights.bin, free some")
    ]


def test_no_folder_of_one_machine_is_kept_of_an_arm(tmp_path: Path) -> None:
    models = [{"kind": "timm", "pretrained": f"/scratch/weights/{name}.pth"} for name in "ab"]
    trials = [({"model": model, "seed": 0}, [7, 8]) for model in models]
    found = collected(write_grid(tmp_path / "weights", trials))
    assert [t.arm["model"]["pretrained"] for t in found.trials] == ["a.pth", "b.pth"]


def test_settings_that_only_another_arm_names_are_kept_beside_it(tmp_path: Path) -> None:
    """The trials' own configurations say 2 and 4: a network of another kind would not have the keys."""
    arms = [{"kind": "unet"}, {"kind": "unet", "depth": 2}, {"kind": "baseline", "width": 4, "no_such": 1}]
    found = collected(write_grid(tmp_path / "network", [({"model": model, "seed": 0}, [7, 8]) for model in arms]))
    assert [t.arm["model"] for t in found.trials] == arms
    assert [t.unsaid for t in found.trials] == [
        {"model.depth": 2, "model.width": 4}, {"model.width": 4}, {"model.depth": 2}
    ]  # fmt: skip


def test_a_search_that_goes_on_has_no_record_yet(tmp_path: Path, grid: Path) -> None:
    assert collect(write_grid(tmp_path / "going", SIX_TRIALS[:2], ranked=False)) is None
    assert collect(write_grid(tmp_path / "bounded", SIX_TRIALS[:3], **{"search.space": GRID})) is None
    write_json({"optim.kind": "adam", "seed": 3}, grid / "trial99" / SAMPLE_FILE)
    assert collect(grid) is None


def test_one_of_several_searches_that_has_not_begun_has_none_either(tmp_path: Path, grid: Path) -> None:
    for name in ("optimizer", "later"):
        (tmp_path / f"{name}.yaml").write_text("{}")
    assert search_folders([tmp_path]) == [tmp_path / "later", grid]
    assert collect(tmp_path / "later") is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "nowhere", "nowhere is no folder"),
        (lambda folder: folder, "holds no run and no search"),
        (lambda folder: write_run(folder / "run", [3]), "holds a run, not a search"),
        (lambda folder: write_grid(folder / "final", SIX_TRIALS[:1]), "the name final is kept"),
        (
            lambda folder: write_grid(folder / "asha", SIX_TRIALS[:1], **{"search.scheduler": "asha"}),
            "its scheduler asha stops trials early",
        ),
        (
            lambda folder: write_grid(folder / "patient", EARLY, **{"train.epochs": 3, "train.patience": 1}),
            r"patient: train.patience ended 1 of 2 trials early \(trial01 after 2 of 3 epochs\), .*; search without it",
        ),
    ],
)
def test_what_is_no_search_of_a_study_is_refused(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(DataError, match=said):
        collect(make(tmp_path))


def test_patience_that_ended_no_trial_is_no_fault(tmp_path: Path) -> None:
    whole = [(sample, [7, 8, 9]) for sample, _ in EARLY]
    found = collected(write_grid(tmp_path / "patient", whole, **{"train.epochs": 3, "train.patience": 1}))
    assert found.epochs == 3


def test_searches_are_named_once(tmp_path: Path, grid: Path) -> None:
    assert search_folders([grid, grid / ".." / "optimizer"]) == [grid]
    other = write_grid(tmp_path / "elsewhere" / "optimizer", SIX_TRIALS[:1])
    with pytest.raises(DataError, match="would both be kept as optimizer"):
        search_folders([grid, other])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "optimizer.yaml").write_text("{}")
    with pytest.raises(DataError, match="configs holds no search that has begun"):
        search_folders([tmp_path / "configs"])


def test_records_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    kept = [seeds(adam=[1, None]), record([], name="a")]
    for each in kept:
        write_record(each, tmp_path)
    (tmp_path / "study" / "final.json").write_text("{}")
    assert read_records(tmp_path) == [kept[1], kept[0]], "by name, without what is no record"


@pytest.mark.parametrize("content", ["{", '{"name": "a"}', "[]"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    path = write_record(record([], name="a"), tmp_path)
    path.write_text(content)
    with pytest.raises(DataError, match=r"study/a.json is damaged"):
        read_records(tmp_path)
    (tmp_path / "study" / "final.json").write_text(content)
    with pytest.raises(DataError, match=r"final.json is damaged"):
        read_final(tmp_path)


def test_an_evaluation_is_refused_where_there_is_none_or_half_of_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no scores.json; give a folder that evaluate wrote"):
        write_final(tmp_path, tmp_path)
    keys = ("checkpoint", "epoch", "split", "split_hash", "baselines", "by_marking")
    (tmp_path / "scores.json").write_text(json.dumps({key: {} if key.endswith("s") else "1" for key in keys}))
    with pytest.raises(DataError, match=r"scores.json lacks"):
        write_final(tmp_path, tmp_path)
    assert not (tmp_path / "study").exists()
