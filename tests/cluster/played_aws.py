"""The AWS account of the launch test: what `moto_server`, at AWS_ENDPOINT_URL, is told and asked. Run on its hosts.

python played_aws.py prepare NETWORK PUBLIC_KEY   a network, a key pair, and what docs/clusters/aws-account.yaml makes
python played_aws.py instances                    all that were ever started, as JSON
python played_aws.py lose ID                      AWS takes a machine back
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import boto3

TEMPLATE = Path(__file__).resolve().parents[2] / "docs/clusters/aws-account.yaml"


def prepare(network: str, public_key: str) -> None:
    """An account whose machines in zone a get the addresses of the hosts."""
    ec2 = boto3.client("ec2")
    for subnet in ec2.describe_subnets()["Subnets"]:  # of the default network
        ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    vpc = ec2.create_vpc(CidrBlock=f"{network}.0/24")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"{network}.{64 * number}/26", AvailabilityZone=f"us-west-2{zone}")
        for number, zone in enumerate("abc")
    ]
    ec2.import_key_pair(KeyName="nuciseg", PublicKeyMaterial=Path(public_key).read_bytes())
    parameters = {
        "Vpc": vpc,
        "Subnets": ",".join(each["Subnet"]["SubnetId"] for each in subnets),
        "SshFrom": f"{network}.0/24",
    }
    boto3.client("cloudformation").create_stack(
        StackName="nuciseg",
        TemplateBody=TEMPLATE.read_text(encoding="utf-8"),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )


def instances() -> None:
    """Print id, address, state and kind of every machine."""
    found = boto3.client("ec2").describe_instances()["Reservations"]
    machines = [
        {
            "id": instance["InstanceId"],
            "address": instance.get("PrivateIpAddress"),
            "state": instance["State"]["Name"],
            "spot": instance.get("InstanceLifecycle") == "spot",
            "kind": next(tag["Value"] for tag in instance["Tags"] if tag["Key"] == "ray-user-node-type"),
        }
        for reservation in found
        for instance in reservation["Instances"]
    ]
    print(json.dumps(machines))


def lose(instance: str) -> None:
    boto3.client("ec2").terminate_instances(InstanceIds=[instance])


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "prepare":
        prepare(*words)
    elif verb == "instances":
        instances()
    else:
        lose(*words)
