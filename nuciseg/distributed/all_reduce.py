"""Summing gradients over all workers, as data-parallel training does after every batch: whether it works, how fast."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from nuciseg.distributed.nodes import alive_nodes, on_node
from nuciseg.errors import ResourceError

NUM_BYTES = 32 * 2**20  # large enough that the network's speed is measured, not its delay
NUM_REPEATS = 3
TIMEOUT_S = 40.0


@dataclass(frozen=True)
class AllReduce:
    """What was measured: the sum of NUM_BYTES over `num_workers` took `seconds`."""

    backend: str
    num_workers: int
    seconds: float

    @property
    def bus_gb_per_s(self) -> float:
        """What each worker sent and received in a second, GB: 2 (n - 1) / n of the bytes for n workers.

        github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md.
        """
        return 2 * (self.num_workers - 1) / self.num_workers * NUM_BYTES / self.seconds / 1e9


class _Peer:
    """One worker. It lives in a process of its own and ends with the measurement."""

    def address(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def measure(self, backend: str, address: str, rank: int, num_workers: int) -> float:
        """Seconds of one sum, the quickest of several. Raises ResourceError where the sum is wrong."""
        torch.distributed.init_process_group(
            backend, init_method=address, rank=rank, world_size=num_workers, timeout=timedelta(seconds=TIMEOUT_S)
        )
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        try:
            return min(_timed_sum(device, rank, num_workers) for _ in range(NUM_REPEATS))
        finally:
            torch.distributed.destroy_process_group()


def _timed_sum(device: torch.device, rank: int, num_workers: int) -> float:
    values = torch.full((NUM_BYTES // 4,), float(rank + 1), device=device)
    torch.distributed.barrier()
    start = time.perf_counter()
    torch.distributed.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    expected = num_workers * (num_workers + 1) / 2
    if not bool((values == expected).all()):
        raise ResourceError(
            f"sums over the workers are wrong ({values.min():g} to {values.max():g} instead of {expected:g}), a fault "
            "of network cards or their drivers; try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1 on every node"
        )
    return seconds


def measure_all_reduce(use_gpu: bool | None) -> AllReduce:
    """Sum over one worker a GPU, or a node where there are none (two workers where there is but one).

    Raises ResourceError where the workers cannot start or do not come together.
    """
    backend, places = _places(use_gpu)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1 if backend == "nccl" else 0}
    remote = ray.remote(_Peer)
    peers = [remote.options(scheduling_strategy=on_node(id), **options).remote() for id in places]
    try:
        return AllReduce(backend, len(peers), _measured(peers, backend))
    finally:
        for peer in peers:
            ray.kill(peer)


def _places(use_gpu: bool | None) -> tuple[str, list[str]]:
    """The backend, and the node of each worker by its id."""
    alive = set(alive_nodes())
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["NodeID"] in alive}
    if use_gpu is not False and sum(gpus.values()) > 1:
        return "nccl", [id for id, num in gpus.items() for _ in range(num)]
    ids = list(gpus)
    return "gloo", ids if len(ids) > 1 else ids * 2


def _measured(peers: Sequence[Any], backend: str) -> float:
    addresses = [peer.address.remote() for peer in peers]
    _, waiting = ray.wait(addresses, num_returns=len(addresses), timeout=TIMEOUT_S)
    if waiting:
        why = "their GPUs are in use by other runs" if backend == "nccl" else "their nodes are overloaded"
        raise ResourceError(
            f"{len(waiting)} of {len(peers)} workers did not start within {TIMEOUT_S:g} s, most likely because {why}; "
            "try again later"
        )
    try:
        address = ray.get(addresses[0])
        calls = [peer.measure.remote(backend, address, rank, len(peers)) for rank, peer in enumerate(peers)]
        return float(max(ray.get(calls, timeout=2 * TIMEOUT_S)))
    except RayTaskError as error:
        if isinstance(error.cause, ResourceError):
            raise error.cause from None
        raise ResourceError(_apart(backend, str(error.cause or error))) from None
    except GetTimeoutError:
        raise ResourceError(_apart(backend, f"no answer within {2 * TIMEOUT_S:g} s")) from None
    except RayError as error:
        raise ResourceError(_apart(backend, str(error))) from None


def _apart(backend: str, reason: str) -> str:
    first_line = next((line.strip() for line in reason.splitlines() if line.strip()), reason)
    return (
        f"the workers do not come together by {backend} ({first_line}); let all ports be open between the nodes, and "
        f"name their network card in {backend.upper()}_SOCKET_IFNAME on every node where they have several"
    )
