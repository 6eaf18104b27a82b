"""Checkpoints are whole or not there: written, read back, damaged, killed, out of space."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nuciseg import patience
from nuciseg.config import Config
from nuciseg.engine import checkpoint as module
from nuciseg.engine.checkpoint import (
    METADATA_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointStore,
    Progress,
    disk_need_bytes,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_json,
)
from nuciseg.engine.network import load_network
from nuciseg.errors import CheckpointError, ResourceError


def make_checkpoint(epoch: int = 1, best_epoch: int = 1, size: int = 1000) -> Checkpoint:
    generator = torch.Generator().manual_seed(epoch)
    weights = {
        "conv.weight": torch.randn(size, generator=generator),
        "half": torch.randn(3, 5, generator=generator).bfloat16().T,
        "count": torch.tensor(epoch),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    return Checkpoint(
        config=Config().replaced({"optim.lr": 1.2345678901234567e-3, "seed": 5}),
        progress=Progress(
            epoch=epoch, step=7 * epoch, best_epoch=best_epoch, history=({"epoch": 1, "loss": 0.1 + 0.2},)
        ),
        split_hash="0123456789abcdef",
        in_channels=1,
        weights=weights,
        training={f"model.{name}": 2 * tensor for name, tensor in weights.items()},
        scores={"cluster_score": 1 / 3},
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert (found.config, found.progress, found.split_hash) == (expected.config, expected.progress, expected.split_hash)
    assert (found.scores, found.in_channels) == (expected.scores, expected.in_channels)
    for mine, theirs in ((found.weights, expected.weights), (found.training, expected.training)):
        assert set(mine) == set(theirs)
        for name in mine:
            assert (mine[name].dtype, mine[name].shape) == (theirs[name].dtype, theirs[name].shape)
            assert bits(mine[name]) == bits(theirs[name]), name


def in_a_child(work: Callable[[], None]) -> int:
    """The exit code of `work` in a process of its own: negative where a signal ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def test_what_was_saved_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    saved = make_checkpoint()
    save_checkpoint(saved, tmp_path / "epoch-0001")
    assert_same(load_checkpoint(tmp_path / "epoch-0001", training=True), saved)
    assert not load_checkpoint(tmp_path / "epoch-0001").training, "prediction does not read the optimizer's state"
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001"]


def test_a_checkpoint_holds_nothing_that_can_run_code(tmp_path: Path) -> None:
    save_checkpoint(make_checkpoint(), tmp_path / "epoch-0001")
    assert {path.suffix for path in (tmp_path / "epoch-0001").iterdir()} == {".json", ".safetensors"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "epoch-0001"
    save_checkpoint(make_checkpoint(), folder)
    return folder


def edit_metadata(folder: Path, **changes: object) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def drop_progress(folder: Path) -> None:
    path = folder / "checkpoint.json"
    metadata = json.loads(path.read_text())
    del metadata["progress"]
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "weights.safetensors"), "is truncated"),
        (lambda folder: flip(folder / "weights.safetensors", 12), "damaged"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "cannot be read"),
        (lambda folder: cut(folder / "checkpoint.json"), "truncated or no checkpoint's"),
        (lambda folder: (folder / "checkpoint.json").write_text("[1, 2]"), "no checkpoint's"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "is not a checkpoint"),
        (drop_progress, "lacks progress"),
        (lambda folder: edit_metadata(folder, schema_version=99), "schema 99, this nuciseg reads schema 1"),
        (lambda folder: edit_metadata(folder, config={"optim": {"lr": -1}}), "optim.lr"),
    ],
)
def test_a_damaged_checkpoint_is_refused(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


def test_a_truncated_training_file_stops_resuming_but_not_prediction(saved: Path) -> None:
    cut(saved / "training.safetensors")
    load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"training\.safetensors is truncated"):
        load_checkpoint(saved, training=True)


def test_weights_of_another_network_are_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit the configuration"):
        load_network(saved, torch.device("cpu"))


