"""What a cluster file allows an autoscaled cluster to become, beside the nodes that are there."""

from __future__ import annotations

from typing import Any

import pytest

from nuciseg.distributed.cluster import Need, _describe_versions, widest_need, worker_slots
from nuciseg.distributed.growth import Resources, addable_nodes

FILE: dict[str, Any] = {
    "max_workers": 4,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4, "GPU": 0}, "max_workers": 0},
        "gpu_spot": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 4},
        "gpu_on_demand": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 4},
        "cpu": {"resources": {"CPU": 8}, "max_workers": 2},
        "unknown": {"resources": {}, "max_workers": 4},
    },
}
HEAD = {"CPU": 4.0}
GPU_NODE = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}


@pytest.mark.parametrize(
    ("workers", "gpus"), [([], 4), ([GPU_NODE], 3), ([GPU_NODE] * 4, 0), ([{"CPU": 8.0}], 3), ([GPU_NODE] * 9, 0)]
)
def test_a_cluster_grows_to_its_most_workers(workers: list[Resources], gpus: int) -> None:
    assert sum(node.get("GPU", 0) for node in addable_nodes(FILE, workers, "GPU")) == gpus


def test_what_is_wanted_comes_first() -> None:
    assert [node["CPU"] for node in addable_nodes(FILE, [], "CPU")] == [8, 8, 4, 4]
    assert [node.get("GPU", 0) for node in addable_nodes(FILE, [], "GPU")] == [1, 1, 1, 1]


def test_a_file_without_gpus_brings_none() -> None:
    kinds = {name: kind for name, kind in FILE["available_node_types"].items() if "gpu" not in name}
    assert not any(node.get("GPU", 0) for node in addable_nodes({**FILE, "available_node_types": kinds}, [], "GPU"))


def test_workers_are_sized_for_the_nodes_to_come() -> None:
    nodes = [HEAD, *addable_nodes(FILE, [], "GPU")]
    need = widest_need(2, 1, nodes)
    assert need == Need(cpus=4, gpus=1)
    assert worker_slots(need, nodes) == 4


def test_other_versions_on_the_cluster_are_one_sentence() -> None:
    of_ray = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12.4\n"
        "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.9\n"
    )
    said = _describe_versions(of_ray)
    assert said.startswith(
        "the cluster runs Ray 2.59.0 with Python 3.12.4, this process Ray 2.60.0 with Python 3.11.9;"
    )
    assert "ray==2.59.0 and Python 3.12.4" in said
