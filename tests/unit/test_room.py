"""How many workers fit on the nodes of a cluster, and how many CPUs each may have."""

from __future__ import annotations

import pytest

from nuciseg.distributed.cluster import Need, widest_need, worker_slots


@pytest.mark.parametrize(
    ("nodes", "num_workers", "cpus"),
    [
        ([{"CPU": 8}], 1, 8),
        ([{"CPU": 8}], 3, 2),
        ([{"CPU": 2}] * 4, 2, 2),
        ([{"CPU": 2}] * 4, 1, 2),
        ([{"CPU": 8}, {"CPU": 2}], 2, 4),
        ([{"CPU": 2}], 9, 1),
    ],
)
def test_workers_get_as_many_cpus_as_leave_room_for_all(
    nodes: list[dict[str, float]], num_workers: int, cpus: int
) -> None:
    assert widest_need(num_workers, 0, nodes) == Need(cpus, 0)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "cpus", "slots"),
    [
        ([{"CPU": 16, "GPU": 2}], 2, 4, 2),
        ([{"CPU": 6, "GPU": 2}], 2, 3, 2),
        ([{"CPU": 32}, {"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}], 2, 2, 2),
        ([{"CPU": 2, "GPU": 4}], 4, 1, 2),
    ],
)
def test_workers_with_a_gpu_use_the_cpus_beside_it(
    nodes: list[dict[str, float]], num_workers: int, cpus: int, slots: int
) -> None:
    need = widest_need(num_workers, 1, nodes)
    assert need == Need(cpus, 1)
    assert worker_slots(need, nodes) == slots


def test_a_worker_lies_whole_on_one_node() -> None:
    assert worker_slots(Need(4, 0), [{"CPU": 2}] * 4) == 0
    assert worker_slots(Need(2, 1), [{"CPU": 8, "GPU": 1}, {"CPU": 2, "GPU": 2}]) == 2
