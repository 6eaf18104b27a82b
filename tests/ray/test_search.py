"""Searches through real Ray Tune trials: samplers, schedulers, failures, room, interruption and resumption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from small_runs import (
    figures,
    last_checkpoint,
    logged_epochs,
    small_config,
    wait_until,
)
from small_searches import EXPLODES, LEARNS, PLAIN, STAYS, run_search

from nuciseg.config import Config, load_config, write_config
from nuciseg.distributed import search
from nuciseg.distributed.search import resume_search, winner
from nuciseg.distributed.trials import RESULTS_FILE, Trial
from nuciseg.distributed.worker import FINISHED_FILE, SPLIT_FILE
from nuciseg.engine.checkpoint import MAX_FOLDERS, find_checkpoint, load_checkpoint
from nuciseg.errors import DataError
from nuciseg.reporting.records import SearchRecord, read_folder

pytestmark = pytest.mark.usefixtures("ray_session")
Searched = tuple[Path, Config, list[Trial], str]


def record_spans(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let each attempt of a trial write down when it began and ended."""
    run_trial = search._run_trial

    def recorded(sample: dict[str, Any], plan: Any) -> None:
        start = time.time()
        try:
            run_trial(sample, plan)
        finally:
            (folder / f"{start}").write_text(json.dumps([start, time.time()]))

    folder.mkdir()
    monkeypatch.setattr(search, "_run_trial", recorded)


def spans(folder: Path) -> list[tuple[float, float]]:
    return [tuple(json.loads(path.read_text())) for path in folder.iterdir()]


def most_at_once(intervals: list[tuple[float, float]]) -> int:
    return max(sum(start <= moment < end for start, end in intervals) for moment, _ in intervals)


# --- samplers and schedulers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_by_asha(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A grid of one network that learns and three that do not, one after the other, and what was printed."""
    folder = tmp_path_factory.mktemp("searches") / "asha"
    patch = pytest.MonkeyPatch()
    printed: list[str] = []
    patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    try:
        config, trials = run_search(
            folder,
            **{"search.scheduler": "asha", "search.grace_epochs": 1, "search.reduction_factor": 2,
               "search.max_concurrent": 1},
        )  # fmt: skip
    finally:
        patch.undo()
    return folder, config, trials, "\n".join(printed)


def test_asha_stops_the_trials_that_do_not_learn(stopped_by_asha: Searched) -> None:
    _, _, trials, _ = stopped_by_asha
    epochs = {trial.sample["optim.lr"]: trial.epochs for trial in trials}
    assert epochs.pop(LEARNS) == 4
    assert len(epochs) == len(STAYS)
    assert max(epochs.values()) < 4
    assert all(trial.failure is None for trial in trials)


def test_trials_are_ranked_by_the_chosen_score(stopped_by_asha: Searched) -> None:
    folder, config, trials, _ = stopped_by_asha
    assert trials[0].sample["optim.lr"] == LEARNS
    scores = [trial.score for trial in trials if trial.score is not None]
    assert len(scores) == len(trials)
    assert scores == sorted(scores, reverse=True)
    for trial in trials:
        history = last_checkpoint(folder / trial.id).progress.history
        assert trial.score == max(row["border_dice"] for row in history)
    best = winner(trials, config)
    assert best is not None
    assert best == config.replaced({"optim.lr": LEARNS})
    written = json.loads((folder / RESULTS_FILE).read_text())
    assert [row["id"] for row in written] == [trial.id for trial in trials]


def test_a_page_is_made_of_what_the_search_left(stopped_by_asha: Searched) -> None:
    folder, _, trials, _ = stopped_by_asha
    found = read_folder(folder)
    assert isinstance(found, SearchRecord)
    assert found.is_finished
    assert [each.trial for each in found.trials] == trials
    assert [each.state for each in found.trials] == ["done", *["stopped"] * len(STAYS)]
    assert [len(each.history) for each in found.trials] == [trial.epochs for trial in trials]


def test_the_scheduler_hears_of_every_epoch(stopped_by_asha: Searched) -> None:
    _, _, trials, printed = stopped_by_asha
    number = trials[0].id.rsplit("_", 1)[-1]
    for epoch in (1, 2, 3, 4):
        assert f"trial {number} running {epoch}/4 " in printed
    assert f"trial {number} done 4/4 " in printed
    assert "stopped 1/4 " in printed


