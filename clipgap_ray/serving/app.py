"""The service as one application: settings and files checked, deployments wired, who may reach it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from clipgap_ray import schema, store
from clipgap_ray.config.serve import ADMIN_VARIABLE, TOKEN_VARIABLE, ServeSettings, read_token
from clipgap_ray.embeddings import check_same_encoder
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError
from clipgap_ray.hidden import read_hidden
from clipgap_ray.index_manifest import read_index, rows_of
from clipgap_ray.serving import swap
from clipgap_ray.serving.coverage import Coverage, recipe_uri
from clipgap_ray.serving.deployments import ENCODER_BATCH, Gateway, GatewayConfig, bind_encoder, bind_shards
from clipgap_ray.serving.guard import token_sha256
from clipgap_ray.serving.messages import Limits


def build_app(args: ServeSettings | Mapping[str, Any]) -> serve.Application:
    """Check the settings and wire the deployments; bearer tokens come from the environment.

    Args:
        args: Settings, or the `args` of a Serve config file.

    Raises:
        ConfigError: On impossible settings, or a public address without a token.
        DataError: If an index or its embeddings are missing.
        IndexMismatchError: If the encoder did not make every index.
    """
    settings = args if isinstance(args, ServeSettings) else ServeSettings.load(args, "serve")
    token = check_exposure(settings)
    indexes = schema.named(settings.index, "--index")
    manifests = {name: read_index(uri) for name, uri in indexes.items()}
    encoder = encoder_settings(settings, next(iter(manifests.values())))
    fingerprint = encoder.build().fingerprint
    shards: dict[str, list[Any]] = {}
    split_files = {store.read_json(recipe_uri(uri))["name"]: uri for uri in settings.splits}
    for name, manifest in manifests.items():
        check_same_encoder(manifest["encoder"], fingerprint, (f"index {name}", "the service's --model"))
        read_hidden(settings.blocklist, settings.hide, rows_of(manifest).metadata_columns())
        shards[name] = bind_shards(indexes[name], manifest, split_files, settings.replicas, f"{name}-shard-")
    if settings.scores:
        Coverage(settings.scores, settings.splits).check(fingerprint)
    admin = read_token(ADMIN_VARIABLE)
    config = GatewayConfig(
        indexes=indexes,
        versions={name: manifest["index_version"] for name, manifest in manifests.items()},
        encoder=encoder,
        limits=limits_of(settings),
        shard_timeout_s=settings.shard_timeout_s,
        token_hash=token_sha256(token) if token else None,
        admin_hash=token_sha256(admin) if admin else None,
        scores=settings.scores,
        splits=settings.splits,
        blocklist=settings.blocklist,
        hide=settings.hide,
        origins=settings.origins,
        access_log=settings.access_log,
    )
    operator = None
    if admin:
        operator = swap.OperatorDeployment.bind(indexes, split_files, settings.replicas)  # type: ignore[attr-defined]
    gateway = Gateway.options(num_replicas=settings.gateways)  # type: ignore[attr-defined]
    return gateway.bind(config, bind_encoder(settings, encoder), shards, operator)


def limits_of(settings: ServeSettings) -> Limits:
    """Return what one request may ask for, in the units that requests are measured in: bytes, pixels, seconds."""
    return Limits(
        k=settings.max_k,
        batch=settings.max_batch,
        body_bytes=int(settings.max_body_mb * 1e6),
        image_pixels=int(settings.max_image_megapixels * 1e6),
        image_url=settings.image_url,
        image_url_s=settings.image_url_timeout_s,
    )


def encoder_settings(settings: ServeSettings, manifest: Mapping[str, Any]) -> EncoderSettings:
    """Return the encoder of the queries: the model asked for, else the index's own by name."""
    made = manifest["encoder"]
    return EncoderSettings(
        model=settings.model or made["model"],
        pretrained=settings.pretrained or ("" if settings.model else made.get("pretrained", "")),
        batch_size=ENCODER_BATCH,
        crop_border=made.get("crop_border", 0),
    )


def check_exposure(settings: ServeSettings) -> str:
    """Return the bearer token ("" for none); only its hash travels on.

    Raises:
        ConfigError: If the address is public and there is no token.
    """
    token = read_token(TOKEN_VARIABLE)
    if token and token == read_token(ADMIN_VARIABLE):
        raise ConfigError(
            f"{TOKEN_VARIABLE} and {ADMIN_VARIABLE} are the same: whoever may read could swap indexes",
            hint="openssl rand -hex 32 makes another one",
        )
    if settings.is_public and not token:
        raise ConfigError(
            f"--host {settings.host} can be reached from other machines, and {TOKEN_VARIABLE} is not set",
            hint=f"export {TOKEN_VARIABLE}=$(openssl rand -hex 32), or use --host 127.0.0.1",
        )
    return token
