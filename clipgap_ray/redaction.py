"""Secrets do not belong into addresses: settings refuse them, and messages show them as ***.

An address on a command line is shown by Ray (entrypoints, logs, dashboard), kept in manifests and repeated in errors.
Credentials are therefore read where botocore looks for them (instance profile, service account, environment, profile
of the machine), and our tokens from the environment. What is left are addresses that are not ours to refuse, such as
AWS_ENDPOINT_URL with a password: `errors` shows none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
ADVICE = (
    "leave it out of the address: credentials are read from the instance profile, the AWS_* environment or --profile, "
    "tokens from the environment"
)
_USER = re.compile(r"(?P<before>[a-z][a-z0-9+.-]*://)[^/?#\s@'\"]*@", re.IGNORECASE)
# Signed addresses of S3 (both versions), Google and Azure, and what services call their keys.
_SIGNED = re.compile(
    r"(?P<before>[?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|sig"
    r"|token|access_token|api_key|apikey|password|secret)=)[^&#\s'\"]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return a text whose addresses show neither users and passwords nor signatures and tokens."""
    if "://" not in text:
        return text
    return _SIGNED.sub(rf"\g<before>{HIDDEN}", _USER.sub(rf"\g<before>{HIDDEN}@", text))


def addresses_with_secrets(value: Any) -> Iterator[str]:
    """Yield, redacted, the texts within a value (also in lists and mappings) that carry a secret in an address."""
    if isinstance(value, str):
        shown = redacted(value)
        if shown != value:
            yield shown
    elif isinstance(value, Mapping):
        yield from addresses_with_secrets(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from addresses_with_secrets(item)
