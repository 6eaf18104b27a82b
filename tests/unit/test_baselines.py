"""The baselines on drawings, and on real data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nuciseg.baselines import BASELINES
from nuciseg.images import read_image, read_labels
from nuciseg.metrics import Scores, score_image
from nuciseg.targets import FullBorderConfig, TouchingBorderConfig, build_target

TARGET = build_target(TouchingBorderConfig())


def two_discs(dtype: type[np.unsignedinteger]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int32]]:
    """Image and labels of two touching discs, with the outline of both together drawn in the greatest value."""
    labels = np.zeros((70, 110), np.uint8)
    cv2.circle(labels, (35, 35), 25, 1, -1)
    cv2.circle(labels, (77, 35), 25, 2, -1)
    top = int(np.iinfo(dtype).max)
    image = np.where(labels == 1, top // 2, np.where(labels == 2, top // 4, 0)).astype(dtype)
    outline, _ = cv2.findContours((labels > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = cv2.drawContours(np.zeros_like(labels), outline, -1, 1, 3)
    image[drawn > 0] = top
    return image, labels.astype(np.int32)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_on_two_touching_discs(dtype: type[np.unsignedinteger]) -> None:
    image_HW, labels_HW = two_discs(dtype)
    found = {name: baseline(image_HW, TARGET) for name, baseline in BASELINES.items()}
    border_HW = TARGET.encode(labels_HW)[TARGET.border_index] > 0
    scores = {
        name: score_image(name, instances.labels_HW, labels_HW, border, border_HW)
        for name, (instances, border) in found.items()
    }
    assert {name: s.num_predicted for name, s in scores.items()} == {
        "drawn_border": 1,
        "all_black": 0,
        "otsu_watershed": 2,
    }
    assert scores["otsu_watershed"].separated
    instances, border = found["otsu_watershed"]
    assert border.any()
    assert np.array_equal(border, TARGET.encode(instances.labels_HW)[TARGET.border_index] > 0)
    assert np.array_equal(found["drawn_border"][1], image_HW == np.iinfo(dtype).max)
    assert not found["all_black"][1].any()
    for instances, border in found.values():
        assert instances.labels_HW.shape == border.shape == image_HW.shape
        assert instances.labels_HW.dtype == np.int32
        assert instances.confidences_N.shape == (instances.labels_HW.max(),)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_an_even_image_has_no_nuclei(value: int) -> None:
    for baseline in BASELINES.values():
        instances, _ = baseline(np.full((40, 40), value, np.uint8), TARGET)
        assert instances.labels_HW.max() == 0


def test_otsu_watershed_on_the_data_science_bowl() -> None:
    """The plain recipe is known to reach a pooled AP of about .65 at IoU .5 on this test split."""
    data = os.environ.get("NUCISEG_DATA")
    if data is None:
        pytest.skip("NUCISEG_DATA is not set")
    target = build_target(FullBorderConfig())
    images = []
    for path in sorted((Path(data) / "dsb2018" / "test" / "images").glob("*.tif")):
        instances, border_HW = BASELINES["otsu_watershed"](read_image(path), target)
        labels_HW = read_labels(path.parents[1] / "masks" / path.name)
        true_HW = target.encode(labels_HW)[target.border_index] > 0
        images.append(score_image(path.stem, instances.labels_HW, labels_HW, border_HW, true_HW))
    assert len(images) == 50
    assert Scores.total(images).flat_summary()["ap50_pooled"] == pytest.approx(0.63, abs=0.03)
