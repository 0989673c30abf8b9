"""What all evaluations share: decoding ahead of the model, result files, and the check of what is there already."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import rundir, schema, store, testsets
from clipgap_ray.encoder import EncoderSettings, ImageError, Preprocess
from clipgap_ray.errors import StaleOutputError
from clipgap_ray.kernels import zero_shot
from clipgap_ray.shards import Sample, Skip
from clipgap_ray.stages.evaluate_sets import Question

ZERO_SHOT, TABLE, PROBE, RETRIEVAL = "zeroshot_classification", "predictions", "linear_probe", "zeroshot_retrieval"


def check_unchanged(out: str, question: Question, record: dict[str, Any] | None) -> None:
    """Refuse to take an earlier result for the answer to another question."""
    if record is None:
        return
    if record["uri"] != question.test_set.uri:
        raise StaleOutputError(
            f"{out} holds test set {question.name} from {record['uri']}, now it is {question.test_set.uri}",
            hint="choose another --out or another name",
        )
    before = record.get("options", {})
    if before != question.options:
        raise StaleOutputError(
            f"{out} holds test set {question.name} evaluated with {before or 'no options'}, "
            f"now with {question.options or 'none'}",
            hint="choose another --out or another name",
        )


def write_jsonl(directory: rundir.RunDirectory) -> None:
    """Write DataComp's line per result of the directory."""
    known = {"settings.json", "parts.json", "manifest.json", "summary.json"}
    lines = []
    for name in store.list_names(directory.uri):
        if not name.endswith(".json") or name.endswith(".candidates.json") or name in known:
            continue
        result = store.read_json(directory.path(name))
        main = result.get("main_metric", "acc1")
        metrics = {**result["metrics"], "main_metric": result["metrics"][main]}
        lines.append(json.dumps({"key": result["dataset"], "dataset": result["dataset"], "metrics": metrics}))
    store.write_bytes(directory.path("eval_results.jsonl"), ("\n".join(lines) + "\n").encode())


def write_result(
    uri: str,
    question: Question,
    name: str,
    encoder: EncoderSettings,
    rows: list[Sample],
    labels: np.ndarray,
    predictions: zero_shot.Predictions,
    dropped: dict[str, int],
    more: dict[str, Any],
    task: str = ZERO_SHOT,
) -> str:
    """Write NAME.parquet and NAME.json.

    Args:
        uri: Directory of the results.
        question: What was asked.
        name: Of the result: the test set's, or the test set's with a variant.
        encoder: The model.
        rows: (n) samples.
        labels: (n,) int32.
        predictions: Of the same samples.
        dropped: Skipped samples by reason.
        more: Further fields of the result.
        task: In CLIP_benchmark's words.

    Returns:
        The sha256 of the predictions.
    """
    groups = [sample.group for sample in rows]
    table = pa.table(
        {
            "row": np.arange(len(rows)),
            "uid": [sample.uid for sample in rows],
            "label": labels,
            "prediction": predictions.prediction,
            "correct": predictions.prediction == labels,
            "top5": list(predictions.top5),
            "logit": predictions.logit,
            "group": groups,
            "class_name": [sample.class_name for sample in rows],
        },
        schema=schema.PREDICTIONS,
    )
    data = store.table_bytes(table)
    store.write_bytes(store.join(uri, f"{name}.parquet"), data)
    by_group = zero_shot.group_accuracy(labels, predictions, groups)
    test_set = question.test_set
    metrics = zero_shot.accuracy(labels, predictions)
    if predictions.top5.shape[1] == 1:
        metrics.pop("acc5")  # a table names one class
    result = {
        "dataset": name,
        "model": encoder.model,
        "pretrained": encoder.pretrained.rstrip("/").rsplit("/", 1)[-1],
        "task": task,
        "metrics": metrics,
        "main_metric": question.metric,
        "language": "en",
        "num_samples": len(rows),
        "skipped": dropped,
        "class_names_sha256": store.digest(list(test_set.class_names)),
        "templates_sha256": store.digest(list(test_set.templates)),
        "crop_border": question.crop_border,
        **({"groups": by_group} if by_group else {}),
        **({"mask": {"classes": len(question.allowed), "sha256": store.digest(list(question.allowed))}}
           if question.allowed is not None else {}),
        **more,
    }  # fmt: skip
    store.write_json(store.join(uri, f"{name}.json"), result)
    return store.sha256(data)


def decoded(
    test_set: testsets.TestSet, preprocess: Preprocess, size: int, decoders: int, dropped: dict[str, int]
) -> Iterator[tuple[list[Sample], np.ndarray]]:
    """Yield batches of samples and (n, s, s, 3) uint8 pixels in the set's order, decoded by threads ahead of the model.

    Args:
        test_set: What to read.
        preprocess: How to decode.
        size: Images per batch.
        decoders: Threads; up to two batches wait decoded.
        dropped: Counts by reason what cannot be used.
    """
    samples: list[Sample] = []
    pixels: list[np.ndarray] = []

    def take(item: Sample | Skip, future: Future[np.ndarray] | None) -> None:
        reason = item.reason if isinstance(item, Skip) else ""
        if isinstance(item, Sample) and future is not None:
            try:
                pixels.append(future.result())
                item.image = b""  # a set's encoded bytes need not stay
                samples.append(item)
            except ImageError as error:
                reason = error.reason
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1

    with ThreadPoolExecutor(decoders, "decode") as pool:
        waiting: collections.deque[tuple[Sample | Skip, Future[np.ndarray] | None]] = collections.deque()
        for shard in test_set.shards:
            for item in test_set.read(shard):
                if isinstance(item, Sample):
                    waiting.append((item, pool.submit(preprocess.decode, item.image)))
                elif item.is_sample:
                    waiting.append((item, None))
                if len(waiting) > 2 * size:
                    take(*waiting.popleft())
                if len(samples) == size:
                    yield samples, np.stack(pixels)
                    samples, pixels = [], []
        while waiting:
            take(*waiting.popleft())
            if len(samples) == size or (samples and not waiting):
                yield samples, np.stack(pixels)
                samples, pixels = [], []
    if samples:
        yield samples, np.stack(pixels)
