"""Choose how probabilities are decoded, on validation images, without another pass of the network."""

from __future__ import annotations

from collections.abc import Sequence

from nuciseg.data.dataset import SampleStore
from nuciseg.engine.inference import predict_probabilities, score_probabilities
from nuciseg.engine.network import Network
from nuciseg.metrics import Scores
from nuciseg.targets import TargetConfig, build_target, decode_grid


def calibrate(network: Network, samples: SampleStore, indices: Sequence[int], metric: str) -> TargetConfig:
    """The target whose decoding scores best by `metric` on the samples at `indices`.

    The configured decoding comes first and only a better score replaces it; among equal scores the decoding with the
    most equally good neighbours would be as good a choice, but the one that needs no change is easier to explain.
    """
    found = [(each, samples[each.index].labels_HW) for each in predict_probabilities(network, samples, indices)]
    best_config, best_rank = network.config.target, (float("-inf"), float("-inf"))
    for config in decode_grid(network.config.target):
        target = build_target(config)
        scores = Scores.total(score_probabilities(target, each, labels_HW) for each, labels_HW in found).flat_summary()
        rank = (scores[metric], scores["ap_mean_per_image"])
        if rank > best_rank:
            best_config, best_rank = config, rank
    return best_config
