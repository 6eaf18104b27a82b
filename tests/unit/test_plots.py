"""Pictures: colours that pair truth and prediction, red for what is wrong, panels that fit together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nuciseg.metrics import score_image
from nuciseg.plots import (
    COLORS,
    FAILED,
    WRONG,
    contact_sheet,
    matched_colors,
    overlay_rgb,
    stretch,
    triptych,
)


@pytest.fixture
def cluster() -> tuple[np.ndarray, np.ndarray]:
    """A grey image 40 x 60 with a drawn white border and two touching square nuclei in it."""
    labels_HW = np.zeros((40, 60), np.int32)
    labels_HW[5:35, 5:30] = 1
    labels_HW[5:35, 30:55] = 2
    image_HW = np.where(labels_HW > 0, 20 + labels_HW * 5, 0).astype(np.uint8)
    image_HW += np.random.default_rng(0).integers(0, 5, image_HW.shape, np.uint8) * (labels_HW > 0)
    image_HW[5:35, [5, 54]] = 255
    return image_HW, labels_HW


def _has(picture: np.ndarray, color: object) -> bool:
    return bool((picture == np.asarray(color)).all(axis=-1).any())


def test_the_drawn_border_does_not_darken_the_nuclei(cluster: tuple[np.ndarray, np.ndarray]) -> None:
    image_HW, labels_HW = cluster
    rgb = stretch(image_HW)
    assert rgb.shape == (40, 60, 3)
    assert rgb.dtype == np.uint8
    assert rgb[10:30, 35:50].mean() > 128  # the brighter nucleus; against the border's 255 it would be about 30
    assert (rgb[labels_HW == 0] == 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(30, 20), (30, 20, 1), (30, 20, 2), (30, 20, 3), (30, 20, 5)])
def test_stretch_takes_any_image(dtype: type, shape: tuple[int, ...]) -> None:
    image = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    rgb = stretch(image)
    assert rgb.shape == (30, 20, 3)
    assert rgb.max() == 255
    assert stretch(np.zeros(shape, dtype)).max() == 0
    assert stretch(np.full(shape, 7, dtype)).shape == (30, 20, 3)


def test_overlay_outlines_each_nucleus_in_its_colour_and_leaves_the_rest(
    cluster: tuple[np.ndarray, np.ndarray],
) -> None:
    image_HW, labels_HW = cluster
    rgb = overlay_rgb(image_HW, labels_HW, fill=0.0, dim=1.0)
    assert (rgb[5, 5:29] == COLORS[0]).all()
    assert (rgb[6:34, 29] == COLORS[0]).all()
    assert (rgb[6:34, 30] == COLORS[1]).all()
    plain = stretch(image_HW)
    assert (rgb[8:32, 10:27] == plain[8:32, 10:27]).all()
    assert (rgb[labels_HW == 0] == 0).all()
    assert overlay_rgb(image_HW, labels_HW, scale=2.5).shape == (100, 150, 3)


def test_overlay_ignores_negative_labels_and_takes_no_nuclei(cluster: tuple[np.ndarray, np.ndarray]) -> None:
    image_HW, labels_HW = cluster
    assert (overlay_rgb(image_HW, -labels_HW, dim=1.0) == stretch(image_HW)).all()


def test_pairs_share_a_colour_and_what_has_no_partner_is_red(cluster: tuple[np.ndarray, np.ndarray]) -> None:
    _, truth_HW = cluster
    prediction_HW = np.zeros_like(truth_HW)
    prediction_HW[truth_HW == 1] = 3  # found, with another id
    prediction_HW[5:15, 30:55] = 1  # a third of the other nucleus
    true_colors, predicted_colors = matched_colors(truth_HW, prediction_HW)
    assert (true_colors[0] == predicted_colors[2]).all()
    assert (true_colors[1] == WRONG).all()
    assert (predicted_colors[0] == WRONG).all()
    assert not (COLORS == WRONG).all(axis=1).any()


def test_a_partner_is_taken_once_at_a_tie() -> None:
    truth_HW = np.array([[1, 1, 1, 1]])
    true_colors, predicted_colors = matched_colors(truth_HW, np.array([[1, 1, 2, 2]]))
    assert not (true_colors[0] == WRONG).all()
    assert (predicted_colors == WRONG).all(axis=1).tolist() == [False, True]


def test_only_a_failed_panel_is_framed_in_red(cluster: tuple[np.ndarray, np.ndarray]) -> None:
    image_HW, truth_HW = cluster
    good = triptych(image_HW, truth_HW, truth_HW, "good", cell_px=90)
    merged = triptych(image_HW, truth_HW, (truth_HW > 0).astype(np.int32), "merged", cell_px=90)
    assert good.shape == merged.shape
    assert not _has(good, FAILED)
    assert not _has(good, WRONG)
    assert (merged[0] == FAILED).all()
    assert (merged[:, 0] == FAILED).all()
    assert _has(merged, WRONG)
    assert (triptych(image_HW, truth_HW, truth_HW, failed=True)[0] == FAILED).all()
    gap_HW = truth_HW * 4  # ids 4 and 8: the ids between them are not missing nuclei
    assert not _has(triptych(image_HW, gap_HW, gap_HW), FAILED)


def test_what_the_scores_ignore_is_not_drawn_as_wrong(cluster: tuple[np.ndarray, np.ndarray]) -> None:
    image_HW, nuclei_HW = cluster
    truth_HW = np.where(nuclei_HW == 2, -1, nuclei_HW)
    truth_HW[5:35, 20:30] = -2  # a third of the nucleus that counts
    within_HW = nuclei_HW.copy()
    within_HW[5:35, 26:30] = 2  # mostly in what is ignored
    nothing_HW = within_HW > 9
    for prediction_HW in (nuclei_HW, within_HW):
        assert score_image("a", prediction_HW, truth_HW, nothing_HW, nothing_HW).average_precision(95) == 1
        picture = triptych(image_HW, truth_HW, prediction_HW, cell_px=90)
        assert not _has(picture, WRONG)
        assert (picture == triptych(image_HW, truth_HW, np.maximum(truth_HW, 0), cell_px=90)).all()
    extra_HW = nuclei_HW.copy()
    extra_HW[:5, 28:60] = extra_HW[5:7, 30:60] = 3  # it touches what is ignored, but lies outside by more than half
    assert score_image("a", extra_HW, truth_HW, nothing_HW, nothing_HW).average_precision(50) == 0.5
    assert _has(triptych(image_HW, truth_HW, extra_HW, cell_px=90), WRONG)


def test_a_long_caption_leaves_the_note_readable(cluster: tuple[np.ndarray, np.ndarray]) -> None:
    image_HW, truth_HW = cluster
    short = triptych(image_HW, truth_HW, truth_HW, "", cell_px=90)
    long = triptych(image_HW, truth_HW, truth_HW, "a name " * 40, cell_px=90)
    assert long.shape == short.shape
    assert (long[:20, -80:] == short[:20, -80:]).all()
    assert not (long[:20, :100] == short[:20, :100]).all()


def test_contact_sheet_places_every_panel_once() -> None:
    panels = [np.full((20 + index, 30, 3), 10 + index, np.uint8) for index in range(5)]
    sheet = contact_sheet(panels, 2, "Title", "legend")
    for index, panel in enumerate(panels):
        assert (sheet == 10 + index).all(axis=2).sum() == panel.shape[0] * panel.shape[1]
    assert sheet.shape[1] < 3 * 30 + 40
    assert contact_sheet([], 3, "nothing").ndim == 3


def test_a_real_cluster_is_drawn_and_written(nucleus_root: Path, tmp_path: Path) -> None:
    from nuciseg.data.formats import nucleus
    from nuciseg.images import write_png

    record = nucleus.read(nucleus_root, "train")[0]
    sample = nucleus.load(record)
    panel = triptych(sample.image_HWC, sample.labels_HW, sample.labels_HW, record.id)
    write_png(tmp_path / "panel.png", panel)
    assert (tmp_path / "panel.png").stat().st_size > 1000
    assert _has(panel, COLORS[0])
    assert not _has(panel, FAILED)
