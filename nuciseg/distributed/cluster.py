"""Start or join Ray quietly, and ask what it has."""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import ray
import torch
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import find_bootstrap_address
from ray.exceptions import AuthenticationError

from nuciseg.distributed.growth import Resources, nodes_within_reach
from nuciseg.distributed.priority import in_background
from nuciseg.engine.precision import local_device
from nuciseg.errors import ConfigError, ResourceError
from nuciseg.scale import ScaleConfig, WorkerRange
from nuciseg.startup import imports_are_done

ANSWER_TIMEOUT_S = 10.0  # of the head's port; Ray itself tries for four minutes
GPU_TRIAL_CPUS = 4  # feeds one GPU; fewer where the node has fewer


@dataclass(frozen=True)
class Need:
    """What one worker takes."""

    cpus: int
    gpus: int


def connect(verbose: bool, **limits: int) -> None:
    """Join the cluster that RAY_ADDRESS or `ray start` names, else start Ray on this machine.

    `limits` (num_cpus, num_gpus, object_store_memory) are those of `ray.init` for a Ray that is started here.
    Raises ResourceError for a cluster that does not answer, refuses this process, or runs other versions, and where Ray
    does not start; ConfigError for a RAY_TMPDIR that it cannot start in.
    """
    imports_are_done()
    quieten(verbose)
    if ray.is_initialized():
        return
    if (folder := os.environ.get("RAY_TMPDIR")) is not None and not Path(folder).is_absolute():
        raise ConfigError(f"RAY_TMPDIR is {folder!r}, and Ray starts in no relative path; give a full one, or unset it")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A trial's state is written at most this long after it changed: what a SIGKILL of the driver may lose.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # results are polled with it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 puts the training behind all that Ray does itself
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths in the configuration are the user's
    port = _free_port()
    address = _address()
    _refuse_closed(address)
    try:
        with _environment_of_workers(port), in_background():
            ray.init(
                include_dashboard=None if "RAY_ADDRESS" in os.environ else True,
                dashboard_host="127.0.0.1",
                dashboard_port=port,
                log_to_driver=verbose,
                configure_logging=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
                **limits,
            )
    except ConnectionError as error:
        raise (_no_token(address) if _refuses_token(address) else _no_cluster(address, error)) from None
    except AuthenticationError:
        raise _no_token(address) from None
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ResourceError(_describe_versions(str(error))) from None
    except Exception as error:  # Ray has no narrower class for it
        if "timed out during startup" not in str(error):
            raise
        raise ResourceError(
            "Ray did not start on this machine within 30 seconds; stop what keeps its processors or memory busy, and "
            f"try again (Ray's own logs: {folder or '/tmp'}/ray/session_latest/logs)"
        ) from None


def _address() -> str:
    """Where Ray would look for a cluster; "" where it would start one."""
    named = os.environ.get("RAY_ADDRESS", "")
    return named if named not in ("", "auto") else find_bootstrap_address(None) or named


