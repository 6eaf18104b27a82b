"""What is read from the folders of runs and searches: finished, going on, killed, failed, damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_runs import NUM_IMAGES, search_config, split, write_run, write_search

from nuciseg.distributed.failures import note_failure
from nuciseg.distributed.trials import RESULTS_FILE, SAMPLE_FILE, as_text
from nuciseg.distributed.worker import CONFIG_FILE, FINISHED_FILE
from nuciseg.engine.checkpoint import write_json
from nuciseg.errors import DataError, TrainingError
from nuciseg.reporting.records import RunRecord, SearchRecord, read_folder
from nuciseg.tracking import METRICS_FILE

SPACE = {"optim.lr": {"loguniform": [1e-4, 1e-1]}}


def run_in(folder: Path) -> RunRecord:
    found = read_folder(folder)
    assert isinstance(found, RunRecord)
    return found


def search_in(folder: Path) -> SearchRecord:
    found = read_folder(folder)
    assert isinstance(found, SearchRecord)
    return found


def test_a_finished_run_has_its_best_checkpoints_scores(tmp_path: Path) -> None:
    run = run_in(write_run(tmp_path / "run", [3, 9, 5]))
    assert (run.name, run.state, len(run.history)) == ("run", "done", 3)
    assert run.scores is not None
    assert run.scores["cluster_score"] == 9 / NUM_IMAGES
    assert run.split_hash == split().hash
    assert sum(row["separated"] for row in run.images) == 9


def test_a_killed_run_is_shown_as_far_as_it_got(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [3, 9, 5], finished=False)
    with (tmp_path / "run" / METRICS_FILE).open("a") as file:
        file.write('{"epoch": 4, "train_l')
    run = run_in(tmp_path / "run")
    assert (run.state, len(run.history)) == ("unfinished", 3)
    assert run.scores is not None
    assert run.scores["cluster_score"] == 9 / NUM_IMAGES


def test_a_run_without_an_epoch_has_no_scores(tmp_path: Path) -> None:
    run = run_in(write_run(tmp_path / "run", []))
    assert (run.state, run.scores, run.evaluations) == ("unfinished", None, ())


def test_why_a_run_failed_is_read(tmp_path: Path) -> None:
    run = run_in(write_run(tmp_path / "run", [3], finished=False, failure="the loss is not finite"))
    assert (run.state, run.failure) == ("failed", "the loss is not finite")


def test_trials_come_as_the_search_ranked_them(tmp_path: Path) -> None:
    trials = [({"optim.lr": 1e-3}, [2, 3]), ({"optim.lr": 1e-2}, [2, 9, 8, 9]), ({"optim.lr": 1e-4}, [1, 5])]
    search = search_in(write_search(tmp_path / "search", search_config(SPACE), trials))
    assert [each.trial.sample["optim.lr"] for each in search.trials] == [1e-2, 1e-4, 1e-3]
    assert [each.state for each in search.trials] == ["done", "stopped", "stopped"]
    assert search.is_finished
    assert search.split_hashes == (split().hash,)
    assert search.best is search.trials[0]


def test_a_search_that_goes_on_is_read_from_its_trials_folders(tmp_path: Path) -> None:
    folder = write_search(
        tmp_path / "search", search_config(SPACE), [({"optim.lr": 1e-3}, [2, 3]), ({"optim.lr": 1e-2}, [6])],
        ranked=False,
    )  # fmt: skip
    (folder / "trial01" / FINISHED_FILE).unlink()
    write_json({"optim.lr": 1e-1}, folder / "trial02" / SAMPLE_FILE)  # begun, nothing else
    write_json({"optim.lr": 5e-2}, folder / "trial03" / SAMPLE_FILE)
    note_failure(folder / "trial03", TrainingError("out of memory"))
    search = search_in(folder)
    assert not search.is_finished
    found = {each.trial.id: (each.state, each.trial.score, each.trial.epochs) for each in search.trials}
    assert found == {
        "trial00": ("stopped", 0.3, 2),
        "trial01": ("unfinished", 0.6, 1),
        "trial02": ("unfinished", None, 0),
        "trial03": ("failed", None, 0),
    }
    assert search.trials[-1].trial.failure == "out of memory"


def test_a_search_that_began_only_some_of_its_trials_is_not_finished(tmp_path: Path) -> None:
    """As one that came to its bound of disk space while no trial was in the middle of an epoch."""
    grid = {"search.sampler": "grid", "search.space": {"optim.lr": {"choice": [1e-3, 1e-2, 1e-1]}}}
    trials = [({"optim.lr": lr}, [2, 3]) for lr in (1e-3, 1e-2, 1e-1)]
    config = search_config(SPACE, epochs=2).replaced(grid)
    assert not search_in(write_search(tmp_path / "some", config, trials[:2])).is_finished
    assert search_in(write_search(tmp_path / "all", config, trials)).is_finished


def test_a_trial_resumed_after_the_ranking_is_read_anew(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", search_config(SPACE), [({"optim.lr": 1e-3}, [2, 3])])
    write_run(folder / "trial00", [2, 3, 8], config=search_config({}))
    [trial] = search_in(folder).trials
    assert (trial.trial.score, trial.trial.epochs) == (0.8, 3)


def test_sections_come_back_from_the_text_that_samplers_keep(tmp_path: Path) -> None:
    choice = {"kind": "unet", "width": 4}
    config = search_config({"model": {"choice": [choice, {"kind": "baseline"}]}})
    folder = write_search(tmp_path / "search", config, [({"model": as_text(choice)}, [2])], ranked=False)
    assert search_in(folder).trials[0].trial.sample["model"] == choice


def test_a_search_that_was_killed_before_its_first_trial_is_one(tmp_path: Path) -> None:
    search = search_in(write_search(tmp_path / "search", search_config(SPACE), [], ranked=False))
    assert (search.trials, search.split_hashes, search.best, search.is_finished) == ((), (), None, False)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run and no search"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match=r"nowhere is no folder"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(("file", "text"), [(RESULTS_FILE, "[{"), (RESULTS_FILE, '[{"id": 1}]'), (RESULTS_FILE, "{}x")])
def test_damaged_results_are_named(tmp_path: Path, file: str, text: str) -> None:
    folder = write_search(tmp_path / "search", search_config(SPACE), [])
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=rf"{file}.*restore it or remove it"):
        read_folder(folder)


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [3])
    (folder / FINISHED_FILE).write_text("{}")
    with pytest.raises(DataError, match=r"finished\.json lacks 'scores'"):
        read_folder(folder)
    assert (folder / CONFIG_FILE).exists()