def test_a_checkpoint_trained_in_fp16_predicts_on_a_cpu(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    config = load_checkpoint(folder).config.replaced({"train.precision": "fp16"})
    edit_metadata(folder, config=config.model_dump(mode="json"))
    network, _ = load_network(folder, torch.device("cpu"))
    assert network.precision.dtype is not torch.float16


def test_best_last_and_the_one_before_are_kept_and_never_more_than_three_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    assert store.best is None
    assert store.last is None
    store.folder.mkdir()
    (store.folder / ".epoch-0001.999").mkdir()  # of a writer that was killed
    most = 0
    replace = os.replace

    def count_and_replace(source: Path, target: Path) -> None:
        nonlocal most
        most = max(most, len(list(store.folder.iterdir())))
        replace(source, target)

    monkeypatch.setattr(os, "replace", count_and_replace)
    for epoch, best in enumerate((1, 2, 2, 2, 5, 5), start=1):
        path = store.save(make_checkpoint(epoch, best))
        assert path == store.last == store.folder / f"epoch-{epoch:04d}"
        assert store.best == store.folder / f"epoch-{best:04d}"
        kept = {f"epoch-{each:04d}" for each in (best, epoch, epoch - 1) if each > 0}
        assert {each.name for each in store.folder.iterdir()} == kept
        assert load_checkpoint(store.folder / f"epoch-{best:04d}").progress.epoch == best
    assert most == 3


@pytest.mark.parametrize("name", [WEIGHTS_FILE, TRAINING_FILE, METADATA_FILE])
def test_a_truncated_last_checkpoint_gives_way_to_the_one_before(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path)
    for epoch in (1, 2, 3):
        store.save(make_checkpoint(epoch, best_epoch=1))
    assert store.damaged == []
    last = store.last
    assert last is not None
    with (last / name).open("r+b") as file:
        file.truncate(20)
    assert store.damaged == [last]
    assert store.last == store.folder / "epoch-0002"
    assert store.best == store.folder / "epoch-0001"
    store.save(make_checkpoint(3, best_epoch=1))
    assert store.damaged == []
    assert_same(load_checkpoint(store.folder / "epoch-0003", training=True), make_checkpoint(3, best_epoch=1))


def test_epochs_of_more_digits_are_newer(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for epoch in (9999, 10000, 10001):
        store.save(make_checkpoint(epoch, best_epoch=9999))
    assert store.last is not None
    assert store.last.name == "epoch-10001"
    (store.last / METADATA_FILE).unlink()
    assert [path.name for path in store.damaged] == ["epoch-10001"]


def test_the_bound_on_the_disk_holds(tmp_path: Path) -> None:
    """Weights, raw weights and Adam's two moments, three times."""
    parameters = torch.zeros(100_000)
    saved = make_checkpoint(size=1)
    training = {f"{name}.weight": parameters.clone() for name in ("model", "exp_avg", "exp_avg_sq")}
    save_checkpoint(
        Checkpoint(saved.config, saved.progress, saved.split_hash, 1, {"weight": parameters}, training), tmp_path / "c"
    )
    written = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    assert written < disk_need_bytes(parameters.numel()) / 3 * 1.02


@pytest.mark.parametrize("moment", ["flush", "rename"])
def test_killed_while_writing_leaves_the_last_whole_one(tmp_path: Path, moment: str) -> None:
    store = CheckpointStore(tmp_path)
    first = make_checkpoint(1)
    store.save(first)

    def write_and_die() -> None:
        def die(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "flush":
            module._flush_to_disk = die
        else:
            os.replace = die  # type: ignore[assignment]
        store.save(make_checkpoint(2, best_epoch=2))

    assert in_a_child(write_and_die) == -signal.SIGKILL
    assert list(store.folder.glob(".epoch-0002.*")), "it died in mid-write"
    assert store.last is not None
    assert store.last.name == "epoch-0001"
    assert find_checkpoint(tmp_path) == store.last
    assert_same(load_checkpoint(store.last, training=True), first)
    store.save(make_checkpoint(2, best_epoch=2))
    names = {path.name for path in store.folder.iterdir()}
    assert names == {"epoch-0001", "epoch-0002"}, "what the dead writer left is gone"


def save_and_expect_no_space(store: CheckpointStore) -> None:
    try:
        store.save(make_checkpoint(2, size=200_000))
    except ResourceError as error:
        sentence = str(error)
    else:
        pytest.fail("no ResourceError")
    assert "no space left for " in sentence
    assert "MB free" in sentence
    assert "\n" not in sentence
    assert store.last is not None
    assert_same(load_checkpoint(store.last, training=True), make_checkpoint(1))
    assert [path.name for path in store.folder.iterdir()] == ["epoch-0001"], "nothing half-written"


def test_a_file_size_limit_is_told_and_leaves_the_last_whole_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make_checkpoint(1))

    def save_with_a_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save_and_expect_no_space(store)

    assert in_a_child(save_with_a_limit) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_the_last_whole_one(small_disk: Path) -> None:
    store = CheckpointStore(small_disk)
    store.save(make_checkpoint(1))
    save_and_expect_no_space(store)


@pytest.mark.parametrize("times", [1, 3])
def test_storage_that_is_away_is_waited_for(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can take a server's disk away; what the system says then is said in its place."""
    answers = iter([OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")] * 9)
    replace_name, left = os.replace, [times]

    def away_at_first(source: Path, target: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise next(answers)
        replace_name(source, target)

    monkeypatch.setattr(os, "replace", away_at_first)
    monkeypatch.setattr(patience, "WAITS_S", (0.0, 0.0, 0.0))
    path = CheckpointStore(tmp_path).save(make_checkpoint())
    assert_same(load_checkpoint(path, training=True), make_checkpoint())
    left[0] = times
    write_json({"value": 1}, tmp_path / "value.json")
    assert json.loads((tmp_path / "value.json").read_text()) == {"value": 1}
    left[0] = 4
    with pytest.raises(ResourceError, match=r"cannot write .*: (Input/output error|Stale file handle)"):
        write_json({"value": 2}, tmp_path / "value.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "value.json"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write .*Not a directory"):
        save_checkpoint(make_checkpoint(), tmp_path / "file" / "epoch-0001")


def test_a_checkpoint_is_found_by_its_run_its_search_and_itself(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "search" / "final")
    store.save(make_checkpoint(1))
    best = store.save(make_checkpoint(2, best_epoch=2))
    store.save(make_checkpoint(3, best_epoch=2))
    for path in (tmp_path / "search", tmp_path / "search" / "final", best):
        assert find_checkpoint(path) == best


@pytest.mark.parametrize(("name", "message"), [("missing", "does not exist"), ("empty", "is not a checkpoint")])
def test_no_checkpoint_is_told(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(tmp_path / name)


def test_json_that_cannot_be_written_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"cannot write .*(Not a directory|File exists)"):
        write_json({}, tmp_path / "file" / "value.json")


def test_a_checkpoint_handed_over_takes_the_place_of_all_but_ones_own_changes_nothing(tmp_path: Path) -> None:
    def after(epoch: int, loss: float) -> Checkpoint:
        history = tuple({"epoch": each, "loss": loss / each} for each in range(1, epoch + 1))
        return replace(make_checkpoint(epoch), progress=Progress(epoch=epoch, best_epoch=1, history=history))

    own, other = CheckpointStore(tmp_path / "own"), CheckpointStore(tmp_path / "other")
    handed_back = tmp_path / "handed back"
    shutil.copytree(own.save(after(1, 0.5)), handed_back)
    own.save(after(2, 0.5))
    handed_over = other.save(after(2, 0.4))

    own.adopt(handed_back)
    assert own.last is not None
    assert [path.name for path in (own.best, own.last) if path] == ["epoch-0001", "epoch-0002"]
    own.adopt(handed_over)
    assert own.best == own.last
    assert load_checkpoint(own.last).progress.history[0]["loss"] == 0.4
