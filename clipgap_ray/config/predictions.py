"""How `shift`, `join` and `discover` name the models whose predictions they read."""

from __future__ import annotations

from collections.abc import Iterable

from clipgap_ray.errors import ConfigError


def prediction_files(words: Iterable[str]) -> dict[str, str]:
    """Read `NAME=FILE` or `FILE` words of --predictions; a FILE alone is a model of the file's name.

    Args:
        words: Such as `b32=eval/b32/animals.parquet`.

    Returns:
        File by model, in order.

    Raises:
        ConfigError: If a model is named twice, or a name or a file is empty.
    """
    paths: dict[str, str] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if not separator:
            name, path = word.rsplit("/", 1)[-1].removesuffix(".parquet"), word
        if not name or not path:
            raise ConfigError(f"--predictions {word!r} is neither FILE.parquet nor NAME=FILE.parquet")
        if name in paths:
            raise ConfigError(f"--predictions names {name!r} twice", hint="call the models NAME=FILE.parquet")
        paths[name] = path
    return paths


def variant_files(words: Iterable[str], models: list[str]) -> dict[str, dict[str, str]]:
    """Read `MODEL:VARIANT=FILE` words of --variants; with one model `VARIANT=FILE` is enough.

    Args:
        words: Such as `b32:1v20=eval/b32/animals-1v20.parquet`.
        models: Of --predictions.

    Returns:
        File by variant by model, in order; models without variants are left out.

    Raises:
        ConfigError: If a word has no `=`, names another model, or names a variant twice.
    """
    found: dict[str, dict[str, str]] = {}
    for word in words:
        name, separator, path = word.partition("=")
        model, colon, variant = name.rpartition(":")
        if not colon and len(models) == 1:
            model = models[0]
        if not separator or not path or not variant or model not in models:
            raise ConfigError(
                f"--variants {word!r} is not MODEL:VARIANT=FILE.parquet of the models {models}",
                hint=f"for example --variants {models[0]}:1v20=FILE.parquet",
            )
        if variant in found.setdefault(model, {}):
            raise ConfigError(f"--variants names {variant!r} of {model} twice")
        found[model][variant] = path
    return found
