"""cluster.yaml against the schema that Ray ships, and against what the jobs ask for."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def _load():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(_load()))


def test_ray_refuses_a_misspelled_node_type_key():
    import jsonschema
    import pytest
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = _load()
    config["available_node_types"]["gpu_worker"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_the_head_schedules_no_work_and_workers_start_at_zero():
    types = _load()["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    workers = {name: node for name, node in types.items() if name != "head"}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) <= _load()["max_workers"]
    assert workers["gpu_worker"]["resources"]["GPU"] == 1
    assert workers["gpu_worker"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_every_node_keeps_its_secrets_and_its_dashboard_to_itself():
    config = _load()
    for node in config["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
    commands = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert "RAY_AUTH_MODE=token" in commands
    assert "RAY_AUTH_TOKEN=" not in commands  # the token itself would show in `ps`
