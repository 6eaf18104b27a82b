"""What only a GPU shows: reduced precision with loss scaling, channels_last, real lack of memory, the CPU's scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import figures, last_checkpoint, small_config

from nuciseg.config import Config
from nuciseg.data.dataset import TrainingLoader
from nuciseg.engine.checkpoint import CheckpointStore, find_checkpoint
from nuciseg.engine.datasets import open_training_set
from nuciseg.engine.inference import Place, predict_probabilities
from nuciseg.engine.loop import EpochReport, Trainer, train
from nuciseg.engine.network import load_network, stride_of
from nuciseg.engine.precision import choose_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

HALF = ["bf16", "fp16"]


@pytest.fixture
def place() -> Place:
    return Place(device=torch.device("cuda", 0))


def make_trainer(config: Config, place: Place, run_dir: Path) -> Trainer:
    return Trainer(config, open_training_set(config, stride_of(config)), place, CheckpointStore(run_dir))


def run(config: Config, place: Place, run_dir: Path, stop_after: int | None = None) -> list[EpochReport]:
    reports: list[EpochReport] = []
    trainer = make_trainer(config, place, run_dir)
    while not trainer.finished and len(reports) != stop_after:
        reports.append(trainer.run_epoch())
    trainer.close()
    return reports


def test_auto_takes_reduced_precision_and_channels_last(place: Place) -> None:
    precision = choose_precision(small_config(**{"train.precision": "auto"}).train, place.device)
    assert precision.dtype in (torch.bfloat16, torch.float16)
    assert precision.channels_last


@pytest.mark.parametrize("precision", ["fp32", *HALF])
def test_a_step_computes_in_the_precision_and_changes_full_precision_weights(
    precision: str, place: Place, tmp_path: Path
) -> None:
    trainer = make_trainer(small_config(**{"train.precision": precision, "model.norm": "batch"}), place, tmp_path)
    before = [parameter.detach().clone() for parameter in trainer.network.model.parameters()]
    seen: list[torch.Tensor] = []
    trainer.network.model.register_forward_hook(lambda module, arguments, logits: seen.extend([*arguments, logits]))
    figures_ = trainer.train_epoch(1)
    trainer.close()
    _, logits = seen[:2]
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert logits.dtype in (expected, torch.float32)
    # With one channel both formats are the same.
    weight = next(each for each in trainer.network.model.parameters() if each.ndim == 4 and each.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) == (precision != "fp32")
    assert weight.dtype == torch.float32
    assert weight.is_cuda
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.model.parameters(), strict=True))
    assert 0 < figures_["train_loss"] < 10


@pytest.mark.parametrize("precision", ["fp32", *HALF])
def test_training_learns(precision: str, place: Place, tmp_path: Path) -> None:
    config = small_config(**{"train.precision": precision, "optim.lr": 0.02, "model.dropout": 0.0})
    history = run(config, place, tmp_path)[-1].progress.history
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


@pytest.mark.parametrize("precision", ["fp32", *HALF])
def test_a_resumed_run_is_close_to_the_undisturbed_one(precision: str, place: Place, tmp_path: Path) -> None:
    """Close, not equal: kernels of a GPU add in an order that may change from run to run."""
    config = small_config(**{"train.precision": precision})
    run(config, place, tmp_path / "undisturbed")
    run(config, place, tmp_path / "resumed", stop_after=2)
    reports = run(config, place, tmp_path / "resumed")
    assert [report.progress.epoch for report in reports] == [3, 4]
    found, expected = last_checkpoint(tmp_path / "resumed"), last_checkpoint(tmp_path / "undisturbed")
    assert [row["learning_rate"] for row in found.progress.history] == [
        row["learning_rate"] for row in expected.progress.history
    ]
    assert set(found.training) == set(expected.training)
    assert ("scaler.scale" in found.training) == (precision == "fp16")
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=0.05, atol=0.01)
    for mine, theirs in zip(figures(found.progress.history), figures(expected.progress.history), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.02)


def test_accumulated_gradients_are_the_gradient_of_the_whole_batch(place: Place, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"model.norm": "none", "model.dropout": 0.0, "train.epochs": 1, "optim.kind": "sgd"}
    weights = []
    for parts in (1, 4):
        run(small_config(**plain, **{"train.accumulate": parts}), place, tmp_path / str(parts))
        weights.append(last_checkpoint(tmp_path / str(parts)).weights)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_of_the_gpu_predicts_the_same_on_the_cpu(place: Place, tmp_path: Path) -> None:
    config = small_config(**{"optim.lr": 0.02})
    data = open_training_set(config, stride_of(config))
    train(config, data, place, CheckpointStore(tmp_path), lambda report: None)
    maps = []
    for device in (place.device, torch.device("cpu")):
        network, _ = load_network(find_checkpoint(tmp_path), device)
        found = predict_probabilities(network, data.samples, data.split.validation)
        maps.append({each.id: torch.from_numpy(each.maps_KHW) for each in found})
    for id, map_KHW in maps[0].items():
        torch.testing.assert_close(maps[1][id], map_KHW, rtol=0, atol=0.01)


def test_batches_are_loaded_into_pinned_memory(place: Place) -> None:
    config = small_config()
    data = open_training_set(config, stride_of(config))
    with TrainingLoader(data.training_data, batch_size=4, num_threads=1, pin_memory=True) as loader:
        batch = next(iter(loader.epoch(1))).batch
    assert batch is not None
    assert batch.images_BCHW.is_pinned()
    assert torch.equal(batch.to(place.device).images_BCHW.cpu(), batch.images_BCHW)


def test_a_batch_that_does_not_fit_is_told_with_the_cure(place: Place, tmp_path: Path) -> None:
    """A real lack of memory: this process may take next to nothing of the GPU."""
    from nuciseg.errors import OutOfMemoryError

    config = small_config(**{"model.width": 256, "data.batch_size": 16, "data.crop_px": 64})
    trainer = make_trainer(config, place, tmp_path)
    total = torch.cuda.get_device_properties(place.device).total_memory
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(place.device) + 64 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / total, place.device)
    try:
        with pytest.raises(OutOfMemoryError, match=r"raise train\.accumulate or lower data\.crop_px"):
            trainer.train_epoch(1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)
        trainer.close()
