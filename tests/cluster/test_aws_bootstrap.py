"""The shipped cluster.yaml and aws-account.yaml, through Ray's own launcher against an AWS that is played in memory.

Nothing of Ray is replaced but its sleeps. What AWS was asked for is read back from AWS.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nuciseg.distributed import spot_first
from nuciseg.distributed.cluster_file import check_cluster_file
from nuciseg.distributed.machines import MACHINES

boto3 = pytest.importorskip("boto3", reason="boto3 is missing: pip install -e '.[test]'")
moto = pytest.importorskip("moto", reason="moto is missing: pip install -e '.[test]'")

ROOT = Path(__file__).resolve().parent.parent.parent
REGION = "us-west-2"
SSH_FROM = "203.0.113.7/32"
WORKERS = {"gpu_spot": "g5.xlarge", "gpu_on_demand": "g5.xlarge", "cpu_spot": "m6i.2xlarge"}


@dataclass(frozen=True)
class Launch:
    """What the launcher made of cluster.yaml, and the AWS account that it met."""

    file: Path
    config: dict[str, Any]
    provider: Any

    def start(self, node_type: str) -> dict[str, Any]:
        """Start a machine as Ray does; returns AWS's own description of it."""
        from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

        tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: node_type}
        (id,) = self.provider.create_node(self.config["available_node_types"][node_type]["node_config"], tags, 1)
        found = boto3.client("ec2").describe_instances(InstanceIds=[id])
        return dict(found["Reservations"][0]["Instances"][0])


def fill_in(text: str) -> str:
    """cluster.yaml with its placeholders set, as a user sets them."""
    return (
        text.replace("SET-REGISTRY", "registry.example")
        .replace("ami-SET-THIS", "ami-0123456789abcdef0")
        .replace("SET-FILE-SYSTEM", "fs-0123.efs.example")
    )


