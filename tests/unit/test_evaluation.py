"""What evaluating a checkpoint writes, and that it is the truth."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nuciseg.baselines import BASELINES
from nuciseg.config import DataConfig
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder, write_nucleus_folder
from nuciseg.engine.checkpoint import load_checkpoint, save_checkpoint
from nuciseg.engine.datasets import open_samples, open_split_samples
from nuciseg.engine.dependence import scores_by_marking
from nuciseg.engine.evaluation import EvaluationResult, default_out, evaluate_checkpoint
from nuciseg.engine.inference import predict_probabilities, score_samples
from nuciseg.engine.network import load_network
from nuciseg.errors import CheckpointError, DataError, ResourceError
from nuciseg.images import read_image, read_labels, write_labels_tiff, write_png
from nuciseg.metrics import Scores, score_image

CPU = torch.device("cpu")
PRODUCTS = {"scores.json", "images.csv", "contact_sheet.png", "overlays", "labels"}
PAIRS = SyntheticConfig(num_train=4, num_test=2, mean_diameter_px=24.0, nuclei_per_cluster=(2, 2), seed=9)


@pytest.fixture(scope="module")
def evaluated(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    """The tiny run's test images, scored."""
    return evaluate_checkpoint(tiny_checkpoint, None, "test", tmp_path_factory.mktemp("out") / "test", device=CPU)


def report_of(result: EvaluationResult) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((result.out / "scores.json").read_text())
    return report


