"""How the file system of a URI is reached: options, credentials, and patience.

How an S3 store is reached is one value, `StorageOptions`: the driver configures it, work carries it, a worker
configures it before its first read. What is not set is what s3fs and botocore read for themselves: AWS_ENDPOINT_URL,
AWS_PROFILE, FSSPEC_S3_ANON, the credentials of the machine. Credentials never travel. Rejected: environment variables
through Ray's runtime_env (a cluster that runs already ignores them, and a job that sets one itself is refused).

Credentials that know their end (instance profiles, service accounts, `credential_process`) are renewed by botocore
ahead of it. Those of a file are read once; when a store refuses them they are read again: after another login.

What is read and written there: `store`.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from clipgap_ray.errors import StorageError

T = TypeVar("T")

ATTEMPTS = 6
FIRST_PAUSE_S = 0.2  # doubled after every attempt: six attempts bridge about six seconds


@dataclass(frozen=True)
class StorageOptions:
    """How S3 stores are reached; empty fields leave it to s3fs and botocore.

    Attributes:
        endpoint_url: Address of an S3 server other than AWS.
        anonymous: Do not sign requests: public buckets without an account.
        profile: A profile of the machine's AWS configuration.
    """

    endpoint_url: str = ""
    anonymous: bool = False
    profile: str = ""

    def for_s3fs(self) -> dict[str, Any]:
        """Return s3fs's keyword arguments."""
        words: dict[str, Any] = {}
        if self.endpoint_url:
            words["endpoint_url"] = self.endpoint_url
        if self.anonymous:
            words["anon"] = True
        if self.profile:
            words["profile"] = self.profile
        # Other drivers and workers write too: a cached listing would be a lie. botocore's own retries are off, since
        # three layers of them multiply: an address where nobody listens took minutes to be an error.
        return {**words, "use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}


_options = StorageOptions()


def configure(options: StorageOptions) -> None:
    """Set how this process reaches S3 stores from now on; workers are given the driver's options with their work."""
    global _options
    _options = options


def options() -> StorageOptions:
    """Return how this process reaches S3 stores."""
    return _options


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URI and the path inside it; a plain path is local."""
    words = _options.for_s3fs() if uri.startswith(("s3://", "s3a://")) else {}
    fs, path = fsspec.core.url_to_fs(uri, **words)
    return fs, path


def patiently(uri: str, call: Callable[[], T]) -> T:
    """Call something that talks to the store of a URI, again when the network or the server fails.

    Args:
        uri: What it is about; calls on local files are made once.
        call: Must be safe to repeat.

    Raises:
        FileNotFoundError: As it comes: that is an answer.
        StorageError: If access is refused, also with credentials read anew, or the last of `ATTEMPTS` attempts failed.
    """
    if is_local(uri):
        return call()
    renewed = False
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            if not renewed and attempt < ATTEMPTS - 1:
                _renew_session(uri)
                renewed = True
                continue
            hint = "check (or renew) the credentials of this machine, --profile, or --anonymous for a public bucket"
            raise StorageError(f"{uri}: access refused: {error}", hint) from None
        except _passing_errors() as error:
            refused = getattr(error, "errno", None) == errno.EINVAL  # 400: of an expired token HEAD says no more
            if refused:
                _renew_session(uri)
            if attempt == ATTEMPTS - 1:
                suspect = "whether the credentials have expired" if refused else "the address and --endpoint-url"
                raise StorageError(
                    f"{uri}: {type(error).__name__} after {ATTEMPTS} attempts: {error}",
                    hint=f"check {suspect}; running the same command again continues",
                ) from error
            time.sleep(FIRST_PAUSE_S * 2**attempt)  # give a busy server, or the network, time to come back
        except _account_errors() as error:
            hint = "configure credentials, name a --profile, or use --anonymous for a public bucket"
            raise StorageError(f"{uri}: {error}", hint) from None
    raise AssertionError("unreachable")


def _renew_session(uri: str) -> None:
    """Have the file system of a URI read its credentials anew; one without sessions (HTTP) stays as it is."""
    connect = getattr(filesystem(uri)[0], "connect", None)
    if connect is not None:
        with contextlib.suppress(*_account_errors()):  # the next call says it
            connect(refresh=True)


def _passing_errors() -> tuple[type[Exception], ...]:
    """Errors of a network or a busy server. Imported when something failed: local runs never load botocore."""
    import aiohttp
    import botocore.exceptions as boto

    return OSError, aiohttp.ClientError, boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError


def _account_errors() -> tuple[type[Exception], ...]:
    import botocore.exceptions as boto

    return boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound


def is_local(uri: str) -> bool:
    """Tell whether a URI is on this machine's file system."""
    return "://" not in uri or uri.startswith(("file://", "local://"))
