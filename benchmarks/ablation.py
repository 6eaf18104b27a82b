"""What the parts of the recipe for nucleus clusters bring, on clusters held out several times over.

    pip install -e '.[weights]'
    python benchmarks/ablation.py --data.root DIR [--splits 3] [--jobs 2] [--any.key value ...]

For each of several splits into training and validation, trains the recipe of `tune_configs/nucleus.yaml` with and
without `augment.join`, and decodes either's validation maps with and without each of the additions for clusters. Prints
every network's separated clusters, of all and of those with three and more nuclei, then as the last line one JSON
object: the clusters separated by the whole recipe over those without the part, all splits together. Other flags go to
`nuciseg train`, after the ones here. About 20 minutes on 2 cores with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nuciseg.engine.checkpoint import find_checkpoint
from nuciseg.engine.datasets import open_split_samples
from nuciseg.engine.inference import predict_probabilities, score_probabilities
from nuciseg.engine.network import load_network
from nuciseg.targets import DecodeConfig, build_target

CONFIG = Path(__file__).parents[1] / "tune_configs" / "nucleus.yaml"
# Near the searches' winners, see docs/results.md.
SETTINGS = (
    *("--model.kind", "timm", "--model.encoder", "tf_efficientnet_lite0", "--model.pretrained", "package"),
    *("--optim.lr", "2e-3", "--optim.weight_decay", "2e-6", "--data.batch_size", "8"),
    *("--loss.weights.dice", "0.4", "--loss.weights.focal", "0.7"),
)
JOINED, PLAIN = "joined", "without augment.join"
USUAL = DecodeConfig()
WITHOUT = {f"without {name}": {name: getattr(USUAL, name)} for name in ("min_nuclei", "border_share", "min_area_px")}
MANY = 3  # nuclei; most clusters have two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--splits", type=int, default=3, help="how many splits, from split_seed 1 on")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one CPU each")
    args, others = parser.parse_known_args()
    runs = [(kind, seed) for seed in range(1, args.splits + 1) for kind in (JOINED, PLAIN)]
    separated: Counter[tuple[str, bool]] = Counter()
    with tempfile.TemporaryDirectory(prefix="nuciseg-ablation-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        trained = pool.map(lambda run: train(args.root, *run, others, Path(folder)), runs)
        for (kind, seed), run_dir in zip(runs, trained, strict=True):
            for decoding, counts in decoded(run_dir).items():
                name = kind if decoding == "" else decoding
                if kind == JOINED or decoding == "":
                    separated.update({(name, many): num for many, num in counts.items()})
                print(f"split {seed}, {kind} {decoding}: {sum(counts.values())} separated, of {MANY}+ {counts[True]}")
            sys.stdout.flush()
    print(json.dumps(ratios(separated)))


def train(root: Path, kind: str, seed: int, others: Iterable[str], folder: Path) -> Path:
    """Train once; returns the run's folder."""
    name = f"{kind.replace(' ', '-')}-{seed}"
    command = [
        *(sys.executable, "-m", "nuciseg.train", "--config", str(CONFIG), "--data.root", str(root), *SETTINGS),
        *("--seed", str(seed), "--data.split_seed", str(seed), "--train.calibrate", "false"),
        *("--scale.cpus_per_worker", "1", "--tracking.kind", "none"),
        *("--run.storage_path", str(folder), "--run.name", name),
        *(("--augment.join", "0") if kind == PLAIN else ()),
        *others,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / name


def decoded(run_dir: Path) -> dict[str, Counter[bool]]:
    """Validation clusters separated by decoding ("" is the recipe's own): False for two nuclei, True for more."""
    network, checkpoint = load_network(find_checkpoint(run_dir), torch.device("cpu"))
    samples, split = open_split_samples(checkpoint.config.data)
    config = network.config.target
    targets = {
        name: build_target(config.model_copy(update={"decode": config.decode.model_copy(update=changes)}))
        for name, changes in {"": {}, **WITHOUT}.items()
    }
    counts: dict[str, Counter[bool]] = {name: Counter() for name in targets}
    for found in predict_probabilities(network, samples, split.validation):
        labels_HW = samples[found.index].labels_HW
        for name, target in targets.items():
            counts[name][int(labels_HW.max()) >= MANY] += score_probabilities(target, found, labels_HW).separated
    return counts


def ratios(separated: Counter[tuple[str, bool]]) -> dict[str, float]:
    """The whole recipe over the recipe without each part, for all clusters and for those of many nuclei."""
    result = {}
    for name in (PLAIN, *WITHOUT):
        part = name.removeprefix("without ").removeprefix("augment.")
        result[f"vs_no_{part}"] = round(
            (separated[JOINED, False] + separated[JOINED, True])
            / max(separated[name, False] + separated[name, True], 1),
            3,
        )
        result[f"vs_no_{part}_many"] = round(separated[JOINED, True] / max(separated[name, True], 1), 3)
    return result


if __name__ == "__main__":
    main()
