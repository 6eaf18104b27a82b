"""Scores against independent implementations, their arithmetic, and the edge cases the module documents."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from nuciseg.metrics import IOU_PERCENTS, METRIC_NAMES, ImageScores, Scores, rank, score_image

Labels = NDArray[np.int32]
small_labels = arrays(np.int32, (7, 8), elements=st.integers(0, 4))


def score(predicted: Labels, true: Labels, valid: NDArray[np.bool_] | None = None, id: str = "a") -> ImageScores:
    return score_image(id, predicted, true, predicted > 0, true > 0, valid)


def brute_force_pairs(predicted: Labels, true: Labels, percent: int) -> tuple[int, float]:
    """Most pairs, then the greatest summed IoU, over every possible one-to-one assignment."""
    true_ids, predicted_ids = (sorted(set(x.ravel().tolist()) - {0}) for x in (true, predicted))
    if len(true_ids) > len(predicted_ids):
        return brute_force_pairs(true, predicted, percent)
    best = (0, 0.0)
    for chosen in itertools.permutations(predicted_ids, len(true_ids)):
        count, total = 0, 0.0
        for t, p in zip(true_ids, chosen, strict=True):
            overlap = int(((true == t) & (predicted == p)).sum())
            union = int(((true == t) | (predicted == p)).sum())
            if 100 * overlap >= percent * union:
                count, total = count + 1, total + overlap / union
        best = max(best, (count, total))
    return best


@settings(max_examples=60)
@given(true=small_labels, predicted=small_labels, kept=st.floats(0, 1), seed=st.integers(0, 99))
def test_matching_agrees_with_trying_every_assignment(true: Labels, predicted: Labels, kept: float, seed: int) -> None:
    same = np.random.default_rng(seed).random(true.shape) < kept  # makes high IoUs likely
    predicted = np.where(same, true, predicted)
    scores = score(predicted, true)
    for percent, true_positives in zip(IOU_PERCENTS, scores.true_positives, strict=True):
        assert true_positives == brute_force_pairs(predicted, true, percent)[0]
    count, total = brute_force_pairs(predicted, true, 50)
    assert scores.mean_matched_iou == pytest.approx(total / count if count else 0, abs=1e-12)


@pytest.mark.skipif(find_spec("stardist") is None, reason="stardist is not installed")
@settings(max_examples=40)
@given(pairs=st.lists(st.tuples(small_labels, small_labels, st.integers(0, 9)), min_size=1, max_size=4))
def test_agrees_with_stardist(pairs: list[tuple[Labels, Labels, int]]) -> None:
    matching = pytest.importorskip("stardist.matching", exc_type=ImportError)
    trues, predictions = [], []
    for true, predicted, moved in pairs:
        true[0, 0] = predicted[0, 0] = 1  # stardist gives an image without nuclei AP 0, we give it 1
        trues.append(true)
        predictions.append(np.where(np.arange(8) < moved, true, predicted))
    summary = Scores.total(score(p, t, id=str(i)) for i, (p, t) in enumerate(zip(predictions, trues, strict=True)))
    thresholds = [percent / 100 for percent in IOU_PERCENTS]
    for key, by_image in (("ap_pooled", False), ("ap_per_image", True)):
        theirs = matching.matching_dataset(trues, predictions, thresholds, by_image=by_image, show_progress=False)
        ours = summary.summary()[key]
        assert isinstance(ours, dict)
        assert list(ours.values()) == pytest.approx([m.accuracy for m in theirs])
        if not by_image:
            assert summary.summary()["mean_matched_iou"] == pytest.approx(theirs[0].mean_matched_score, abs=1e-6)


@settings(max_examples=20)
@given(pairs=st.lists(st.tuples(small_labels, small_labels), max_size=8), seed=st.integers(0, 99))
def test_one_and_three_shards_give_the_same_to_the_last_digit(pairs: list[tuple[Labels, Labels]], seed: int) -> None:
    images = [score(p, t, id=str(i)) for i, (p, t) in enumerate(pairs)]
    whole = Scores.total(images)
    random.Random(seed).shuffle(images)
    shards = [pickle.loads(pickle.dumps(Scores.total(images[rank::3]))) for rank in range(3)]
    assert shards[2] + shards[0] + shards[1] == whole
    assert json.dumps((shards[2] + shards[1] + shards[0]).summary()) == json.dumps(whole.summary())


def test_two_partners_of_exactly_half_do_not_both_count() -> None:
    true = np.array([[1, 1, 0, 0]], np.int32)
    predicted = np.array([[1, 2, 0, 0]], np.int32)
    scores = score(predicted, true)
    assert scores.true_positives[0] == 1
    assert scores.false_positives[0] == 1
    assert not scores.separated


def two_nuclei() -> Labels:
    labels = np.zeros((10, 20), np.int32)
    labels[1:9, 1:10], labels[1:9, 10:19] = 1, 2
    return labels


@pytest.mark.parametrize(
    ("predicted", "separated"),
    [
        (two_nuclei() * 7, True),
        (np.minimum(two_nuclei(), 1), False),  # joined
        (two_nuclei() % 2, False),  # one missing
        (np.where(np.arange(20) < 2, 3, two_nuclei()), False),  # one too many, though both others match
        (np.where(np.arange(20) < 16, np.minimum(two_nuclei(), 1), two_nuclei()), False),  # cut in the wrong place
    ],
)
def test_a_cluster_is_separated_only_if_all_nuclei_match_one_to_one(predicted: Labels, separated: bool) -> None:
    assert score(predicted.astype(np.int32), two_nuclei()).separated is separated


def test_ignored_pixels_count_nowhere() -> None:
    true = two_nuclei()
    true[:, 12:] = -1
    valid = np.ones(true.shape, bool)
    valid[:, :3] = False
    predicted = two_nuclei()  # nucleus 2 lies mostly in the ignored part and is dropped
    scores = score(predicted, true, valid)
    assert (scores.num_true, scores.num_predicted) == (2, 1)
    assert scores.true_positives[-1] == 1
    assert scores.mean_matched_iou == 1
    assert scores.border_true_positives == 8 * 9
    assert scores.border_false_positives == scores.border_false_negatives == 0


def test_images_without_nuclei() -> None:
    empty, some = np.zeros((10, 20), np.int32), two_nuclei()
    right, missed, invented = score(empty, empty), score(empty, some), score(some, empty)
    assert [s.average_precision(50) for s in (right, missed, invented)] == [1, 0, 0]
    total = Scores.total([right, missed, invented]).flat_summary()
    assert (total["images"], total["clusters"], total["cluster_score"]) == (3, 1, 0)
    assert (total["ap50_pooled"], total["ap50_per_image"]) == (0, pytest.approx(1 / 3))
    nothing = Scores().flat_summary()
    assert (nothing["ap50_pooled"], nothing["ap50_per_image"], nothing["border_dice"]) == (1, 0, 1)


def test_pooled_and_per_image_differ_as_named() -> None:
    half = np.where(two_nuclei() == 1, 1, 0).astype(np.int32)
    many = np.arange(1, 201, dtype=np.int32).reshape(10, 20)
    total = Scores.total([score(half, two_nuclei()), score(many, many)]).flat_summary()
    assert total["ap50_per_image"] == 0.75
    assert total["ap50_pooled"] == 201 / 202
    assert total["ap_mean_pooled"] == pytest.approx(201 / 202)
    assert total["ap_mean_to_90_pooled"] == pytest.approx(201 / 202)
    assert (total["nuclei_true"], total["nuclei_found"]) == (202, 201)


def test_border_iou_and_dice() -> None:
    labels = np.zeros((1, 6), np.int32)
    predicted, true = np.array([[1, 1, 1, 0, 0, 0]], bool), np.array([[0, 0, 1, 1, 0, 0]], bool)
    total = Scores.total([score_image("a", labels, labels, predicted, true)]).flat_summary()
    assert total["border_iou"] == 1 / 4
    assert total["border_dice"] == 2 / 5


def test_metric_names_can_be_ranked_by() -> None:
    perfect = Scores.total([score(two_nuclei(), two_nuclei())]).flat_summary()
    worst = Scores.total([score_image("a", 0 * two_nuclei(), two_nuclei(), two_nuclei() < 1, two_nuclei() > 0)])
    for name in METRIC_NAMES:
        assert perfect[name] == 1
        assert worst.flat_summary()[name] == 0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"image 'x'.*\(10, 20\).*\(20, 10\)"):
        score_image("x", two_nuclei(), two_nuclei().T, two_nuclei() > 0, two_nuclei() > 0)


def test_equal_scores_are_ranked_by_how_well_the_nuclei_are_outlined() -> None:
    good, better = ({"cluster_score": 0.9, "ap_mean_per_image": ap, "border_dice": 1 - ap} for ap in (0.7, 0.8))
    assert rank(better, "cluster_score") > rank(good, "cluster_score")
    assert rank(better, "border_dice") < rank(good, "border_dice")


def test_the_mean_to_90_leaves_out_the_hardest_threshold() -> None:
    true = np.zeros((20, 100), np.int32)
    true[5:15] = 1
    nearly = true.copy()
    nearly[5, :70] = 0  # IoU .93
    total = Scores.total([score(nearly, true)]).flat_summary()
    for average in ("pooled", "per_image"):
        assert total[f"ap_mean_to_90_{average}"] == 1
        assert total[f"ap_mean_{average}"] == pytest.approx(0.9)


def test_ids_are_only_names_however_large() -> None:
    true = two_nuclei()
    huge = np.where(true > 0, true * 1_000_000_000, 0).astype(np.int32)
    assert score(huge, true) == score(true, huge) == score(true, true)
