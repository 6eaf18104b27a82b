"""Training taken up again is training undisturbed; any number of workers train the same network; failures are named."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_workers import SPAWN, on_workers
from small_runs import assert_same_run, figures, last_checkpoint, open_data, run, small_config, wait_until

from nuciseg.config import Config
from nuciseg.engine.checkpoint import (
    CheckpointStore,
    find_checkpoint,
)
from nuciseg.engine.epoch_part import Wish
from nuciseg.engine.inference import Place, score_samples
from nuciseg.engine.loop import EpochReport, Trainer, train
from nuciseg.engine.network import load_network
from nuciseg.errors import CheckpointError, NonFiniteLossError
from nuciseg.metrics import Scores
from nuciseg.optim import learning_rate_at


class InterruptedOnPurposeError(Exception):
    """Ends a run from inside."""


def interrupt_after(epoch: int) -> Callable[[EpochReport], None]:
    def on_epoch(report: EpochReport) -> None:
        if report.progress.epoch == epoch:
            raise InterruptedOnPurposeError

    return on_epoch


# --- resumed is undisturbed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.kind": "adamw"},
        {"optim.kind": "adam", "schedule.kind": "one_cycle", "train.accumulate": 2},
        {"optim.kind": "sgd", "train.ema_decay": None, "model.norm": "batch"},
        {"optim.kind": "sgd", "optim.momentum": 0.0, "schedule.kind": "constant"},
        {"optim.kind": "rmsprop", "data.num_loader_threads": 2},
        {"optim.kind": "adamw", "train.channels_last": True},
        {"optim.kind": "adam", "train.precision": "bf16"},
        {"optim.kind": "sgd", "train.precision": "bf16"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_a_resumed_run_is_the_undisturbed_run_to_the_last_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(**changes)
    run(config, tmp_path / "undisturbed")
    for epoch in (1, 3):
        with pytest.raises(InterruptedOnPurposeError):
            run(config, tmp_path / "resumed", on_epoch=interrupt_after(epoch))
    run(config, tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")


MIDDLE_OF_EPOCH_3 = 2 * 4 + 2


def _train_until_killed(config: Config, run_dir: Path) -> None:
    """Trains to the middle of the third epoch, says so, and waits for its end there."""
    torch.set_num_threads(1)
    data = open_data(config)
    store = CheckpointStore(run_dir)
    trainer = Trainer(config, data, Place(), store)

    def hold(module: torch.nn.Module, arguments: Any) -> None:
        if trainer.progress.step == MIDDLE_OF_EPOCH_3:
            (run_dir / "held").touch()
            threading.Event().wait()

    trainer.network.model.register_forward_pre_hook(hold)
    while not trainer.finished:
        trainer.run_epoch()


def test_a_run_killed_in_mid_epoch_goes_on_from_its_last_checkpoint_as_if_undisturbed(tmp_path: Path) -> None:
    config = small_config()
    run(config, tmp_path / "undisturbed")
    killed = tmp_path / "killed"
    killed.mkdir()
    process = SPAWN.Process(target=_train_until_killed, args=(config, killed))
    process.start()
    wait_until((killed / "held").exists, "the third epoch")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert last_checkpoint(killed).progress.epoch == 2
    seen: list[int] = []
    run(config, killed, on_epoch=lambda report: seen.append(report.progress.epoch))
    assert seen == [3, 4]
    assert_same_run(killed, tmp_path / "undisturbed")


def stop_after(num_steps: int) -> Callable[[], Wish]:
    counter = itertools.count(1)
    return lambda: Wish.STOP if next(counter) == num_steps else Wish.GO_ON


@pytest.mark.parametrize("changes", [{}, {"data.num_loader_threads": 2, "model.norm": "batch"}])
@pytest.mark.parametrize("legs", [(1,), (3, 1, 7), (16,)])
def test_a_run_stopped_in_mid_epoch_loses_no_step(
    legs: tuple[int, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    config = small_config(**changes)
    run(config, tmp_path / "undisturbed")
    stopped = tmp_path / "stopped"
    step = 0
    for num_steps in legs:
        step += num_steps
        wish = stop_after(num_steps)
        progress = train(config, open_data(config), Place(), CheckpointStore(stopped), lambda report: None, wish)
        assert (progress.step, progress.epoch, progress.batches) == (step, (step - 1) // 4, (step - 1) % 4 + 1)
        assert last_checkpoint(stopped).progress == progress
    run(config, stopped)
    assert_same_run(stopped, tmp_path / "undisturbed")


def test_long_epochs_have_checkpoints_in_their_middle(tmp_path: Path) -> None:
    seen: list[Path | None] = []
    store = CheckpointStore(tmp_path)

    def look() -> Wish:
        seen.append(store.last)
        return Wish.GO_ON

    config = small_config(**{"run.checkpoint_minutes": 1e-6, "train.epochs": 2})
    train(config, open_data(config), Place(), store, lambda report: None, wish=look)
    names = [path.name if path else None for path in seen]
    assert names == [
        None, "epoch-0000-batch-000001", "epoch-0000-batch-000002", "epoch-0000-batch-000003",
        "epoch-0001", "epoch-0001-batch-000001", "epoch-0001-batch-000002", "epoch-0001-batch-000003",
    ]  # fmt: skip


def test_before_the_first_epoch_is_over_there_is_nothing_to_predict_with(tmp_path: Path) -> None:
    config = small_config()
    train(config, open_data(config), Place(), CheckpointStore(tmp_path), lambda report: None, wish=lambda: Wish.STOP)
    assert CheckpointStore(tmp_path).best is None
    with pytest.raises(CheckpointError, match="is not a checkpoint and holds none"):
        find_checkpoint(tmp_path)


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    """What the tests above compare does depend on the weights' beginning, the batches and dropout."""
    for seed in (0, 1):
        run(small_config(**{"seed": seed, "train.epochs": 1}), tmp_path / str(seed))
    assert figures(last_checkpoint(tmp_path / "0").progress.history) != figures(
        last_checkpoint(tmp_path / "1").progress.history
    )


