"""What is wrong with a cluster file for `ray up`, found without a network and before anything is started.

Ray checks part of this itself, late and in terms of its own; what a typing mistake leaves out it takes from its
defaults. Each finding is one sentence: the place in the file, what stands there, what to do.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.providers import _NODE_PROVIDERS, _get_default_config

from nuciseg.distributed.cluster_machines import check_aws_node_types
from nuciseg.distributed.cluster_secrets import check_secret_files, check_token, find_plain_keys

SCHEMA = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
PLACEHOLDER = re.compile(r"SET-[A-Z][A-Z-]*")
# What Ray 2.60 reads of `provider` beyond its schema, for the two providers that docs/cluster.md describes.
PROVIDER_KEYS = {
    "aws": {
        "type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "key_pair",
        "aws_credentials", "cloudwatch", "use_external_head_ip", "disable_node_updaters", "foreground_node_launch",
        "disable_launch_config_check", "worker_liveness_check",
    },
    "local": {"type", "head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}  # fmt: skip
OPEN_ADDRESSES = {"0.0.0.0", "::", "0.0.0.0/0", "::/0"}
SSH_PORT = 22


def check_cluster_file(path: Path) -> list[str]:
    """All that is wrong with the cluster file `path`, one sentence each; an empty list where it is good.

    Looks at this machine only for the files that `file_mounts` sends; starts nothing and connects to nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); name a cluster file for `ray up`"
        ]
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"{path} is no YAML ({' '.join(str(error).split())}); mend it there"]
    if not isinstance(config, dict) or not isinstance(config.get("provider"), dict):
        return [f"{path} has no section `provider`, so it is no cluster file; begin with cluster.yaml of nuciseg"]
    findings = [*find_plain_keys(text), *_placeholders(config), *_schema_faults(config)]
    if config["provider"].get("type") not in list(_NODE_PROVIDERS):
        return findings
    defaults = _get_default_config(config["provider"])
    effective = {**defaults, **config}
    checks = (_provider_keys, _node_counts, _images, _open_ports, check_token, check_secret_files)
    try:
        for check in checks:
            findings += check(effective)
        if config["provider"]["type"] == "aws":
            findings += check_aws_node_types(effective)
    except (AttributeError, TypeError, KeyError) as error:
        # A value of the wrong kind: what Ray's schema sees of that is among the findings, the rest is this.
        findings.append(
            f"{path} holds a value of a kind that does not belong there ({error}); compare it with cluster.yaml"
        )
    return list(dict.fromkeys(findings))


def _placeholders(config: Mapping[str, Any]) -> Iterator[str]:
    """Once for each placeholder, at the first place that holds it: anchors repeat it."""
    seen = set()
    for place, value in walk(config):
        for placeholder in PLACEHOLDER.findall(value) if isinstance(value, str) else ():
            if placeholder not in seen:
                seen.add(placeholder)
                yield f"{place} still holds the placeholder {placeholder}; the comment beside it says what to set"


