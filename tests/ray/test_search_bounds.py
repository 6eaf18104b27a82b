"""A search ends at its bound of hours or disk, in order, and goes on: see `nuciseg/distributed/limits.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import last_checkpoint, logged_epochs, small_config

from nuciseg import tune
from nuciseg.cli import run_verb
from nuciseg.config import Config, load_config, write_config
from nuciseg.distributed import limits
from nuciseg.distributed.limits import Limits, SearchEndedError, spent_seconds
from nuciseg.distributed.runs import trial_disk_bytes
from nuciseg.distributed.search import check_search, resume_search, start_search
from nuciseg.distributed.trials import RESULTS_FILE
from nuciseg.distributed.worker import FINISHED_FILE
from nuciseg.errors import ConfigError, LimitReachedError
from nuciseg.reporting.records import SearchRecord, read_folder

NUM_TRIALS = 3
SEARCH = {
    "search.sampler": "grid",
    "search.scheduler": "none",
    "search.space": {"optim.lr": {"choice": [0.01 / (1 + i) for i in range(NUM_TRIALS)]}},
    "search.max_concurrent": 2,
    "search.final": False,
}

pytestmark = pytest.mark.usefixtures("ray_session")


def bounded(**bounds: Any) -> Config:
    return small_config(**SEARCH, **bounds)


@pytest.fixture
def hour_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's clock goes on by an hour as soon as a trial has an epoch behind it, however slow the machine is."""
    note_time = Limits._note_time

    def later(self: Limits) -> float:
        return note_time(self) + 3600 * any(self.folder.glob("*/metrics.jsonl"))

    monkeypatch.setattr(Limits, "_note_time", later)
    monkeypatch.setattr(limits, "LOOK_S", 0.0)  # a trial has many epochs behind it in the second between two looks


def run_until_bound(config: Config, folder: Path) -> SearchEndedError:
    with pytest.raises(SearchEndedError) as ended:
        start_search(config, folder, verbose=False)
    return ended.value


def resume(folder: Path, **bounds: Any) -> list[Any]:
    config = load_config(folder / "config.yaml").replaced(bounds)
    write_config(config, folder / "config.yaml")
    return resume_search(config, folder, verbose=False)


@pytest.mark.usefixtures("hour_passes")
def test_at_the_last_hour_running_trials_leave_a_checkpoint_and_no_other_begins(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    # Epochs enough that no trial ends by itself.
    ended = run_until_bound(bounded(**{"search.max_hours": 1.0, "train.epochs": 300}), folder)
    begun = [path.parent for path in folder.glob("*/sample.json")]
    assert 1 <= len(begun) <= 2
    for trial in ended.trials:
        assert 1 <= trial.epochs < 300
        assert trial.failure is None
        assert not (folder / trial.id / FINISHED_FILE).exists()
    num_kept = len(ended.trials)
    assert re.fullmatch(
        rf"the search ended at its bound: 1\.\d\d h of --max-hours 1 are used; of {NUM_TRIALS} trials 0 ended, "
        rf"{num_kept} can go on from a checkpoint, {NUM_TRIALS - num_kept} were not begun: go on with "
        rf"`python -m nuciseg\.tune --resume {folder} --max-hours MORE`",
        str(ended),
    )
    record = read_folder(folder)
    assert isinstance(record, SearchRecord)
    assert not record.is_finished
    assert {row["id"] for row in json.loads((folder / RESULTS_FILE).read_text())} == {t.id for t in ended.trials}


@pytest.mark.usefixtures("hour_passes")
@pytest.mark.slow
def test_a_higher_bound_lets_it_go_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "search"
    ended = run_until_bound(bounded(**{"search.max_hours": 1.0, "train.epochs": 24}), folder)
    spent = spent_seconds(folder)
    kept = {trial.id: last_checkpoint(folder / trial.id).progress.history for trial in ended.trials}
    assert any(len(history) < 24 for history in kept.values())

    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: tune.main(["--resume", str(folder)]))
    assert exit_.value.code == LimitReachedError.exit_code == 3
    said = capsys.readouterr()
    assert f"--resume {folder} --max-hours MORE" in said.err, said
    rows = json.loads((folder / RESULTS_FILE).read_text())
    assert [(row["id"], row["epochs"]) for row in rows] == [(t.id, t.epochs) for t in ended.trials]

    trials = resume(folder, **{"search.max_hours": 100.0})
    assert spent_seconds(folder) > spent
    assert len(trials) == NUM_TRIALS
    for trial in trials:
        assert (trial.epochs, trial.failure) == (24, None)
        assert logged_epochs(folder / trial.id) == list(range(1, 25))
        before = kept.get(trial.id, ())
        assert last_checkpoint(folder / trial.id).progress.history[: len(before)] == before, "trained again"


@pytest.mark.slow
def test_without_room_for_another_trial_those_that_run_come_to_their_end(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    config = bounded(**{"train.epochs": 2})
    # Two at a time fit; what a trial leaves besides its checkpoints takes the room of a third.
    bytes_of_two = 2.2 * trial_disk_bytes(config)
    config = config.replaced({"search.max_disk_gb": bytes_of_two / 1e9})
    ended = run_until_bound(config, folder)
    assert "--max-disk" in str(ended)
    assert str(ended).endswith("--max-disk MORE`")
    assert 1 <= len(ended.trials) < NUM_TRIALS
    assert all((trial.epochs, trial.failure) == (2, None) for trial in ended.trials)
    assert all((folder / trial.id / FINISHED_FILE).exists() for trial in ended.trials)
    assert len(resume(folder, **{"search.max_disk_gb": 1.0})) == NUM_TRIALS


def test_a_bound_that_no_trial_fits_into_is_refused() -> None:
    config = bounded(**{"search.max_disk_gb": 1e-6})
    with pytest.raises(ConfigError, match=r"search\.max_disk_gb is 1e-06, but the checkpoints of one trial take up to"):
        check_search(config, verbose=False)
