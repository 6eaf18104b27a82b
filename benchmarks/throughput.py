"""Images per second of three loops that train the same network, in alternating runs (a b c a b c ...):

(a) bare        forward, backward and optimizer step on one batch that lies in memory: what the hardware allows
(b) loop        nuciseg's own `Trainer` and loader, all on that is on by default (clipping, averaged weights, schedule)
(c) lightning   what a user would write with Lightning, segmentation_models_pytorch and albumentations over the PNG
                files, see lightning_user.py; with the number of loader workers that is best for it

    python benchmarks/throughput.py --data.root DIR        # the nucleus data set; without DIR clusters are drawn

The same in all three: the network (nuciseg's U-Net on a timm encoder, from scratch), batch size, crop, precision,
kinds and strengths of augmentation, optimizer (AdamW), number of threads. Every image is padded or cropped to the
same square, so that images per second compare; nuciseg's smaller canvases for smaller images, which would save it
a good part of the pixels, are switched off. `vs_lightning` is (b) / (c); part of it is that nuciseg keeps images
`channels_last` in reduced precision and Lightning leaves that to the user, so (c) is measured with it as well, as
`vs_lightning_channels_last`. Ratios are medians over the rounds. The last line is one JSON object.

About 5 minutes on 2 cores. Needs `pip install -e '.[bench]'` and a machine with nothing else to do: with others on
it read `cpu_ms_per_image`, which waiting does not change (spinning threads do).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from nuciseg.config import Config, load_config
from nuciseg.data.formats import nucleus
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.engine.datasets import TrainingSet, open_training_set
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import Trainer
from nuciseg.engine.network import Network, build_network
from nuciseg.errors import NucisegError
from nuciseg.losses import build_loss
from nuciseg.models.timm_library import import_timm
from nuciseg.optim import build_optimizer

if TYPE_CHECKING:
    from lightning_user import UserLoop

CPU = Place()


@dataclass(frozen=True)
class Run:
    """One run of one loop."""

    num_images: int
    wall_s: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        return self.num_images / self.wall_s


class Clock:
    """Wall and CPU time, that of loader processes included, since it was made."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = time.perf_counter(), _cpu_s()

    def run(self, num_images: int) -> Run:
        return Run(num_images, time.perf_counter() - self.wall_s, _cpu_s() - self.cpu_s)


def _cpu_s() -> float:
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))


# ------------------------------------------------------------------------------------------------ the three loops
def bare_loop(config: Config, data: TrainingSet, device: torch.device = CPU.device) -> Callable[[], Run]:
    """(a): as many steps as an epoch of the others has, all on the first batch."""
    network = _network(config, data, device)
    loss, optimizer = build_loss(config.loss).to(device), build_optimizer(config.optim, network.model)
    loaded = data.training_data.load(data.training_data.plan(1, config.data.batch_size)[0], epoch=1).batch
    assert loaded is not None  # one worker has every image of a batch
    batch = loaded.to(device, network.precision.channels_last)
    num_steps = len(data.training_data.indices) // len(batch)

    def run() -> Run:
        network.model.train()
        clock = Clock()
        for _ in range(num_steps):
            optimizer.zero_grad(set_to_none=True)
            with network.precision.autocast():
                logits_BKHW = network.model(batch.images_BCHW)
            loss(logits_BKHW, batch.targets_BKHW, batch.valid_BHW)["loss"].mean().backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock.run(num_steps * len(batch))

    return run


def nuciseg_loop(trainer: Trainer) -> Callable[[], Run]:
    """(b): an epoch of nuciseg's training loop."""
    num_images, epoch = len(trainer.data.training_data.indices), 0

    def run() -> Run:
        nonlocal epoch
        epoch += 1
        clock = Clock()
        trainer.train_epoch(epoch)
        return clock.run(num_images)

    return run


def alternate(
    user: UserLoop,
    network: Network,
    num_workers: int,
    rounds: int,
    others: Sequence[Callable[[], Run]],
    channels_last: bool = False,
) -> list[list[Run]]:
    """For each round the runs of `others` and one epoch of the user's loop; the first epoch of each is a warm-up.

    Lightning's `fit` is one call, so the others run inside it, between two epochs: at that moment its loader's
    workers have nothing to do. The user's clock goes from there to the end of the next epoch.
    """  # fmt: skip
    result: list[list[Run]] = []
    clock: Clock | None = None

    def between_epochs() -> None:
        nonlocal clock
        if clock is not None:
            result[-1].append(clock.run(len(user.pairs)))
        if len(result) < rounds:
            result.append([run() for run in others])
            clock = Clock()

    for run in others:
        run()
    user.fit(network.model, num_workers, rounds + 1, between_epochs, channels_last)
    return result


# ------------------------------------------------------------------------------------------------------ the set-up
def _network(config: Config, data: TrainingSet, device: torch.device = CPU.device) -> Network:
    torch.manual_seed(config.seed)
    return build_network(config, data.in_channels, device)


def equal_canvases(data: TrainingSet, config: Config, num_images: int) -> TrainingSet:
    """The first `num_images` training images, every one on a canvas of `data.crop_px`."""
    whole = data.training_data
    if len(whole.indices) < num_images:
        raise SystemExit(
            f"{len(whole.indices)} training images are fewer than the {num_images} of a run; "
            "lower --steps or --batch-size"
        )
    return replace(data, training_data=replace(
        whole, indices=whole.indices[:num_images], multiple=config.data.crop_px
    ))  # fmt: skip


