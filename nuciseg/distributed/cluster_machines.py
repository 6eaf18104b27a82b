"""Whether the machines that a cluster file asks of AWS exist and have what the file says."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from nuciseg.distributed.machines import MACHINES


def check_aws_node_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Each type of machine of the file; its settings' names only where boto3, which knows them, is installed."""
    known = _launch_settings()
    if not known:
        yield "boto3 is not installed here, without which `ray up` cannot reach AWS; pip install 'nuciseg[cluster]'"
    for name, node_type in config["available_node_types"].items():
        place = f"available_node_types.{name}"
        node_config = node_type["node_config"]
        for key in sorted(set(node_config) - known) if known else ():
            near = difflib.get_close_matches(key, known, n=1)
            yield (
                f"{place}.node_config.{key} is a setting that AWS does not know; "
                + (f"did you mean {near[0]!r}?" if near else "remove it")
            )
        yield from _machine_faults(place, node_config.get("InstanceType"), node_type.get("resources") or {})
        if not node_config.get("ImageId"):
            yield (
                f"{place}.node_config has no ImageId, so Ray takes an image of 2021 that is too old for this PyTorch; "
                "name one as cluster.yaml does"
            )


@lru_cache
def _launch_settings() -> frozenset[str]:
    """What a node_config may hold: what AWS takes to start a machine, and Ray's SubnetIds."""
    if importlib.util.find_spec("boto3") is None:
        return frozenset()
    import botocore.session

    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    return frozenset(model.input_shape.members) | {"SubnetIds"}


def _machine_faults(place: str, name: object, resources: Mapping[str, int]) -> Iterator[str]:
    machine = MACHINES.get(str(name))
    if machine is None:
        near = difflib.get_close_matches(str(name), MACHINES, n=1)
        families = ", ".join(dict.fromkeys(each.partition(".")[0] for each in MACHINES))
        cure = f"did you mean {near[0]!r}?" if near else f"take one of the families {families}"
        yield f"{place}.node_config.InstanceType is {name!r}, which nuciseg does not know as a machine of AWS; {cure}"
        return
    for kind, has in (("CPU", machine.cpus), ("GPU", machine.gpus)):
        if resources.get(kind, 0) > has:
            yield (
                f"{place}.resources.{kind} is {resources[kind]}, but {name} has {has}; lower it, or leave it out and "
                "Ray reads it from the type"
            )
