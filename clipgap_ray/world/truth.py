"""The table that says what every written sample is: one row per sample, beside the data and never inside it."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from clipgap_ray.world.pictures import Facts

TRUTH_SCHEMA = pa.schema(
    [
        ("set", pa.string()),  # "pool", "reference", "counteranimal" or a test set
        ("shard", pa.string()),  # tar below the world's root; "counteranimal" for its files
        ("key", pa.string()),  # webdataset key as written; counteranimal: file below `shard`
        ("row", pa.int64()),  # position among the shard's samples as written (broken ones count); -1: unreadable
        ("uid", pa.string()),  # as in the json; pool only, else ""
        ("class_name", pa.string()),  # "" off topic
        ("label", pa.int32()),  # -1 off topic
        ("style", pa.string()),
        ("background", pa.string()),  # "paper" and "plain" for sketches and silhouettes, "" off topic and for digits
        ("distant", pa.bool_()),  # a photo whose object is a few pixels far away; in the pool only as a leak
        ("caption", pa.string()),  # pool only, else ""
        ("caption_kind", pa.string()),  # names_class, no_class, wrong, off_topic; "" outside the pool
        ("duplicate_group", pa.int64()),  # pool row of the source, shared by its copies; -1: none
        ("duplicate_kind", pa.string()),  # "", source, exact, reencode, resize, crop
        ("leak_of_set", pa.string()),  # the test set that this pool row's picture is from, and its key there
        ("leak_of_key", pa.string()),
        ("leak_kind", pa.string()),  # "", exact, near
        ("group", pa.string()),  # counteranimal: common or counter
        ("fault", pa.string()),  # "" or a name in plan.py; an empty shard has one row with an empty key
    ]
)

_BLANK: dict[str, Any] = {
    field.name: False if pa.types.is_boolean(field.type) else -1 if pa.types.is_integer(field.type) else ""
    for field in TRUTH_SCHEMA
}


def truth_row(set_name: str, shard: str, key: str, row: int, facts: Facts | None, **more: Any) -> dict[str, Any]:
    """One row of the truth table; columns not named are blank ("", -1 or false)."""
    known: dict[str, Any] = {"set": set_name, "shard": shard, "key": key, "row": row}
    if facts is not None:
        known |= {
            "class_name": facts.class_name,
            "label": facts.label,
            "style": facts.style,
            "background": facts.background,
            "distant": facts.distant,
        }
    return {**_BLANK, **known, **more}


def truth_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of `truth_row` as a table of TRUTH_SCHEMA."""
    return pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA)
