"""A run on a folder of drawn pairs, evaluated, and shipped to a folder that stands for the package's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from small_runs import run, small_config

from nuciseg.config import write_config
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.engine.checkpoint import find_checkpoint
from nuciseg.engine.evaluation import default_out, evaluate_checkpoint
from nuciseg.reporting.shipping import CardSources

WORDS = Path(__file__).parents[1] / "scripts" / "model_cards" / "separator.md"
PAIRS = SyntheticConfig(num_train=10, num_test=3, mean_diameter_px=24.0, nuclei_per_cluster=(2, 2), seed=4)


@dataclass(frozen=True)
class EvaluatedRun:
    """`data_root` is what it was trained on."""

    folder: Path
    data_root: Path
    sources: CardSources


def make_evaluated_run(folder: Path) -> EvaluatedRun:
    """One epoch on drawn pairs, with scores of validation and test images."""
    data_root, run_dir, recipe = folder / "drawn", folder / "runs" / "tiny", folder / "tiny.yaml"
    write_nucleus_folder(PAIRS, data_root)
    plain = small_config(**{"train.epochs": 1, "train.calibrate": False})
    write_config(plain, recipe)
    where = {"data.root": str(data_root), "run.storage_path": str(folder / "runs"), "run.name": "tiny"}
    run(plain.replaced(where | {"tracking.tags": ["mine"], "seed": 3, "scale.cpus_per_worker": 2}), run_dir)
    checkpoint = find_checkpoint(run_dir)
    for split in ("validation", "test"):
        evaluate_checkpoint(checkpoint, None, split, default_out(checkpoint, split), device=torch.device("cpu"))
    return EvaluatedRun(run_dir, data_root, CardSources(WORDS, recipe))
