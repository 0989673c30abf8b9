"""Evaluate models on test sets: zero-shot for CLIP, logits for classifiers, every prediction kept.

One Ray task per test set; finished results are skipped. Writes per test set: OUT/<test>.json (CLIP_benchmark's
fields), OUT/<test>.parquet (schema.PREDICTIONS), and OUT/eval_results.jsonl (DataComp's line per set).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import rundir, schema, store, testsets
from clipgap_ray.config.evaluate import EvaluateSettings
from clipgap_ray.encoder import EncoderSettings, ImageError, Preprocess, check, register_models, resolve_checkpoint
from clipgap_ray.errors import DataError, StaleOutputError
from clipgap_ray.kernels import zero_shot
from clipgap_ray.shards import Sample, Skip
from clipgap_ray.stages.session import Progress, bounded, connect, resolve_device


def run(settings: EvaluateSettings) -> rundir.Summary:
    """Evaluate one model on test sets.

    Raises:
        ConfigError: Unknown model or weights, a test set that is missing or has no class names.
        DataError: A test set without a single readable image, or a classifier of another number of classes.
    """
    preprocess = check(EncoderSettings(settings.model, settings.pretrained, crop_border=settings.crop_border))
    named = schema.named(settings.test, "--test")
    sets = {name: testsets.open_test_set(uri) for name, uri in named.items()}
    checkpoint = resolve_checkpoint(settings.pretrained)
    weights = store.sha256(store.read_bytes(checkpoint)) if store.exists(checkpoint) else checkpoint
    guarded = {"model": settings.model, "weights": weights, "crop_border": settings.crop_border}
    with rundir.RunDirectory(settings.out, "evaluate", guarded) as directory:
        numbers = rundir.assign_parts(directory.uri, list(sets))
        for name, number in numbers.items():
            before = directory.log.records.get(number, {}).get("uri", named[name])
            if before != named[name]:
                raise StaleOutputError(
                    f"{settings.out} holds test set {name} from {before}, now it is {named[name]}",
                    hint="choose another --out or another name",
                )
        todo = [name for name in sets if numbers[name] not in directory.log.records]
        progress = Progress("evaluate", len(sets), "test sets", done=len(sets) - len(todo))
        if todo:
            connect()
            device = resolve_device(settings.device)
            encoder = EncoderSettings(
                settings.model, settings.pretrained, device, batch_size=settings.batch_size,
                crop_border=settings.crop_border,
            )  # fmt: skip
            task = ray.remote(num_cpus=1, num_gpus=1 if device == "cuda" else 0)(_evaluate)
            for record in bounded(lambda name: task.remote(directory.uri, name, sets[name], encoder, preprocess), todo):
                directory.log.append([{"part": numbers[record["test"]], **record}])
                progress.advance(rows=record["kept"])
        progress.close()
        _write_jsonl(directory)
        return directory.finish({"model": settings.model, "pretrained": settings.pretrained, "tests": named})


def _write_jsonl(directory: rundir.RunDirectory) -> None:
    names = [name for name in store.list_names(directory.uri) if name.endswith(".json")]
    known = {"settings.json", "parts.json", "manifest.json", "summary.json"}
    lines = []
    for name in names:
        if name in known:
            continue
        result = store.read_json(directory.path(name))
        metrics = {**result["metrics"], "main_metric": result["metrics"]["acc1"]}
        lines.append(json.dumps({"key": result["dataset"], "dataset": result["dataset"], "metrics": metrics}))
    store.write_bytes(directory.path("eval_results.jsonl"), ("\n".join(lines) + "\n").encode())


def _evaluate(
    uri: str, name: str, test_set: testsets.TestSet, encoder: EncoderSettings, preprocess: Preprocess
) -> dict[str, Any]:
    """Evaluate one test set and write its files; returns the commit record."""
    logits_of = _classifier(encoder, test_set) or _zero_shot(encoder, test_set)
    rows: list[Sample] = []
    dropped: dict[str, int] = {}
    logits: list[np.ndarray] = []
    for batch, pixels in _decoded(test_set, preprocess, encoder.batch_size, dropped):
        rows.extend(batch)
        logits.append(logits_of(pixels))
    if not rows:
        raise DataError(f"test set {name} ({test_set.uri}) has no readable image: skipped {dropped}")
    predictions = zero_shot.predict(np.concatenate(logits))
    labels = np.array([sample.label for sample in rows], np.int32)
    metrics = zero_shot.accuracy(labels, predictions)
    table = pa.table(
        {
            "row": np.arange(len(rows)),
            "uid": [sample.uid for sample in rows],
            "label": labels,
            "prediction": predictions.prediction,
            "correct": predictions.prediction == labels,
            "top5": list(predictions.top5),
            "logit": predictions.logit,
            "group": [sample.group for sample in rows],
            "class_name": [sample.class_name for sample in rows],
        },
        schema=schema.PREDICTIONS,
    )
    data = store.table_bytes(table)
    store.write_bytes(store.join(uri, f"{name}.parquet"), data)
    result = {
        "dataset": name,
        "model": encoder.model,
        "pretrained": encoder.pretrained.rstrip("/").rsplit("/", 1)[-1],
        "task": "zeroshot_classification",
        "metrics": metrics,
        "language": "en",
        "num_samples": len(rows),
        "skipped": dropped,
        "class_names_sha256": store.digest(list(test_set.class_names)),
        "templates_sha256": store.digest(list(test_set.templates)),
        "crop_border": encoder.crop_border,
    }
    store.write_json(store.join(uri, f"{name}.json"), result)
    read = len(rows) + sum(dropped.values())
    files = {"predictions": store.sha256(data)}
    return {
        "test": name,
        "uri": test_set.uri,
        "read": read,
        "kept": len(rows),
        "dropped": dropped,
        "files": files,
        "metrics": metrics,
    }


def _decoded(
    test_set: testsets.TestSet, preprocess: Preprocess, size: int, dropped: dict[str, int]
) -> Iterator[tuple[list[Sample], np.ndarray]]:
    """Yield batches of samples and (n, s, s, 3) uint8 pixels; what cannot be used is counted in `dropped`."""
    samples: list[Sample] = []
    pixels: list[np.ndarray] = []
    for shard in test_set.shards:
        for item in test_set.read(shard):
            reason = item.reason if isinstance(item, Skip) else ""
            if isinstance(item, Sample):
                try:
                    pixels.append(preprocess.decode(item.image))
                    samples.append(item)
                except ImageError as error:
                    reason = error.reason
            elif not item.is_sample:
                continue
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
            if len(samples) == size:
                yield samples, np.stack(pixels)
                samples, pixels = [], []
    if samples:
        yield samples, np.stack(pixels)


LogitsOf = Callable[[np.ndarray], np.ndarray]


def _zero_shot(settings: EncoderSettings, test_set: testsets.TestSet) -> LogitsOf:
    """Return pixels -> logits by the prompt ensemble (train_test_similarity.md 2.10)."""
    encoder = settings.build()
    prompts = [template.format(c=name) for name in test_set.class_names for template in test_set.templates]
    weights = zero_shot.class_weights(encoder.encode_texts(prompts), len(test_set.class_names))
    return lambda pixels: encoder.encode_images(pixels) @ weights.T


def _classifier(settings: EncoderSettings, test_set: testsets.TestSet) -> LogitsOf | None:
    """Return pixels -> logits of a supervised checkpoint of ours; None when the weights are CLIP's."""
    import open_clip
    import torch

    from clipgap_ray.stages.train_model import Classifier

    path = resolve_checkpoint(settings.pretrained)
    if not path.endswith(".pt") or not store.exists(path):
        return None
    state = torch.load(path, map_location="cpu", weights_only=True).get("state_dict", {})
    if "head.weight" not in state:
        return None
    num_classes, dim = state["head.weight"].shape
    if num_classes != len(test_set.class_names):
        raise DataError(
            f"the classifier {path} has {num_classes} classes, {test_set.uri} names {len(test_set.class_names)}",
            hint="train it on a reference with the same classnames.txt",
        )
    register_models()  # this process may be a fresh Ray worker
    model = Classifier(open_clip.create_model(settings.model).visual, dim, num_classes)
    model.load_state_dict(state)
    model = model.eval().to(settings.device)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=settings.device).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=settings.device).view(1, 3, 1, 1)

    def logits_of(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            tensor = torch.from_numpy(pixels).to(settings.device).permute(0, 3, 1, 2).float()
            return model((tensor / 255 - mean) / std).cpu().numpy()

    return logits_of
