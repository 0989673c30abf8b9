"""Evaluation on frozen features: linear and few-shot probes, and retrieval between images and captions.

One Ray task per test set, as in `evaluate`. Writes OUT/<test>.json and, for probes, OUT/<test>.parquet with every
prediction; a probe on k images per class is the result <test>-<k>shot, and the curve is OUT/<test>.fewshot.parquet.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import rundir, schema, store, testsets
from clipgap_ray.config.evaluate import EvaluateSettings
from clipgap_ray.encoder import Encoder, EncoderSettings, check
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import probe, retrieval, zero_shot
from clipgap_ray.shards import Sample
from clipgap_ray.sources import list_shards
from clipgap_ray.stages import evaluate_models
from clipgap_ray.stages.evaluate_io import PROBE, RETRIEVAL, check_unchanged, decoded, write_jsonl, write_result
from clipgap_ray.stages.evaluate_sets import Question
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect, resolve_device
from clipgap_ray.stages.waits import bounded

RANKS = (1, 5, 10)
CURVE = pa.schema([("k", pa.int32()), ("seed", pa.int64()), ("acc1", pa.float64()), ("num_samples", pa.int64())])


def run(settings: EvaluateSettings) -> rundir.Summary:
    """Probe a model's features, or retrieve with them; errors are those of `evaluate.run`.

    Raises:
        ConfigError: A probe without training images, or with other classes than the test set; retrieval by a model
            without a text tower.
    """
    encoder = EncoderSettings(
        settings.model, settings.pretrained, batch_size=settings.batch_size, crop_border=settings.crop_border
    )
    check(encoder)
    if settings.task == "retrieval" and not encoder.has_text:
        raise ConfigError(f"--task retrieval: {settings.model} embeds images only", hint="use an open_clip model")
    asked = {name: _open(settings, name, uri) for name, uri in schema.named(settings.test, "--test").items()}
    guarded = {
        "model": settings.model, "weights": evaluate_models.weights_id(encoder), "crop_border": settings.crop_border,
        "task": settings.task, "seed": settings.seed,
    }  # fmt: skip
    with rundir.RunDirectory(settings.out, "evaluate", guarded) as directory:
        numbers = rundir.assign_parts(directory.uri, list(asked))
        for name, number in numbers.items():
            check_unchanged(settings.out, asked[name][0], directory.log.records.get(number))
        todo = [name for name in asked if numbers[name] not in directory.log.records]
        progress = Progress("evaluate", len(asked), "test sets", done=len(asked) - len(todo))
        if todo:
            connect()
            device = resolve_device(settings.device)
            gpus = 1 if device == "cuda" else 0
            task = ray.remote(num_cpus=1, num_gpus=gpus)(_evaluate)
            submit = lambda name: task.remote(directory.uri, *asked[name], settings, device)  # noqa: E731
            for record in bounded(submit, todo, needs={"CPU": 1.0, "GPU": gpus}):
                directory.log.append([{"part": numbers[record["test"]], **record}])
                progress.advance(rows=record["kept"])
        progress.close()
        write_jsonl(directory)
        tests = schema.named(settings.test, "--test")
        return directory.finish({"model": settings.model, "pretrained": settings.pretrained, "tests": tests})


def _open(settings: EvaluateSettings, name: str, uri: str) -> tuple[Question, testsets.TestSet | None]:
    """Return the test set as a question, and the training set of a probe."""
    crop = int(settings.of("crop", name) or settings.crop_border)
    if settings.task == "retrieval":
        captions = testsets.TestSet(uri, "captions", (), (), tuple(list_shards(uri)))
        return Question(name, captions, crop, "image_retrieval_recall@5"), None
    elsewhere = settings.of("train", name)
    test_set = testsets.open_test_set(uri, "" if elsewhere else "test")
    train = testsets.open_test_set(elsewhere) if elsewhere else testsets.open_test_set(uri, "train")
    if train.class_names != test_set.class_names:
        raise ConfigError(
            f"--task linear-probe: {train.uri} has {len(train.class_names)} classes, {uri} has "
            f"{len(test_set.class_names)}, expected the same names in the same order"
        )
    options = {"shots": list(settings.shots), "train": elsewhere} if settings.shots or elsewhere else {}
    return Question(name, test_set, crop, settings.of("metric", name) or "acc1", options=options), train


def _evaluate(
    uri: str, question: Question, train: testsets.TestSet | None, settings: EvaluateSettings, device: str
) -> dict[str, Any]:
    built = EncoderSettings(
        settings.model, settings.pretrained, device, batch_size=settings.batch_size, crop_border=settings.crop_border
    )
    encoder = built.build()
    dropped: dict[str, int] = {}
    rows, features = _features(question, question.test_set, encoder, settings.decoders, dropped)
    if train is None:
        return _retrieve(uri, question, built, encoder, rows, features, dropped)
    train_rows, train_features = _features(question, train, encoder, settings.decoders, {})
    order = np.array(sorted(range(len(train_rows)), key=lambda i: _rank(settings.seed, train_rows[i].uid)))
    train_labels = np.array([sample.label for sample in train_rows], np.int64)
    labels = np.array([sample.label for sample in rows], np.int32)
    classes = len(question.test_set.class_names)
    files: dict[str, str] = {}
    metrics: dict[str, float] = {}
    curve: list[dict[str, Any]] = []
    for k in settings.shots or (0,):
        chosen = order[np.isin(order, probe.shots(train_labels, order, k))] if k else order
        fitted = probe.fit(train_features[chosen], train_labels[chosen], classes)
        predictions = zero_shot.predict(fitted.logits(features))
        name = f"{question.name}-{k}shot" if k else question.name
        said = {"train": train.uri, "train_samples": len(chosen), "shots": k or None, "strength": fitted.strength}
        files[name] = write_result(uri, question, name, built, rows, labels, predictions, dropped, said, PROBE)
        metrics[name] = zero_shot.accuracy(labels, predictions)["acc1"]
        curve.append({"k": k, "seed": settings.seed, "acc1": metrics[name], "num_samples": len(rows)})
    files["fewshot"] = _write_curve(uri, question.name, curve)
    return _record(question, rows, dropped, files, metrics)


def _write_curve(uri: str, name: str, curve: list[dict[str, Any]]) -> str:
    """Write accuracy over shots as the report reads it; returns its sha256. k = 0 is all training images."""
    data = store.table_bytes(pa.Table.from_pylist(curve, schema=CURVE))
    store.write_bytes(store.join(uri, f"{name}.fewshot.parquet"), data)
    return store.sha256(data)


def _record(
    question: Question, rows: list[Sample], dropped: dict[str, int], files: dict[str, str], metrics: dict[str, float]
) -> dict[str, Any]:
    return {
        "test": question.name,
        "uri": question.test_set.uri,
        **({"options": question.options} if question.options else {}),
        "read": len(rows) + sum(dropped.values()),
        "kept": len(rows),
        "dropped": dropped,
        "files": files,
        "metrics": metrics,
    }


def _rank(seed: int, uid: str) -> bytes:
    """Draws by uid, so that the same images are the shots of every model."""
    return hashlib.blake2b(f"{seed} {uid}".encode(), digest_size=8).digest()


def _features(
    question: Question, test_set: testsets.TestSet, encoder: Encoder, decoders: int, dropped: dict[str, int]
) -> tuple[list[Sample], np.ndarray]:
    rows: list[Sample] = []
    features: list[np.ndarray] = []
    preprocess = evaluate_models.with_border(encoder.preprocess, question)
    for batch, pixels in decoded(test_set, preprocess, encoder.settings.batch_size, decoders, dropped):
        rows.extend(batch)
        features.append(encoder.encode_images(pixels))
    if not rows:
        raise DataError(f"test set {question.name} ({test_set.uri}) has no readable image: skipped {dropped}")
    return rows, np.concatenate(features)


def _retrieve(
    uri: str,
    question: Question,
    settings: EncoderSettings,
    encoder: Encoder,
    rows: list[Sample],
    features: np.ndarray,
    dropped: dict[str, int],
) -> dict[str, Any]:
    """Captions to images and back. Several captions of an image are lines of its text."""
    lines = [[line.strip() for line in (sample.caption or "").splitlines() if line.strip()] for sample in rows]
    with_text = [number for number, texts in enumerate(lines) if texts]
    if len(with_text) < len(rows):
        dropped["missing_caption"] = len(rows) - len(with_text)
    if not with_text:
        raise DataError(
            f"test set {question.name} ({question.test_set.uri}) has no captions", hint="expected .txt members"
        )
    rows, features = [rows[i] for i in with_text], features[with_text]
    texts = [text for i in with_text for text in lines[i]]
    image_of_text = np.repeat(np.arange(len(rows)), [len(lines[i]) for i in with_text])
    metrics = retrieval.recall(features, encoder.encode_texts(texts), image_of_text, RANKS)
    result = {
        "dataset": question.name,
        "model": settings.model,
        "pretrained": settings.pretrained.rstrip("/").rsplit("/", 1)[-1],
        "task": RETRIEVAL,
        "metrics": metrics,
        "main_metric": question.metric,
        "language": "en",
        "num_samples": len(rows),
        "num_texts": len(texts),
        "skipped": dropped,
        "crop_border": question.crop_border,
    }
    data = store.digest(metrics)
    store.write_json(store.join(uri, f"{question.name}.json"), result)
    return _record(question, rows, dropped, {"metrics": data}, metrics)
