"""Mistakes in a cluster file: each is found offline and told in one sentence with the place and the cure."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nuciseg.distributed.cluster_file import check_cluster_file
from nuciseg.distributed.machines import MACHINES, Machine
from nuciseg.engine.planning import MACHINES as PLANNED_MACHINES

pytest.importorskip("boto3", reason="boto3 is missing: pip install -e '.[test]'")

ROOT = Path(__file__).resolve().parent.parent.parent
TYPES = "available_node_types"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with the files that the shipped cluster files send."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    for name in ("auth_token", "wandb_netrc"):
        (tmp_path / ".ray" / name).touch(mode=0o600)
    return tmp_path


def filled_in(name: str) -> dict[str, Any]:
    text = (ROOT / name).read_text(encoding="utf-8")
    for word in (
        "SET-REGISTRY",
        "SET-THIS",
        "SET-FILE-SYSTEM",
        "SET-HEAD-ADDRESS",
        "SET-WORKER-ADDRESS",
        "SET-ADDRESS",
        "SET-USER",
    ):
        text = text.replace(word, f"given-{word[4:].lower()}")
    loaded = yaml.safe_load(text)
    assert isinstance(loaded, dict)
    return copy.deepcopy(loaded)


def findings_of(folder: Path, config: dict[str, Any]) -> list[str]:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config, width=1000), encoding="utf-8")
    return check_cluster_file(path)


SHIPPED = ["cluster.yaml", "docs/clusters/on-prem.yaml", "docs/clusters/one-machine.yaml"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_lacks_nothing_but_what_the_user_has_to_set(home: Path, name: str) -> None:
    findings = check_cluster_file(ROOT / name)
    assert findings
    assert all("placeholder SET-" in finding for finding in findings), findings
    assert findings_of(home, filled_in(name)) == []


# place in the file, what is written there (None: removed), what the finding says of it
MISTAKES = [
    ("max_worker", 4, "max_worker is a key that Ray does not know; did you mean 'max_workers'?"),
    ("provider.regoin", "us-west-2", "provider.regoin is a key that Ray does not know; did you mean 'region'?"),
    (f"{TYPES}.gpu_spot.min_worker", 1, f"{TYPES}.gpu_spot.min_worker is a key that Ray does not know; did you mean"),
    (f"{TYPES}.gpu_spot.node_config.InstanceTyp", "x", "InstanceTyp is a setting that AWS does not know; did you mean"),
    ("docker.imag", "x", "docker.imag is a key that Ray does not know; did you mean 'image'?"),
    ("max_workers", "four", "max_workers is 'four', which Ray refuses ('four' is not of type 'integer'); correct it"),
    ("cluster_name", None, "the file lacks cluster_name; Ray needs it"),
    ("provider.type", None, "provider lacks type; Ray needs it"),
    ("provider.type", "aw", "provider.type is 'aw', which Ray does not know; take one of"),
    ("head_node_type", "haed", "'haed', which is not among available_node_types; did you mean 'head'?"),
    (f"{TYPES}.gpu_spot.min_workers", 5, "gpu_spot.min_workers is 5, more than its max_workers (4); lower the one"),
    ("max_workers", -1, "max_workers is -1, which Ray refuses"),
    (f"{TYPES}.gpu_spot.node_config.InstanceType", "g5.xlrage", "'g5.xlrage', which nuciseg does not know"),
    (f"{TYPES}.gpu_spot.node_config.InstanceType", "banana", "take one of the families c6i, c7i, m6i"),
    (f"{TYPES}.gpu_spot.resources", {"GPU": 4}, "resources.GPU is 4, but g5.xlarge has 1; lower it"),
    (f"{TYPES}.head.node_config.ImageId", None, "head.node_config has no ImageId, so Ray takes an image of 2021"),
    ("docker.image", "registry.example:5000/nuciseg", "may be another image tomorrow; name a tag"),
    ("docker.image", "nuciseg:latest", "docker.image is nuciseg:latest, which may be another image tomorrow"),
    ("docker.head_image", "nuciseg:2", "docker names 2 images; take one for all"),
    ("head_start_ray_commands", ["ray start --head --dashboard-host 0.0.0.0"], "listen at 0.0.0.0; write"),
    ("head_start_ray_commands", None, "dashboard, which takes jobs, listen at 0.0.0.0"),  # Ray's default
    ("docker.run_options", [], "nothing sets RAY_AUTH_MODE=token for the worker, so it asks for no token"),
    ("file_mounts", {}, "file_mounts does not send ~/.ray/auth_token, so the cluster asks for no token"),
    ("file_mounts.~/data", "~/nowhere", "file_mounts sends ~/nowhere, which is not there; make it, or remove the line"),
    ("docker.run_options", ["--env=RAY_AUTH_MODE=token", "--env=WANDB_API_KEY=abc"], "holds a W&B key in plain text"),
    ("setup_commands", ["wandb login " + "0123456789" * 4], "holds a W&B key in plain text"),
    ("setup_commands", ["export AWS_ACCESS_KEY_ID=AKIA" + "ABCDEFGH23456789"], "holds an AWS key in plain text"),
    ("provider.aws_credentials", {"aws_secret_access_key": "abc"}, "holds an AWS key in plain text"),
    ("setup_commands", ["echo " + "0123abcd" * 8 + " > token"], "holds a Ray token in plain text"),
    ("file_mounts", None, "file_mounts does not send ~/.ray/auth_token"),
    (f"{TYPES}.gpu_spot", "g5", "available_node_types.gpu_spot is 'g5', which Ray refuses"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "said"), MISTAKES)
def test_mistake_is_told_with_its_place_and_cure(home: Path, place: str, value: object, said: str) -> None:
    config = filled_in("cluster.yaml")
    *sections, key = place.split(".") if "~" not in place else place.split(".", 1)
    section = config
    for name in sections:
        section = section[name]
    if value is None:
        del section[key]
    else:
        section[key] = value
    findings = findings_of(home, config)
    matching = [finding for finding in findings if said in finding]
    assert len(matching) == 1, findings
    assert all("\n" not in finding for finding in findings)


@pytest.mark.parametrize("address", [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}, {"Ipv6Ranges": [{"CidrIpv6": "::/0"}]}])
def test_port_open_to_the_world_is_found_and_ssh_is_not(home: Path, address: dict[str, Any]) -> None:
    config = filled_in("cluster.yaml")
    config["provider"]["security_group"]["IpPermissions"] = [
        {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **address},
        {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, **address},
        {"IpProtocol": "tcp", "FromPort": 6379, "ToPort": 6379, "IpRanges": [{"CidrIp": "10.0.0.0/8"}]},
    ]
    (finding,) = findings_of(home, config)
    assert "IpPermissions[1] opens ports 8265 to 8265 to the whole internet; remove it" in finding


def test_more_machines_at_least_than_at_most(home: Path) -> None:
    config = filled_in("cluster.yaml")
    for name in ("gpu_spot", "cpu_spot"):
        config[TYPES][name]["min_workers"] = 3
    (finding,) = findings_of(home, config)
    assert "max_workers is 4, but the min_workers of all node types make 6; raise it or lower those" in finding


def test_secret_never_appears_in_the_finding(home: Path) -> None:
    key = "fedcba9876" * 4
    config = filled_in("cluster.yaml")
    config["setup_commands"] = [f"export WANDB_API_KEY={key}"]
    findings = findings_of(home, config)
    assert findings
    assert not any(key[:6] in finding for finding in findings)


def test_variables_and_digests_are_no_secrets(home: Path) -> None:
    config = filled_in("cluster.yaml")
    config["docker"]["image"] = "registry.example/nuciseg@sha256:" + "0123abcd" * 8
    config["setup_commands"] = ["test -n $WANDB_API_KEY", 'echo "WANDB_API_KEY=${KEY}"', "git checkout -q v1"]
    assert findings_of(home, config) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_job_that_is_stopped_has_time_to_keep_its_checkpoints(name: str) -> None:
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in filled_in(name)["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", SHIPPED[1:])
def test_the_netrc_of_a_machines_user_stays(home: Path, name: str) -> None:
    config = filled_in(name)
    assert "~/.netrc" not in config["file_mounts"]
    for role in ("head", "worker"):
        assert "NETRC=~/.ray/wandb_netrc" in config[f"{role}_start_ray_commands"][1]
    (home / ".ray" / "wandb_netrc").chmod(0o644)
    [readable] = findings_of(home, config)
    assert "~/.ray/wandb_netrc, which others may read" in readable


def test_files_to_send_must_be_there_and_secret(home: Path) -> None:
    (home / ".ray" / "auth_token").chmod(0o644)
    (home / ".ray" / "wandb_netrc").unlink()
    missing, readable = sorted(findings_of(home, filled_in("cluster.yaml")), key=len, reverse=True)
    assert readable == "file_mounts sends ~/.ray/auth_token, which others may read; chmod 600 ~/.ray/auth_token"
    assert "~/.ray/wandb_netrc, which is not there; make it with `(umask 077; NETRC=~/.ray/wandb_netrc" in missing


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ({"type": "local"}, "provider lacks head_ip or worker_ips"),
        ({"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.1"]}, "names 10.0.0.1 more than once"),
        ({"type": "local", "head_ip": "10.0.0.1", "worker_ips": [], "worker_ip": "x"}, "did you mean 'worker_ips'?"),
    ],
)
def test_mistake_about_machines_of_one_s_own(home: Path, provider: dict[str, Any], said: str) -> None:
    config = filled_in("docs/clusters/on-prem.yaml") | {"provider": provider}
    (finding,) = findings_of(home, config)
    assert said in finding


def test_second_autoscaler_is_refused_for_machines_of_one_s_own(home: Path) -> None:
    config = filled_in("docs/clusters/on-prem.yaml")
    config["head_start_ray_commands"] = ["ray stop", "ray start --head --dashboard-host=127.0.0.1"]
    (finding,) = findings_of(home, config)
    assert "write RAY_enable_autoscaler_v2=0 before `ray start`" in finding


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("a: [1", "is no YAML"),
        ("- 1", "has no section `provider`"),
        ("cluster_name: x", "has no section `provider`"),
        ("provider: aws", "has no section `provider`"),
        ("\0", "is no YAML"),
    ],
)
def test_what_is_no_cluster_file(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    (finding,) = check_cluster_file(path)
    assert said in finding
    assert str(path) in finding


def test_an_image_without_nuciseg_is_told_before_ray_starts_in_it(tmp_path: Path) -> None:
    """`ray up` runs these commands in the container, shows what they say, and ends where one of them fails."""
    [command] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["setup_commands"]

    def said() -> tuple[int, str]:
        environment = {"PATH": str(tmp_path)}
        done = subprocess.run(["/bin/bash", "-c", command], env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, sentence = said()
    assert code == 1
    assert "The image has no nuciseg on its PATH" in sentence
    assert "metadata.image of cluster.yaml" in sentence
    (tmp_path / "nuciseg").touch(mode=0o755)
    assert said() == (0, "")


def test_machines_have_what_aws_says() -> None:
    """moto ships AWS's own description of its machines."""
    known = pytest.importorskip("moto.ec2.models.instance_types").INSTANCE_TYPES
    described = {}
    for name in MACHINES:
        gpus = known[name].get("GpuInfo", {}).get("Gpus", [])
        num_gpus = sum(each["Count"] for each in gpus)
        memory_gib = known[name]["MemoryInfo"]["SizeInMiB"] // 1024
        described[name] = Machine(known[name]["VCpuInfo"]["DefaultVCpus"], num_gpus, memory_gib)
    assert described == MACHINES


@pytest.mark.parametrize("name", PLANNED_MACHINES)
def test_plan_and_checker_know_the_same_machines(name: str) -> None:
    planned = PLANNED_MACHINES[name]
    assert (planned.num_cpus, planned.num_gpus) == (MACHINES[name].cpus, MACHINES[name].gpus)
