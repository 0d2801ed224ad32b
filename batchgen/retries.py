"""Requests that are tried again: which errors of a store pass by themselves, and how long to wait.

The clients of stores try again too, but not all of them, not for every error, and for a second or
so. A run of hours outlives a store that is busy or away for half a minute.

**Source:** capped exponential backoff with jitter, M. Brooker, AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

NUM_ATTEMPTS = 8
FIRST_WAIT_S = 0.25  # doubles with each attempt; 0.5 to 1 times that is waited, 24 s in all
MAX_WAIT_S = 15.0
_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
# What S3 says with other statuses while a request of the same key, or the connection, is at fault.
_TRANSIENT_CODES = frozenset({"RequestTimeout", "ConditionalRequestConflict", "OperationAborted"})
# Errors of connections that do not derive from Python's own, by the module that defines them.
_CONNECTION_ERRORS = (
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "IncompleteReadError"),
    ("botocore.parsers", "ResponseParserError"),
    ("aiohttp", "ClientConnectionError"),
    ("aiohttp", "ClientPayloadError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
)

_log = logging.getLogger(__name__)


class TruncatedReadError(ConnectionError):
    """A store ended its answer early without an error of its own."""


def retrying(
    request: Callable[[], T],
    errors: tuple[type[Exception], ...],
    describe: Callable[[Exception], str],
) -> T:
    """What `request` returns, tried up to NUM_ATTEMPTS times while its error is transient.

    Only for requests that may be repeated. `errors` are those that may be transient, `describe`
    makes one a line for the log. The last error is raised as it is.
    """
    for attempt in range(NUM_ATTEMPTS - 1):
        try:
            return request()
        except errors as error:
            if not is_transient(error):
                raise
            wait_s = min(FIRST_WAIT_S * 2**attempt, MAX_WAIT_S) * random.uniform(0.5, 1.0)
            _log.warning("%s; trying again in %.1f s", describe(error), wait_s)
        time.sleep(wait_s)
    return request()


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: by type and status, never by text."""
    connection_errors = tuple(_loaded(*name) for name in _CONNECTION_ERRORS)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (TimeoutError, ConnectionError, *connection_errors)):
            return True
        status, code = _answer(cause)
        if status is not None:
            return status in _TRANSIENT_STATUSES or code in _TRANSIENT_CODES
        cause = cause.__cause__
    return False


def error_code(error: BaseException) -> str | None:
    """What an S3 server calls the error, such as PreconditionFailed."""
    return _answer(error)[1] or (_answer(error.__cause__)[1] if error.__cause__ else None)


def _answer(error: BaseException) -> tuple[int | None, str | None]:
    """The HTTP status and the store's code of an error, as its client holds them."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status, response.get("Error", {}).get("Code")
    # Of aiohttp; gcsfs, where it may be text; azure; requests.
    names = ("status", "code", "status_code")
    for holder, name in (*((error, name) for name in names), (response, "status_code")):
        status = getattr(holder, name, None)
        if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()):
            return int(status), None
    return None, None


def _loaded(module: str, name: str) -> type[BaseException]:
    """The error's class, or one that nothing raises while its module is not imported."""
    return getattr(sys.modules.get(module), name, _NotLoadedError)


class _NotLoadedError(Exception):
    pass
