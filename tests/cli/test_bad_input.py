"""`train` and `tune` answer bad input with one sentence and exit code 2, and leave nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nuciseg import train, tune
from nuciseg.cli import run_verb
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.images import write_png

SMALL = (
    "--data.synthetic.num_train",
    "8",
    "--data.synthetic.num_test",
    "2",
    "--model.depth",
    "2",
    "--model.width",
    "4",
)


def answer(main: Callable[[list[str]], None], *words: str | Path) -> int:
    """The exit code of a verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], *words: str | Path) -> str:
    """The one sentence with which a verb refuses `words`."""
    assert answer(main, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.fixture
def clusters(tmp_path: Path) -> Path:
    root = tmp_path / "clusters"
    write_nucleus_folder(SyntheticConfig(num_train=6, num_test=2, mean_diameter_px=30.0), root)
    return root


@pytest.mark.parametrize("verb", [train, tune])
def test_wrong_settings(
    verb: object, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main = verb.main  # type: ignore[attr-defined]
    assert "did you mean '--optim.lr'?" in refused(capsys, main, "--optim.lrr", "1")
    assert "data.batch_size" in refused(capsys, main, "--data.batch_size", "0")
    assert "optim.lr" in refused(capsys, main, "--optim.lr", "fast")
    (tmp_path / "c.yaml").write_text("optm: {lr: 1}\n")
    assert "did you mean 'optim'" in refused(capsys, main, "--config", "c.yaml")
    assert "no.yaml" in refused(capsys, main, "--config", "no.yaml")
    assert "nowhere" in refused(capsys, main, "--resume", "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"], "no run folder is left behind"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{optim.lr: {loguniform: [1e-2, 1e-5]}}", "lower < upper"),
        ("{optim.lrr: {loguniform: [1e-5, 1e-2]}}", "did you mean 'optim.lr'"),
        ("{optim.lr: {loguniformm: [1e-5, 1e-2]}}", "unknown sampler"),
        ("{data.batch_size: {choice: [0, 4]}}", "data.batch_size"),
        ("{optim.lr: {uniform: [-1, 1]}}", "optim.lr"),
        ("{scale.num_workers: {choice: [1, 2]}}", "scale cannot be searched"),
        ("{model: {choice: [{kind: unet}, {kind: timm}]}, model.depth: {choice: [2]}}", "search.space.model.depth"),
    ],
)
def test_a_search_space_that_cannot_be_sampled(
    line: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search.yaml").write_text(f"search:\n  space: {line}\n")
    assert expected in refused(capsys, tune.main, "--config", "search.yaml", *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["search.yaml"]


def test_wrong_data(capsys: pytest.CaptureFixture[str], clusters: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ("--data.root", clusters, "--run.storage_path", runs, "--tracking.kind", "none")

    def sentence() -> str:
        found = [refused(capsys, verb.main, *words, *extra) for verb, extra in ((train, ()), (tune, ("--no-final",)))]
        assert found[0] == found[1], "both verbs say the same"
        assert not runs.exists()
        return found[0]

    (tmp_path / "empty").mkdir()
    assert "no known layout" in refused(capsys, train.main, "--data.root", tmp_path / "empty")
    assert "does not exist" in refused(capsys, train.main, "--data.root", tmp_path / "missing")

    first, second = sorted((clusters / "train").glob("*.png"))[:2]
    solution = clusters / "train" / "solutions" / first.name
    saved = solution.read_bytes()
    solution.unlink()
    assert first.stem in sentence(), "an image without solution is named"
    solution.write_bytes(saved[: len(saved) // 2])
    assert str(solution) in sentence(), "a truncated solution is named"
    write_png(solution, np.zeros((40, 40, 3), np.uint8))
    assert str(solution) in sentence(), "a solution of another size is named"
    solution.write_bytes(saved)
    image = second.read_bytes()
    second.unlink()
    assert second.stem in sentence(), "a solution without image is named"
    second.write_bytes(image)
    assert answer(train.main, *words, *SMALL[4:], "--train.epochs", "1", "--data.crop_px", "64") == 0, "mended"


def test_test_images_are_looked_at_before_a_search(
    capsys: pytest.CaptureFixture[str], clusters: Path, tmp_path: Path
) -> None:
    (clusters / "test" / "solutions").rename(clusters / "gone")
    words = ("--data.root", clusters, "--run.storage_path", tmp_path / "runs", "--tracking.kind", "none")
    assert str(clusters / "test") in refused(capsys, tune.main, *words)
    assert not (tmp_path / "runs").exists()


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(("--train.precision", "fp16"), "train.precision is fp16, which needs a GPU", marks=NO_GPU),
        (("--loss.map_weights", "[1,2,3]"), "loss.map_weights has 3 values"),
        (("--loss.bce.positive_weight", "[1,2,3]"), "loss.positive_weight has 3 values"),
        (("--model.kind", "timm", "--model.pretrained", "no.pth"), "no.pth', and there is no such file"),
        (("--model.kind", "timm", "--model.pretrained", "hub"), "cannot be had from the hub"),
        (("--train.init_from", "nowhere"), "nowhere does not exist; give a run's folder"),
        (("--init-from", "nuciseg/none"), "no weights called nuciseg/none"),
        (("--init-from", "nuciseg/separator", "--model.stages", "3"), "its weights are of another network ("),
        (("--init-from", "nuciseg/separator", "--resume", "runs"), "give one of the two"),
        (("--tracking.kind", "wandb"), "run `wandb login`"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_settings_that_a_run_would_end_with_leave_no_folder(
    words: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert expected in refused(capsys, train.main, *SMALL[:4], *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "{model: {choice: [{kind: unet, depth: 2}, {kind: timm, encoder: resnet18, pretrained: no.pth}]}}",
            "no.pth', and there is no such file",
        ),
        ("{loss.weights.focal: {uniform: [0.0, 1.0]}}", "loss.map_weights has 3 values"),
        ("{model.depth: {choice: [2, 6]}}", "stride"),
        (
            "{target: {choice: [{kind: touching_border}, {kind: depth}]}, loss.bce.map_weights: {choice: [[1, 2]]}}",
            "loss.map_weights has 2 values",
        ),
    ],
)
def test_settings_that_a_trial_would_end_with_leave_no_folder(
    line: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the configuration as it stands could be trained with."""
    monkeypatch.chdir(tmp_path)
    drawn = "data: {synthetic: {mean_diameter_px: 16.0}}\n"
    (tmp_path / "search.yaml").write_text(
        f"{drawn}loss: {{focal: {{map_weights: [1, 2, 3]}}}}\nsearch:\n  space: {line}\n"
    )
    assert expected in refused(capsys, tune.main, "--config", "search.yaml", *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["search.yaml"]


def test_trials_longer_than_the_winners_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--search.trial_epochs", "5", "--train.epochs", "2", "--run.storage_path", tmp_path / "runs", *SMALL)
    assert refused(capsys, tune.main, *words) == (
        "nuciseg: search.trial_epochs is 5, but train.epochs, for the winner, is 2: set search.trial_epochs to that or "
        "less"
    )


def test_an_image_smaller_than_the_stride(capsys: pytest.CaptureFixture[str], clusters: Path) -> None:
    message = refused(capsys, train.main, "--data.root", clusters, "--model.depth", "6", "--data.crop_px", "64")
    assert "stride" in message
    assert "model.depth" in message


def test_more_workers_than_the_cluster_has(
    ray_session: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--scale.num_workers", "99", "--run.storage_path", tmp_path / "runs", *SMALL)
    for main in (train.main, tune.main):
        message = refused(capsys, main, *words)
        assert "scale.num_workers is 99" in message
        assert "CPUs: 4" in message
    assert "no GPU" in refused(capsys, train.main, *words[2:], "--scale.use_gpu", "true")
    assert not (tmp_path / "runs").exists()


def test_an_output_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    message = refused(capsys, train.main, "--run.storage_path", tmp_path / "file", *SMALL)
    assert "run.storage_path" in message


def test_a_run_of_the_same_name_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    message = refused(capsys, train.main, "--run.storage_path", tmp_path, "--run.name", "a", *SMALL)
    assert "--resume" in message


def test_as_a_process(tmp_path: Path) -> None:
    """What the shell sees: the same sentence on standard error, nothing else, and the code."""
    command = [sys.executable, "-m", "nuciseg.train", "--data.batch_size", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("nuciseg: ")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """No file may grow beyond 64 kB: the network's weights do not fit, and what is left of them goes."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
    code = limit + "from nuciseg.cli import run_verb; from nuciseg.train import main; run_verb(main)"
    words = [
        "--run.storage_path",
        "runs",
        "--run.name",
        "a",
        "--tracking.kind",
        "none",
        *SMALL[:4],
        "--model.width",
        "8",
    ]
    # The cache is larger than the limit, so it is made before.
    subprocess.run([sys.executable, "-c", CACHE, *SMALL[:4]], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "no space left" in line
    assert "--resume" in line
    checkpoints = tmp_path / "runs" / "a" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


CACHE = """
import sys
from nuciseg.config import load_config
from nuciseg.engine.datasets import open_samples
numbers = {"num_train": int(sys.argv[2]), "num_test": int(sys.argv[4])}
open_samples(load_config(None, {"data": {"synthetic": numbers}}).data, "train")
"""
