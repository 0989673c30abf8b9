"""Evaluate models on test sets: zero-shot for CLIP, logits for classifiers, every prediction kept.

One Ray task per test set; finished results are skipped. Writes per test set: OUT/<test>.json (CLIP_benchmark's
fields), OUT/<test>.parquet (schema.PREDICTIONS), and OUT/eval_results.jsonl (DataComp's line per set). Candidate lists
(1 vs. 20) give a second result OUT/<test>-1v20.json and .parquet. Probes and retrieval: `evaluate_features`.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import ray

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.evaluate import EvaluateSettings
from clipgap_ray.encoder import EncoderSettings, Preprocess
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import zero_shot
from clipgap_ray.shards import Sample
from clipgap_ray.stages import evaluate_features, evaluate_models, evaluate_tables
from clipgap_ray.stages.evaluate_io import TABLE, ZERO_SHOT, check_unchanged, decoded, write_jsonl, write_result
from clipgap_ray.stages.evaluate_sets import Question, questions
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect, resolve_device
from clipgap_ray.stages.waits import bounded


def run(settings: EvaluateSettings) -> rundir.Summary:
    """Evaluate one model on test sets.

    Raises:
        ConfigError: Unknown model or weights, a test set that is missing or has no class names, a class list, mask or
            map that does not fit.
        DataError: A test set without a single readable image, or a classifier of another number of classes.
    """
    if settings.task != "zeroshot":
        return evaluate_features.run(settings)
    asked = questions(settings)
    encoder = EncoderSettings(
        settings.model, settings.pretrained, batch_size=settings.batch_size, crop_border=settings.crop_border
    )
    runs_model = any(not question.predictions for question in asked.values())
    preprocess = evaluate_models.check_model(encoder) if runs_model else None
    if runs_model:
        evaluate_models.class_counts(encoder, list(asked.values()))
    weights = evaluate_models.weights_id(encoder) if runs_model else "predictions"
    guarded = {"model": settings.model, "weights": weights, "crop_border": settings.crop_border}
    with rundir.RunDirectory(settings.out, "evaluate", guarded) as directory:
        numbers = rundir.assign_parts(directory.uri, list(asked))
        for name, number in numbers.items():
            check_unchanged(settings.out, asked[name], directory.log.records.get(number))
        todo = [name for name in asked if numbers[name] not in directory.log.records]
        progress = Progress("evaluate", len(asked), "test sets", done=len(asked) - len(todo))
        if todo:
            connect()
            device = resolve_device(settings.device)
            encoder = EncoderSettings(
                settings.model, settings.pretrained, device, batch_size=settings.batch_size,
                crop_border=settings.crop_border,
            )  # fmt: skip
            gpus = 1 if device == "cuda" and runs_model else 0
            task = ray.remote(num_cpus=1, num_gpus=gpus)(_evaluate)
            submit = lambda name: task.remote(directory.uri, asked[name], encoder, preprocess, settings.decoders)  # noqa: E731
            for record in bounded(submit, todo, needs={"CPU": 1.0, "GPU": gpus}):
                directory.log.append([{"part": numbers[record["test"]], **record}])
                progress.advance(rows=record["kept"])
        progress.close()
        write_jsonl(directory)
        tests = schema.named(settings.test, "--test")
        return directory.finish({"model": settings.model, "pretrained": settings.pretrained, "tests": tests})


def _evaluate(
    uri: str, question: Question, encoder: EncoderSettings, preprocess: Preprocess | None, decoders: int
) -> dict[str, Any]:
    """Evaluate one test set and write its files; returns the commit record."""
    dropped: dict[str, int] = {}
    mask = question.mask()
    if question.predictions:
        rows, predictions = evaluate_tables.read(question, dropped)
        logits = None
    else:
        assert preprocess is not None  # `run` checked the model
        rows, logits = _logits(question, encoder, preprocess, decoders, dropped)
        if mask is not None:
            inside = [mask[sample.label] for sample in rows]
            rows = list(itertools.compress(rows, inside))
            logits = logits[np.array(inside, bool)]
            if len(rows) < len(inside):
                dropped["outside_mask"] = len(inside) - len(rows)
        if rows:
            predictions = zero_shot.predict(logits, mask)
    if not rows:
        raise DataError(f"test set {question.name} ({question.test_set.uri}) has no readable image: skipped {dropped}")
    labels = np.array([sample.label for sample in rows], np.int32)
    task = TABLE if question.predictions else ZERO_SHOT
    files = {
        "predictions": write_result(uri, question, question.name, encoder, rows, labels, predictions, dropped, {}, task)
    }
    if logits is not None:
        lists, said = _candidates(uri, question, encoder, logits, labels)
        if lists is not None:
            among = zero_shot.predict_among(logits, labels, lists)
            name = f"{question.name}-1v{max(len(one) for one in lists.values())}"
            files["among"] = write_result(uri, question, name, encoder, rows, labels, among, dropped, said)
    return {
        "test": question.name,
        "uri": question.test_set.uri,
        **({"options": question.options} if question.options else {}),
        "read": len(rows) + sum(dropped.values()),
        "kept": len(rows),
        "dropped": dropped,
        "files": files,
        "metrics": zero_shot.accuracy(labels, predictions),
    }


def _logits(
    question: Question, encoder: EncoderSettings, preprocess: Preprocess, decoders: int, dropped: dict[str, int]
) -> tuple[list[Sample], np.ndarray]:
    rows: list[Sample] = []
    logits: list[np.ndarray] = []
    score = evaluate_models.logits_of(encoder, question)
    framed = evaluate_models.with_border(preprocess, question)
    for batch, pixels in decoded(question.test_set, framed, encoder.batch_size, decoders, dropped):
        rows.extend(batch)
        logits.append(score(pixels))
    return rows, np.concatenate(logits) if logits else np.zeros((0, len(question.test_set.class_names)), np.float32)


def _candidates(
    uri: str, question: Question, encoder: EncoderSettings, logits: np.ndarray, labels: np.ndarray
) -> tuple[dict[int, list[int]] | None, dict[str, Any]]:
    """Return candidate lists, given or made (and then written), and what the result says of them."""
    names = question.test_set.class_names
    if question.lists is not None:
        lacking = sorted(set(labels.tolist()) - question.lists.keys())
        if lacking:
            raise ConfigError(
                f"--candidates of {question.name} has no list for class {lacking[0]} ({names[lacking[0]]})",
                hint="make lists on the same test set with --candidates-k",
            )
        return question.lists, {"candidates_sha256": store.digest(question.lists)}
    if not question.candidates_k:
        return None, {}
    lists, forced = zero_shot.candidate_lists(logits, labels, question.candidates_k)
    table = {
        "model": encoder.model,
        "pretrained": encoder.pretrained.rstrip("/").rsplit("/", 1)[-1],
        "k": question.candidates_k,
        "class_names_sha256": store.digest(list(names)),
        "forced": forced,
        "forced_names": [names[label] for label in forced],
        "lists": {str(label): found for label, found in lists.items()},
    }
    store.write_json(store.join(uri, f"{question.name}.candidates.json"), table)
    return lists, {"candidates_sha256": store.digest(lists), "true_label_forced": forced}
