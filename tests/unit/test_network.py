"""A network as training and inference build it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nuciseg.config import load_config
from nuciseg.engine.checkpoint import Checkpoint, Progress, save_checkpoint
from nuciseg.engine.network import build_network, count_parameters, load_network, stride_of


@pytest.mark.parametrize("model", [{"kind": "unet", "depth": 2}, {"kind": "timm", "encoder": "resnet10t"}])
def test_a_fresh_network_starts_at_the_typical_share_of_each_map(model: dict[str, object]) -> None:
    config = load_config(None, {"model": model, "train": {"precision": "fp32"}})
    torch.manual_seed(0)
    network = build_network(config, 1, torch.device("cpu"))
    network.model.eval()
    probabilities_K = network.model(torch.zeros(1, 1, 64, 64)).sigmoid().mean(dim=(0, 2, 3))
    assert probabilities_K.tolist() == pytest.approx(network.target.typical_shares, abs=0.15)
    assert network.stride == stride_of(config)
    assert sum(parameter.numel() for parameter in network.model.parameters()) == count_parameters(config)


def test_training_validates_with_rounds_and_one_view_and_prediction_with_all_that_is_set(tmp_path: Path) -> None:
    settings = {"model": {"depth": 1, "width": 2}, "inference": {"rounds": 2, "num_views": 4}}
    config = load_config(None, settings)
    network = build_network(config, 1, torch.device("cpu"))
    assert (network.rounds, network.num_views) == (2, 1)
    save_checkpoint(Checkpoint(config, Progress(1), "split", 1, network.model.state_dict()), tmp_path / "kept")
    loaded, _ = load_network(tmp_path / "kept", torch.device("cpu"))
    assert (loaded.rounds, loaded.num_views) == (2, 4)
