"""Secrets in addresses: refused as settings, hidden in errors, and nothing else is touched."""

from __future__ import annotations

import pytest

from clipgap_ray import cli
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.errors import ClipgapError, ConfigError
from clipgap_ray.redaction import redacted

SECRETS = {
    "http://key:s3cret@minio:9000/pool": "http://***@minio:9000/pool",
    "https://s3cret@host/a.tar": "https://***@host/a.tar",
    "https://b.s3.amazonaws.com/a.tar?X-Amz-Credential=AK%2Fx&X-Amz-Date=1&X-Amz-Signature=s3cret": (
        "https://b.s3.amazonaws.com/a.tar?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Signature=***"
    ),
    "https://b.blob.core.windows.net/a.tar?sv=1&sig=s3cret#x": "https://b.blob.core.windows.net/a.tar?sv=1&sig=***#x",
    "https://host/a.tar?x=1&Token=s3cret": "https://host/a.tar?x=1&Token=***",
}
PLAIN = [
    "s3://bucket/pool/{00000..00010}.tar", "http://minio:9000", "a photo of a {c}, by me@home", "/data/a@b/c.tar",
    "https://host/a@b.tar?design=1&assigned=2", "hf-hub:laion/x", "user@host without an address",
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), SECRETS.items())
def test_a_secret_is_refused_as_a_setting_and_hidden_in_errors(text: str, shown: str) -> None:
    assert redacted(f"cannot read '{text}'") == f"cannot read '{shown}'"
    assert str(ClipgapError(f"{text} does not exist")) == f"{shown} does not exist"
    for words in ({"source": text, "out": "o"}, {"source": "s", "out": text}):
        with pytest.raises(ConfigError, match="a secret in a setting") as error:
            EmbedSettings.load({"model": "projection", **words}, "x.yaml")
        assert shown in str(error.value)


@pytest.mark.parametrize("text", PLAIN)
def test_everything_else_passes_as_it_is(text: str) -> None:
    assert redacted(text) == text
    assert EmbedSettings(source=text, out="o", model="projection").source == text


def test_a_secret_in_a_flag_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["s", "--endpoint-url", "http://key:s3cret@minio:9000"], ["https://me:s3cret@host/pool"]):
        assert cli.main(["embed", *flags, "--out", "o", "--model", "projection"]) == 1
        said = "".join(capsys.readouterr())
        assert "s3cret" not in said
        assert "***@" in said