def test_the_learning_rate_goes_on_where_it_was(tmp_path: Path) -> None:
    config = small_config(**{"schedule.warmup_share": 0.5})
    with pytest.raises(InterruptedOnPurposeError):
        run(config, tmp_path, on_epoch=interrupt_after(2))
    history = run(config, tmp_path).history
    last_steps = [4 * epoch - 1 for epoch in (1, 2, 3, 4)]
    expected = [learning_rate_at(config.schedule, config.optim.lr, step, 16) for step in last_steps]
    assert [row["learning_rate"] for row in history] == expected
    assert len(set(expected)) == 4


def test_a_run_of_other_images_is_not_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(InterruptedOnPurposeError):
        run(small_config(), tmp_path, on_epoch=interrupt_after(1))
    with pytest.raises(CheckpointError, match=r"data\.validation_fraction, split_seed, .* changed; begin anew"):
        run(small_config(**{"data.split_seed": 1}), tmp_path)


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    config = small_config(**{"train.epochs": 1})
    run(config, tmp_path)
    seen: list[EpochReport] = []
    run(config, tmp_path, on_epoch=seen.append)
    assert not seen


# --- what one step is ------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    plain = {"model.norm": "none", "model.dropout": 0.0, "train.epochs": 2, "optim.kind": "sgd", "optim.lr": 0.05}
    for parts in (1, 3, 4):
        run(small_config(**plain, **{"train.accumulate": parts}), tmp_path / str(parts))
    whole = last_checkpoint(tmp_path / "1")
    for parts in (3, 4):
        cut = last_checkpoint(tmp_path / str(parts))
        for name, tensor in whole.weights.items():
            torch.testing.assert_close(cut.weights[name], tensor, rtol=1e-4, atol=1e-6)
        assert [row["train_loss"] for row in cut.progress.history] == pytest.approx(
            [row["train_loss"] for row in whole.progress.history], rel=1e-5
        )


def test_each_part_of_an_accumulated_batch_is_smaller(tmp_path: Path) -> None:
    config = small_config(**{"train.accumulate": 4})
    trainer = Trainer(config, open_data(config), Place(), CheckpointStore(tmp_path))
    sizes: list[int] = []
    trainer.network.model.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    trainer.train_epoch(1)
    trainer.close()
    assert sizes == [1] * 16


def test_training_learns(tmp_path: Path) -> None:
    history = run(small_config(**{"optim.lr": 0.02, "model.dropout": 0.0}), tmp_path).history
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    plain = {
        "optim.kind": "sgd",
        "optim.momentum": 0.0,
        "optim.lr": 1.0,
        "optim.weight_decay": 0.0,
        "schedule.kind": "constant",
        "schedule.warmup_share": 0.0,
        "train.clip_norm": 1e-3,
    }
    config = small_config(**plain)
    trainer = Trainer(config, open_data(config), Place(), CheckpointStore(tmp_path))
    before = [parameter.detach().clone() for parameter in trainer.network.model.parameters()]
    trainer.train_epoch(1)
    trainer.close()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, trainer.network.model.parameters(), strict=True)])
    assert 0 < float(moved.detach().norm()) <= 4 * 1e-3 * (1 + 1e-4)  # four steps of length 1e-3 at most


