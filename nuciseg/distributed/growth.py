"""What an autoscaled cluster may still grow to. `ray up` begins without a GPU; its autoscaler adds nodes on demand.

Ray tells a driver what nodes there are, not what nodes there may be. The file that the autoscaler works by lies on the
head node, and its process names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray.exceptions import RayError

from nuciseg.distributed.nodes import ANSWER_TIMEOUT_S, on_node

_HEAD = "node:__internal_head__"
_FLAG = "--autoscaling-config="

Resources = Mapping[str, float]


def nodes_within_reach(first: str) -> list[Resources]:
    """The resources of each alive node of the connected cluster and of each that its autoscaler may add to them.

    Where the file's `max_workers` allows only some of those, the ones with the most of `first` ("CPU" or "GPU") count.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    head = next((node["NodeID"] for node in alive if _HEAD in node["Resources"]), None)
    file = _autoscaling_file(head) if head is not None else None
    workers = [node["Resources"] for node in alive if node["NodeID"] != head]
    return [node["Resources"] for node in alive] + (addable_nodes(file, workers, first) if file else [])


def addable_nodes(file: Mapping[str, Any], workers: Sequence[Resources], first: str) -> list[Resources]:
    """The resources of the nodes that a cluster file allows beside the `workers` that are there.

    A node type whose resources do not stand in the file counts for nothing.
    """
    head_type = file.get("head_node_type")
    kinds = {name: kind for name, kind in file["available_node_types"].items() if name != head_type}
    most = int(file.get("max_workers", sum(int(kind.get("max_workers", 0)) for kind in kinds.values())))
    allowed = [
        {name: float(amount) for name, amount in kind.get("resources", {}).items()}
        for kind in kinds.values()
        for _ in range(min(most, int(kind.get("max_workers", most))))
    ]
    for worker in workers:
        same = next((node for node in allowed if _size(node, first) == _size(worker, first)), None)
        if same is not None:
            allowed.remove(same)
    allowed = sorted(filter(None, allowed), key=lambda node: _size(node, first), reverse=True)
    return list(allowed[: max(0, most - len(workers))])


def _size(node: Resources, first: str) -> tuple[int, int]:
    cpus, gpus = int(node.get("CPU", 0)), int(node.get("GPU", 0))
    return (gpus, cpus) if first == "GPU" else (cpus, gpus)


def _autoscaling_file(head: str) -> Mapping[str, Any] | None:
    """What the autoscaler works by, or None where there is none or the head does not tell within ANSWER_TIMEOUT_S."""
    address = ray.get_runtime_context().gcs_address
    if ray.get_runtime_context().get_node_id() == head:
        return read_autoscaling_file(address)
    remote = ray.remote(num_cpus=0, max_retries=0)(read_autoscaling_file)
    try:
        found: Mapping[str, Any] | None = ray.get(
            remote.options(scheduling_strategy=on_node(head)).remote(address), timeout=ANSWER_TIMEOUT_S
        )
    except RayError:  # the head is busy or has no nuciseg; what is there now is known without it
        return None
    return found


def read_autoscaling_file(gcs_address: str) -> Mapping[str, Any] | None:
    """On the head node: the cluster file that the autoscaler of this Ray was started with; None without one."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        named = next((word.removeprefix(_FLAG) for word in words if word.startswith(_FLAG)), "")
        if named and f"--gcs-address={gcs_address}" in words:
            try:
                file = yaml.safe_load(Path(named).expanduser().read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError):
                return None
            return file if isinstance(file, dict) and "available_node_types" in file else None
    return None