def test_every_trial_keeps_a_run_of_its_own(stopped_by_asha: Searched) -> None:
    folder, config, trials, _ = stopped_by_asha
    for trial in trials:
        run_dir = folder / trial.id
        assert logged_epochs(run_dir) == list(range(1, trial.epochs + 1))
        assert load_config(run_dir / "config.yaml").optim.lr == trial.sample["optim.lr"]
        assert (run_dir / SPLIT_FILE).exists()
        assert (run_dir / FINISHED_FILE).exists()  # also where a scheduler ended it
        assert len(list((run_dir / "checkpoints").iterdir())) <= MAX_FOLDERS
    assert load_config(folder / "config.yaml") == config


def test_trials_of_a_search_share_the_decoded_images(stopped_by_asha: Searched) -> None:
    splits = {(stopped_by_asha[0] / trial.id / SPLIT_FILE).read_text() for trial in stopped_by_asha[2]}
    assert len(splits) == 1


@pytest.mark.parametrize("sampler", [pytest.param("random", marks=pytest.mark.slow), "optuna"])
def test_samplers_draw_by_the_seed(sampler: str, tmp_path: Path) -> None:
    space = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "data.batch_size": {"choice": [4, 8]}}
    config, trials = run_search(
        tmp_path / "search",
        **{"search.sampler": sampler, "search.space": space, "search.num_trials": 3, "search.trial_epochs": 1},
    )
    assert len({trial.sample["optim.lr"] for trial in trials}) == 3
    assert all(trial.epochs == 1 and trial.failure is None for trial in trials)
    for trial in trials:
        assert 1e-4 <= trial.sample["optim.lr"] <= 1e-2
        assert trial.sample["data.batch_size"] in (4, 8)
    assert config.train.epochs == 4  # what the winner is trained for


@pytest.mark.slow
def test_a_population_takes_over_the_weights_of_its_best(tmp_path: Path) -> None:
    changes = {"search.sampler": "random", "search.scheduler": "pbt", "search.num_trials": 4, "search.grace_epochs": 2,
               "train.epochs": 6, "search.space": {"optim.lr": {"choice": [LEARNS, STAYS[0]]}},
               # Long epochs: a trial that ends before the others have begun takes nothing from them.
               "data.synthetic.num_train": 150}  # fmt: skip
    folder = tmp_path / "search"
    _, trials = run_search(folder, **changes)
    assert all(trial.failure is None and trial.epochs == 6 for trial in trials)
    histories = {trial.id: figures(last_checkpoint(folder / trial.id).progress.history) for trial in trials}
    begun = {id: json.loads((folder / id / "metrics.jsonl").read_text().split("\n")[0]) for id in histories}
    taken_over = [id for id, history in histories.items() if history[0]["train_loss"] != begun[id]["train_loss"]]
    assert taken_over, "no trial took over another's weights"
    for id in taken_over:
        donors = [other for other, row in begun.items() if row["train_loss"] == histories[id][0]["train_loss"]]
        assert donors
        assert id not in donors
        assert len(histories[id]) == 6