def test_validation_and_the_checkpoint_use_the_averaged_weights(tmp_path: Path) -> None:
    reports: list[EpochReport] = []
    config = small_config(**{"train.epochs": 2, "train.ema_decay": 0.99, "optim.lr": 0.02})
    data = open_data(config)
    train(config, data, Place(), CheckpointStore(tmp_path), reports.append)
    checkpoint = last_checkpoint(tmp_path)
    raw = {name.removeprefix("model."): value for name, value in checkpoint.training.items() if "model." in name}
    assert any(not torch.equal(raw[name], tensor) for name, tensor in checkpoint.weights.items())
    last = CheckpointStore(tmp_path).last
    assert last is not None
    network, _ = load_network(last, torch.device("cpu"))
    assert tuple(score_samples(network, data.samples, data.split.validation)) == reports[-1].image_scores


# --- several workers -------------------------------------------------------------------------------------------------


def _train_and_note_ids(place: Place, config: Config, run_dir: Path) -> list[str]:
    """Trains, and returns the ids of all images this worker has learned from."""
    trainer = Trainer(config, open_data(config), place, CheckpointStore(run_dir))
    learned: list[str] = []
    backward = trainer._backward

    def noting(batch: Any, global_size: int) -> Any:
        learned.extend(batch.ids)
        return backward(batch, global_size)

    trainer._backward = noting  # type: ignore[method-assign]
    while not trainer.finished:
        trainer.run_epoch()
    trainer.close()
    return learned


# 16 images in batches of 5: shares of 2, 2 and 1 images, and a last batch of a single one: two workers have none.
UNEVEN = {
    "data.batch_size": 5,
    "model.norm": "none",
    "model.dropout": 0.0,
    "train.epochs": 2,
    "optim.kind": "sgd",
    "optim.lr": 0.05,
    "train.accumulate": 2,
}


@pytest.fixture(scope="module")
def one_and_three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """The folder of one run by one worker (`1`) and by three (`3`), and the ids that each of the three learned from."""
    folder = tmp_path_factory.mktemp("workers")
    config = small_config(**UNEVEN)
    run(config, folder / "1")
    return folder, on_workers(3, folder / "rendezvous", _train_and_note_ids, config, folder / "3")


def test_uneven_shares_neither_hang_nor_count_an_image_twice(one_and_three: tuple[Path, list[list[str]]]) -> None:
    config = small_config(**UNEVEN)
    data = open_data(config)
    learned = sorted(id for ids in one_and_three[1] for id in ids)
    expected = sorted(2 * [data.samples.ids[index] for index in data.split.train])
    assert len(data.split.train) == 16
    assert learned == expected
    assert len({len(ids) for ids in one_and_three[1]}) > 1, "the shares were even: the test shows nothing"


def test_three_workers_train_the_network_that_one_worker_trains(one_and_three: tuple[Path, list[list[str]]]) -> None:
    folder, _ = one_and_three
    one, three = last_checkpoint(folder / "1"), last_checkpoint(folder / "3")
    assert one.progress.step == three.progress.step == 2 * 4
    for name, tensor in one.weights.items():
        torch.testing.assert_close(three.weights[name], tensor, rtol=1e-3, atol=1e-5)
    for key in ("train_loss", "learning_rate"):
        assert [row[key] for row in three.progress.history] == pytest.approx(
            [row[key] for row in one.progress.history], rel=1e-4
        )


def _score(place: Place, checkpoint: Path) -> tuple[list[Any], list[str]]:
    network, loaded = load_network(checkpoint, place.device)
    data = open_data(loaded.config)
    indices = range(len(data.samples.ids))
    return score_samples(network, data.samples, indices, place), list(data.samples.ids)


