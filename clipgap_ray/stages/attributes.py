"""Label backgrounds (or any attribute) of embedded images by zero-shot, and compare with labels that are known.

Use an encoder other than the model under test, or its mistakes label its own test (counteranimal.md 10). Writes:
OUT/labels/part-00000.parquet (schema.ATTRIBUTES), one part per part of the embeddings and the unit of restart;
OUT/attributes.json (counts, abstentions, agreement), OUT/confusion.csv, OUT/to_check.csv (least certain images).
Small sets are labelled in this process, pools by Ray tasks; memory is one part per task.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.base import read_yaml
from clipgap_ray.config.groups import AttributesSettings
from clipgap_ray.embeddings import EmbeddingSet, Part, check_same_encoder
from clipgap_ray.encoder import Encoder, EncoderSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import attributes
from clipgap_ray.reporting.page import csv_bytes
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.waits import each_part

SHIPPED = ("backgrounds", "backgrounds-miniature")
FOLDER = re.compile(r"(?:common|counter)-(.+)\Z")


def run(settings: AttributesSettings) -> rundir.Summary:
    """Label a set.

    Raises:
        ConfigError: If the prompts name fewer than two attributes or the encoder has no text side.
        IndexMismatchError: If the encoder built here is not that of the embeddings.
        DataError: If a file of labels lacks columns.
    """
    embeddings = EmbeddingSet.open(settings.embeddings)
    prompts = read_prompts(settings.prompts)
    corrections = read_labels(settings.corrections) if settings.corrections else {}
    unknown = sorted(set(corrections.values()) - set(prompts))
    if unknown:
        raise ConfigError(f"{settings.corrections} corrects to {unknown}, the prompts name {sorted(prompts)}")
    given = read_labels(settings.given) if settings.given and settings.given not in NAMED else {}
    guarded = {"embeddings": embeddings.digest, "prompts": prompts, "margin": settings.margin,
               "corrections": corrections}  # fmt: skip
    with rundir.RunDirectory(settings.out, "attributes", guarded) as directory:
        todo = [part for part in embeddings.parts if part.number not in directory.log.records]
        if todo:
            encoder = _encoder(settings, embeddings)
            texts = encoder.encode_texts([prompt for words in prompts.values() for prompt in words])
            weights = attributes.prompt_weights(texts, [len(words) for words in prompts.values()])
            work = partial(_part, embeddings, directory.uri, list(prompts), weights, settings.margin, corrections)
            progress = Progress("attributes", len(embeddings.parts), "parts", len(embeddings.parts) - len(todo))
            for record in each_part(work, todo, embeddings.num_rows):
                directory.log.append([record])
                progress.advance(rows=record["kept"])
            progress.close()
        result = _result(settings, embeddings, directory.uri, list(prompts), given)
        store.write_json(directory.path("attributes.json"), result)
        inputs = {"embeddings": embeddings.uri, "digest_of_embeddings": embeddings.digest, "attributes": list(prompts)}
        return directory.finish(inputs, counts=result["counts"], agreement=_brief(result["agreement"]))


def read_prompts(name: str) -> dict[str, list[str]]:
    """Read attribute: prompts, from a file or one of `SHIPPED`.

    Raises:
        ConfigError: If there is no such file, or it does not map two attributes or more to prompts.
    """
    if name in SHIPPED:
        with resources.as_file(resources.files("clipgap_ray") / "models" / f"{name}.yaml") as path:
            values = read_yaml(str(path))
    else:
        values = read_yaml(name)
    prompts = {str(key): [value] if isinstance(value, str) else value for key, value in values.items()}
    for key, texts in prompts.items():
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise ConfigError(f"{name}: {key} is {texts!r}, expected a prompt or a list of prompts")
    if len(prompts) < 2:
        raise ConfigError(f"{name} names {len(prompts)} attributes: choosing needs at least two")
    return prompts


def _encoder(settings: AttributesSettings, embeddings: EmbeddingSet) -> Encoder:
    own, device = embeddings.encoder, settings.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = EncoderSettings(
        own["model"], settings.pretrained or own.get("pretrained") or "", device,
        batch_size=int(own.get("batch_size") or 64), crop_border=int(own.get("crop_border") or 0),
    )  # fmt: skip
    if not wanted.has_text:
        raise ConfigError(f"{own['model']} knows images only", hint="embed with a CLIP model to label by zero-shot")
    encoder = wanted.build()
    if not str(own.get("weights_sha256") or "").startswith("as given"):
        check_same_encoder(own, encoder.fingerprint, (embeddings.uri, "the encoder built here"))
    elif encoder.dim != embeddings.dim:
        raise ConfigError(f"the encoder built here has {encoder.dim} dimensions, {embeddings.uri} has {embeddings.dim}")
    return encoder


def _part(
    embeddings: EmbeddingSet, out: str, names: list[str], weights: np.ndarray, margin: float,
    corrections: dict[str, str], part: Part,
) -> dict[str, Any]:  # fmt: skip
    found = attributes.label(np.asarray(embeddings.images(part.number)), weights, margin)
    uids = embeddings.metadata(part.number, ["uid"]).column("uid").to_pylist()
    labels = [corrections.get(uid) or (names[at] if at >= 0 else None)
              for uid, at in zip(uids, found.label.tolist(), strict=True)]  # fmt: skip
    table = pa.table(
        {
            "row_id": schema.row_ids(part.number, len(uids)),
            "uid": uids,
            "attribute": labels,
            "best": [names[at] for at in found.best.tolist()],
            "runner_up": [names[at] for at in found.runner_up.tolist()],
            "score": found.score,
            "margin": found.margin,
            "corrected": [uid in corrections for uid in uids],
        },
        schema=schema.ATTRIBUTES,
    )
    data = store.table_bytes(table)
    store.write_bytes(store.join(out, "labels", f"part-{part.number:05d}.parquet"), data)
    return {"part": part.number, "read": len(uids), "kept": len(uids), "files": {"labels": store.sha256(data)}}


# --- what came out ---------------------------------------------------------------------------------------


def _result(
    settings: AttributesSettings, embeddings: EmbeddingSet, out: str, names: list[str], given: dict[str, str]
) -> dict[str, Any]:
    """Counts over all parts, the least certain images, and the agreement with known labels, streaming the parts."""
    counts: dict[str, int] = dict.fromkeys([*names, ""], 0)
    least: list[dict[str, Any]] = []
    known: tuple[list[str], list[str | None]] = ([], [])
    for part in embeddings.parts:
        table = store.read_table(store.join(out, "labels", f"part-{part.number:05d}.parquet"))
        labels = table.column("attribute").to_pylist()
        for word in labels:
            counts[word or ""] += 1
        metadata = embeddings.metadata(part.number, ["uid", "image_path", "shard", "group", "class_name"])
        least = _least(least, table, metadata, settings.check)
        if settings.given:
            for row, label in zip(metadata.to_pylist(), labels, strict=True):
                word = NAMED[settings.given](row) if settings.given in NAMED else given.get(row["uid"], "")
                if word:
                    known[0].append(word)
                    known[1].append(label)
    if settings.given and not known[0]:
        raise DataError(f"--given {settings.given}: no image of {embeddings.uri} has a known label there")
    agreement = attributes.agreement(*known, names) if settings.given else None
    if agreement is not None:
        store.write_bytes(store.join(out, "confusion.csv"), csv_bytes(agreement["confusion"]))
    if least:
        store.write_bytes(store.join(out, "to_check.csv"), csv_bytes(least))
    abstained = counts.pop("")
    return {
        "num_images": embeddings.num_rows,
        "num_abstained": abstained,
        "counts": counts,
        "margin": settings.margin,
        "agreement": agreement,
    }


def _least(least: list[dict[str, Any]], table: pa.Table, metadata: pa.Table, count: int) -> list[dict[str, Any]]:
    """The least certain images so far that nobody has corrected."""
    margins = table.column("margin").to_numpy()
    for at in np.argsort(margins, kind="stable")[:count].tolist():
        row = table.slice(at, 1).to_pylist()[0]
        if row["corrected"]:
            continue
        key = metadata["image_path"][at].as_py()
        least.append({"uid": row["uid"], "attribute": row["best"], "runner_up": row["runner_up"],
                      "margin": row["margin"], "key": key, "shard": metadata["shard"][at].as_py()})  # fmt: skip
    return sorted(least, key=lambda record: record["margin"])[:count]


def _folder(row: dict[str, Any]) -> str:
    match = FOLDER.search(row["shard"] or "")
    return match.group(1) if match else ""


NAMED: dict[str, Callable[[dict[str, Any]], str]] = {
    "folder": _folder,
    "group": lambda row: row["group"] or "",
    "class_name": lambda row: row["class_name"] or "",
}


def _brief(agreement: dict[str, Any] | None) -> dict[str, Any] | None:
    return agreement and {key: agreement[key] for key in ("agree", "kappa", "num_abstained", "num_unknown")}


def read_labels(uri: str) -> dict[str, str]:
    """Read uid: attribute from the output of `clipgap attributes`, or from a csv or parquet file; abstentions are left
    out. For test sets and corrections, which fit in memory.

    Raises:
        DataError: If there is no `uid` or `attribute`, or an image has two labels.
    """
    result: dict[str, str] = {}
    for row in _label_rows(uri):
        if not row["attribute"]:
            continue
        if result.setdefault(row["uid"], row["attribute"]) != row["attribute"]:
            raise DataError(f"{uri} has two labels of {row['uid']}: {result[row['uid']]!r} and {row['attribute']!r}")
    if not result:
        raise DataError(f"{uri} holds no label", hint="expected columns uid, attribute")
    return result


def _label_rows(uri: str) -> Iterator[dict[str, str]]:
    rows: Iterator[dict[str, str]]
    if uri.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(store.read_bytes(uri).decode()))
        found, rows = list(reader.fieldnames or []), iter(reader)
    elif uri.endswith(".parquet"):
        table = store.read_table(uri)
        found, rows = table.column_names, iter(table.to_pylist())
    else:
        rundir.read_manifest(uri, "attributes")
        folder = store.join(uri, "labels")
        found = ["uid", "attribute"]
        rows = (row for name in sorted(store.list_names(folder)) for row in
                store.read_table(store.join(folder, name), ["uid", "attribute"]).to_pylist())  # fmt: skip
    missing = {"uid", "attribute"} - set(found)
    if missing:
        raise DataError(f"{uri} lacks the columns {sorted(missing)}; it has {found}")
    yield from rows