@pytest.mark.slow
def test_trials_of_two_workers_use_the_whole_cluster_and_free_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers with two CPUs each are all that the cluster has: a trial that held any itself would wait for ever."""
    changes = {
        "scale.num_workers": 2,
        "scale.cpus_per_worker": 2,
        "search.scheduler": "asha",
        "search.grace_epochs": 1,
        "search.reduction_factor": 2,
        "search.space": {"optim.lr": {"choice": [LEARNS, STAYS[0]]}},
        "train.epochs": 12,
    }
    _, trials = run_search(tmp_path / "search", **changes)
    assert len(trials) == 2
    assert all(trial.failure is None for trial in trials)
    assert [trial.sample["optim.lr"] for trial in trials] == [LEARNS, STAYS[0]]
    assert trials[0].epochs == 12
    assert trials[1].epochs < 12  # its workers train on for the moment until Tune has ended them
    printed = capsys.readouterr().out
    number = trials[0].id.rsplit("_", 1)[-1]
    for epoch in range(1, 13):
        assert f"trial {number} running {epoch}/12 " in printed, "the scheduler did not hear of this epoch"
    all_cpus = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == all_cpus, "the places of stopped trials", 60)


# --- room ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "room"),
    [
        pytest.param({}, 4, id="all"),
        pytest.param({"search.max_concurrent": 2}, 2, id="limited"),
    ],
)
@pytest.mark.slow
def test_never_more_trials_at_once_than_there_is_room_for(
    changes: dict[str, Any], room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_spans(monkeypatch, tmp_path / "spans")
    num_trials = room + 2
    space = {"optim.lr": {"choice": [0.01 / (1 + i) for i in range(num_trials)]}}
    _, trials = run_search(tmp_path / "search", **{"search.space": space, "search.trial_epochs": 2, **changes})
    assert len(trials) == len(spans(tmp_path / "spans")) == num_trials
    assert 2 <= most_at_once(spans(tmp_path / "spans")) <= room


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_trial_that_fails_is_told_with_its_reason_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_spans(monkeypatch, tmp_path / "spans")
    changes = {"search.space": {"optim.lr": {"choice": [EXPLODES, 0.001]}}, "optim.kind": "sgd", "model.norm": "none",
               "train.clip_norm": None, "optim.weight_decay": 10.0, "schedule.warmup_share": 0.0}  # fmt: skip
    config, trials = run_search(tmp_path / "search", **changes)
    good, failed = trials
    assert good.failure is None
    assert good.epochs == 4
    assert failed.failure is not None
    assert " is not finite in step " in failed.failure
    assert "at learning rate 90" in failed.failure
    best = winner(trials, config)
    assert best is not None
    assert best.optim.lr == 0.001
    assert len(spans(tmp_path / "spans")) == 2, "what cannot be mended was tried again"


def test_a_trial_that_raises_says_what_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken(sample: dict[str, Any], plan: Any) -> None:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(search, "_run_trial", mistaken)
    _, [trial] = run_search(
        tmp_path / "search", **{"search.space": {"optim.lr": {"choice": [LEARNS]}}, "run.max_failures": 1}
    )
    said = capsys.readouterr().out
    assert " died - RuntimeError: nobody thought of this; it is started again " in said
    assert " failed - RuntimeError: nobody thought of this " in said
    assert trial.failure == "RuntimeError: nobody thought of this"


def test_trials_begin_with_the_weights_that_are_given(stopped_by_asha: Searched, tmp_path: Path) -> None:
    folder, _, trials, _ = stopped_by_asha
    learned = folder / trials[0].id
    changes = {
        "search.space": {"optim.lr": {"choice": [1e-12]}},
        "train.epochs": 1,
        "train.init_from": str(learned),
    }
    _, [trial] = run_search(tmp_path / "search", **changes)
    best = load_checkpoint(find_checkpoint(learned)).weights
    for name, values in last_checkpoint(tmp_path / "search" / trial.id).weights.items():
        torch.testing.assert_close(values, best[name], rtol=0, atol=1e-6)


def test_data_that_is_away_ends_a_resumption_before_it_ends_the_trials(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    folder.mkdir()
    away = small_config(**PLAIN, **{"data.root": str(tmp_path / "away"), "data.format": "nucleus"})
    write_config(away, folder / "config.yaml")
    with pytest.raises(DataError, match="away"):
        resume_search(away, folder, verbose=False)
    assert list(folder.iterdir()) == [folder / "config.yaml"]


def test_without_a_trial_that_ended_well_there_is_no_winner(tmp_path: Path) -> None:
    changes = {"search.space": {"optim.lr": {"choice": [EXPLODES]}}, "optim.kind": "sgd", "model.norm": "none",
               "train.clip_norm": None, "optim.weight_decay": 10.0, "schedule.warmup_share": 0.0}  # fmt: skip
    config, trials = run_search(tmp_path / "search", **changes)
    assert winner(trials, config) is None
    [written] = json.loads(
        (tmp_path / "search" / "results.json").read_text(), parse_constant=lambda text: f"not JSON: {text}"
    )
    assert written["score"] is None
