"""The exception tree. Every message names the value, the expectation and, in `hint`, the next step.

ClipgapError
  ConfigError         (also ValueError)  a setting is impossible
  DataError                              a tar, row or column is not what its schema says
  IndexMismatchError  (also ValueError)  dims, encoder or metric of index and query disagree
  StaleOutputError                       the output exists and was written with other settings
  LeaseError                             another driver is writing to the same directory
  StorageError                           an object store refuses, or does not answer
  ShardLostError                         an index shard's actor died
  ServiceError                           a service refuses a request, or does not answer
  BudgetError                            too much was skipped, or a run would cost more than allowed
  StoppedError                           --max-hours or --max-cost was reached; what is committed stays
"""

from __future__ import annotations

from clipgap_ray.redaction import redacted


class ClipgapError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        message: What is wrong, with the value and the expectation. Secrets in addresses are shown as ***.
        hint: The next step, usually a command; shown on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        message = redacted(message)
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(ClipgapError, ValueError):
    """A setting is impossible."""


class DataError(ClipgapError):
    """A tar, row or column is not what its schema says."""


class IndexMismatchError(ClipgapError, ValueError):
    """Dims, encoder or metric of an index and a query disagree."""


class StaleOutputError(ClipgapError):
    """The output exists and was written with other settings."""


class LeaseError(ClipgapError):
    """Another driver is writing to the same directory."""


class StorageError(ClipgapError):
    """An object store refuses, or does not answer after several attempts."""


class ShardLostError(ClipgapError):
    """An index shard's actor died; the message carries the shard's number and rows."""


class ServiceError(ClipgapError):
    """A service refuses a request, or does not answer.

    Args:
        message: The service's words, or what came instead of them.
        hint: The next step.
        status: HTTP status; 0 where nobody answered.
    """

    def __init__(self, message: str, hint: str | None = None, status: int = 0) -> None:
        super().__init__(message, hint)
        self.status = status


class BudgetError(ClipgapError):
    """More was skipped than allowed, or a run would cost more than allowed."""


class StoppedError(ClipgapError):
    """A run reached --max-hours or --max-cost and stopped; what is committed stays, the same command continues."""
