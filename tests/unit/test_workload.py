"""The arithmetic of docs/scale.md: its own table, and counts by loops."""

from __future__ import annotations

import itertools

import pytest

from clipgap_ray.kernels import workload
from clipgap_ray.kernels.workload import Machine, Work

POOL, KEPT, QUERIES, REFERENCE, DIM = 413e6, 199.8e6, 166_963, 1.28e6, 640
MACHINE = Machine(16, 2, 0.004, 5e10, 6.5e10, 5e13, 1e9)


def test_the_paper_s_run_is_that_of_the_page() -> None:
    embed = workload.embed(POOL, DIM, 64.0e9, 24e3, 208e6)
    assert embed.network_flops == pytest.approx(26.4e18, rel=0.01)
    assert embed.read_bytes == pytest.approx(9.9e12, rel=0.01)
    assert embed.written_bytes == pytest.approx(1.06e12 + 60e9, rel=0.01)
    dedup = workload.dedup(POOL, DIM, 50_000, probes=1)
    assert dedup.product_flops == pytest.approx(26.4e15 + 4.4e15, rel=0.01)
    assert dedup.driver_bytes == pytest.approx(103e9, rel=0.01)
    score = workload.score(KEPT, QUERIES, 6, REFERENCE, DIM, 100)
    assert score.product_flops == pytest.approx(42.7e15 + 0.27e15, rel=0.01)
    assert score.written_bytes == pytest.approx(54e9, rel=0.01)
    train = workload.train(6.4e9, KEPT, 14.78e9, 24e3, 151e6, checkpoints=1)
    assert train.network_flops == pytest.approx(284e18, rel=0.01)
    assert train.read_bytes == pytest.approx(154e12, rel=0.01)
    assert train.written_bytes == pytest.approx(1.8e9, rel=0.01)
    assert workload.score(KEPT, QUERIES, 6, REFERENCE, DIM, 100).worker_bytes == pytest.approx(1.1e9, rel=0.02)
    assert workload.index(POOL, DIM, 0, 72, shards=10).worker_bytes == pytest.approx(3e9, rel=0.01)
    assert workload.index(POOL, DIM, 0, 72).written_bytes == pytest.approx(30e9, rel=0.01)


@pytest.mark.parametrize(("rows", "queries"), [(7, 3), (40, 11)])
def test_products_are_counted_as_a_loop_counts_them(rows: int, queries: int) -> None:
    dim = 5
    of_one = sum(2 for _ in range(dim))  # a multiplication and an addition
    assert workload.score(rows, queries, 1, 0, dim, 1).product_flops == sum(
        of_one for _ in itertools.product(range(rows), range(queries))
    )
    pairs = sum(of_one for _ in itertools.combinations(range(rows), 2))
    all_pairs = workload.dedup(rows, dim, 0, 2).product_flops
    assert pairs < all_pairs <= pairs + rows * of_one  # a row against itself is no pair, but is computed


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(images=4000, read_bytes=1e8), 1.0),  # decoding: 4 ms on 16 cores
        (Work(images=4000, network_flops=8e11), 1.0 + 1.0),  # on CPUs they share the cores
        (Work(images=4000, network_flops=3e14, on_gpu=True), 3.0),  # GPUs compute meanwhile
        (Work(images=40_000, network_flops=3e14, on_gpu=True), 10.0),
        (Work(product_flops=2 * 16 * 6.5e10), 2.0),
        (Work(product_flops=1e14, read_bytes=5e9, on_gpu=True), 5.0),
        (Work(written_bytes=1e9), 0.0),
    ],
)
def test_a_step_takes_as_long_as_its_scarcest_part(work: Work, seconds: float) -> None:
    assert MACHINE.seconds(work) == pytest.approx(seconds)


def test_without_gpus_their_work_is_the_cores_() -> None:
    laptop = Machine(2, 0, 0.004, 5e10, 6.5e10, 0.0, 1e9)
    assert laptop.seconds(Work(network_flops=1e11, on_gpu=True)) == pytest.approx(1.0)


def test_small_pools_are_compared_with_themselves() -> None:
    assert workload.default_partitions(200_000, 200_000, 8192) == 0
    assert workload.default_partitions(413e6, 200_000, 8192) == 50_416
