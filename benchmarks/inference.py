"""How fast images become nuclei: nuciseg's network and decoding against StarDist's.

    pip install -e '.[bench]'
    python benchmarks/inference.py DATA [--checkpoint nuciseg/fields] [--images N] [--rounds 5]

On the images of DATA/test/images, whose nuclei are in DATA/test/masks, in alternating runs on the same cores, first one
of them and then all, each in a process of its own (`alternating.py`):

(a) from file to file: read, normalise, network, decode, write the labels as TIFF. nuciseg's `predict_file` with all
    that it does by default, such as looking for the size of the nuclei; StarDist as in its example: `imread`,
    `normalize`, `predict_instances`, `save_tiff_imagej_compatible`;
(b) network and decoding alone, on arrays in memory: nuciseg's `Predictor.instances` (it normalises in there), and
    `predict_instances` on normalised arrays.

StarDist has the architecture of 2D_paper_dsb2018 and, in the ratios `..._grid_2`, that of its training example, which
computes at half the resolution. Its network runs with random weights and then answers with the maps of the true
nuclei, so that non-maximum suppression has as many candidates as a trained one gives it, see `ToldNetwork` in
`stardist_user.py`. Either computes in the precision that it chooses by itself. One pass of each is a warm-up.

Ratios are medians over the rounds. The last line is one JSON object; the ratios without a number of cores in their
name are on all of them. About 30 minutes for 50 images on 2 cores with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alternating import Pass, Player, all_cores, on_cores, serve

from nuciseg.data.formats import labels as layout
from nuciseg.engine.checkpoint import find_checkpoint
from nuciseg.errors import NucisegError
from nuciseg.images import read_image

HERE = Path(__file__).parent
PASSES = {"files": "predict", "arrays": "network_and_decode"}
PEERS = {"stardist": 1, "stardist_grid_2": 2}  # name, grid
SERVE = "serve"  # what the process of nuciseg is started with

Times = dict[str, dict[str, list[float]]]
"""Seconds of each round, by pass and player."""


def main() -> None:
    try:
        if sys.argv[1:] == [SERVE]:
            serve(prepare_passes)
            return
        arguments = parse_arguments()
        busy = os.getloadavg()[0]
        if busy > 0.5:
            print(f"Something else runs on this machine (load {busy:.1f}): its figures count little.")
        print(json.dumps(measure(arguments)))
    except NucisegError as error:
        sys.exit(str(error))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with test/images and test/masks")
    parser.add_argument("--checkpoint", type=Path, default=Path("nuciseg/fields"), help="of nuciseg (nuciseg/fields)")
    parser.add_argument("--images", type=int, default=None, help="how many images, the first by name (all)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (5)")
    parser.add_argument("--cores", type=int, nargs="+", default=None, help="numbers of cores to try (1 and all)")
    parser.add_argument("--stardist-python", default=sys.executable, help="a Python that has StarDist (this one)")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    records = layout.read(arguments.data, "test")[: arguments.images]
    images = [record.image_path for record in records if record.image_path is not None]
    masks = [record.label_paths[0] for record in records]
    megapixels = sum(read_image(path).size for path in images) / 1e6
    cores = all_cores()
    commands = {"nuciseg": [sys.executable, __file__, SERVE]}
    commands |= {name: [arguments.stardist_python, str(HERE / "stardist_user.py"), "predict"] for name in PEERS}
    job: dict[str, Any] = {
        "checkpoint": str(find_checkpoint(arguments.checkpoint)),
        "images": [str(path) for path in images],
        "labels": [str(path) for path in masks],
    }
    result: dict[str, Any] = {}
    for num_cores in sorted({min(count, len(cores)) for count in arguments.cores or (1, len(cores))}):
        with tempfile.TemporaryDirectory() as folder, on_cores(cores[:num_cores]) as environment:
            players = {}
            for name, command in commands.items():
                out = Path(folder) / name
                out.mkdir()
                players[name] = Player(command, {**job, "out": str(out), "grid": PEERS.get(name)}, environment)
            times, nuclei = alternate(players, arguments.rounds, megapixels, num_cores)
            candidates = {name: player.facts["candidates"] for name, player in players.items() if name in PEERS}
            for player in players.values():
                player.close()
        ending = "" if num_cores == len(cores) else f"_{num_cores}_core{'s' if num_cores > 1 else ''}"
        result |= ratios(times, ending)
        result[f"megapixels_per_s{ending}"] = rates(times, megapixels)
    return {
        **result,
        "cores": len(cores),
        "images": len(images),
        "megapixels": round(megapixels, 2),
        "rounds": arguments.rounds,
        "nuclei_found": nuclei,
        "stardist_candidates": candidates,
    }


def alternate(
    players: Mapping[str, Player], rounds: int, megapixels: float, num_cores: int
) -> tuple[Times, dict[str, int]]:
    """The players' times, and how many nuclei each found."""
    times: Times = {pass_name: {name: [] for name in players} for pass_name in PASSES}
    nuclei: dict[str, int] = {}
    for number in range(1, rounds + 1):
        for pass_name, shown in PASSES.items():
            for name, player in players.items():
                played = player.play(pass_name)
                times[pass_name][name].append(played["wall_s"])
                nuclei[name] = played["nuclei"]
            found = ", ".join(f"{name} {megapixels / seconds[-1]:.2f}" for name, seconds in times[pass_name].items())
            print(f"{num_cores} core(s), round {number}, {shown}: {found} megapixels/s", flush=True)
    return times, nuclei


def ratios(times: Times, ending: str) -> dict[str, float]:
    """nuciseg's speed over each peer's: medians of the rounds' own ratios."""
    return {
        f"{shown}_vs_{name}{ending}": round(_median_ratio(times[pass_name][name], times[pass_name]["nuciseg"]), 3)
        for name in PEERS
        for pass_name, shown in PASSES.items()
    }


def rates(times: Times, megapixels: float) -> dict[str, dict[str, float]]:
    return {
        shown: {name: float(f"{megapixels / statistics.median(each):.4g}") for name, each in times[pass_name].items()}
        for pass_name, shown in PASSES.items()
    }


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def prepare_passes(job: dict[str, Any]) -> tuple[dict[str, Pass], dict[str, Any]]:
    """nuciseg's passes; `alternating.serve` makes them."""
    import torch

    from nuciseg.engine.files import Request, predict_file
    from nuciseg.engine.prediction import Predictor

    predictor = Predictor.load(Path(job["checkpoint"]), torch.device("cpu"))
    images = [Path(path) for path in job["images"]]
    arrays = [read_image(path) for path in images]
    request = Request(outputs=("masks",), out=Path(job["out"]))

    def files() -> int:
        summaries = [predict_file(predictor, path, request).row.summary for path in images]
        return sum(summary.num_nuclei for summary in summaries if summary is not None)

    def in_memory() -> int:
        return sum(len(predictor.instances(image_HW).confidences_N) for image_HW in arrays)

    files()  # the warm-up
    return {"files": files, "arrays": in_memory}, {}


if __name__ == "__main__":
    main()
