"""Sizing work by what a cluster has, and by what its autoscaler may bring."""

import ast
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipgap_ray.errors import ClipgapError, ConfigError
from clipgap_ray.stages import autoscaler, session, waits


@pytest.fixture
def cluster(monkeypatch):
    """A pretended cluster: cluster(has, may) sets what is there and what the autoscaler may launch in all."""

    def pretend(has, may, nodes=1, free=None):
        state = SimpleNamespace(get_max_resources_from_cluster_config=lambda: may)
        monkeypatch.setattr(autoscaler.ray._private, "state", SimpleNamespace(state=state))
        monkeypatch.setattr(session.ray, "cluster_resources", lambda: has)
        monkeypatch.setattr(session.ray, "nodes", lambda: [{"Alive": True, "NodeID": "a", "Resources": has}] * nodes)
        monkeypatch.setattr(session.ray, "available_resources", lambda: free or has)
        monkeypatch.setattr(session.os, "cpu_count", lambda: 2)

    return pretend


def test_without_autoscaler_the_real_cores_count_not_the_logical_ones(cluster):
    cluster({"CPU": 4.0}, None)
    assert session.physical_cpus() == 2
    cluster({"CPU": 4.0}, None, nodes=2)
    assert session.physical_cpus() == 4


def test_a_head_without_work_counts_what_may_come(cluster):
    cluster({}, {"CPU": 144, "GPU": 2})
    assert session.physical_cpus() == 144
    assert session.cluster_gpus() == 2
    assert session.resolve_device("auto") == session.resolve_device("cuda") == "cuda"


def test_without_gpus_now_or_later(cluster):
    cluster({"CPU": 2.0}, {"CPU": 32})
    assert session.resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="no node of the cluster has a GPU"):
        session.resolve_device("cuda")


def test_an_autoscaler_without_limit_is_given_one(cluster):
    cluster({}, {"CPU": sys.maxsize})
    assert session.physical_cpus() == autoscaler.MOST_TASKS


def test_limits_that_ray_does_not_tell_are_read_from_the_variable(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster({}, None)
    monkeypatch.setenv("CLIPGAP_LAUNCHABLE", "CPU=80, GPU=2")
    assert (session.physical_cpus(), session.cluster_gpus(), autoscaler.launchable("TPU")) == (80, 2, 0)
    monkeypatch.setenv("CLIPGAP_LAUNCHABLE", "CPU=many")
    with pytest.raises(ConfigError, match="CPU=many"):
        session.physical_cpus()


def test_limits_of_a_cluster_made_by_ray_up_are_read_from_its_configuration(
    cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster({}, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(Path(__file__).parents[2] / "cluster.yaml", tmp_path / "ray_bootstrap_config.yaml")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert autoscaler.launchable("CPU") == 0, "a private Ray on a head has no autoscaler"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (autoscaler.launchable("CPU"), autoscaler.launchable("GPU")) == (8 * 16 + 2 * 8, 2)


def test_limits_can_be_told_to_nodes_that_do_not_know_them(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster({}, {"CPU": 144.0, "GPU": 2.0, "memory": 1.5e12})
    said = autoscaler.said_here()
    cluster({}, None)
    assert (autoscaler.said_here(), autoscaler.launchable("GPU")) == ("", 0)
    monkeypatch.setenv(autoscaler.VARIABLE, said)
    assert [autoscaler.launchable(name) for name in ("CPU", "GPU", "TPU")] == [144, 2, 0]
    cluster({}, None)
    monkeypatch.setenv(autoscaler.VARIABLE, "CPU=inf")
    assert autoscaler.launchable("CPU") == autoscaler.MOST_TASKS


@pytest.mark.parametrize(
    ("all_together", "expected"),
    [(None, {"CPU": 1 + 3 * 4 + 2 * 8, "GPU": 2}), (3, {"CPU": 1 + 2 * 8 + 4, "GPU": 2}), (1, {"CPU": 9, "GPU": 1})],
)
def test_the_most_that_node_types_come_to(all_together, expected) -> None:
    config = {
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 1}, "max_workers": 0},
            "small": {"resources": {"CPU": 4}, "max_workers": 3},
            "large": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
        },
    }
    config |= {} if all_together is None else {"max_workers": all_together}
    assert autoscaler.most_resources(config) == expected


def test_a_slow_start_of_ray_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def start() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(session, "_init_private", start)
    session._start_private()
    assert len(calls) == 3


def test_a_ray_that_never_starts_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(session, "_init_private", start)
    with pytest.raises(ClipgapError, match="Ray did not start on this machine"):
        session._start_private()


def test_a_cluster_that_happens_to_run_here_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {}
    monkeypatch.setattr(session.ray, "init", lambda **given: words.update(given))
    session._init_private()
    assert words["address"] == "local"


@pytest.mark.parametrize(
    ("has", "may", "free", "said"),
    [
        ({"CPU": 4.0}, {"CPU": 32, "GPU": 2}, None, "no node has 1 GPU; the autoscaler may launch one"),
        ({"CPU": 4.0}, None, None, "no node has 1 GPU; add such a node to the cluster"),
        ({"CPU": 0.25, "GPU": 1.0}, None, None, "no node has 0.5 CPU, the largest has 0.25; add such a node"),
        ({"CPU": 4.0, "GPU": 1.0}, None, {"CPU": 4.0}, "all GPU of the cluster is in use"),
        ({"CPU": 4.0, "GPU": 1.0}, None, None, "resources are there"),
    ],
)
def test_a_shortage_names_the_resource(cluster, has, may, free, said):
    cluster(has, may, free=free)
    assert waits.shortage({"CPU": 0.5, "GPU": 1.0}).startswith(said)


def test_resources_on_different_nodes_do_not_add_up(cluster, monkeypatch):
    cluster({"CPU": 4.0, "GPU": 1.0}, None)
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"GPU": 1.0}}]
    monkeypatch.setattr(session.ray, "nodes", lambda: nodes)
    assert waits.shortage({"CPU": 1.0, "GPU": 1.0}) == "no node has 1 CPU and 1 GPU together"


