"""Borders that do not close are counted, and a network that completes drawn borders gets to do so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nuciseg.config import Config
from nuciseg.data.dataset import NORMALIZED_RANGE
from nuciseg.data.markings import draw_border, part_of
from nuciseg.engine.datasets import open_samples, open_training_set
from nuciseg.engine.inference import predict_probabilities
from nuciseg.engine.network import load_network
from nuciseg.engine.refinement import refined
from nuciseg.images import write_png
from nuciseg.predict import main as predict
from nuciseg.targets import TouchingBorderConfig, build_target
from nuciseg.targets.borders import BorderTarget

TARGET = build_target(TouchingBorderConfig())


def maps(border_rows: int) -> np.ndarray:
    """A nucleus pair of 40 x 60 pixels on 48 x 80; the line between them is there along its first `border_rows`."""
    found = np.zeros((2, 48, 80), np.float32)
    found[0, 4:44, 10:70] = 1
    found[1, 4 : 4 + border_rows, 39:42] = 1
    return found


@pytest.mark.parametrize(("border_rows", "num_open"), [(40, 0), (0, 0), (28, 1)])
def test_a_border_with_a_gap_is_open_and_a_whole_or_missing_one_is_not(border_rows: int, num_open: int) -> None:
    assert TARGET.open_borders(maps(border_rows)) == num_open


def test_a_border_that_is_asked_for_again_grows_until_it_closes() -> None:
    asked: list[np.ndarray] = []

    def completes(images_BCHW: torch.Tensor) -> np.ndarray:
        """Answers with what is drawn, and 14 rows more."""
        asked.append(images_BCHW.numpy().copy())
        drawn = (images_BCHW[:, 0, :, 40] == NORMALIZED_RANGE[1]).sum(dim=1)
        return np.stack([maps(min(int(rows) + 14, 40)) for rows in drawn])

    images = torch.zeros(2, 1, 48, 80)
    images[1, 0, 4:30, 39:42] = NORMALIZED_RANGE[1]  # this one closes at once
    once = refined(completes, images, [(48, 80)] * 2, TARGET, 0)
    assert [TARGET.open_borders(found) for found in once] == [0, 0]  # 14 rows do not divide the first
    asked.clear()
    images[0, 0, 4:18, 39:42] = NORMALIZED_RANGE[1]
    final = refined(completes, images, [(48, 80)] * 2, TARGET, 5)
    assert [len(each) for each in asked] == [2, 1]
    assert not images[0, 0, 20:].any()
    assert np.array_equal(final, np.stack([maps(40)] * 2))


def test_a_loaded_network_looks_as_often_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    network, loaded = load_network(tiny_checkpoint, torch.device("cpu"))
    assert network.rounds == 0
    samples = open_samples(loaded.config.data, "test")
    looks: list[int] = []
    network.model.register_forward_hook(lambda *_: looks.append(1))
    monkeypatch.setattr(BorderTarget, "open_borders", lambda *_: 1)  # never closed
    for rounds in (0, 2):
        looks.clear()
        list(predict_probabilities(replace(network, rounds=rounds), samples, [0]))
        assert len(looks) == 1 + rounds


def test_an_open_border_is_flagged_for_a_person_to_look_at(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    cluster_HW = np.zeros((64, 64), np.uint8)
    cluster_HW[12:52, 10:50], cluster_HW[20:40, 15:35] = 90, 120
    write_png(path, cluster_HW)
    monkeypatch.setattr(BorderTarget, "open_borders", lambda *_: 2)
    predict(["--checkpoint", str(tiny_checkpoint), str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert " nuclei, open borders: 2, look at it" in said
    assert "flagged above, may be cut wrongly: 1" in said


def test_training_shows_parts_of_the_true_border() -> None:
    settings = {"augment.drawn_borders": 1.0, "augment.join": 0.0, "data.synthetic.num_train": 24}
    data = open_training_set(Config().replaced(settings), 16).training_data
    shares = []
    for index in data.indices:
        before, after = data.samples[index], data._sample(index, 0)
        border = data.target.border_of(before.labels_HW)
        new = (after.image_HWC[..., 0] == 255) & (before.image_HWC[..., 0] < 255)
        assert not np.any(new & ~border)
        np.testing.assert_array_equal(after.image_HWC[~new], before.image_HWC[~new])
        free = border & (before.image_HWC[..., 0] < 255)
        shares.append(new.sum() / max(free.sum(), 1))
    assert min(shares) < 0.2
    assert max(shares) > 0.8
    assert any(0.2 < share < 0.8 for share in shares)


def test_the_part_depends_on_the_generator_alone() -> None:
    border = np.ones((60, 90), bool)
    one, same = (part_of(border, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    image = np.full((60, 90, 1), 7, np.uint16)
    assert draw_border(image, one)[one].min() == 65535
    assert image.max() == 7
