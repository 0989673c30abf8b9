"""`clipgap query` and `clipgap swap`: a running service, asked from a terminal."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from clipgap_ray import store
from clipgap_ray.client import questions
from clipgap_ray.client.clients import Client
from clipgap_ray.client.questions import SearchResult, Swap
from clipgap_ray.config.ask import QuerySettings, SwapCommand, read_conditions
from clipgap_ray.config.serve import ADMIN_VARIABLE, TOKEN_VARIABLE, read_token
from clipgap_ray.errors import DataError, ServiceError

logger = logging.getLogger("clipgap")

LOOK_S = 0.5  # between looks at a swap
PATIENCE = 5  # looks in a row that may fail: a gateway restarts, a proxy is busy


def query(settings: QuerySettings, transport: httpx.BaseTransport | None = None) -> dict[str, Any] | None:
    """Ask, and print a table; the answer itself where JSON is wanted.

    Args:
        settings: What to ask and whom.
        transport: httpx transport, for tests.

    Raises:
        DataError: If the image or the vectors cannot be read.
        ServiceError: If the service does not answer, or refuses: with its words.
    """
    words = _question(settings)
    with _client(settings.url, TOKEN_VARIABLE, transport, settings.retry_s) as client:
        found = client.ask(questions.search(**words))
    if found.degraded:
        logger.warning("%d of %d index shards answered: neighbours may be missing", found.shards_ok, found.shards)
    if settings.json_:
        return asdict(found)
    sys.stdout.write("\n".join(table(found, shutil.get_terminal_size((120, 24)).columns)) + "\n")
    return None


def _question(settings: QuerySettings) -> dict[str, Any]:
    words: dict[str, Any] = {
        "text": settings.text or None,
        "uid": settings.uid or None,
        "image": _read_file(settings.image) if settings.image else None,
        "k": settings.k,
        "index": settings.index or None,
        "modality": settings.modality or None,
        "collapse": settings.collapse,
        "filter": read_conditions(settings.filter) or None,
    }
    if settings.vector:
        rows = _read_vectors(settings.vector)
        batch = [{"vector": row} for row in rows.astype(np.float64).tolist()]
        words |= {"queries": batch} if len(batch) > 1 else batch[0]
    return words


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"--image {path}: {error.strerror}", hint="a file of this machine") from None


def _read_vectors(path: str) -> np.ndarray:
    """Return (n, d) rows of an .npy file that holds (d,) or (n, d) finite numbers."""
    try:
        rows = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(f"--vector {path}: {error.strerror or error}", hint="a file that numpy.save wrote") from None
    except (ValueError, EOFError) as error:
        raise DataError(f"--vector {path} is no .npy array: {error}", hint="numpy.save writes one") from None
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiu" or rows.ndim not in (1, 2) or not rows.size:
        kind = f"{rows.dtype} of shape {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise DataError(f"--vector {path} holds {kind}: expected numbers, (d,) or (n, d)", hint="numpy.save writes it")
    if not np.isfinite(rows).all():
        raise DataError(f"--vector {path} holds NaN or infinity: expected finite numbers")
    return np.atleast_2d(rows)


def table(found: SearchResult, width: int = 120) -> list[str]:
    """Return an answer as lines: similarity, uid, splits and caption of every neighbour, a block per query."""
    lines = [f"{found.index}, version {found.version}"]
    for at, near in enumerate(found.results):
        lines += [f"query {at}"] if len(found) > 1 else []
        lines += ["  nothing found"] if not near else []
        for rank, row in enumerate(near, 1):
            splits = f"  [{' '.join(row.splits)}]" if row.splits else ""
            said = " ".join((row.caption or row.url or row.image_path or "").split())
            named = _plain(f"{rank:>4}  {row.similarity:.4f}  {row.uid or row.row_id}{splits}  {said}")
            lines.append(named if len(named) <= width else named[: width - 3] + "...")
    return lines


def _plain(text: str) -> str:
    """Captions come from strangers: nothing of them may steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def swap(settings: SwapCommand, transport: httpx.BaseTransport | None = None) -> dict[str, Any]:
    """Begin a swap, wait for its end, return the versions before and after.

    Args:
        settings: Which index gets which version, and where.
        transport: httpx transport, for tests.

    Raises:
        ServiceError: If the service does not answer, refuses, did not manage it, or takes longer than the deadline.
    """
    uri = store.absolute(settings.version) if settings.version else None
    deadline = time.monotonic() + settings.timeout_s
    with _client(settings.url, ADMIN_VARIABLE, transport) as client:
        begun = state = client.swap(settings.name, uri)
        said, failures = "", 0
        while state.state not in ("done", "failed"):
            if state.state != said:
                said = state.state
                logger.info("swap of %s: %s", settings.name, said)
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"swap of {settings.name} to {begun.version_after} is still {state.state} after "
                    f"{settings.timeout_s:g} s",
                    hint="it goes on by itself; `clipgap query` prints the version that answers",
                )
            time.sleep(LOOK_S)
            try:
                state, failures = client.swap_state(), 0
            except ServiceError as error:
                failures += 1
                if failures >= PATIENCE or error.status in (401, 404):
                    raise
            _check_ours(begun, state)
    if state.state == "failed":
        raise ServiceError(
            f"swap of {settings.name} failed: {state.message}; version {state.version_before} answers on",
            hint="the service's log says more; the same command tries again",
        )
    return {"index": state.index, "version_before": state.version_before, "version": state.version_after}


def _check_ours(begun: Swap, state: Swap) -> None:
    """An operator that restarted has forgotten the swap; somebody else may have begun another."""
    if (state.index, state.version_after) != (begun.index, begun.version_after):
        raise ServiceError(
            f"the service knows of no swap of {begun.index} to {begun.version_after} any more, its last one is "
            f"{state.index or 'none'} {state.version_after or ''}".rstrip(),
            hint="`clipgap query` prints the version that answers; the same command tries again",
        )


@contextmanager
def _client(url: str, variable: str, transport: httpx.BaseTransport | None, retry_s: float = 0.0) -> Iterator[Client]:
    """A client with the token of an environment variable; a refused one is explained."""
    token = read_token(variable)
    with Client(url, token or None, transport, retry_s) as client:
        try:
            yield client
        except ServiceError as error:
            if error.status == 401:
                have = f"the token of {variable} is not the service's" if token else f"{variable} is not set"
                hint = f"export {variable}=..., or {variable}_FILE=FILE with the token"
                raise ServiceError(f"{url} wants a bearer token: {have}", hint, 401) from None
            if error.status == 404 and variable == ADMIN_VARIABLE and "not_found" in error.message:
                hint = f"start it with {ADMIN_VARIABLE} in its environment"
                raise ServiceError(f"{url} lets nobody swap: it has no admin's token", hint, 404) from None
            raise