def test_three_workers_score_every_image_once_and_to_the_last_digit_as_one(
    one_and_three: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    checkpoint = find_checkpoint(one_and_three[0] / "1")
    alone, ids = _score(Place(), checkpoint)
    assert [scores.id for scores in alone] == sorted(ids)
    for together, _ in on_workers(3, tmp_path / "rendezvous", _score, checkpoint):
        assert together == alone
        assert Scores.total(together).flat_summary() == Scores.total(alone).flat_summary()


def _batch_norm_buffers(place: Place, config: Config, run_dir: Path) -> list[torch.Tensor]:
    trainer = Trainer(config, open_data(config), place, CheckpointStore(run_dir))
    trainer.run_epoch()
    trainer.close()
    return list(trainer.network.model.buffers())


def test_running_statistics_are_the_same_on_all_workers_and_finite(tmp_path: Path) -> None:
    config = small_config(**{**UNEVEN, "model.norm": "batch"})
    first, second = on_workers(2, tmp_path / "rendezvous", _batch_norm_buffers, config, tmp_path / "run")
    assert first
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
        assert bool(torch.isfinite(mine.float()).all())


def _confer_and_stop(place: Place, config: Config, run_dir: Path) -> tuple[int, list[str | None]]:
    """Asks for a conference after the second and the third step, which says that a machine has to go; stops after the
    sixth. Returns how often this worker was asked, and the newest checkpoint after each step."""
    answers = iter([Wish.GO_ON, Wish.CONFER, Wish.CONFER, Wish.GO_ON, Wish.GO_ON, Wish.STOP])
    store = CheckpointStore(run_dir)
    newest: list[str | None] = []
    conferences: list[int] = []

    def wish() -> Wish:
        newest.append(store.last.name if store.last else None)
        return next(answers)

    def must_one_go() -> bool:
        conferences.append(len(newest))
        return True

    train(config, open_data(config), place, store, lambda report: None, wish, must_one_go)
    return len(conferences), newest


def test_workers_keep_one_checkpoint_when_a_machine_has_to_go_and_lose_no_step(tmp_path: Path) -> None:
    config = small_config(**{**UNEVEN, "model.dropout": 0.2})
    on_workers(2, tmp_path / "all", _train_and_note_ids, config, tmp_path / "undisturbed")
    found = on_workers(2, tmp_path / "first", _confer_and_stop, config, tmp_path / "stopped")
    assert [conferences for conferences, _ in found] == [2, 2]
    before_third = "epoch-0000-batch-000002"
    assert found[0][1] == [None, None, before_third, before_third, "epoch-0001", "epoch-0001"]
    assert last_checkpoint(tmp_path / "stopped").progress.batches == 2
    on_workers(2, tmp_path / "second", _train_and_note_ids, config, tmp_path / "stopped")
    stopped, undisturbed = (last_checkpoint(tmp_path / name) for name in ("stopped", "undisturbed"))
    for mine, theirs in ((stopped.weights, undisturbed.weights), (stopped.training, undisturbed.training)):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for mine, theirs in zip(stopped.progress.history, undisturbed.progress.history, strict=True):
        assert figures([mine])[0] == pytest.approx(figures([theirs])[0], rel=1e-6)  # sums of other groups of images


def _stop_in_mid_epoch(place: Place, config: Config, run_dir: Path) -> int:
    answers = iter([Wish.GO_ON, Wish.STOP])
    train(config, open_data(config), place, CheckpointStore(run_dir), lambda report: None, lambda: next(answers))
    return last_checkpoint(run_dir).progress.batches


def test_one_worker_goes_on_with_the_images_that_two_have_left(
    one_and_three: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    """From a checkpoint of the middle of an epoch: each image is learned from once, as if there always had been one."""
    config = small_config(**UNEVEN)
    assert on_workers(2, tmp_path / "rendezvous", _stop_in_mid_epoch, config, tmp_path / "run") == [2, 2]
    learned = _train_and_note_ids(Place(), config, tmp_path / "run")
    data = open_data(config)
    batches = data.training_data.plan(1, config.data.batch_size)
    left = [data.samples.ids[index] for batch in batches[2:] for index in batch.indices]
    assert len(left) == 6
    assert sorted(learned) == sorted(left + [data.samples.ids[index] for index in data.split.train])
    mixed, one = (last_checkpoint(run_dir) for run_dir in (tmp_path / "run", one_and_three[0] / "1"))
    assert mixed.progress.step == one.progress.step
    for name, tensor in one.weights.items():
        torch.testing.assert_close(mixed.weights[name], tensor, rtol=1e-3, atol=1e-5)
    for key in ("train_loss", "learning_rate"):
        expected = [row[key] for row in one.progress.history]
        assert [row[key] for row in mixed.progress.history] == pytest.approx(expected, rel=1e-4)


def _fail_together(place: Place, config: Config, run_dir: Path) -> str:
    with pytest.raises(NonFiniteLossError) as raised:
        run(config, run_dir, place)
    return str(raised.value)


def test_a_loss_that_is_not_finite_ends_every_worker(tmp_path: Path) -> None:
    """Those that found nothing wrong with their own images must not wait for the others for ever."""
    config = small_config(**{**UNEVEN, "optim.lr": 100.0, "train.clip_norm": None, "optim.weight_decay": 10.0})
    messages = on_workers(2, tmp_path / "rendezvous", _fail_together, config, tmp_path / "run")
    steps = {message.split(" in step ")[1].split()[0] for message in messages}
    assert len(steps) == 1