def deploy_account() -> None:
    subnets = boto3.client("ec2").describe_subnets()["Subnets"]
    parameters = {
        "Vpc": subnets[0]["VpcId"],
        "Subnets": ",".join(subnet["SubnetId"] for subnet in subnets[:3]),
        "SshFrom": SSH_FROM,
    }
    boto3.client("cloudformation").create_stack(
        StackName="nuciseg",
        TemplateBody=(ROOT / "docs" / "clusters" / "aws-account.yaml").read_text(encoding="utf-8"),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    for name in ("auth_token", "wandb_netrc"):
        (home / ".ray" / name).touch(mode=0o600)
    file = home / "cluster.yaml"
    file.write_text(fill_in((ROOT / "cluster.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": REGION}
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        for name, value in keys.items() | {("HOME", str(home))}:
            patch.setenv(name, value)
        instance_types = pytest.importorskip("moto.ec2.models.instance_types").INSTANCE_TYPES
        for name in set(instance_types) - set(MACHINES):
            patch.delitem(instance_types, name)  # Ray has all of them listed, a thousand: most of the time of this test
        deploy_account()
        from ray.autoscaler._private.aws import config as aws_config
        from ray.autoscaler._private.aws import utils as aws_utils
        from ray.autoscaler._private.commands import _bootstrap_config
        from ray.autoscaler._private.providers import _get_node_provider

        patch.setattr(aws_config, "time", SimpleNamespace(sleep=lambda seconds: None))
        aws_config._get_subnets_or_die.cache_clear()
        for cached in (aws_utils.resource_cache, aws_utils.client_cache):
            cached.cache_clear()
        config = _bootstrap_config(yaml.safe_load(file.read_text(encoding="utf-8")), no_config_cache=True)
        provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
        yield Launch(file, config, provider)


def test_checker_finds_nothing_in_the_file_once_it_is_filled_in(launch: Launch) -> None:
    assert check_cluster_file(launch.file) == []


def test_every_node_type_gets_its_resources(launch: Launch) -> None:
    resources = {name: each["resources"] for name, each in launch.config["available_node_types"].items()}
    assert resources["head"] == {"CPU": 2, "GPU": 0}
    for name in ("gpu_spot", "gpu_on_demand"):
        assert (resources[name]["CPU"], resources[name]["GPU"]) == (4, 1)
    assert resources["cpu_spot"]["CPU"] == 8
    assert "GPU" not in resources["cpu_spot"]


def test_the_cluster_grows_from_the_head_alone_to_n_machines(launch: Launch) -> None:
    types = launch.config["available_node_types"]
    assert {name: types[name]["min_workers"] for name in types} == dict.fromkeys(types, 0)
    assert types["head"]["max_workers"] == 0
    bound = launch.config["metadata"]["most_machines"]
    assert launch.config["max_workers"] == bound
    assert {types[name]["max_workers"] for name in WORKERS} == {bound}


@pytest.mark.parametrize(("node_type", "machine"), WORKERS.items())
def test_machines_are_started_as_the_file_promises(launch: Launch, node_type: str, machine: str) -> None:
    instance = launch.start(node_type)
    assert instance["InstanceType"] == machine
    assert instance["ImageId"] == "ami-0123456789abcdef0"
    assert (instance.get("InstanceLifecycle") == "spot") == ("spot" in node_type)
    assert instance["KeyName"] == "nuciseg"
    assert instance["MetadataOptions"]["HttpTokens"] == "required"


def test_roles_are_the_head_s_and_the_workers(launch: Launch) -> None:
    types = launch.config["available_node_types"]
    profiles = {name: each["node_config"]["IamInstanceProfile"]["Name"] for name, each in types.items()}
    assert profiles == {"head": "nuciseg-head"} | dict.fromkeys(WORKERS, "nuciseg-worker")
    assert launch.config["head_node"] == {}, "Ray added a role of its own, which may do all in EC2 and S3"


def test_nothing_is_open_but_ssh_and_the_cluster_to_itself(launch: Launch) -> None:
    used = {tuple(each["node_config"]["SecurityGroupIds"]) for each in launch.config["available_node_types"].values()}
    ((group_id,),) = used
    (group,) = boto3.client("ec2").describe_security_groups(GroupIds=[group_id])["SecurityGroups"]
    assert group["GroupName"] == "nuciseg"
    to_itself = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert [[pair["GroupId"] for pair in rule["UserIdGroupPairs"]] for rule in to_itself] == [[group_id]]
    assert not any(rule["IpRanges"] or rule["Ipv6Ranges"] or rule["PrefixListIds"] for rule in to_itself)
    (ssh,) = [rule for rule in group["IpPermissions"] if not rule["UserIdGroupPairs"]]
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert [each["CidrIp"] for each in ssh["IpRanges"]] == [SSH_FROM]


def test_key_is_readable_by_its_owner_alone(launch: Launch) -> None:
    key = Path(launch.config["auth"]["ssh_private_key"])
    assert key == Path(os.environ["HOME"]) / ".ssh" / "nuciseg.pem"
    assert key.stat().st_mode & 0o777 == 0o600


def test_template_makes_what_the_file_names_and_gives_no_role_more_than_it_needs(launch: Launch) -> None:
    iam = boto3.client("iam")
    for name in ("nuciseg-head", "nuciseg-worker"):
        (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert role["RoleName"] == name
    assert iam.list_role_policies(RoleName="nuciseg-worker")["PolicyNames"] == [], "workers start no machines"
    head = iam.get_role_policy(RoleName="nuciseg-head", PolicyName="workers")["PolicyDocument"]
    document = yaml.safe_load(head) if isinstance(head, str) else head  # moto keeps it as Python prints it
    text = json.dumps(document)
    tagging = [each for each in document["Statement"] if "ec2:CreateTags" in each["Action"]]
    assert tagging
    assert all("Condition" in each for each in tagging), "else it could give its tag to any machine, and end it"
    assert iam.get_role(RoleName="nuciseg-worker")["Role"]["Arn"] in text, "the head may hand out the workers' role"
    assert '"ec2:*"' not in text
    efs = boto3.client("efs")
    (file_system,) = efs.describe_file_systems()["FileSystems"]
    assert file_system["Encrypted"]
    assert len(efs.describe_mount_targets(FileSystemId=file_system["FileSystemId"])["MountTargets"]) == 3


def test_on_demand_is_started_while_aws_has_no_spot_machine(launch: Launch) -> None:
    """Ray's own launcher meets AWS's refusal, and Ray's own scheduler asks our function what to start then."""
    from botocore.exceptions import ClientError
    from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
    from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    def refuse_spot(params: dict[str, Any], **_: Any) -> None:
        if "InstanceMarketOptions" in params:
            error = {"Code": "InsufficientInstanceCapacity", "Message": "There is no Spot capacity available."}
            raise ClientError({"Error": error}, "RunInstances")

    tracker = NodeProviderAvailabilityTracker()
    events = launch.provider.ec2_fail_fast.meta.client.meta.events
    events.register("provide-client-params.ec2.RunInstances", refuse_spot)

    def next_type() -> str:
        def scorer(*args: Any) -> Any:
            return spot_first.score(*args, node_availability_summary=tracker.summary())

        types = launch.config["available_node_types"]
        ((node_type, _),) = get_nodes_for(types, {}, "head", 1, [{"CPU": 4, "GPU": 1}], scorer)[0].items()
        return str(node_type)

    assert next_type() == "gpu_spot"
    with pytest.raises(NodeLaunchException) as refused:
        launch.start("gpu_spot")
    tracker.update_node_availability("gpu_spot", int(time.time()), refused.value)
    assert next_type() == "gpu_on_demand"
    assert launch.start("gpu_on_demand").get("InstanceLifecycle") != "spot"
    tracker.update_node_availability("gpu_spot", int(time.time()), None)
    assert next_type() == "gpu_spot"
    events.unregister("provide-client-params.ec2.RunInstances", refuse_spot)


def test_the_template_is_one_that_cloudformation_takes() -> None:
    lint = pytest.importorskip("cfnlint.api", reason="cfn-lint is missing: pip install -e '.[test]'")
    text = (ROOT / "docs" / "clusters" / "aws-account.yaml").read_text(encoding="utf-8")
    assert lint.lint(text, regions=[REGION]) == []
    for setting in ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"):
        assert f"{setting}: true" in text  # moto does not read it