def user_loop(config: Config, data: TrainingSet, root: Path, network: Network) -> UserLoop:
    from lightning_user import UserLoop

    records = nucleus.read(root, "train")
    chosen = [records[index] for index in data.training_data.indices]
    return UserLoop(
        pairs=tuple((record.image_path, record.label_paths[0]) for record in chosen if record.image_path is not None),
        crop_px=config.data.crop_px,
        batch_size=config.data.batch_size,
        precision="32-true" if network.precision.dtype is None else "bf16-mixed",
        augment=config.augment,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.train.clip_norm,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Images/s of nuciseg's training loop against a bare step and Lightning"
    )
    parser.add_argument("--data.root", dest="root", type=Path, metavar="DIR", help="nucleus folder; none: drawn")
    parser.add_argument("--encoder", default="resnet18", help="timm encoder (resnet18)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (16)")
    parser.add_argument("--crop-px", type=int, default=192, help="side of every image, pixels, a multiple of 32 (192)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="autocast type (auto)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run (8)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each loop (9)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="(c)'s loader workers to try (0 1 2)")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    num_images = arguments.steps * arguments.batch_size
    root = arguments.root
    if root is None:
        root = folder / "drawn"
        # A fifth of the training images is held out.
        write_nucleus_folder(SyntheticConfig(num_train=num_images * 5 // 4 + 2, num_test=1), root)
    config = load_config(overrides={
        "data": {"format": "nucleus", "root": root, "cache_dir": folder / "cache",
                 "batch_size": arguments.batch_size, "crop_px": arguments.crop_px},
        "model": {"kind": "timm", "encoder": arguments.encoder},
        "train": {"precision": arguments.precision, "epochs": arguments.rounds + 1},
    })  # fmt: skip
    data = equal_canvases(open_training_set(config, stride=32), config, num_images)
    trainer = Trainer(config, data, CPU, CheckpointStore(folder))
    bare, loop = bare_loop(config, data), nuciseg_loop(trainer)
    network = _network(config, data)
    user = user_loop(config, data, root, network)

    rates = {}
    for num_workers in arguments.workers:
        tried = alternate(user, network, num_workers, rounds=1, others=[])
        rates[num_workers] = tried[0][0].images_per_s
        print(f"(c) with {num_workers} workers: {rates[num_workers]:.1f} images/s", flush=True)
    num_workers = max(rates, key=lambda workers: rates[workers])

    runs = alternate(user, network, num_workers, arguments.rounds, [bare, loop])
    tuned = alternate(user, network, num_workers, max(1, arguments.rounds // 2), [loop], True)
    trainer.close()
    report(runs, tuned)
    return {
        "loop_vs_bare": median_ratio(runs, 1, 0),
        "vs_lightning": median_ratio(runs, 1, 2),
        "vs_lightning_channels_last": median_ratio(tuned, 0, 1),
        "images_per_s": {
            **{name: median_rate(runs, place) for place, name in enumerate(NAMES)},
            "lightning_channels_last": median_rate(tuned, 1),
        },
        "cpu_ms_per_image": {
            **{name: cpu_ms_per_image(runs, place) for place, name in enumerate(NAMES)},
            "lightning_channels_last": cpu_ms_per_image(tuned, 1),
        },
        "lightning_workers": num_workers,
        "precision": str(trainer.network.precision.dtype or torch.float32).removeprefix("torch."),
        **{key: getattr(arguments, key) for key in ("encoder", "batch_size", "crop_px", "threads", "rounds", "steps")},
    }


# ------------------------------------------------------------------------------------------------------ the report
NAMES = ("bare", "loop", "lightning")


def median_ratio(runs: Sequence[Sequence[Run]], above: int, below: int) -> float:
    ratios = [round_[above].images_per_s / round_[below].images_per_s for round_ in runs]
    return round(statistics.median(ratios), 3)


def median_rate(runs: Sequence[Sequence[Run]], place: int) -> float:
    return round(statistics.median(round_[place].images_per_s for round_ in runs), 2)


def cpu_ms_per_image(runs: Sequence[Sequence[Run]], place: int) -> float:
    return round(statistics.median(1e3 * round_[place].cpu_s / round_[place].num_images for round_ in runs), 2)


def report(runs: Sequence[Sequence[Run]], tuned: Sequence[Sequence[Run]]) -> None:
    print("images/s   " + "".join(f"{name:>12}" for name in NAMES) + f"{'loop/bare':>12}{'loop/light.':>12}")
    for number, (bare, loop, user) in enumerate(runs, start=1):
        rates = [run.images_per_s for run in (bare, loop, user)]
        ratios = (rates[1] / rates[0], rates[1] / rates[2])
        print(f"round {number:<5}" + "".join(f"{value:12.2f}" for value in (*rates, *ratios)))
    for number, (loop, user) in enumerate(tuned, start=1):
        rates = [loop.images_per_s, user.images_per_s]
        print(f"c. last {number:<3}{'':12}{rates[0]:12.2f}{rates[1]:12.2f}{'':12}{rates[0] / rates[1]:12.2f}")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    import_timm()  # before lightning_user, whose libraries import torchvision as well; see there
    try:
        import lightning_user  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed; pip install -e '.[bench]'")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"Something else runs on this machine (load {busy:.1f}): its figures count little.")
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = measure(arguments, Path(folder))
        except NucisegError as error:
            sys.exit(str(error))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
