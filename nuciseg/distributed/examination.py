"""What `doctor` asks of a machine or cluster, one check after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray

from nuciseg.config import Config
from nuciseg.data.cache import default_cache_dir
from nuciseg.distributed import checks
from nuciseg.distributed.all_reduce import measure_all_reduce
from nuciseg.distributed.checks import Check, failed, passed
from nuciseg.distributed.clocks import clock_offsets
from nuciseg.distributed.cluster import connect, gpus_within_reach, require_room_for_runs, worker_need
from nuciseg.distributed.node_facts import NodeFacts, disk_usage, first_image, node_facts, versions, wandb_state
from nuciseg.distributed.nodes import ANSWER_TIMEOUT_S, alive_nodes, on_every_node
from nuciseg.distributed.rehearsal import rehearse
from nuciseg.distributed.runs import disk_need, trial_disk_bytes
from nuciseg.distributed.space import refuse_elastic_trials
from nuciseg.distributed.storage import require_shared
from nuciseg.engine.network import count_parameters
from nuciseg.errors import NucisegError, ResourceError
from nuciseg.images import require_writable
from nuciseg.scale import WorkerRange

GRADIENT_BYTES = 4  # fp32, whatever the network computes in
FETCH_TIMEOUT_S = 3600.0
NO_GPU_YET = "no node with a GPU is up, they come with the work; ask again while a search runs"


def examine(config: Config, *, kill_worker: bool = False, verbose: bool = False) -> Iterator[Check]:
    """Each check as it is done; after one that the others need, they are left out. Raises nothing of the user's."""
    try:
        connect(verbose)
    except ResourceError as error:
        yield failed("cluster", str(error))
        return
    answers = on_every_node(node_facts, config, in_own_process=True)
    yield (answering := checks.check_nodes(answers))
    nodes = {name: answer.value for name, answer in answers.items() if answer.value is not None}
    coming = _coming_gpus(config, nodes)
    yield from _about_nodes(config, nodes, coming)
    if not answering.passed:
        return  # each question to all nodes would wait for the same one
    if coming:
        yield passed("all-reduce", f"not measured: {NO_GPU_YET}")
    else:
        yield _attempted("all-reduce", lambda: _all_reduce(config))
    storage = _attempted("storage", lambda: _storage(config.run.storage_path))
    yield storage
    from_bucket = isinstance(config.data.root, str)  # fetched whole into each node's cache, which takes its time
    images = on_every_node(first_image, config, timeout_s=FETCH_TIMEOUT_S if from_bucket else ANSWER_TIMEOUT_S)
    yield checks.check_images(images)
    yield checks.check_wandb(on_every_node(wandb_state, config))
    yield checks.check_clocks(clock_offsets())
    if storage.passed:
        yield _disk(config, nodes)
        if kill_worker and isinstance(config.run.storage_path, str):
            yield failed("recovery", "not tried: it needs a run.storage_path that is a folder, not a bucket")
        elif kill_worker:
            folder = Path(config.run.storage_path) / f"doctor-{time.strftime('%Y%m%d-%H%M%S')}"
            yield _attempted("recovery", lambda: rehearse(folder.resolve(), verbose=verbose))
    elif kill_worker:
        yield failed("recovery", "not tried: it needs the storage, see above")


def _about_nodes(config: Config, nodes: dict[str, NodeFacts], coming: int) -> Iterator[Check]:
    names = alive_nodes()
    of_ray = {names[n["NodeID"]]: int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["NodeID"] in names}
    yield checks.check_versions(nodes, versions())
    gpus = {name: of_ray.get(name, 0) for name in nodes}
    yield checks.check_gpus(nodes, gpus, coming)
    if coming:
        yield passed("bf16", f"not looked at: {NO_GPU_YET}")
    else:
        yield checks.check_precision(nodes, config.train.precision, config.scale.use_gpu)
    yield _attempted("room", lambda: _room(config))


def _attempted(name: str, check: Callable[[], Check]) -> Check:
    """The check, failed with the sentence of what it raises."""
    try:
        return check()
    except NucisegError as error:
        return failed(name, str(error))


def _room(config: Config) -> Check:
    scale = config.scale
    if config.search.space:
        refuse_elastic_trials(config)
    need = worker_need(scale, for_trial=bool(config.search.space))
    runs = require_room_for_runs(scale, need)
    each = f"{scale.min_workers} workers" if scale.min_workers > 1 else "one worker"
    if isinstance(scale.num_workers, WorkerRange):
        each += f" (at most {scale.max_workers})"
    return passed("room", f"for {runs} at a time of {each} with {need.cpus} CPUs and {need.gpus} GPUs")


def _coming_gpus(config: Config, nodes: dict[str, NodeFacts]) -> int:
    """How many GPUs an autoscaled cluster without any may add, which workers would then train on."""
    here = ray.cluster_resources().get("GPU", 0) or any(facts.gpus for facts in nodes.values())
    if here or config.scale.use_gpu is False:
        return 0
    return gpus_within_reach()


def _all_reduce(config: Config) -> Check:
    gradient_bytes = GRADIENT_BYTES * count_parameters(config)
    return checks.check_all_reduce(measure_all_reduce(config.scale.use_gpu), gradient_bytes)


def _storage(location: Path | str) -> Check:
    num = len(alive_nodes())
    if isinstance(location, str):
        require_shared(location)
        return passed("storage", f"{location} can be written and read" + (f" from {num} nodes" if num > 1 else ""))
    folder = location.resolve()
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    require_shared(folder)
    require_writable(folder)
    for each in made:
        with contextlib.suppress(OSError):  # somebody else has begun to use it
            each.rmdir()
    return passed("storage", f"{folder} is writable" + (f", and the same on {num} nodes" if num > 1 else ""))


def _disk(config: Config, nodes: dict[str, NodeFacts]) -> Check:
    location = config.run.storage_path
    if isinstance(location, str):  # what a node trains lies in its cache, too, and all of it in this one's
        cure = "set NUCISEG_CACHE there to another folder"
        name, facts = min(nodes.items(), key=lambda node: node[1].cache_free_bytes)
        cache = default_cache_dir()
        of_node = checks.check_disk(
            nodes, trial_disk_bytes(config), facts.cache_free_bytes, f"the cache of node {name}", cure
        )
        of_all = checks.check_disk(nodes, disk_need(config), disk_usage(cache).free, str(cache), cure)
        return of_node if of_all.passed else of_all
    cure = "set run.storage_path to another folder"
    return checks.check_disk(nodes, disk_need(config), disk_usage(location.resolve()).free, str(location), cure)
