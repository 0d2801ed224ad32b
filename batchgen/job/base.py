"""The types that the sections of a job file are made of. Strict: "3" is no number, 3 is no text."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_SECONDS_PER_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = r"[0-9]+(\.[0-9]+)?[smhd]"


class Section(BaseModel):
    """One mapping of the job file: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def parse_duration(value: object) -> object:
    """Seconds of "30s", "5m", "1.5h" or "2d". A number is seconds already.

    Raises: ValueError for any other text.
    """
    if not isinstance(value, str):
        return value
    if not re.fullmatch(_DURATION, value):
        raise ValueError("should be a duration such as 30s, 5m, 1.5h or a number of seconds")
    return float(value[:-1]) * _SECONDS_PER_UNIT[value[-1]]


def _list_to_tuple(value: object) -> object:
    """What `strict=False` would do too, but not inside a union in pydantic 2.10."""
    return tuple(value) if isinstance(value, list) else value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("should be a power of two")
    return value


Auto = Literal["auto"]
Text = Annotated[str, Field(min_length=1)]
FromList = BeforeValidator(_list_to_tuple)
HttpEndpoint = Annotated[str, Field(pattern=r"^http://[^/]+$")]
NoticeSource = Literal["sigterm", "sigusr1", "aws", "gcp", "azure"]
TextList = Annotated[tuple[Text, ...], FromList]
NonEmptyTextList = Annotated[tuple[Text, ...], Field(min_length=1), FromList]
TokenIdList = Annotated[tuple[Annotated[int, Field(ge=0)], ...], FromList]
PositiveInt = Annotated[int, Field(ge=1)]
PowerOfTwo = Annotated[int, AfterValidator(_power_of_two)]
Seconds = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": f"^{_DURATION}$"},
            ]
        }
    ),
]
