"""Which samples no gallery may show: a takedown list and rules over the metadata, for report and audit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipgap_ray import schema
from clipgap_ray.errors import ConfigError

RULE = re.compile(r"(?P<column>[A-Za-z_0-9]+)\s*(?P<sign>[<>~])\s*(?P<value>.+)\Z", re.S)


@dataclass(frozen=True)
class HideRule:
    """`caption~REGEX` (found anywhere, without regard to case), `clip_score<0.1` or `width>4000`."""

    text: str
    column: str
    sign: str
    value: float | re.Pattern[str]

    def hides(self, facts: dict[str, Any]) -> bool:
        """Tell whether the rule holds for a metadata row; a value that is not known hides nothing."""
        found = facts.get(self.column)
        if found is None:
            return False
        if isinstance(self.value, re.Pattern):
            return self.value.search(str(found)) is not None
        return bool(found < self.value if self.sign == "<" else found > self.value)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def parse_hide_rule(text: str, columns: pa.Schema | None = schema.METADATA) -> HideRule:
    """Read a rule.

    Args:
        text: The rule.
        columns: The metadata that it is about: a pool may have more than `embed` writes. None where it is not opened
            yet: a column that `embed` does not write is then taken as given, a text for `~` and a number for `<` and
            `>`.

    Raises:
        ConfigError: If it is none, names no column of the metadata, or its value does not fit the column.
    """
    match = RULE.match(text.strip())
    if match is None:
        raise ConfigError(f"--hide {text!r} is no rule", hint="for example 'caption~nsfw|gore' or 'clip_score<0.1'")
    column, sign, value = match.groups()
    known = schema.METADATA if columns is None else columns
    if column in known.names:
        kind = known.field(column).type
        if not (_is_text(kind) if sign == "~" else _is_number(kind)):
            raise ConfigError(f"--hide {text!r}: {column} is {kind}", hint="~ is for texts, < and > are for numbers")
    elif columns is not None:
        raise ConfigError(f"--hide {text!r}: no column {column!r}", hint=f"columns: {', '.join(columns.names)}")
    try:
        return HideRule(text, column, sign, re.compile(value, re.IGNORECASE) if sign == "~" else float(value))
    except (re.error, ValueError) as error:
        raise ConfigError(f"--hide {text!r}: {value!r} cannot be read: {error}") from None
