"""What Ray's autoscaler starts next: spot machines, and others for a while after the cloud had no spot machine to give.

Ray asks for it by the name that RAY_AUTOSCALER_UTILIZATION_SCORER gives on the head (cluster.yaml). Left to itself it
would ask for the spot machine again and again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _resource_based_utilization_scorer

Score = tuple[bool, int, bool, float, float, bool]


def score(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> Score | None:
    """How well a machine of `node_type` would serve the waiting `resources`: the highest is started, None never.

    First, as Ray has it: no GPU for what needs none, and as many kinds of resources as possible. Then types whose last
    start did not fail (Ray forgets a failure after half an hour), the fuller machine, and spot before the like.
    """
    own = _resource_based_utilization_scorer(
        node_resources, resources, node_availability_summary=node_availability_summary
    )
    if own is None:
        return None
    spares_gpus, num_matching, least_used, mean_used = own
    last = node_availability_summary.node_availabilities.get(node_type)
    startable = last is None or last.is_available
    return spares_gpus, num_matching, startable, least_used, mean_used, "spot" in node_type
