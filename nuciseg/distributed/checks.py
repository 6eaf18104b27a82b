"""What `doctor` makes of what it was told: each check passes, or says what is wrong and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nuciseg.distributed.all_reduce import NUM_BYTES, AllReduce
from nuciseg.distributed.node_facts import Images, NodeFacts
from nuciseg.distributed.nodes import Result

# Pictures of several nodes side by side lie by no more than this; signed requests to S3 fail from 15 minutes on.
MAX_SKEW_S = 2.0
# From here on Ray writes nothing more: local_fs_capacity_threshold in ray/common/ray_config_def.h.
FULL = 0.95


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, whether it is well, and what was found or what is to be done."""

    name: str
    passed: bool
    said: str


def passed(name: str, said: str) -> Check:
    return Check(name, True, said)


def failed(name: str, said: str) -> Check:
    return Check(name, False, said)


def judged(name: str, faults: Iterable[str], said: str) -> Check:
    """Failed with all `faults`, or passed with `said` where there are none."""
    found = list(faults)
    return failed(name, "; ".join(found)) if found else passed(name, said)


def check_nodes(answers: Mapping[str, Result[NodeFacts]]) -> Check:
    """Whether every node answers, and with nuciseg."""
    faults = [f"node {name} {answer.failure}" for name, answer in answers.items() if answer.failure is not None]
    return judged("nodes", faults, f"{_num(answers, 'node')}: {', '.join(answers)}")


def check_versions(nodes: Mapping[str, NodeFacts], here: Mapping[str, str]) -> Check:
    """Whether all nodes have what this process has: workers unpickle what it pickles."""
    faults = []
    for what, version in here.items():
        others = {name: facts.versions[what] for name, facts in nodes.items() if facts.versions[what] != version}
        if others:
            listed = ", ".join(f"{other} on node {name}" for name, other in others.items())
            faults.append(
                f"{what} is {version} in this process but {listed}; give all nodes one image, or install the same there"
            )
    return judged("versions", faults, ", ".join(f"{what} {version}" for what, version in here.items()))


def check_gpus(nodes: Mapping[str, NodeFacts], of_ray: Mapping[str, int], num_coming: int = 0) -> Check:
    """Whether torch can use the GPUs that Ray gives away. `of_ray` are those by the node's name; `num_coming` may be
    added to a cluster that has none yet."""
    faults, idle = [], 0
    for name, facts in nodes.items():
        if len(facts.gpus) < of_ray[name]:
            faults.append(
                f"Ray offers {_num(of_ray[name], 'GPU')} on node {name} but torch sees {len(facts.gpus)}; install the "
                "CUDA build of torch and NVIDIA's driver there, and see that nvidia-smi lists them in the container"
            )
        idle += max(0, len(facts.gpus) - of_ray[name])
    kinds = Counter(gpu for facts in nodes.values() for gpu in facts.gpus)
    none = f"none yet, up to {num_coming} come with the work" if num_coming else "none: workers train on CPUs"
    seen = ", ".join(f"{num} x {kind}" for kind, num in kinds.items()) or none
    return judged("GPUs", faults, seen + (f"; Ray leaves {idle} of them idle (ray start --num-gpus)" if idle else ""))


def check_precision(nodes: Mapping[str, NodeFacts], precision: str, use_gpu: bool | None) -> Check:
    """Whether all workers compute in one type. `precision` is `train.precision`."""
    with_gpu = {name: facts for name, facts in nodes.items() if facts.gpus}
    computing = with_gpu if with_gpu and use_gpu is not False else nodes
    kinds = {facts.precision for facts in computing.values()}
    without = [name for name, facts in computing.items() if facts.precision != "bf16"]
    faults = []
    if precision == "auto" and len(kinds) > 1:
        listed = ", ".join(f"{facts.precision} on node {name}" for name, facts in computing.items())
        faults.append(
            f"train.precision auto takes {listed}, so that runs depend on where they lie; set train.precision to fp32, "
            "or use one type of machine"
        )
    if precision == "bf16" and without:
        faults.append(
            f"train.precision is bf16, which node {', '.join(without)} does not compute natively; take auto or fp32"
        )
    native = "native on all nodes that train" if not without else "not native here"
    return judged("bf16", faults, f"{native}; train.precision {precision} takes {_taken(precision, kinds)}")


def _taken(precision: str, kinds: Iterable[str]) -> str:
    return precision if precision != "auto" else ", ".join(sorted(kinds))