def test_workers_that_start_together_are_counted_together(cluster, monkeypatch):
    cluster({"CPU": 2.7}, None)
    assert waits.slots({"CPU": 0.9}) == waits.slots_to_come({"CPU": 0.9}) == 3
    assert waits.shortage({"CPU": 0.9}, 4) == (
        "4 workers want 0.9 CPU each, the nodes have room for 3; add nodes to the cluster"
    )
    cluster({"CPU": 2.7}, {"CPU": 8}, free={"CPU": 0.1})
    assert waits.shortage({"CPU": 0.9}, 8).endswith("the autoscaler may launch more")
    assert waits.shortage({"CPU": 0.9}, 3) == "all CPU of the cluster is in use"
    cluster({"CPU": 1.5}, None, nodes=4)
    assert waits.slots({"CPU": 0.9, "GPU": 0.0}) == 4, "halves of two nodes make no place"


def test_training_that_would_wait_for_ever_is_refused(cluster):
    from clipgap_ray.config.train import TrainSettings
    from clipgap_ray.stages import train

    def check(needs=None, **more):
        settings = TrainSettings(source="s", out="o", model="conv-64-test", **more)
        needs = needs or {"CPU": train.WORKER_CPUS}
        train._check_room(settings, needs, settings.min_workers or settings.workers)

    cluster({"CPU": 4.0}, None)
    check(workers=4)
    check(workers=2, decoders=2)
    check(workers=5, min_workers=4, accum_freq=4)
    with pytest.raises(ConfigError, match=r"8 workers want 0.9 CPU each, the cluster has room for 4"):
        check(workers=8)
    with pytest.raises(ConfigError, match=r"2 workers with 3 --decoders each want 4.8 CPUs, the cluster has 4.0"):
        check(workers=2, decoders=3)
    with pytest.raises(ConfigError, match=r"2 workers want 0.9 CPU and 1 GPU each, the cluster has room for 0"):
        check({"CPU": train.WORKER_CPUS, "GPU": 1.0}, workers=2)
    cluster({}, {"CPU": 16, "GPU": 2})
    check(workers=8)
    check({"CPU": train.WORKER_CPUS, "GPU": 1.0}, workers=2)
    with pytest.raises(ConfigError, match="room for 17"):
        check(workers=18)


def test_waiting_speaks_until_something_comes_and_never_gives_up(cluster, monkeypatch):
    cluster({"CPU": 4.0}, None)
    monkeypatch.setattr(waits, "SAY_SHORTAGE_S", 0.01)
    spoken = threading.Event()
    monkeypatch.setattr(waits.logger, "info", lambda *words: spoken.set())
    with waits.waiting({"GPU": 1.0}) as came:
        assert spoken.wait(10)
        spoken.clear()
        assert spoken.wait(10)
        came()
    spoken.clear()
    with waits.waiting({"GPU": 1.0}) as came:
        came()
        assert not spoken.wait(0.05)


def test_nodes_with_gpus(monkeypatch):
    nodes = [
        {"Alive": True, "NodeID": "a", "Resources": {"GPU": 1.0}},
        {"Alive": True, "NodeID": "b", "Resources": {"CPU": 1.0}},
        {"Alive": False, "NodeID": "c", "Resources": {"GPU": 1.0}},
    ]
    monkeypatch.setattr(session.ray, "nodes", lambda: nodes)
    assert session.gpu_nodes() == ["a"]


@pytest.mark.parametrize("name", ["edges", "evaluate", "evaluate_features", "export", "export_index", "score"])
def test_tasks_that_ask_for_something_else_than_a_cpu_say_what_they_wait_for(name):
    tree = ast.parse((Path(session.__file__).parent / f"{name}.py").read_text())
    found = 0
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        asked = {word.arg: ast.unparse(word.value) for call in calls for word in call.keywords}
        if asked.get("num_cpus", "1") == "1" and "num_gpus" not in asked:
            continue
        for call in (call for call in calls if ast.unparse(call.func) == "bounded"):
            found += 1
            needs = [word.value for word in call.keywords if word.arg == "needs"] or call.args[3:]
            assert [key.value for key in needs[0].keys] == (["CPU", "GPU"] if "num_gpus" in asked else ["CPU"])
    assert found == 1
