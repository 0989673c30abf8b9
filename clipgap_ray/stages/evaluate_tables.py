"""Predictions that somebody else's model made: scored like our own, so that closed models can be compared.

A csv or parquet file with `uid` or `key` (the sample's webdataset key, or its path below the test set) and
`prediction`: a class name, or its index. A column `logit` is taken over if it is there.
"""

from __future__ import annotations

import csv
import difflib
import io
from typing import Any

import numpy as np

from clipgap_ray import store
from clipgap_ray.errors import DataError
from clipgap_ray.kernels.zero_shot import Predictions
from clipgap_ray.shards import Sample, Skip
from clipgap_ray.sources import suffix_of
from clipgap_ray.stages.evaluate_sets import Question


def read(question: Question, dropped: dict[str, int]) -> tuple[list[Sample], Predictions]:
    """Join a table of predictions with its test set.

    Args:
        question: With `predictions`.
        dropped: Counts `no_prediction` for images that the table lacks, and what the set itself skips.

    Returns:
        The samples with a prediction, in the set's order, and the predictions; `top5` holds the prediction alone.

    Raises:
        DataError: If the file lacks its columns, names a class that the set does not have, repeats a sample, or names
            none of the set's samples.
    """
    rows, column = _rows(question.predictions)
    classes = question.test_set.class_names
    place = {name: index for index, name in reversed(list(enumerate(classes)))}
    table: dict[str, tuple[int, float]] = {}
    for row in rows:
        key = str(row[column])
        if key in table:
            raise DataError(f"{question.predictions}: {column} {key!r} occurs twice")
        table[key] = (_label(row["prediction"], place, question), float(row.get("logit") or 0.0))
    samples: list[Sample] = []
    found: list[tuple[int, float]] = []
    for shard in question.test_set.shards:
        for item in question.test_set.read(shard):
            if isinstance(item, Skip):
                if item.is_sample:
                    dropped[item.reason] = dropped.get(item.reason, 0) + 1
                continue
            hit = table.get(item.uid if column == "uid" else item.key)
            if hit is None:
                dropped["no_prediction"] = dropped.get("no_prediction", 0) + 1
                continue
            item.image = b""
            samples.append(item)
            found.append(hit)
    if not samples:
        raise DataError(
            f"{question.predictions}: none of its {len(table)} rows is of {question.test_set.uri} (by {column})",
            hint="keys are the samples' webdataset keys, or paths below the test set's folder",
        )
    labels = np.array([label for label, _ in found], np.int32)
    return samples, Predictions(labels, labels[:, None], np.array([logit for _, logit in found], np.float32))


def _rows(uri: str) -> tuple[list[dict[str, Any]], str]:
    if suffix_of(uri) == "parquet":
        rows: list[dict[str, Any]] = store.read_table(uri).to_pylist()
    else:
        rows = list(csv.DictReader(io.StringIO(store.read_bytes(uri).decode())))
    names = set(rows[0]) if rows else set()
    column = next((name for name in ("uid", "key") if name in names), "")
    if not column or "prediction" not in names:
        raise DataError(
            f"{uri} has the columns {sorted(names) or 'none'}", hint="expected uid or key, and prediction[, logit]"
        )
    return rows, column


def _label(value: Any, place: dict[str, int], question: Question) -> int:
    word = str(value).strip()
    if word in place:
        return place[word]
    if word.lstrip("-").isdigit() and 0 <= int(word) < len(question.test_set.class_names):
        return int(word)
    near = difflib.get_close_matches(word, place, n=1)
    raise DataError(
        f"{question.predictions}: prediction {word!r} is no class of {question.test_set.uri}",
        hint=f"did you mean {near[0]!r}?" if near else "class names as in classnames.txt, or their indices",
    )
