"""Keeps secrets out of what is shown or stored: messages, logs, cards, ledgers, dead letters.

`redact` is for uris, which name rows and so must stay as they are otherwise; `redact_message` for
texts that others wrote (stores, clients, tracebacks), which is masked more than it needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping

_MASK = "***"
# In the names of keys, of parts of a query, of headers and of variables of the environment.
_SECRET_WORDS = (
    r"(?:secret|token(?![a-z_])|passw(?:or)?d|passphrase|pwd|credential|signature|(?<![a-z])sig(?![a-z])|"
    r"(?<![a-z])sas(?![a-z])|api_?-?key|access_?-?key|account_?-?key|private_?-?key|"
    r"connection_?-?string|authorization|cookie|sharedaccess)"
)
_SECRET_NAME = re.compile(_SECRET_WORDS, re.IGNORECASE)
# Options of storages whose names say less.
_SECRET_OPTIONS = frozenset({"key", "auth", "username", "user", "login", "pass"})
_USER_INFO = re.compile(r"(\w://)[^/\s]*@")
_HTTP_QUERY = re.compile(r"(\bhttps?://[^\s?\"'>]*)\?[^\s\"'>]*", re.IGNORECASE)
_QUERY_SECRET = re.compile(rf"([?&;][\w.%-]*{_SECRET_WORDS}[\w.%-]*=)[^&;\s\"'<>]+", re.IGNORECASE)
# name: value, "name": "value", name=value, Authorization: Bearer value
_NAMED_SECRET = re.compile(
    rf"([\w-]*{_SECRET_WORDS}[\w-]*[\"']?\s*[=:]\s*[\"']?(?:(?:bearer|basic|aws4-\S+)\s+)?)"
    r"[^\s\"',;&<>{}()]+",
    re.IGNORECASE,
)
_MIN_SECRET_CHARS = 6
# Of shells: the folder that one is in, and the one before it.
_WORKING_FOLDERS = frozenset({"PWD", "OLDPWD"})
_URI_WITH_SECRET = re.compile(
    rf"\w+://[^/\s]*:[^/\s]*@|[?&;][\w.%-]*{_SECRET_WORDS}[\w.%-]*=|https?://[^?]*\?.*=",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text without the users, passwords, queries and signatures of the urls in it."""
    text = _HTTP_QUERY.sub(r"\1", _USER_INFO.sub(r"\1", text))
    return _QUERY_SECRET.sub(rf"\1{_MASK}", text)


def redact_message(text: str, options: Mapping[str, object] | None = None) -> str:
    """The text without what looks like a secret, and without those of storage `options`."""
    return _NAMED_SECRET.sub(rf"\1{_MASK}", redact(mask_values(text, options or {})))


def mask_values(text: str, options: Mapping[str, object]) -> str:
    """The text without the secrets of these options."""
    secrets = sorted(secret_values(options), key=len, reverse=True)
    if not secrets:
        return text
    return re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, secrets))})(?!\w)", _MASK, text)


def has_secret(uri: str) -> bool:
    """Whether a uri holds a password, a signature or, over HTTP, a query."""
    return _URI_WITH_SECRET.search(uri) is not None


def secret_values(options: Mapping[str, object]) -> set[str]:
    """The texts below keys that name secrets, at any depth."""
    return {
        value
        for name, value in _named_texts(options)
        if len(value) >= _MIN_SECRET_CHARS
        and (name.lower() in _SECRET_OPTIONS or _SECRET_NAME.search(name))
    }


def environment_secrets() -> dict[str, str]:
    """The variables of the environment that name secrets, as options for `redact_message`."""
    return {
        name: value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and name not in _WORKING_FOLDERS
    }


def _named_texts(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the value with the name that it stands under."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            # What lies below a secret's name is secret, whatever it is called there.
            is_secret = name.lower() in _SECRET_OPTIONS or _SECRET_NAME.search(name)
            yield from _named_texts(item, name if is_secret else str(key))
    elif isinstance(value, str):
        yield name, value
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        for item in value:
            yield from _named_texts(item, name)