def walk(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below `value` that is neither list nor mapping, with its place, as in provider.worker_ips[0]."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from walk(each, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from walk(each, f"{place}[{index}]")
    else:
        yield place, value


def _schema_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """What Ray's own schema for cluster files refuses."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for error in jsonschema.Draft7Validator(schema).iter_errors(config):
        place = error.json_path.removeprefix("$").removeprefix(".")
        if error.validator == "additionalProperties":
            known = set(error.schema.get("properties", {}))
            yield from _unknown(place, set(error.instance) - known, known)
        elif error.validator == "required":
            missing = [key for key in error.validator_value if key not in error.instance]
            yield f"{place or 'the file'} lacks {', '.join(missing)}; Ray needs it"
        else:
            yield f"{place} is {_short(error.instance)}, which Ray refuses ({error.message}); correct it"
    kind = config["provider"].get("type")
    if kind is not None and kind not in list(_NODE_PROVIDERS):
        yield f"provider.type is {kind!r}, which Ray does not know; take one of {', '.join(sorted(_NODE_PROVIDERS))}"


def _unknown(place: str, unknown: set[str], known: set[str]) -> Iterator[str]:
    for key in sorted(unknown):
        near = difflib.get_close_matches(key, known, n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"remove it, or take one of {', '.join(sorted(known))}"
        yield f"{place + '.' if place else ''}{key} is a key that Ray does not know; {cure}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _provider_keys(config: Mapping[str, Any]) -> Iterator[str]:
    provider = config["provider"]
    known = PROVIDER_KEYS.get(provider["type"])
    if known is not None:
        yield from _unknown("provider", set(provider) - known, known)
    if provider["type"] != "local":
        return
    if not provider.get("coordinator_address") and not (provider.get("head_ip") and "worker_ips" in provider):
        yield "provider lacks head_ip or worker_ips; name the machines, an empty list of workers for one machine"
        return
    addresses = [provider.get("head_ip"), *(provider.get("worker_ips") or [])]
    for address in sorted({str(each) for each in addresses if addresses.count(each) > 1}):
        yield f"provider names {address} more than once; each machine is either the head or one worker"
    if not any("RAY_enable_autoscaler_v2=0" in command for command in config["head_start_ray_commands"]):
        yield (
            "head_start_ray_commands start Ray's second autoscaler, which loses a worker of a local cluster; "
            "write RAY_enable_autoscaler_v2=0 before `ray start`"
        )


def _node_counts(config: Mapping[str, Any]) -> Iterator[str]:
    """Which types of machine there are, and how many of each."""
    types = config.get("available_node_types") or {}
    if config["provider"]["type"] == "local":
        if types:
            yield "available_node_types is for clouds; machines of one's own are named by provider.worker_ips alone"
        return
    head = config.get("head_node_type")
    if head not in types:
        near = difflib.get_close_matches(str(head), types, n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"take one of {', '.join(sorted(types))}"
        yield f"head_node_type is {head!r}, which is not among available_node_types; {cure}"
    total = config.get("max_workers", 0)
    for name, node_type in types.items():
        least, most = node_type.get("min_workers", 0), node_type.get("max_workers", total)
        if least > most:
            yield (
                f"available_node_types.{name}.min_workers is {least}, more than its max_workers ({most}); "
                "lower the one or raise the other"
            )
    least = sum(node_type.get("min_workers", 0) for node_type in types.values())
    if least > total:
        yield f"max_workers is {total}, but the min_workers of all node types make {least}; raise it or lower those"


def _images(config: Mapping[str, Any]) -> Iterator[str]:
    """An image that may change between two starts gives nodes of different versions."""
    docker = config.get("docker") or {}
    for key in ("image", "head_image", "worker_image"):
        image = docker.get(key)
        if not isinstance(image, str) or not image or "@sha256:" in image:
            continue
        tag = image.rpartition("/")[2].partition(":")[2]
        if tag in ("", "latest"):
            yield (
                f"docker.{key} is {image}, which may be another image tomorrow; name a tag that is never moved, or the "
                "digest (NAME@sha256:...)"
            )
    images = {docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    if len(images) > 1:
        yield f"docker names {len(images)} images; take one for all, so that Ray and Python are the same on all nodes"


def _open_ports(config: Mapping[str, Any]) -> Iterator[str]:
    """Whoever reaches the dashboard, the client port or the GCS runs code on the cluster."""
    group = config["provider"].get("security_group") or {}
    for index, rule in enumerate(group.get("IpPermissions") or []):
        ranges = [each.get("CidrIp") for each in rule.get("IpRanges") or []]
        ranges += [each.get("CidrIpv6") for each in rule.get("Ipv6Ranges") or []]
        is_ssh = rule.get("FromPort") == rule.get("ToPort") == SSH_PORT
        if OPEN_ADDRESSES & set(ranges) and not is_ssh:
            ports = f"ports {rule.get('FromPort', 0)} to {rule.get('ToPort', 65535)}"
            yield (
                f"provider.security_group.IpPermissions[{index}] opens {ports} to the whole internet; remove it: the "
                "dashboard and jobs go through SSH (`ray dashboard`)"
            )
    for index, command in enumerate(config["head_start_ray_commands"]):
        address = re.search(r"--dashboard-host[= ]['\"]?([^\s'\"]+)", command)
        if address and address[1] in OPEN_ADDRESSES:
            yield (
                f"head_start_ray_commands[{index}] has the dashboard, which takes jobs, listen at {address[1]}; write "
                "--dashboard-host=127.0.0.1 and reach it with `ray dashboard`"
            )
