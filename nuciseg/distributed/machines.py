"""The AWS machines that nuciseg's cluster files may name, with what they have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What one machine has; memory in GiB, without that of its GPUs."""

    cpus: int
    gpus: int
    memory_gib: int


_CPUS = {
    "large": 2,
    "xlarge": 4,
    "2xlarge": 8,
    "4xlarge": 16,
    "8xlarge": 32,
    "12xlarge": 48,
    "16xlarge": 64,
    "24xlarge": 96,
    "48xlarge": 192,
}
_CPU_FAMILIES_GIB_PER_CPU = {"c6i": 2, "c7i": 2, "m6i": 4, "m7i": 4, "r6i": 8, "r7i": 8}
_CPU_SIZES = ("large", "xlarge", "2xlarge", "4xlarge", "8xlarge", "12xlarge", "16xlarge")
_GPU_FAMILIES_GIB_PER_CPU = {"g4dn": 4, "g5": 4, "g6": 4, "g6e": 8}  # T4, A10G, L4, L40S
_GPUS = {
    "xlarge": 1,
    "2xlarge": 1,
    "4xlarge": 1,
    "8xlarge": 1,
    "16xlarge": 1,
    "12xlarge": 4,
    "24xlarge": 4,
    "48xlarge": 8,
}
_G4DN_SIZES = ("xlarge", "2xlarge", "4xlarge", "8xlarge", "12xlarge", "16xlarge")

MACHINES: dict[str, Machine] = {
    **{
        f"{family}.{size}": Machine(_CPUS[size], 0, _CPUS[size] * gib)
        for family, gib in _CPU_FAMILIES_GIB_PER_CPU.items()
        for size in _CPU_SIZES
    },
    **{
        f"{family}.{size}": Machine(_CPUS[size], gpus, _CPUS[size] * gib)
        for family, gib in _GPU_FAMILIES_GIB_PER_CPU.items()
        for size, gpus in _GPUS.items()
        if family != "g4dn" or size in _G4DN_SIZES
    },
    "p4d.24xlarge": Machine(96, 8, 1152),  # A100
    "p4de.24xlarge": Machine(96, 8, 1152),
    "p5.4xlarge": Machine(16, 1, 256),  # H100
    "p5.48xlarge": Machine(192, 8, 2048),
}
