"""What no gallery and no answer may show: takedown lists and rules over the metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipgap_ray import blocklist, schema
from clipgap_ray.config.hide import HideRule, parse_hide_rule


@dataclass(frozen=True)
class Hidden:
    """A takedown list and rules over the metadata."""

    blocklist: blocklist.Blocklist | None = None
    rules: tuple[HideRule, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Metadata columns that `reason` looks at."""
        return ("uid", "sha256", "url", *(rule.column for rule in self.rules))

    def __bool__(self) -> bool:
        """Whether anything can be hidden."""
        return self.blocklist is not None or bool(self.rules)

    def reason(self, facts: dict[str, Any]) -> str:
        """Say why a metadata row is hidden; "" when it is not."""
        if self.blocklist is not None and self.blocklist.reason(facts["uid"], facts["sha256"] or "", facts["url"]):
            return "on the blocklist"
        return next((f"hidden by {rule.text}" for rule in self.rules if rule.hides(facts)), "")


def read_hidden(uri: str, rules: tuple[str, ...] = (), columns: pa.Schema = schema.METADATA) -> Hidden:
    """Read a takedown list ("" is none) and the rules beside it.

    Args:
        uri: The list.
        rules: The rules.
        columns: Of the metadata that the rules are about.

    Raises:
        ConfigError: If a rule names none of the columns, or does not fit its column.
    """
    return Hidden(blocklist.read(uri) if uri else None, tuple(parse_hide_rule(rule, columns) for rule in rules))
