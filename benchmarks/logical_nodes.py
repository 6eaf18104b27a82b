"""`nuciseg train` on a Ray cluster of several nodes that are all this machine, for scaling.py.

    python benchmarks/logical_nodes.py NUM_NODES [--any.key value of nuciseg train ...]

Every node is a raylet of its own with one CPU, so that as many workers are on as many nodes.
"""

from __future__ import annotations

import os
import sys

import ray
from ray.cluster_utils import Cluster

from nuciseg.train import main as train

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def main() -> None:
    num_nodes, *words = sys.argv[1:]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": True})
    try:
        for _ in range(int(num_nodes) - 1):
            cluster.add_node(**NODE)
        os.environ["RAY_ADDRESS"] = cluster.address
        train([*words, "--scale.num_workers", num_nodes, "--scale.cpus_per_worker", "1"])
    finally:
        ray.shutdown()  # a node is not taken from a driver that is connected to it
        cluster.shutdown()


if __name__ == "__main__":
    main()