def check_all_reduce(measured: AllReduce, gradient_bytes: int) -> Check:
    """How fast workers sum; what that means for one step of a network with so many bytes of gradients."""
    step_ms = gradient_bytes / NUM_BYTES * measured.seconds * 1e3
    return passed(
        "all-reduce",
        f"{measured.backend} over {measured.num_workers} workers: {measured.bus_gb_per_s:.2f} GB/s a worker; the "
        f"{gradient_bytes / 1e6:.1f} MB of gradients of this network take {step_ms:.1f} ms a step or more",
    )


def check_images(answers: Mapping[str, Result[Images]]) -> Check:
    """Whether every node reads the data, and the same."""
    faults = [f"node {name}: {answer.failure}" for name, answer in answers.items() if answer.failure is not None]
    found = {name: answer.value for name, answer in answers.items() if answer.value is not None}
    if len({images.names for images in found.values()}) > 1:
        listed = ", ".join(f"{images.num} on node {name}" for name, images in found.items())
        faults.append(f"the nodes have different training images ({listed}); give them one folder, or equal copies")
    num = next(iter(found.values())).num if found else 0
    return judged("data", faults, f"{_num(num, 'training image')}, readable on {_num(found, 'node')}")


def check_wandb(answers: Mapping[str, Result[str]]) -> Check:
    """Whether runs reach W&B from wherever their first worker lies. States as in `node_facts.wandb_state`."""
    faults = [f"node {name}: {answer.failure}" for name, answer in answers.items() if answer.failure is not None]
    states = {name: answer.value for name, answer in answers.items() if answer.value is not None}
    silent = {name: state for name, state in states.items() if state not in ("none", "offline", "online")}
    if silent:
        faults.append(
            f"{', '.join(sorted(set(silent.values())))} does not answer from node {', '.join(silent)}, so runs there "
            "are kept offline; open the network, or set tracking.kind to offline"
        )
    keyless = [name for name, state in states.items() if state == "offline"]
    if keyless and len(keyless) < len(states):
        faults.append(
            f"node {', '.join(keyless)} has no W&B key, so runs whose first worker lies there are kept offline; give "
            "every node the key in ~/.netrc, or in the file that NETRC names there, or in WANDB_API_KEY"
        )
    said = {
        "none": "not used (tracking.kind is none, or W&B is disabled)",
        "offline": "offline: runs are kept in their folders, `wandb sync` uploads them",
        "online": f"reachable, with a key, from {_num(states, 'node')}",
    }
    return judged("W&B", faults, said.get(next(iter(states.values()), ""), ""))


def check_clocks(answers: Mapping[str, Result[float]]) -> Check:
    """Whether the nodes agree on the time. Offsets in seconds ahead of this process."""
    faults = [f"node {name} {answer.failure}" for name, answer in answers.items() if answer.failure is not None]
    offsets = {name: answer.value for name, answer in answers.items() if answer.value is not None}
    for name, offset in offsets.items():
        if abs(offset) > MAX_SKEW_S:
            way = "ahead of" if offset > 0 else "behind"
            faults.append(
                f"the clock of node {name} is {abs(offset):.0f} s {way} this one; set it by chrony or systemd-timesyncd"
            )
    most = max(map(abs, offsets.values()), default=0.0)
    return judged("clocks", faults, f"at most {most:.2f} s from this one")


def check_disk(nodes: Mapping[str, NodeFacts], need_bytes: int, free_bytes: int, storage: str, cure: str) -> Check:
    """Whether checkpoints of `need_bytes` fit into `storage`, and the nodes have room for decoded images and what Ray
    writes."""
    faults = []
    if need_bytes > free_bytes:
        faults.append(
            f"the checkpoints take up to {need_bytes / 1e6:.0f} MB but {storage} has {free_bytes / 1e6:.0f} MB free; "
            f"make room, or {cure}"
        )
    for name, facts in nodes.items():
        for folder, full in facts.full.items():
            if full > FULL:
                faults.append(
                    f"the disk of {folder} on node {name} is {full:.0%} full; from {FULL:.0%} on Ray writes nothing: "
                    "make room there"
                )
    said = f"the checkpoints take up to {need_bytes / 1e6:.0f} MB of {free_bytes / 1e6:.0f} MB free in {storage}"
    return judged("disk", faults, said)


def _num(things: int | Iterable[str] | Mapping[str, object], what: str) -> str:
    num = things if isinstance(things, int) else len(list(things))
    return f"{num} {what}" if num == 1 else f"{num} {what}s"
