"""Comparing nodes with the driver, without a cluster."""

import pytest

from clipgap_ray.environment import FAISS_WHEELS
from clipgap_ray.errors import ConfigError
from clipgap_ray.stages import nodes

DRIVER = {
    "node": "driver", "python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0", "faiss": "1.15.1 (faiss-cpu)",
    "cuda": "13.0", "usable_gpus": "0", "gpus": 0, "region": "",
}  # fmt: skip
SAME = {**DRIVER, "node": "10.0.0.2 abcdef01"}


def test_a_node_like_the_driver_has_no_problem():
    assert nodes.compare(DRIVER, SAME) == []


@pytest.mark.parametrize("name", ["python", "ray", "torch", "cuda"])
def test_another_version_is_named_with_both_values(name):
    (problem,) = nodes.compare(DRIVER, {**SAME, name: "1.2.3"})
    assert problem == f"10.0.0.2 abcdef01: {name} is 1.2.3, the driver's is {DRIVER[name]}"


def test_a_missing_torch_is_a_problem():
    (problem,) = nodes.compare(DRIVER, {**SAME, "torch": ""})
    assert "torch is -" in problem


def test_the_gpu_wheel_of_the_same_faiss_is_no_problem_and_another_faiss_is():
    assert nodes.compare(DRIVER, {**SAME, "faiss": "1.15.0 (faiss-gpu-cuvs)"}) == []
    (problem,) = nodes.compare(DRIVER, {**SAME, "faiss": "1.14.9 (faiss-cpu)"})
    assert "1.14.9" in problem


def test_two_faiss_wheels_on_a_node_are_a_problem():
    (problem,) = nodes.compare(DRIVER, {**SAME, "faiss": "1.15.1 (faiss-cpu), 1.15.0 (faiss-gpu-cuvs)"})
    assert "over each other" in problem


def test_a_gpu_that_torch_cannot_use_is_a_problem():
    (problem,) = nodes.compare(DRIVER, {**SAME, "gpus": 1})
    assert "offers 1 GPUs" in problem
    assert nodes.compare(DRIVER, {**SAME, "gpus": 1, "usable_gpus": "1"}) == []


def test_a_silent_node_is_a_problem_and_has_a_line():
    silent = {"node": "10.0.0.3 12345678", "gpus": 0, "error": "no answer within 120 s"}
    assert nodes.compare(DRIVER, silent) == ["10.0.0.3 12345678: no answer within 120 s"]
    lines = nodes.table([DRIVER, SAME, silent]).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["node", "python", "ray", "torch", "faiss", "cuda", "gpus", "region"]
    assert lines[3].endswith("no answer within 120 s")
    assert lines[1].index("3.11.7") == lines[2].index("3.11.7")


def test_without_a_cluster_it_says_how_to_name_one(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(nodes.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        nodes.run()


def test_the_probe_describes_this_process():
    import platform

    seen = nodes._prober()(FAISS_WHEELS)
    assert seen["python"] == platform.python_version()
    assert seen["faiss"].count("faiss-") == 1