def _refuse_closed(address: str) -> None:
    """Raise ResourceError where Ray would try for minutes: nobody listens, or a token is asked for and none given."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # such as "auto" or "local"
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from None
    if _refuses_token(address):
        raise _no_token(address)


def _refuses_token(address: str) -> bool:
    """Whether Ray's head node there refuses the token of this process, or that it has none. Ray's own error does not
    tell, and comes after 20 seconds with a line for each."""
    with init_grpc_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
        except AuthenticationError:
            return True
    return False


def _no_token(address: str) -> ResourceError:
    return ResourceError(
        f"the Ray cluster at {address!r} lets nobody in without its token, which is missing or another one here; copy "
        "~/.ray/auth_token from the machine that started the cluster, and set RAY_AUTH_MODE=token"
    )


def _no_cluster(address: str, error: OSError) -> ResourceError:
    reason = f"no Ray cluster answers at {address!r} ({error.strerror or error})"
    if os.environ.get("RAY_ADDRESS"):
        return ResourceError(
            f"{reason}; start it with `ray start`, correct RAY_ADDRESS, or unset it to use this machine"
        )
    return ResourceError(
        f"{reason}, which `ray start` noted down on this machine; start it again, or use this machine alone after "
        "`ray stop`, which forgets it"
    )


def _describe_versions(of_ray: str) -> str:
    """One sentence from what Ray says of a cluster with other versions than this process: its own takes six lines."""
    rays, pythons = (re.findall(rf"{name}: (\S+)", of_ray) for name in ("Ray", "Python"))
    cluster, here = (f"Ray {ray} with Python {python}" for ray, python in zip(rays, pythons, strict=True))
    return (
        f"the cluster runs {cluster}, this process {here}; both must be equal: start it in the cluster's image or "
        f"environment, as `ray job submit` does, or install ray=={rays[0]} and Python {pythons[0]} here"
    )


def _environment_of_workers(dashboard_port: int) -> AbstractContextManager[None]:
    """What is started in the block inherits the dashboard's address, and no W&B service of this process.

    Ray Train frees the places of stopped trials by asking the dashboard. Left to itself it looks for Ray's processes
    on the machine, and where another Ray runs there too it gives up, so that the next trial waits for ever.
    W&B's service ends when this process asks it to: a worker that was told of it would have nobody to write to.
    """
    return environment({"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}", "WANDB_SERVICE": None})


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Within, the environment has these variables, and lacks those that are None; afterwards it is as it was."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quieten(verbose: bool) -> None:
    """Keep what Ray says of itself out of the way; why a trial failed stands in our own table."""
    if not verbose:
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("ray."):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def worker_need(scale: ScaleConfig, *, for_trial: bool) -> Need:
    """CPUs and GPUs of one worker on the connected cluster; raises ResourceError where a GPU is wanted in vain."""
    cluster_gpus = gpus_within_reach()
    if scale.use_gpu and not cluster_gpus:
        raise ResourceError(
            "scale.use_gpu is true but the cluster has no GPU and may not grow to one; set it to false, or add a GPU "
            "node, or a node type with GPUs to the cluster file"
        )
    gpus = 1 if scale.use_gpu or (scale.use_gpu is None and cluster_gpus) else 0
    if scale.cpus_per_worker is not None:
        return Need(scale.cpus_per_worker, gpus)
    if for_trial and not gpus:
        return Need(1, 0)
    nodes = nodes_within_reach("GPU" if gpus else "CPU")
    return widest_need(cluster_gpus if for_trial else scale.max_workers, gpus, nodes)


def gpus_within_reach() -> int:
    """The GPUs that the connected cluster has, or may grow to."""
    return sum(int(node.get("GPU", 0)) for node in nodes_within_reach("GPU"))


def has_gpu(scale: ScaleConfig) -> bool:
    """Whether the workers compute on GPUs, of this machine or of the cluster where one was joined."""
    if scale.use_gpu is False:
        return False
    return torch.cuda.is_available() or (ray.is_initialized() and gpus_within_reach() > 0)


def device_of_trial(need: Need) -> torch.device:
    """What a trial of one worker, with CPUs and GPUs as in `need`, computes on.

    Ray lets a process see its own GPU alone; `ray.train.torch.get_device` answers Ray Train's workers, not trials.
    Raises ResourceError where torch cannot use the GPU that Ray gave it.
    """
    if not need.gpus:
        return torch.device("cpu")
    device = local_device()
    if device.type == "cpu":
        raise ResourceError(
            f"this trial was given a GPU, but torch {torch.__version__} sees none on node {platform.node()}; install "
            "there a torch for its GPU and driver, or set scale.use_gpu to false"
        )
    return device


def widest_need(num_workers: int, gpus: int, nodes: Sequence[Resources]) -> Need:
    """As many CPUs a worker as leave room for `num_workers`, or for as many as fit at all."""
    wanted = min(num_workers, worker_slots(Need(1, gpus), nodes))
    most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    cpus = min(GPU_TRIAL_CPUS, most) if gpus else most
    while cpus > 1 and worker_slots(Need(cpus, gpus), nodes) < wanted:
        cpus -= 1
    return Need(max(1, cpus), gpus)


def worker_slots(need: Need, nodes: Sequence[Resources]) -> int:
    """How many such workers fit on the nodes, given by their resources; each worker whole on one node."""
    slots = 0
    for node in nodes:
        fitting = int(node.get("CPU", 0)) // need.cpus
        slots += min(fitting, int(node.get("GPU", 0)) // need.gpus) if need.gpus else fitting
    return slots


def require_room_for_runs(scale: ScaleConfig, need: Need) -> int:
    """The number of runs that fit at once, each with its fewest workers; raises ResourceError where not one does."""
    asked = "scale.num_workers" + (".min" if isinstance(scale.num_workers, WorkerRange) else "")
    return require_room(scale.min_workers, need, asked, f"lower {asked} or scale.cpus_per_worker, or add nodes")


def require_room(num_workers: int, need: Need, asked: str, cure: str) -> int:
    """The number of runs of `num_workers` that fit at once; raises ResourceError where not even one does.

    `asked` is the setting that the number came from, `cure` what the user can do.
    """
    nodes = nodes_within_reach("GPU" if need.gpus else "CPU")
    slots = worker_slots(need, nodes)
    if slots < num_workers:
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        grown = " at its largest" if len(nodes) > sum(node["Alive"] for node in ray.nodes()) else ""
        raise ResourceError(
            f"{asked} is {num_workers} with {need.cpus} CPUs and {need.gpus} GPUs each, but the cluster{grown} "
            f"(CPUs: {cpus:g}, GPUs: {gpus:g}) has room for {slots} such workers; {cure}"
        )
    return slots // num_workers
