"""Ceilings, baselines and the recommendation, on cases small enough to be known."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from nuciseg.config import DataConfig, add_config_flags, config_from_args
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.exploring.ceilings import (
    MAX_PIXELS,
    Ceiling,
    choose_images,
    measure_baselines,
    measure_ceilings,
    targets_to_try,
)
from nuciseg.exploring.reading import DataSet, open_data
from nuciseg.exploring.recommendation import Measured, field_of_view_px, recommend
from nuciseg.images import write_labels_tiff, write_png
from nuciseg.metrics import Scores
from nuciseg.targets import FullBorderConfig, TouchingBorderConfig
from nuciseg.tune import DEFAULT_SEARCH


@pytest.fixture
def pair(tmp_path: Path) -> DataSet:
    """One field: two squares that touch, and a speck that any decoding drops."""
    labels_HW = np.zeros((60, 100), np.int32)
    labels_HW[10:40, 10:40], labels_HW[10:40, 40:70], labels_HW[50:53, 80:83] = 1, 2, 3
    write_png(tmp_path / "train" / "images" / "a.png", (20 + 100 * (labels_HW > 0)).astype(np.uint8))
    write_labels_tiff(tmp_path / "train" / "masks" / "a.tif", labels_HW)
    return open_data(DataConfig(root=tmp_path))


def test_the_ceiling_of_a_known_image(pair: DataSet) -> None:
    ceilings = list(measure_ceilings(pair, choose_images(pair)))
    assert len(ceilings) == len(targets_to_try())
    assert {each.target.kind for each in ceilings if each.is_default} == {"touching_border", "full_border", "depth"}
    for each in ceilings:
        assert each.split == "train"
        assert each.scores.num_true == 3
        assert each.scores.num_predicted == 2
        assert each.scores.clusters_separated == 0, "the speck is lost"
        assert each.scores.flat_summary()["ap50_pooled"] == pytest.approx(2 / 3)


def test_every_target_is_tried_at_its_default_and_at_other_widths() -> None:
    tried = {(target.kind, target.width_px): is_default for target, is_default in targets_to_try()}
    for config in (TouchingBorderConfig(), FullBorderConfig()):
        own = {width_px: is_default for (kind, width_px), is_default in tried.items() if kind == config.kind}
        assert len(own) == 3
        assert own[config.width_px]
    assert [kind for kind, _ in tried].count("depth") == 1, "which is decoded without the line"


def test_the_baselines_of_a_known_image(pair: DataSet) -> None:
    scores = {each.name: each.scores for each in measure_baselines(pair, choose_images(pair))}
    assert scores["all_black"].num_predicted == 0
    assert scores["otsu_watershed"].num_predicted == 2, "bright squares; the speck is too small"


def test_large_data_sets_are_sampled_by_seed() -> None:
    class Store:
        shapes = ((1000, 1000),) * 100

    class Part:
        split = "train"
        samples = Store()

    class Data:
        parts = (Part(),)

    data: DataSet = Data()  # type: ignore[assignment]
    chosen = choose_images(data)["train"]
    assert len(chosen) == MAX_PIXELS // 1_000_000
    assert chosen == choose_images(data)["train"] != choose_images(data, seed=1)["train"]
    assert sorted(set(chosen)) == list(chosen)


def ceiling(target: TouchingBorderConfig | FullBorderConfig, separated: int) -> Ceiling:
    scores = Scores(100, 100, separated, 100, 100, true_positives=(separated,) * 10)
    return Ceiling(target, True, "train", scores)


def measured(**changes: object) -> Measured:
    values: dict[str, object] = {
        "root": Path("clusters of mine"),
        "format_name": "nucleus",
        "num_train": 500,
        "longest_sides_px": [150] * 95 + [300] * 5,
        "shortest_side_px": 54,
        "diameters_px": [76.0] * 100,
        "fewest_nuclei": 2,
    }
    return Measured(**{**values, **changes})  # type: ignore[arg-type]


def test_the_widest_line_that_costs_nothing_is_recommended() -> None:
    ceilings = [
        ceiling(TouchingBorderConfig(width_px=1), 100),
        ceiling(TouchingBorderConfig(width_px=3), 100),
        ceiling(TouchingBorderConfig(width_px=5), 95),
        ceiling(FullBorderConfig(width_px=6), 97),
    ]
    found = recommend(measured(), ceilings)
    assert found is not None
    assert found.settings["target.kind"] == "touching_border"
    assert found.settings["target.width_px"] == 3
    assert found.settings["data.crop_px"] == 192
    assert found.settings["data.batch_size"] == 16
    assert found.settings["model.depth"] == 4
    assert found.settings["target.decode.min_nuclei"] == 2
    assert set(found.reasons) == set(found.settings)


def test_a_better_full_border_is_recommended() -> None:
    found = recommend(measured(), [ceiling(TouchingBorderConfig(), 90), ceiling(FullBorderConfig(), 99)])
    assert found is not None
    assert found.settings["target.kind"] == "full_border"


def test_small_data() -> None:
    few = measured(num_train=10, longest_sides_px=[40] * 10, shortest_side_px=20, fewest_nuclei=1)
    found = recommend(few, [ceiling(TouchingBorderConfig(), 100)])
    assert found is not None
    assert found.settings["data.crop_px"] == 64
    assert found.settings["data.batch_size"] == 4
    assert found.settings["model.depth"] == 4, "stride 16"
    assert "target.decode.min_nuclei" not in found.settings
    assert recommend(measured(diameters_px=[]), []) is None


@pytest.mark.parametrize("format_name", ["nucleus", "labels"])
def test_the_command_is_one_that_tune_takes(format_name: str) -> None:
    from nuciseg.cli import Parser
    from nuciseg.distributed.space import build_space

    found = recommend(measured(format_name=format_name), [ceiling(TouchingBorderConfig(), 100)])
    assert found is not None
    python, module, verb, *words = shlex.split(found.command)
    assert (python, module, verb) == ("python", "-m", "nuciseg.tune")
    parser = Parser("tune", "")
    flags = add_config_flags(parser)
    config = config_from_args(flags, parser.parse_args(words), DEFAULT_SEARCH)
    for key, value in found.settings.items():
        assert config.value(key) == value
    assert not set(config.search.space) & set(found.settings), "the search would overrule what is recommended"
    assert build_space(config)


def test_the_field_of_view_is_that_of_convolutions_and_pooling() -> None:
    """Which pixels reach the middle of the deepest map, by the gradient."""
    depth = 2
    layers: list[torch.nn.Module] = []
    for level in range(depth + 1):
        layers += [torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Conv2d(1, 1, 3, padding=1)]
        layers += [torch.nn.AvgPool2d(2)] if level < depth else []
    image = torch.zeros(1, 1, 64, 64, requires_grad=True)
    deepest = torch.nn.Sequential(*layers)(image)
    deepest[0, 0, 8, 8].backward()
    assert image.grad is not None
    seen = torch.nonzero(image.grad[0, 0].abs().sum(0)).ravel()
    assert int(seen.max() - seen.min()) + 1 == field_of_view_px(depth)


def test_drawn_clusters_lose_nothing_to_the_default_targets(tmp_path: Path) -> None:
    write_nucleus_folder(SyntheticConfig(num_train=6, num_test=2, seed=1), tmp_path)
    data = open_data(DataConfig(root=tmp_path))
    for each in measure_ceilings(data, choose_images(data)):
        if each.target.kind == "touching_border" and each.is_default:
            assert each.scores.clusters_separated == each.scores.clusters == {"train": 6, "test": 2}[each.split]
