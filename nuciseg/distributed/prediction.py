"""Many images: by one network in this process, or streamed through a pool of Ray actors with one network each."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import torch

from nuciseg.engine.files import FileResult, Request, predict_file
from nuciseg.engine.precision import is_out_of_memory, local_device
from nuciseg.engine.prediction import Predictor
from nuciseg.errors import DataError, ResourceError
from nuciseg.outputs import ImageResult
from nuciseg.startup import imports_are_done

NUM_RETRIES = 3  # of an image whose process ended; an image that ends every process must not do so for ever


def predict_files(
    paths: Sequence[Path],
    checkpoint: Path,
    request: Request,
    *,
    num_workers: int = 1,
    on_share: Callable[[float], None] | None = None,
) -> Iterator[FileResult]:
    """The result of each image as it is finished; one that cannot be used has a reason and no summary.

    `on_share` is told which share of the image in work is done, where there is but one at a time.

    With several workers each needs a CPU, and a GPU where the cluster has any; on several machines they read and write
    the same paths, so these must lie on storage that all share. Raises CheckpointError, ResourceError.
    """
    if not paths:
        return
    num_workers = min(num_workers, len(paths))
    if num_workers > 1:
        yield from _by_actors(paths, checkpoint, request, num_workers)
        return
    predictor = Predictor.load(checkpoint, local_device())
    for path in paths:
        yield _result(predictor, path, request, on_share)


def _result(
    predictor: Predictor, path: Path, request: Request, on_share: Callable[[float], None] | None = None
) -> FileResult:
    try:
        return predict_file(predictor, path, request, on_share)
    except DataError as error:
        reason = str(error)
    except (MemoryError, RuntimeError, cv2.error) as error:
        if not is_out_of_memory(error):
            raise
        reason = (
            f"{path} takes more memory than there is; check --diameter, give a smaller --tile-px, or take a machine "
            "with more"
        )
    return FileResult(ImageResult(str(path), reason=reason))


class _PredictingActor:
    """One network, kept for all the images that come to it. A full disk ends no actor: its sentence is handed on."""

    def __init__(self, checkpoint: Path, request: Request) -> None:
        imports_are_done()
        self.predictor = Predictor.load(checkpoint, local_device())
        self.request = request

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        path = Path(os.fsdecode(row["path"]))
        try:
            found: FileResult | ResourceError = _result(self.predictor, path, self.request)
            if isinstance(found, FileResult):
                named = os.fsdecode(row["name"])  # as the user wrote it, not from the root of the file system
                found = replace(found, row=replace(found.row, file=named))
        except ResourceError as error:
            found = error
        return {"found": pickle.dumps(found)}


def _by_actors(paths: Sequence[Path], checkpoint: Path, request: Request, num_workers: int) -> Iterator[FileResult]:
    import ray

    from nuciseg.distributed.cluster import Need, connect, require_room
    from nuciseg.distributed.storage import require_everywhere, require_shared

    on_sigterm = signal.getsignal(signal.SIGTERM)
    connect(verbose=False)
    if threading.current_thread() is threading.main_thread():  # else neither Ray nor we may set it
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own ends the process before a sentence is said
    need = Need(cpus=1, gpus=1 if ray.cluster_resources().get("GPU", 0) else 0)
    require_room(num_workers, need, "--workers", "give fewer, or add nodes")
    require_shared(request.out, "--out")
    # Of each folder one file: enough to tell whether a node sees it. A link to nothing is nowhere, and fails alone.
    folders = {str(path.absolute().parent): path for path in paths if path.exists()}
    require_everywhere({"--checkpoint": checkpoint, **{f"INPUT in {name}": path for name, path in folders.items()}})
    # An actor that cannot start is started for ever.
    Predictor.load(checkpoint, torch.device("cpu"))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"path": os.fsencode(path.absolute()), "name": os.fsencode(path)} for path in paths]
    # One block an image: a result is handed on when its image is finished, and a dead machine costs few images.
    images = ray.data.from_items(rows, override_num_blocks=len(rows))
    # Ray 2.60 has no other way to bound the retries than the one that it deprecates.
    with warnings.catch_warnings(action="ignore", category=ray.util.annotations.RayDeprecationWarning):
        stream = images.map(
            _PredictingActor,
            fn_constructor_args=(checkpoint.absolute(), replace(request, out=request.out.absolute())),
            # One image at a time each: none waits for an actor that is busy while another has nothing to do.
            compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
            num_cpus=need.cpus,
            num_gpus=need.gpus,
            max_task_retries=NUM_RETRIES,
        )
    try:
        for row in stream.iter_rows():
            found = pickle.loads(row["found"])  # made by our own actor
            if isinstance(found, ResourceError):
                raise found
            yield found
    except ray.exceptions.RayActorError as error:
        raise ResourceError(
            f"a process that predicted ended {NUM_RETRIES + 1} times on one image, most likely for want of memory; go "
            "on with --resume and fewer --workers"
        ) from error
