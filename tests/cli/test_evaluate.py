"""`evaluate`: the table, the files, the W&B run, and a sentence for every data set or checkpoint it cannot use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from wandb_offline import read_offline_runs

from nuciseg.cli import run_verb
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder, write_nucleus_folder
from nuciseg.evaluate import main
from nuciseg.images import read_image, write_png
from nuciseg.tracking import RunIdentity, TrackingConfig, open_tracker

PAIRS = SyntheticConfig(num_train=4, num_test=3, mean_diameter_px=24.0, nuclei_per_cluster=(2, 2), seed=4)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    write_nucleus_folder(PAIRS, root / "nucleus")
    write_labels_folder(PAIRS, root / "labels", 96, 96)
    return root


@pytest.fixture
def data(drawn: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged: `nucleus` and `labels`."""
    shutil.copytree(drawn, tmp_path / "data")
    return tmp_path / "data"


def evaluate(*words: str | Path) -> int:
    """The exit code of the verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def test_the_scores_are_printed_and_written(tiny_run: Path, drawn: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nuciseg.evaluate", "--checkpoint", str(tiny_run), "--data.root"]
    result = subprocess.run(
        [*command, str(drawn / "nucleus"), "--split", "test", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    rows = {name: cells for name, *cells in table}
    baselines = list(report["baselines"].values())
    assert rows["clusters separated"] == [f"{each['clusters_separated']} of 3" for each in (report, *baselines)]
    assert rows["AP .7 per image"] == [f"{each['ap_per_image']['0.70']:.3f}" for each in (report, *baselines)]
    assert rows["mean AP .5:.9 pooled"][0] == f"{report['ap_mean_to_90_pooled']:.3f}"
    assert rows["mean AP pooled"] == [f"{each['ap_mean_pooled']:.3f}" for each in (report, *baselines)]
    assert rows["nuclei found / true"][0] == f"{report['nuclei_found']} / 6"
    assert report["split_hash"] in result.stdout
    assert report["checkpoint"] in result.stdout
    assert "border_threshold" in result.stdout
    assert "core_rise" not in result.stdout, "this target does not heed it"
    assert not (tmp_path / "out" / "wandb").exists(), "the run was not tracked, so its evaluation is not"


def test_without_a_folder_the_runs_own_data_and_folder_are_taken(tiny_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    assert evaluate("--checkpoint", run_dir, "--split", "validation") == 0
    report = json.loads((run_dir / "evaluation-validation" / "scores.json").read_text())
    assert (report["data"]["format"], report["images"]) == ("synthetic", 12)


def test_the_evaluation_is_a_run_of_its_own_in_the_group_of_the_run(tiny_run: Path, tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(tiny_run, run_dir)
    trained = RunIdentity("trial-7", "unet 7", group="the-search", job_type="train")
    open_tracker(TrackingConfig(kind="none"), trained, run_dir, {}).finish(0)
    for _ in range(2):  # the second goes on with the same W&B run
        assert evaluate("--checkpoint", run_dir, "--out", out, "--tracking.kind", "offline") == 0
    report = json.loads((out / "scores.json").read_text())
    runs = read_offline_runs(out)
    assert len({run.run["id"] for run in runs}) == 1
    (first, *_) = runs
    assert (first.run["group"], first.run["job_type"]) == ("the-search", "evaluate")
    assert "unet 7" in first.run["name"]
    assert first.summary["cluster_score"] == report["cluster_score"]
    assert first.summary["otsu_watershed/cluster_score"] == report["baselines"]["otsu_watershed"]["cluster_score"]
    assert first.summary["split_hash"] == report["split_hash"]
    assert first.config["model"]["depth"] == 3
    (table,) = (row["image_scores"] for row in first.history if "image_scores" in row)
    assert table["nrows"] == report["images"]


# ------------------------------------------------------------------------------------------------------------ bad input
def first_image(data: Path) -> Path:
    return min((data / "nucleus" / "test").glob("*.png"))


def solution_of(image: Path) -> Path:
    return image.parent / "solutions" / image.name


def no_folder(data: Path) -> None:
    shutil.rmtree(data / "nucleus")


def no_test_folder(data: Path) -> None:
    shutil.rmtree(data / "nucleus" / "test")


def empty_folder(data: Path) -> None:
    for path in (data / "nucleus" / "test").rglob("*.png"):
        path.unlink()


def no_layout(data: Path) -> None:
    no_folder(data)
    (data / "nucleus").mkdir()


def no_solution(data: Path) -> None:
    solution_of(first_image(data)).unlink()


def no_image(data: Path) -> None:
    first_image(data).unlink()


def other_size(data: Path) -> None:
    write_png(solution_of(first_image(data)), np.zeros((40, 41), np.uint8))


def truncated(data: Path) -> None:
    path = first_image(data)
    path.write_bytes(path.read_bytes()[:200])


def unreadable(data: Path) -> None:
    first_image(data).write_text("no image")


def colour(data: Path) -> None:
    path = first_image(data)
    noise = np.random.default_rng(0).integers(0, 255, (*read_image(path).shape, 3), dtype=np.uint8)
    write_png(path, noise)


def all_black(data: Path) -> None:
    path = first_image(data)
    write_png(solution_of(path), np.zeros(read_image(path).shape, np.uint8))


def too_small(data: Path) -> None:
    write_png(first_image(data), np.full((7, 30), 9, np.uint8))
    border = np.full((7, 30), 255, np.uint8)
    border[1:-1, 1:-1] = 0
    write_png(solution_of(first_image(data)), border)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_folder, "does not exist"),
        (no_test_folder, "does not exist"),
        (empty_folder, "holds no images"),
        (no_layout, "has no known layout"),
        (no_solution, "have no solution of the same name"),
        (no_image, "have no image of the same name"),
        (other_size, "make both the same size"),
        (truncated, "cannot be read as an image"),
        (unreadable, "cannot be read as an image"),
        (colour, "is a colour image where grey is needed"),
        (all_black, "is all black"),
        (too_small, "the network needs at least 8 on each side"),
    ],
)
def test_bad_data_is_one_sentence(
    tiny_run: Path, data: Path, tmp_path: Path, damage: Callable[[Path], None], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(data)
    refused(
        evaluate("--checkpoint", tiny_run, "--data.root", data / "nucleus", "--out", tmp_path / "out"), message, capsys
    )
    assert not (tmp_path / "out").exists(), "nothing half-written"


def test_an_image_of_floats_is_one_sentence(
    tiny_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = min((data / "labels" / "test" / "images").glob("*.png"))
    tifffile.imwrite(image.with_suffix(".tif"), np.ones((96, 96), np.float32))
    image.unlink()
    code = evaluate("--checkpoint", tiny_run, "--data.root", data / "labels", "--out", tmp_path / "out")
    refused(code, "holds float32 pixels", capsys)


def refused(code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("nuciseg: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def truncate_weights(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_schema(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))


def not_one(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, "is truncated"),
        (other_schema, "has checkpoint schema 2, this nuciseg reads schema 1"),
        (not_one, "is not a checkpoint"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_bad_checkpoint_is_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    damage(folder)
    refused(evaluate("--checkpoint", folder, "--out", tmp_path / "out"), message, capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    refused(evaluate("--checkpoint", tiny_run, "--out", tmp_path / "file" / "out"), "cannot be written", capsys)


def test_the_folder_of_the_training_run_is_no_place_for_its_evaluation(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    identity = RunIdentity(id="a", name="a", group="a", job_type="train", tags=())
    open_tracker(TrackingConfig(kind="none"), identity, folder, {}).finish(0)
    before = sorted(folder.rglob("*"))
    refused(evaluate("--checkpoint", folder, "--out", folder), "is the folder of a train run; choose another", capsys)
    assert sorted(folder.rglob("*")) == before


def test_validation_images_of_other_data_are_refused(
    tiny_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--checkpoint",
        tiny_run,
        "--data.root",
        data / "nucleus",
        "--split",
        "validation",
        "--out",
        tmp_path / "o",
    ]
    refused(evaluate(*words), "was trained on split", capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.format", "nucleuss"], "data.format is 'nucleuss'"),
        (["--tracking.kind", "wandbb"], "tracking.kind is 'wandbb'"),
        (["--split", "tset"], "argument --split: invalid choice: 'tset'"),
        (["--data.rot", "x"], "unknown argument '--data.rot'; did you mean '--data.root'?"),
    ],
)
def test_a_bad_flag_is_one_sentence(
    tiny_run: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--checkpoint", tiny_run, "--out", tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_bad_input_as_a_process(tmp_path: Path) -> None:
    """The same through the front door: exit code, one line, no traceback."""
    command = [sys.executable, "-m", "nuciseg.evaluate", "--checkpoint", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"nuciseg: {tmp_path} is not a checkpoint and holds none; ")
    assert result.stderr.count("\n") == 1
