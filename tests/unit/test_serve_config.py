from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from clipgap_ray.config.index import IndexSettings
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
(APPLICATION,) = CONFIG["applications"]


def test_the_config_file_knows_only_keys_that_serve_knows() -> None:
    # Serve itself ignores misspelled keys (ray.md finding 15).
    from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

    for values, schema in (
        (CONFIG, ServeDeploySchema),
        (CONFIG["http_options"], HTTPOptionsSchema),
        (CONFIG["logging_config"], LoggingConfig),
        (APPLICATION, ServeApplicationSchema),
    ):
        fields = getattr(schema, "model_fields", None) or schema.__fields__
        assert set(values) <= set(fields), schema.__name__
    ServeDeploySchema.model_validate(CONFIG)


def test_its_arguments_are_settings_and_agree_with_the_proxy() -> None:
    settings = ServeSettings.load(APPLICATION["args"], "serve/config.yaml")
    assert not settings.is_public
    assert (settings.host, settings.port) == (CONFIG["http_options"]["host"], CONFIG["http_options"]["port"])


def test_the_import_path_is_our_file_and_does_no_work_at_import() -> None:
    module, _, name = APPLICATION["import_path"].partition(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location("serve_app_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    with pytest.raises(ConfigError, match="unknown setting 'indexx'"):
        getattr(loaded, name)({"index": ["pool=x"], "indexx": []})
    assert len(path.read_text().splitlines()) <= 30


def encoder_of(**words: float) -> tuple[dict, EncoderSettings]:
    """What Serve is told of the encoder's deployment, as its schema has it, and what its replicas build."""
    from ray.serve.schema import DeploymentSchema

    from clipgap_ray.serving.deployments import bind_encoder

    settings = ServeSettings.load({**APPLICATION["args"], **words}, "serve/config.yaml")
    deployment = bind_encoder(settings, EncoderSettings("projection"))._bound_deployment
    config = deployment._deployment_config
    told = {"name": deployment.name, "ray_actor_options": deployment.ray_actor_options}
    if config.autoscaling_config is None:
        told["num_replicas"] = config.num_replicas
    else:
        told["autoscaling_config"] = config.autoscaling_config.model_dump(exclude_unset=True)
    assert set(told) <= set(DeploymentSchema.model_fields)
    DeploymentSchema.model_validate(told)
    return told, deployment.init_args[0]


def test_the_encoder_of_the_config_file_follows_the_load() -> None:
    told, built = encoder_of()
    scaling = told["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 4, 16)
    assert told["ray_actor_options"]["num_gpus"] == 0
    assert built.device == "cpu"


def test_the_encoder_may_share_a_gpu_or_stay_as_it_is() -> None:
    told, built = encoder_of(encoder_gpus=0.25, encoder_min_replicas=2, encoder_max_replicas=8)
    assert told["ray_actor_options"]["num_gpus"] == 0.25
    assert built.device == "cuda"
    assert told["autoscaling_config"]["min_replicas"] == 2
    told, _ = encoder_of(encoder_min_replicas=3, encoder_max_replicas=3)
    assert told["num_replicas"] == 3
    assert "autoscaling_config" not in told


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_needs_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipgap_ray.serving.app import check_exposure

    settings = ServeSettings(index=("pool=x",), host=host)
    monkeypatch.delenv("CLIPGAP_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="CLIPGAP_TOKEN is not set"):
        check_exposure(settings)
    monkeypatch.setenv("CLIPGAP_TOKEN", "secret")
    assert check_exposure(settings) == "secret"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_none(host: str) -> None:
    assert not ServeSettings(index=("pool=x",), host=host).is_public


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"index": []}, "names no index"),
        ({"index": ["pool"]}, "is not NAME=PATH"),
        ({"index": ["Pool=x"]}, "does not match"),
        ({"index": ["a=x", "a=y"]}, "names 'a' twice"),
        ({"index": ["a=x"], "port": 0}, "port is 0"),
        ({"index": ["a=x"], "encoder_min_replicas": 3, "encoder_max_replicas": 2}, "2 is less than"),
        ({"index": ["a=x"], "encoder_gpus": 1.5}, "above 1 Ray knows whole GPUs only"),
        ({"index": ["a=x"], "encoder_gpus": -1}, "encoder_gpus is -1"),
        ({"index": ["a=x"], "max_kk": 1}, "unknown setting 'max_kk'"),
    ],
)
def test_impossible_serve_settings(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeSettings.load(values, "serve")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"out": "o"}, "expected exactly one"),
        ({"out": "o", "embeddings": "e", "follow": "f"}, "expected exactly one"),
        ({"out": "o", "embeddings": "e", "min_recall": 1.5}, "not between 0 and 1"),
        ({"out": "o", "embeddings": "e", "shards": 0}, "shards is 0"),
    ],
)
def test_impossible_index_settings(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IndexSettings.load(values, "index")
