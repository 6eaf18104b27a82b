"""Training of one network, by one worker or by many in step. Plain PyTorch, no Ray.

Whatever the number of workers, a step sees the same images with the same augmentation, and its gradient is the mean
over the images of the whole batch; randomness is fixed by (seed, epoch, batch), so that a run taken up again from a
checkpoint, also from one in the middle of an epoch, goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nuciseg.config import Config
from nuciseg.data.dataset import TrainingLoader
from nuciseg.engine.checkpoint import Checkpoint, CheckpointStore, Progress, load_checkpoint
from nuciseg.engine.datasets import TrainingSet, format_of
from nuciseg.engine.epoch_part import EpochPart, Wish
from nuciseg.engine.inference import Place, score_samples
from nuciseg.engine.network import Network, begun_network, build_network
from nuciseg.engine.precision import is_out_of_memory
from nuciseg.errors import CheckpointError, NonFiniteLossError, OutOfMemoryError
from nuciseg.losses import build_loss
from nuciseg.metrics import ImageScores, Scores, rank
from nuciseg.models import freeze_encoder
from nuciseg.optim import AveragedWeights, build_optimizer, learning_rate_at, load_optimizer_state, set_learning_rate
from nuciseg.types import Batch


@dataclass(frozen=True)
class EpochReport:
    """What is known after an epoch. `metrics` are the same on every worker; `image_scores` and `is_best` too."""

    progress: Progress
    metrics: Mapping[str, float]
    image_scores: tuple[ImageScores, ...]
    is_best: bool
    checkpoint: Path | None
    network: Network


class Trainer:
    """The state of a run and the steps that change it."""

    def __init__(
        self,
        config: Config,
        data: TrainingSet,
        place: Place,
        store: CheckpointStore,
        wish: Callable[[], Wish] = lambda: Wish.GO_ON,
        must_one_go: Callable[[], bool] = lambda: False,
    ) -> None:
        """`wish` is asked by the first worker after every step; where it is to confer, `must_one_go` by all of them."""
        self.config, self.data, self.place, self.store = config, data, place, store
        self.wish, self.must_one_go, self.one_goes = wish, must_one_go, False
        torch.manual_seed(config.seed)
        resume_from = store.last
        if resume_from is None:
            self.network = begun_network(config, data.in_channels, place.device)
        else:
            self.network = build_network(config, data.in_channels, place.device, load_pretrained=False)
        self.loss = build_loss(config.loss).to(place.device)
        self.loss_names = ("loss", *self.loss.terms)
        self.optimizer = build_optimizer(config.optim, self.network.model)
        self.parameters = [*self.network.model.parameters()]  # a walk through the network takes time
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=self.network.precision.needs_loss_scaling)
        decay = config.train.ema_decay
        self.averaged = AveragedWeights(self.network.model, decay) if decay is not None else None
        self.diameters = data.diameters() if place.rank == 0 else None  # the one that writes checkpoints
        self.data_format = format_of(config.data)  # looks into folders: once, not in each epoch
        self.progress, self.part, self.stopped = Progress(), EpochPart(), False
        self.saved_at = time.monotonic()
        if resume_from is not None:
            self._restore(resume_from)
        self.loader = TrainingLoader(
            data.training_data,
            batch_size=config.data.batch_size,
            rank=place.rank,
            world_size=place.world_size,
            num_threads=config.data.num_loader_threads,
            pin_memory=place.device.type == "cuda",
        )
        self.num_steps = config.train.epochs * self.loader.num_batches()
        self._begin_phase(self._is_frozen_in(self.progress.epoch + 1))

    @property
    def finished(self) -> bool:
        """All epochs done, or no better score for `train.patience` epochs."""
        patience = self.config.train.patience
        patience_over = patience is not None and self.progress.epochs_since_best >= patience
        return self.progress.epoch >= self.config.train.epochs or (self.progress.epoch > 0 and patience_over)

    def run_epoch(self) -> EpochReport | None:
        """Train one epoch, validate, keep a checkpoint. Every worker calls this at the same time.

        None where the run is to stop: the checkpoint is of the middle of the epoch then.
        """
        epoch = self.progress.epoch + 1
        training = self.train_epoch(epoch)
        if self.stopped:
            return None
        self._same_buffers_everywhere()
        start = time.perf_counter()
        network = self._validated_network()
        with _memory_watched("validation, which takes whole images; leave out the largest or use a device with more"):
            image_scores = score_samples(network, self.data.samples, self.data.split.validation, self.place)
        validation = Scores.total(image_scores).flat_summary()
        metrics = {"epoch": epoch, **training, **validation, "validation_s": time.perf_counter() - start}

        metric = self.config.train.metric
        is_best = all(rank(metrics, metric) > rank(row, metric) for row in self.progress.history)
        self.progress = replace(
            self.progress,
            epoch=epoch,
            best_epoch=epoch if is_best else self.progress.best_epoch,
            history=(*self.progress.history, metrics),
        )
        path = self.store.save(self._checkpoint(metrics)) if self.place.rank == 0 else None
        self.saved_at = time.monotonic()
        return EpochReport(self.progress, metrics, tuple(image_scores), is_best, path, network)

    def close(self) -> None:
        self.loader.close()

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """The training half of `run_epoch`: one pass over the images; every loss term per image, and rates."""
        model, device = self.network.model, self.place.device
        if self._is_frozen_in(epoch) != self.encoder_is_frozen:
            self._begin_phase(self._is_frozen_in(epoch))
        model.train()
        mark = time.perf_counter()
        for loaded in self.loader.epoch(epoch, first_batch=self.progress.batches):
            wait_s = time.perf_counter() - mark
            torch.manual_seed(_mixed_seed(self.config.seed, epoch, self.progress.batches, self.place.rank))
            rate = self._learning_rate(self.progress.step)
            set_learning_rate(self.optimizer, rate)
            batch = loaded.batch
            with _memory_watched(
                f"step {self.progress.step} with data.batch_size {self.config.data.batch_size} in train.accumulate "
                f"{self.config.train.accumulate} parts; raise train.accumulate or lower data.crop_px"
            ):
                if batch is not None:
                    batch = batch.to(device, self.network.precision.channels_last)
                terms, wish = self._step(batch, loaded.global_size, rate)
            self.part.add(terms, loaded.global_size, wait_s, time.perf_counter() - mark)
            self.progress = replace(self.progress, step=self.progress.step + 1, batches=self.progress.batches + 1)
            if wish is Wish.CONFER:
                wish = self._conferred()
            if wish is not Wish.GO_ON:
                self._save_part()
                self.stopped = wish is Wish.STOP
                if self.stopped:
                    break
            mark = time.perf_counter()
        figures = self.part.figures(self._summed_over_workers(self.part.terms))
        figures["learning_rate"] = self._learning_rate(self.progress.step - 1)
        if not self.stopped:
            self.progress, self.part = replace(self.progress, batches=0), EpochPart()
        return figures

    def _save_part(self) -> None:
        """Keep a checkpoint of the middle of an epoch. Every worker calls this at the same time."""
        summed = self._summed_over_workers(self.part.terms)
        if self.place.rank == 0:
            history = self.progress.history
            part = {f"part.{name}": tensor for name, tensor in self.part.tensors(summed).items()}
            self.store.save(self._checkpoint(history[-1] if history else {}, part))
        self.saved_at = time.monotonic()

    def _is_frozen_in(self, epoch: int) -> bool:
        return epoch <= self.config.optim.frozen_encoder_epochs

    def _begin_phase(self, encoder_is_frozen: bool) -> None:
        """Freeze or thaw the encoder and make what takes the steps: data-parallel training sums the gradients of those
        parameters that had one when it was set up."""
        self.encoder_is_frozen = encoder_is_frozen
        if self.config.optim.frozen_encoder_epochs:
            freeze_encoder(self.network.model, encoder_is_frozen)
        self.parallel = self._data_parallel()
        self.step_model = self._compiled(self.parallel or self.network.model)

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(self.config.schedule, self.config.optim.lr, step, self.num_steps)

    def _step(self, batch: Batch | None, global_size: int, rate: float) -> tuple[dict[str, torch.Tensor], Wish]:
        """One optimizer step: every loss term summed over this worker's images, on the device, and what comes next."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._backward(batch, global_size) if batch is not None else self._backward_nothing()
        self.scaler.unscale_(self.optimizer)
        limit = self.config.train.clip_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, limit if limit is not None else float("inf"))
        loss, wish = self._agreed(sums["loss"])
        self._refuse_non_finite(loss, sums, global_size, norm, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update()
        return sums, wish

    def _agreed(self, loss: torch.Tensor) -> tuple[torch.Tensor, Wish]:
        """The loss summed over all workers, and the first one's wish: one message for both."""
        wish = self._own_wish() if self.place.rank == 0 else Wish.GO_ON
        if self.place.world_size == 1:
            return loss, wish
        both = torch.stack([loss.float(), torch.tensor(float(wish), device=loss.device)])
        dist.all_reduce(both)
        return both[0], Wish(int(both[1]))

    def _conferred(self) -> Wish:
        """Wants a checkpoint when a machine is announced to go, once. Every worker calls this at the same time."""
        knew, self.one_goes = self.one_goes, self.must_one_go()
        return Wish.CHECKPOINT if self.one_goes and not knew else Wish.GO_ON

    def _own_wish(self) -> Wish:
        minutes = self.config.run.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        return max(self.wish(), Wish.CHECKPOINT if due else Wish.GO_ON)

    def _backward(self, batch: Batch, global_size: int) -> dict[str, torch.Tensor]:
        parts = min(self.config.train.accumulate, len(batch))
        bounds = [round(len(batch) * part / parts) for part in range(parts + 1)]
        sums: dict[str, torch.Tensor] = {}
        for start, stop in pairwise(bounds):
            part = batch.slice(start, stop)
            with self._synced_only_if(stop == len(batch)):
                with self.network.precision.autocast():
                    logits_BKHW = self.step_model(part.images_BCHW)
                terms = self.loss(logits_BKHW, part.targets_BKHW, part.valid_BHW)
                # DDP takes the mean over workers, so that this makes the mean over the images of the whole batch.
                scaled = terms["loss"].sum() * (self.place.world_size / global_size)
                self.scaler.scale(scaled).backward()
            for name, value_B in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=value_B.device)) + value_B.detach().sum()
        return sums

    def _backward_nothing(self) -> dict[str, torch.Tensor]:
        """This worker has no image in a short last batch: it joins the gradients' sum with zeros, or the rest hang."""
        side = self.network.stride * 2
        nothing_BCHW = torch.zeros(1, self.network.in_channels, side, side, device=self.place.device)
        self.network.model.eval()  # running statistics must not learn from it
        logits_BKHW = self.step_model(nothing_BCHW)
        self.scaler.scale(logits_BKHW.sum() * 0.0).backward()
        self.network.model.train()
        return {name: torch.zeros((), device=self.place.device) for name in self.loss_names}

    def _refuse_non_finite(
        self, loss: torch.Tensor, sums: Mapping[str, torch.Tensor], global_size: int, norm: torch.Tensor, rate: float
    ) -> None:
        # Every worker must come to the same verdict, or those who go on wait for ever. `loss` and the norm of the
        # summed gradient are the same everywhere; under fp16 the norm may be infinite while the scale is found, so
        # there the loss alone is asked.
        health = loss if self.scaler.is_enabled() else loss + norm
        if bool(torch.isfinite(health)):
            return
        totals = self._summed_over_workers(sums)
        what = "gradient" if bool(torch.isfinite(totals["loss"])) else "loss"
        terms = ", ".join(f"{name} {float(value) / global_size:.4g}" for name, value in totals.items())
        raise NonFiniteLossError(
            f"the {what} is not finite in step {self.progress.step} at learning rate {rate:.3g} "
            f"({terms}; gradient norm {float(norm):.4g}); lower optim.lr, set train.clip_norm, or train.precision fp32"
        )

    def _data_parallel(self) -> DistributedDataParallel | None:
        if self.place.world_size == 1:
            return None
        device_ids = [self.place.device] if self.place.device.type == "cuda" else None
        return DistributedDataParallel(self.network.model, device_ids=device_ids)

    def _compiled(self, model: nn.Module) -> nn.Module:
        if not self.config.train.compile:
            return model
        model.compile()
        return model

    def _synced_only_if(self, last_part: bool) -> contextlib.AbstractContextManager[object]:
        if self.parallel is None or last_part:
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _validated_network(self) -> Network:
        if self.averaged is None:
            self.network.model.eval()
            return self.network
        return replace(self.network, model=self.averaged.module.eval())

    def _same_buffers_everywhere(self) -> None:
        """Running statistics differ between workers; those of rank 0 are validated and kept."""
        if self.place.world_size > 1:
            models = [self.network.model] + ([self.averaged.module] if self.averaged is not None else [])
            for model in models:
                for buffer in model.buffers():
                    dist.broadcast(buffer, src=0)

    def _summed_over_workers(self, sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        totals = {name: value.clone() for name, value in sums.items()}
        if self.place.world_size > 1:
            for name in sorted(totals):
                dist.all_reduce(totals[name])
        return totals

    def _checkpoint(self, metrics: Mapping[str, float], part: Mapping[str, torch.Tensor] | None = None) -> Checkpoint:
        model = self.network.model
        training = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            training |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        if self.averaged is not None:
            training["averaged.n_averaged"] = self.averaged.n_averaged
        if self.scaler.is_enabled():
            training |= {f"scaler.{key}": torch.tensor(value) for key, value in self.scaler.state_dict().items()}
        weights = (self.averaged.module if self.averaged is not None else model).state_dict()
        return Checkpoint(
            config=self.config,
            progress=self.progress,
            split_hash=self.data.split.hash,
            in_channels=self.data.in_channels,
            weights=weights,
            # Without averaging the weights to predict with are the raw ones: safetensors stores no tensor twice.
            training={key: tensor.clone() for key, tensor in (training | dict(part or {})).items()},
            scores=metrics,
            diameters=self.diameters,
            data_format=self.data_format,
        )

    def _restore(self, folder: Path) -> None:
        checkpoint = load_checkpoint(folder, training=True)
        if checkpoint.split_hash != self.data.split.hash:
            raise CheckpointError(
                f"{folder} was trained on split {checkpoint.split_hash}, the data now gives {self.data.split.hash}: "
                "the images or data.validation_fraction, split_seed, num_folds, fold, validation_list or pool_test "
                "changed; begin anew"
            )
        tensors: dict[str, dict[str, torch.Tensor]] = {
            part: {} for part in ("model", "optimizer", "averaged", "scaler", "part")
        }
        for name, tensor in checkpoint.training.items():
            part, key = name.split(".", 1)
            tensors[part][key] = tensor
        self.network.model.load_state_dict(tensors["model"])
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors["optimizer"].items():
            index, key = name.split(".", 1)
            states.setdefault(int(index), {})[key] = tensor
        load_optimizer_state(self.optimizer, states)
        if self.averaged is not None:
            self.averaged.module.load_state_dict(dict(checkpoint.weights))
            self.averaged.n_averaged.copy_(tensors["averaged"]["n_averaged"])
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            self.scaler.load_state_dict({key: type(state[key])(value) for key, value in tensors["scaler"].items()})
        self.progress = checkpoint.progress
        if self.progress.batches:
            self.part = EpochPart.of(tensors["part"], self.place.device, self.place.rank)


def train(
    config: Config,
    data: TrainingSet,
    place: Place,
    store: CheckpointStore,
    on_epoch: Callable[[EpochReport], None],
    wish: Callable[[], Wish] = lambda: Wish.GO_ON,
    must_one_go: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train from the last checkpoint in `store` where there is one; `on_epoch` runs on every worker.

    `wish` and `must_one_go` are those of `Trainer`. Where the run was to stop, `batches` of the result is not 0.
    """
    trainer = Trainer(config, data, place, store, wish, must_one_go)
    try:
        while not trainer.finished:
            report = trainer.run_epoch()
            if report is None:
                break
            on_epoch(report)
    finally:
        trainer.close()
    return trainer.progress


def _mixed_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    return ((seed * 1_000_003 + epoch * 7919 + rank) * 1_000_033 + batch) % 2**63


@contextlib.contextmanager
def _memory_watched(doing: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory in {doing}") from error