def rows_of(result: EvaluationResult) -> list[dict[str, str]]:
    with (result.out / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_holds_the_products_alone(evaluated: EvaluationResult) -> None:
    assert {path.name for path in evaluated.out.iterdir()} == PRODUCTS


def test_scores_are_those_of_validation(evaluated: EvaluationResult, tiny_checkpoint: Path) -> None:
    network, loaded = load_network(tiny_checkpoint, CPU)
    samples = open_samples(loaded.config.data, "test")
    expected = Scores.total(score_samples(network, samples, range(len(samples))))
    assert evaluated.scores == expected
    report = report_of(evaluated)
    assert {key: report[key] for key in expected.summary()} == expected.summary()
    assert report["clusters"] == 6
    assert report["ap_pooled"].keys() == report["ap_per_image"].keys() >= {"0.50", "0.70", "0.90"}


def test_validation_scores_are_those_the_checkpoint_was_chosen_by(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(tiny_checkpoint)
    result = evaluate_checkpoint(tiny_checkpoint, None, "validation", tmp_path / "out", device=CPU)
    flat = result.scores.flat_summary()
    assert {key: loaded.scores[key] for key in flat} == flat
    samples, split = open_split_samples(loaded.config.data)
    assert {row["id"] for row in rows_of(result)} == {samples.ids[index] for index in split.validation}


def test_the_report_says_what_the_scores_were_obtained_with(evaluated: EvaluationResult, tiny_checkpoint: Path) -> None:
    report, loaded = report_of(evaluated), load_checkpoint(tiny_checkpoint)
    assert report["checkpoint"] == str(tiny_checkpoint)
    assert (report["split"], report["split_hash"]) == ("test", loaded.split_hash)
    assert report["target"] == loaded.config.target.model_dump(mode="json")
    assert report["data"]["format"] == "synthetic"
    assert {"ap_pooled", "ap_per_image", "clusters_separated"} <= report["averaging"].keys()


def test_baselines_stand_beside_with_the_same_figures(evaluated: EvaluationResult, tiny_checkpoint: Path) -> None:
    report = report_of(evaluated)
    assert report["baselines"].keys() == BASELINES.keys()
    network, loaded = load_network(tiny_checkpoint, CPU)
    samples = open_samples(loaded.config.data, "test")
    for name, baseline in BASELINES.items():
        by_hand = []
        for id, sample in zip(samples.ids, samples, strict=True):
            instances, border_HW = baseline(sample.image_HWC[..., 0], network.target)
            truth_HW = network.target.encode(sample.labels_HW)[1] > 0
            by_hand.append(score_image(id, instances.labels_HW, sample.labels_HW, border_HW, truth_HW))
        assert report["baselines"][name] == Scores.total(by_hand).summary()
    assert report["baselines"]["all_black"]["clusters_separated"] == 0


def test_other_markings_and_open_borders_are_told(evaluated: EvaluationResult, tiny_checkpoint: Path) -> None:
    network, loaded = load_network(tiny_checkpoint, CPU)
    samples = open_samples(loaded.config.data, "test")
    indices = range(len(samples))
    by_hand = {name: scores.summary() for name, scores in scores_by_marking(network, samples, indices).items()}
    assert report_of(evaluated)["by_marking"] == json.loads(json.dumps(by_hand))
    expected = {
        found.id: str(network.target.open_borders(found.maps_KHW))
        for found in predict_probabilities(network, samples, indices)
    }
    assert {row["id"]: row["open_borders"] for row in rows_of(evaluated)} == expected


def test_the_labels_written_give_the_scores_again(evaluated: EvaluationResult, tiny_checkpoint: Path) -> None:
    samples = open_samples(load_checkpoint(tiny_checkpoint).config.data, "test")
    scores = Scores()
    for id, sample in zip(samples.ids, samples, strict=True):
        nothing = np.zeros(sample.labels_HW.shape, bool)
        found_HW = read_labels(evaluated.out / "labels" / f"{id}.tif")
        scores += Scores.of(score_image(id, found_HW, sample.labels_HW, nothing, nothing))
    assert scores.summary()["ap_pooled"] == report_of(evaluated)["ap_pooled"]
    assert scores.clusters_separated == report_of(evaluated)["clusters_separated"]


def test_rows_are_worst_first_and_add_up(evaluated: EvaluationResult) -> None:
    rows = rows_of(evaluated)
    order = [(float(row["ap50"]), float(row["ap_mean"]), row["id"]) for row in rows]
    assert order == sorted(order)
    assert sum(row["separated"] == "True" for row in rows) == evaluated.scores.clusters_separated
    assert sum(int(row["nuclei_found"]) for row in rows) == evaluated.scores.num_predicted
    assert sum(int(row["nuclei_true"]) for row in rows) == evaluated.scores.num_true == 12
    mean = sum(float(row["ap50"]) for row in rows) / len(rows)
    assert report_of(evaluated)["ap_per_image"]["0.50"] == pytest.approx(mean, abs=1e-12)


def test_there_is_a_picture_of_every_image_worst_first(evaluated: EvaluationResult) -> None:
    rows = rows_of(evaluated)
    names = sorted(path.name for path in (evaluated.out / "overlays").iterdir())
    assert names == [f"{rank:04d}_{row['id']}.png" for rank, row in enumerate(rows, start=1)]
    assert [row["overlay"] for row in rows] == [f"overlays/{name}" for name in names]


def test_failures_are_marked_in_red(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Nuclei in an empty image cannot be found."""
    root = tmp_path / "data"
    write_labels_folder(PAIRS, root)
    (first, *_) = sorted((root / "test" / "images").iterdir())
    write_png(first, np.full(read_image(first).shape, 7, np.uint8))
    result = evaluate_checkpoint(tiny_checkpoint, DataConfig(root=root), "test", tmp_path / "out", device=CPU)
    worst, best = rows_of(result)[0], rows_of(result)[-1]
    assert worst["id"] == first.stem
    assert float(worst["ap50"]) < 1
    frames = [overlay_frame(result.out / row["overlay"]) for row in (worst, best)]
    assert frames[0] == (200, 20, 20)
    assert (frames[1] == (200, 20, 20)) == (float(best["ap50"]) < 1)


def overlay_frame(path: Path) -> tuple[int, ...]:
    import imageio.v3 as iio

    return tuple(iio.imread(path)[-1, -1].tolist())


def test_another_data_set_may_be_given(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_nucleus_folder(PAIRS, tmp_path / "data")
    data = load_checkpoint(tiny_checkpoint).config.data.model_copy(update={"root": tmp_path / "data", "format": "auto"})
    result = evaluate_checkpoint(tiny_checkpoint, data, "test", tmp_path / "out", device=CPU)
    assert report_of(result)["data"]["format"] == "nucleus"
    assert result.scores.images == 2


def test_validation_images_of_another_split_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = load_checkpoint(tiny_checkpoint).config.data.model_copy(update={"split_seed": 1})
    for split in ("validation", "train"):
        with pytest.raises(CheckpointError, match="was trained on split"):
            evaluate_checkpoint(tiny_checkpoint, data, split, tmp_path / "out", device=CPU)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- test images that are none
@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Four clusters in either part, by the same names."""
    write_nucleus_folder(PAIRS.model_copy(update={"num_test": 4}), tmp_path / "drawn")
    return tmp_path / "drawn"


@pytest.fixture
def flat_checkpoint(tiny_checkpoint: Path, drawn: Path, tmp_path: Path) -> Path:
    """The checkpoint of a run on a folder without parts: `drawn/train`."""
    loaded = load_checkpoint(tiny_checkpoint)
    data = DataConfig(root=drawn / "train")
    _, split = open_split_samples(data)
    config = loaded.config.model_copy(update={"data": data})
    save_checkpoint(replace(loaded, config=config, split_hash=split.hash), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refused_as_test(checkpoint: Path, root: Path | None, out: Path) -> None:
    said = r"trained on the very images in \S+/train, .* --split validation"
    with pytest.raises(CheckpointError, match=said) as caught:
        evaluate_checkpoint(checkpoint, root and DataConfig(root=root), "test", out, device=CPU)
    assert caught.value.exit_code == 2
    assert not out.exists()


def test_images_that_were_trained_on_are_no_test(flat_checkpoint: Path, drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused_as_test(flat_checkpoint, None, out)
    refused_as_test(flat_checkpoint, drawn / "train", out)
    shutil.copytree(drawn / "train", tmp_path / "copy" / "train")
    refused_as_test(flat_checkpoint, tmp_path / "copy" / "train", out)
    assert evaluate_checkpoint(flat_checkpoint, None, "validation", out, device=CPU).scores.images == 1


def test_images_that_were_added_since_do_not_make_it_a_test(flat_checkpoint: Path, drawn: Path, tmp_path: Path) -> None:
    for folder in (drawn / "train", drawn / "train" / "solutions"):
        shutil.copy(folder / "drawn_00000.png", folder / "more.png")
    refused_as_test(flat_checkpoint, drawn / "train", tmp_path / "out")


def test_images_that_were_trained_on_elsewhere_are_known_by_their_names(
    flat_checkpoint: Path, drawn: Path, tmp_path: Path
) -> None:
    drawn.rename(tmp_path / "moved")
    refused_as_test(flat_checkpoint, tmp_path / "moved" / "train", tmp_path / "out")
    moved = DataConfig(root=tmp_path / "moved")
    assert evaluate_checkpoint(flat_checkpoint, moved, "test", tmp_path / "out", device=CPU).scores.images == 4


@pytest.mark.parametrize("part", ["", "test"])
def test_other_images_of_the_same_names_are_a_test(
    flat_checkpoint: Path, drawn: Path, tmp_path: Path, part: str
) -> None:
    result = evaluate_checkpoint(flat_checkpoint, DataConfig(root=drawn / part), "test", tmp_path / "out", device=CPU)
    assert result.scores.images == 4


def test_a_second_evaluation_replaces_the_first_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "overlays").mkdir(parents=True)
    (out / "overlays" / "0001_old.png").write_bytes(b"")
    (out / "notes.txt").write_text("mine")
    first = evaluate_checkpoint(tiny_checkpoint, None, "test", out, device=CPU)
    before = (out / "scores.json").read_bytes()
    second = evaluate_checkpoint(tiny_checkpoint, None, "test", out, device=CPU)
    assert (out / "scores.json").read_bytes() == before
    assert first.scores == second.scores
    assert {path.name for path in out.iterdir()} == PRODUCTS | {"notes.txt"}
    assert len(list((out / "overlays").iterdir())) == 6


def test_nothing_is_left_where_the_data_cannot_be_used(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_labels_folder(PAIRS, tmp_path / "data")
    (first, *_) = sorted((tmp_path / "data" / "test" / "images").iterdir())
    write_png(first, np.ones((5, 90), np.uint8))
    write_labels_tiff(tmp_path / "data" / "test" / "masks" / f"{first.stem}.tif", np.ones((5, 90), np.int32))
    with pytest.raises(DataError, match="5x90 pixels, the network needs at least 8"):
        evaluate_checkpoint(tiny_checkpoint, DataConfig(root=tmp_path / "data"), "test", tmp_path / "out", device=CPU)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        evaluate_checkpoint(tiny_checkpoint, None, "test", tmp_path / "file" / "out", device=CPU)


def test_results_go_to_the_run_unless_told_otherwise(tmp_path: Path) -> None:
    assert default_out(tmp_path / "run" / "checkpoints" / "epoch-0003", "test") == tmp_path / "run" / "evaluation-test"
    assert default_out(tmp_path / "copied", "validation") == tmp_path / "copied" / "evaluation-validation"
