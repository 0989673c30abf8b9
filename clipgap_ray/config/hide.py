"""Which samples no gallery may show: a takedown list and rules over the metadata, for report and audit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipgap_ray import schema
from clipgap_ray.errors import ConfigError

RULE = re.compile(r"(?P<column>[a-z_0-9]+)\s*(?P<sign>[<>~])\s*(?P<value>.+)\Z", re.S)


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


def parse_hide_rule(text: str) -> HideRule:
    """Read a rule.

    Raises:
        ConfigError: If it is none, names no column of the metadata, or its value does not fit the column.
    """
    match = RULE.match(text.strip())
    if match is None:
        raise ConfigError(f"--hide {text!r} is no rule", hint="for example 'caption~nsfw|gore' or 'clip_score<0.1'")
    column, sign, value = match.groups()
    if column not in schema.METADATA.names:
        raise ConfigError(f"--hide {text!r}: no column {column!r}", hint=f"columns: {', '.join(schema.METADATA.names)}")
    kind = schema.METADATA.field(column).type
    if (sign == "~") != pa.types.is_string(kind):
        raise ConfigError(f"--hide {text!r}: {column} is {kind}", hint="~ is for texts, < and > are for numbers")
    try:
        return HideRule(text, column, sign, re.compile(value, re.IGNORECASE) if sign == "~" else float(value))
    except (re.error, ValueError) as error:
        raise ConfigError(f"--hide {text!r}: {value!r} cannot be read: {error}") from None
