"""How much of the pool one task of `score` reads."""

from types import SimpleNamespace

import pytest

from clipgap_ray.stages import score

GB = 1 << 30


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "cluster_gpus", lambda: 2)
    monkeypatch.setattr(score, "physical_cpus", lambda: 8)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("rows", "num_queries", "device", "expected"),
    [
        (1 << 28, 1_000, "cpu", 1 << 28),  # 512 GB: 256 MB a task
        (1 << 28, 200_000, "cpu", 1 << 28),  # however large the query side
        (1 << 28, 1_000, "cuda", 1 << 28),
        (1 << 28, 200_000, "cuda", 20 * 200_000 * 1216),  # 20 times what it returns
        (1 << 20, 1_000, "cpu", 2 * GB // 16),  # a small pool: two tasks for each worker
        (1 << 20, 200_000, "cuda", 2 * GB // 4),
        (0, 10, "cpu", 1),
    ],
)
def test_a_task_reads_much_and_leaves_no_worker_idle(rows, num_queries, device, expected):
    pool = SimpleNamespace(num_rows=rows, dim=1024)
    assert score._group_bytes(pool, num_queries, 100, device) == expected
