"""When a question is asked again: nobody answered it for want of room or of a replica, and there is time left.

Asked again is what changes nothing by being asked twice (`Call.repeatable`), after

* 502, 503, 504: the service's queue is full, a shard or a replica is missing, or a proxy found nobody to ask;
* any other 5xx that is not our JSON: Ray's proxies answer in plain text when the replica that held the request died.
  HAProxy, as Ray sets it up, makes 500 "Internal Server Error" of its 502, 503 and 504, too;
* a connection that ended under the question.

Not after a refused connection (nothing runs there: say so at once) nor after one that stayed silent until the timeout.
"""

from __future__ import annotations

import email.utils
import logging
import random
import re
import time
from typing import Any

import httpx

logger = logging.getLogger("clipgap")

RETRY_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 3.0
NOBODY = frozenset({502, 503, 504})
CUT = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class Tries:
    """One question, asked once or more often.

    Args:
        retry_s: No longer than so many seconds after the first time it is asked again; 0: it is asked once.

    Attributes:
        made: How often it was asked.
    """

    def __init__(self, retry_s: float) -> None:
        self.made = 0
        self._until = time.monotonic() + retry_s

    def pause(self, outcome: httpx.Response | httpx.HTTPError) -> float | None:
        """Count a try, and return the seconds to wait before the next one; None: this outcome stands."""
        self.made += 1
        if not is_lost(outcome):
            return None
        # Twice as long each time, and not all callers of a dead replica at the same moment.
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self.made - 1)) * random.uniform(0.5, 1.0)
        if isinstance(outcome, httpx.Response):
            pause = max(pause, asked_to_wait_s(outcome.headers.get("retry-after", "")))
        if time.monotonic() + pause > self._until:
            return None
        said = outcome.status_code if isinstance(outcome, httpx.Response) else outcome
        logger.info("no answer (%s): asking again in %.1f s", said, pause)
        return pause


def is_lost(outcome: httpx.Response | httpx.HTTPError) -> bool:
    """Tell whether the same question may be answered if it is asked again."""
    if not isinstance(outcome, httpx.Response):
        return isinstance(outcome, CUT)
    return outcome.status_code in NOBODY or (outcome.status_code >= 500 and error_of(outcome) is None)


def error_of(response: httpx.Response) -> dict[str, Any] | None:
    """Return the service's own words of an error: code, message, hint; None where somebody else answered."""
    try:
        body = response.json()
    except ValueError:
        return None
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) and "message" in error else None


def asked_to_wait_s(retry_after: str) -> float:
    """Return the seconds of a Retry-After header, which holds a number of them or a date; 0 for anything else."""
    if re.fullmatch("[0-9]+", retry_after):
        return float(retry_after)
    try:
        then = email.utils.parsedate_to_datetime(retry_after).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return max(0.0, then - time.time())
