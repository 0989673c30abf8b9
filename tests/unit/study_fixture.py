"""A small, fake but coherent study directory: drawn images, planted closeness, predictions that follow it.

Latent vectors are class + style + background + noise. The reference holds photos only, the pool photos and sketches;
so sketches are closer to the pool, gap matching on sketch removes sketches, and predicted accuracy follows the gap.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from clipgap_ray import embeddings, rundir, schema, shards, store
from clipgap_ray.kernels.splits import keep_least, keep_most, keep_random
from clipgap_ray.sources import Shard

CLASSES = ("fox", "owl", "crab", "boat", "tree", "car", "cup", "fish")
BACKGROUNDS = ("grass", "snow", "sand", "water")
COLOURS = {"grass": "#7fae6a", "snow": "#e9eef2", "sand": "#dcc48f", "water": "#6f9fc4"}
DIM = 48
ENCODER = {
    "model": "projection",
    "pretrained": "",
    "weights_sha256": "f" * 64,
    "quick_gelu": False,
    "preprocess": "64px",
    "dim": DIM,
    "crop_border": 0,
    "precision": "fp32",
}
TESTS = ("val", "sketch", "counteranimal")
NEIGHBOURS = 3


@dataclass
class Images:
    """One set of images: facts and stored rows."""

    labels: np.ndarray
    styles: list[str]
    backgrounds: np.ndarray
    rows: np.ndarray
    uids: list[str]
    keys: list[str]
    jpegs: list[bytes]
    groups: list[str] = field(default_factory=list)


def draw(rng: np.random.Generator, label: int, style: str, background: str) -> bytes:
    """Draw a 64 px picture: a polygon per class, photo on colour or sketch on white."""
    image = Image.new("RGB", (64, 64), COLOURS[background] if style == "photo" else "white")
    pen = ImageDraw.Draw(image)
    angles = np.linspace(0, 2 * np.pi, label + 4)[:-1] + rng.uniform(0, 0.6)
    radius = rng.uniform(16, 26) * np.where(np.arange(len(angles)) % 2, 1.0, 0.55 + 0.05 * label)
    shape = [(32 + r * np.cos(a), 32 + r * np.sin(a)) for r, a in zip(radius, angles, strict=True)]
    fill = tuple(int(v) for v in rng.integers(40, 200, 3)) if style == "photo" else None
    pen.polygon(shape, fill=fill, outline="black", width=1 if style == "photo" else 2)
    # Grain: without it two plain polygons may round to the same pixels and be true duplicates.
    pixels = np.asarray(image, np.int16) + rng.integers(-6, 7, (64, 64, 1))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def make_images(rng: np.random.Generator, basis: dict[str, np.ndarray], name: str, count: int, sketches: float,
                spread: float) -> Images:  # fmt: skip
    """Make `count` images of which a share are sketches; `spread` is the latent noise."""
    labels = rng.integers(0, len(CLASSES), count)
    styles = ["sketch" if drawn else "photo" for drawn in rng.random(count) < sketches]
    backgrounds = rng.integers(0, len(BACKGROUNDS), count)
    latent = basis["class"][labels] + 0.45 * basis["background"][backgrounds]
    latent += 0.9 * np.stack([basis["style"][int(style == "sketch")] for style in styles])
    latent += spread * rng.normal(size=(count, DIM)) / np.sqrt(DIM) * 3
    rows = (latent / np.linalg.norm(latent, axis=1, keepdims=True)).astype(np.float16)
    jpegs = [draw(rng, labels[i], styles[i], BACKGROUNDS[backgrounds[i]]) for i in range(count)]
    keys = [f"{i:06d}" for i in range(count)]
    shard = Shard("", "00000.tar", "tar", name)
    uids = [shards.sample_uid({}, None, None, shard, key) for key in keys]
    return Images(labels, styles, backgrounds, rows, uids, keys, jpegs)


def write_embeddings(root: Path, name: str, folder: str, images: Images, per_part: int, labelled: bool) -> None:
    """Write the tars of a set and its embeddings."""
    with rundir.RunDirectory(str(root / "embed" / name), "embed", {"source": folder}) as directory:
        tars, records = {}, []
        for part, start in enumerate(range(0, len(images.rows), per_part)):
            chosen = range(start, min(start + per_part, len(images.rows)))
            tar = str(root / folder / f"{part:05d}.tar")
            members = [(images.keys[i], {"jpg": images.jpegs[i], "txt": _caption(images, i).encode()}) for i in chosen]
            store.write_bytes(tar, shards.write_tar(members))
            tars[str(part)] = tar
            offsets = {s.key: s.offset for s in shards.read_shard(Shard(tar, tar, "tar")) if hasattr(s, "offset")}
            rows = [_metadata(images, i, part, i - start, offsets, labelled) for i in chosen]
            table = pa.Table.from_pylist(rows, schema=schema.METADATA)
            ledger = pa.Table.from_pylist([], schema=schema.LEDGER)
            records.append(
                embeddings.write_part(
                    directory.uri, part, f"{part:05d}.tar", images.rows[list(chosen)], None, table, ledger
                )
            )
        directory.log.append(records)
        directory.finish({"encoder": ENCODER, "source": str(root / folder), "shards": tars})


def _caption(images: Images, i: int) -> str:
    return f"a {images.styles[i]} of a {CLASSES[images.labels[i]]}"


def _metadata(images: Images, i: int, part: int, row: int, offsets: dict[str, int], labelled: bool) -> dict[str, Any]:
    return {
        "image_path": images.keys[i],
        "caption": _caption(images, i),
        "uid": images.uids[i],
        "row_id": part << 32 | row,
        "shard": f"{part:05d}.tar",
        "sha256": store.sha256(images.jpegs[i]),
        "image_offset": offsets[images.keys[i]],
        "image_bytes": len(images.jpegs[i]),
        "label": int(images.labels[i]) if labelled else -1,
        "class_name": CLASSES[images.labels[i]] if labelled else "",
        "group": images.groups[i] if images.groups else "",
    }


@dataclass
class Built:
    """A study on disk and the exact similarities behind it."""

    root: Path
    pool: Images
    reference: Images
    tests: dict[str, Images]
    similarity: dict[str, np.ndarray]  # (test images, pool) float64
    tau: dict[str, np.ndarray]
    keeps: dict[str, np.ndarray]


def build_study(root: Path, pool_rows: int = 400, test_rows: int = 80, seeds: tuple[int, ...] = (0,),
                num_supervised: int = 3, per_part: int = 150) -> Built:  # fmt: skip
    """Write a complete study.

    Args:
        root: Directory to write.
        pool_rows: Images in the pool; the reference has half as many.
        test_rows: Images per test set.
        seeds: Training seeds of every split.
        num_supervised: Supervised baselines of different length.
        per_part: Rows per part of the pool.
    """
    rng = np.random.default_rng(7)
    basis = {
        "class": rng.normal(size=(len(CLASSES), DIM)) / np.sqrt(DIM) * 1.6,
        "style": rng.normal(size=(2, DIM)) / np.sqrt(DIM),
        "background": rng.normal(size=(len(BACKGROUNDS), DIM)) / np.sqrt(DIM),
    }
    pool = make_images(rng, basis, "pool", pool_rows, 0.3, 0.32)
    reference = make_images(rng, basis, "reference", pool_rows // 2, 0.0, 0.26)
    tests = {
        "val": make_images(rng, basis, "val", test_rows, 0.0, 0.26),
        "sketch": make_images(rng, basis, "sketch", test_rows, 1.0, 0.3),
        "counteranimal": make_images(rng, basis, "counteranimal", test_rows, 0.0, 0.34),
    }
    tests["counteranimal"].groups = ["common" if b < 2 else "counter" for b in tests["counteranimal"].backgrounds]
    _plant(pool, tests["val"])
    for name, images in {"pool": pool, "reference": reference, **tests}.items():
        folder = f"world/{name if name in ('pool', 'reference') else 'tests/' + name}"
        write_embeddings(root, name, folder, images, per_part, labelled=name != "pool")
    similarity = {t: images.rows.astype(np.float64) @ pool.rows.astype(np.float64).T for t, images in tests.items()}
    nearest = {t: images.rows.astype(np.float64) @ reference.rows.astype(np.float64).T for t, images in tests.items()}
    tau = {t: values.max(axis=1) for t, values in nearest.items()}
    built = Built(root, pool, reference, tests, similarity, tau, {})
    built.keeps = _cuts(built)
    _write_scores(built, {t: v.argmax(axis=1) for t, v in nearest.items()}, per_part)
    _write_splits(built, per_part)
    _write_diagnostics(built)
    _write_truth(built)
    _write_runs(built, seeds, num_supervised)
    return built


def _plant(pool: Images, val: Images) -> None:
    """Rows 1 and 2 copy rows 11 and 12 of the pool; rows 3 and 4 are test images of val."""
    for copy, source in ((1, 11), (2, 12)):
        pool.rows[copy], pool.jpegs[copy] = pool.rows[source], pool.jpegs[source]
        pool.labels[copy], pool.styles[copy] = pool.labels[source], pool.styles[source]
    for row, test in ((3, 0), (4, 1)):
        pool.rows[row], pool.jpegs[row], pool.styles[row] = val.rows[test], val.jpegs[test], "photo"
        pool.labels[row] = val.labels[test]


def _cuts(built: Built) -> dict[str, np.ndarray]:
    count = len(built.pool.rows)
    most = built.similarity["sketch"].max(axis=0)
    cuts = {"full": np.ones(count, bool)}
    for test in ("sketch", "val"):
        margin = (built.similarity[test] - built.tau[test][:, None]).max(axis=0)
        cuts[f"gap-{test}"] = margin <= 0
    for share in (2, 4):
        size = count // share
        cuts[f"near-sketch-{size}"] = keep_least(most, size)
        cuts[f"random-{size}"] = keep_random(count, size, np.random.default_rng(share))
        cuts[f"far-sketch-{size}"] = keep_most(most, size)
    return cuts


def _pool_row_ids(built: Built, per_part: int) -> np.ndarray:
    at = np.arange(len(built.pool.rows))
    return (at // per_part) << 32 | at % per_part


def _write_scores(built: Built, nearest_reference: dict[str, np.ndarray], per_part: int) -> None:
    row_ids = _pool_row_ids(built, per_part)
    for test, s in built.similarity.items():
        test_ids = _test_row_ids(built, test, per_part)
        margin = s - built.tau[test][:, None]
        table = pa.table(
            [row_ids, built.pool.uids, s.max(axis=0), test_ids[s.argmax(axis=0)], margin.max(axis=0),
             test_ids[margin.argmax(axis=0)]], names=schema.POOL_SCORES.names,
        ).cast(schema.POOL_SCORES)  # fmt: skip
        for part, start in enumerate(range(0, len(row_ids), per_part)):
            path = built.root / "scores" / "pool" / test / f"part-{part:05d}.parquet"
            store.write_table(str(path), table.slice(start, per_part))
        order = np.argsort(-s, axis=1, kind="stable")[:, :10]
        records = [
            {
                "row_id": int(test_ids[i]),
                "uid": built.tests[test].uids[i],
                "tau": built.tau[test][i],
                "reference_uid": built.reference.uids[nearest_reference[test][i]],
                "similarity": s[i].max(),
                "nearest_uid": built.pool.uids[order[i, 0]],
                "nearest_row_ids": row_ids[order[i]].tolist(),
                "nearest_similarities": s[i, order[i]].tolist(),
            }
            for i in range(len(s))
        ]
        table = pa.Table.from_pylist(records, schema=schema.QUERY_SCORES)
        store.write_table(str(built.root / "scores" / "queries" / f"{test}.parquet"), table)
    store.write_json(str(built.root / "scores" / "manifest.json"), {"stage": "score", "digest": "5" * 64})


def _test_row_ids(built: Built, test: str, per_part: int) -> np.ndarray:
    at = np.arange(len(built.tests[test].rows))
    return (at // per_part) << 32 | at % per_part


def _write_splits(built: Built, per_part: int) -> None:
    row_ids = _pool_row_ids(built, per_part)
    for name, keep in built.keeps.items():
        kind = name.split("-")[0].replace("gap", "gap-match")
        tests = [name.split("-")[1]] if kind in ("gap-match", "near", "far") else []
        recipe = {
            "name": name,
            "kind": kind,
            "tests": tests,
            "slack": 0.0 if kind == "gap-match" else None,
            "counts": {"pool": len(keep), "kept": int(keep.sum()), "removed": int((~keep).sum())},
            "rescored": 0,
        }
        store.write_json(str(built.root / "splits" / f"{name}.recipe.json"), recipe)
        for test, s in built.similarity.items():
            kept = np.where(keep, s, -np.inf)
            best = kept.max(axis=1)
            kth = -np.sort(-kept, axis=1)[:, :NEIGHBOURS]
            table = pa.table(
                [_test_row_ids(built, test, per_part), built.tests[test].uids, built.tau[test], best,
                 np.maximum(best, built.tau[test]), row_ids[kept.argmax(axis=1)], list(kth),
                 [[0]] * len(best)], names=schema.GAPS.names,
            ).cast(schema.GAPS)  # fmt: skip
            store.write_table(str(built.root / "gaps" / name / f"{test}.parquet"), table)


def _write_diagnostics(built: Built) -> None:
    """Median k-th neighbours as `gaps` writes them; the reference's curve is tau less 0.02 per neighbour."""
    records = []
    jpegs = np.array([hash(jpeg) for jpeg in built.pool.jpegs])
    for test, s in built.similarity.items():
        own = [hash(jpeg) for jpeg in built.tests[test].jpegs]
        for name, keep in {"pool": np.ones(s.shape[1], bool), **built.keeps}.items():
            kth = np.median(-np.sort(-np.where(keep, s, -np.inf), axis=1)[:, :NEIGHBOURS], axis=0)
            within = float((np.where(keep, s, -np.inf) > built.tau[test][:, None] - 0.05).sum(axis=1).mean())
            best = np.where(keep, s, -np.inf).max(axis=1)
            records.append({"split": name, "test": test, "num_images": len(s), "mean_rows_within": {"0.05": within},
                            "duplicate_rate": {f"{at:g}": float((best >= at).mean()) for at in (0.9, 0.99)},
                            "same_bytes_rate": float(np.isin(own, jpegs[keep]).mean()),
                            "median_kth_similarity": [float(x) if np.isfinite(x) else None for x in kth]})  # fmt: skip
        curve = [float(np.median(built.tau[test])) - 0.02 * j for j in range(NEIGHBOURS)]
        records.append({"split": "reference", "test": test, "median_kth_similarity": curve})
    store.write_json(str(built.root / "gaps" / "diagnostics.json"), records)


def _write_truth(built: Built) -> None:
    rows = []
    for i, uid in enumerate(built.pool.uids):
        kind, group = "", -1
        if i in (1, 2, 11, 12):
            kind, group = ("exact" if i < 3 else "source"), 11 + (i - 1) % 10
        leak = {3: "000000", 4: "000001"}.get(i, "")
        rows.append(
            {"set": "pool", "uid": uid, "duplicate_group": group, "duplicate_kind": kind, "fault": "",
             "leak_of_set": "val" if leak else "", "leak_of_key": leak, "leak_kind": "exact" if leak else ""}
        )  # fmt: skip
    store.write_table(str(built.root / "world" / "truth.parquet"), pa.Table.from_pylist(rows))
    keep = [
        {"row_id": i, "uid": uid, "keep": i not in (1, 2), "similarity": None,
         "kept_uid": built.pool.uids[i + 10] if i in (1, 2) else uid, "reason": "sha256" if i in (1, 2) else "",
         "group": i} for i, uid in enumerate(built.pool.uids)
    ]  # fmt: skip
    thresholds = {"0.98": {"kept": len(keep) - 2, "dropped": {"sha256": 2}},
                  "0.9": {"kept": len(keep) - 5, "dropped": {"sha256": 2, "similarity": 3}}}  # fmt: skip
    store.write_json(str(built.root / "dedup" / "summary.json"), {"stage": "dedup", "thresholds": thresholds})
    table = pa.Table.from_pylist(keep, schema=schema.KEEP)
    store.write_table(str(built.root / "dedup" / "keep" / "part-00000.parquet"), table)


def _write_runs(built: Built, seeds: tuple[int, ...], num_supervised: int) -> None:
    runs = []
    for split in built.keeps:
        for seed in seeds:
            runs.append(_run(f"{split}-s{seed}", split, "clip", "pool+reference", seed, 35_000))
    for number in range(num_supervised):
        runs.append(_run(f"supervised-{number}", "full", "supervised", "reference", 0, 12_000 * (number + 1)))
    for entry in runs:
        _write_run(built, entry)
    info = {
        "name": "fixture", "seeds": list(seeds), "settings": {"made_by": "tests/unit/study_fixture.py"},
        "metric": {"model": "projection", "pretrained": "none"}, "tests": list(TESTS), "reference": "reference",
        "main_test": "val", "base_split": "full", "runs": runs, "splits": list(built.keeps),
    }  # fmt: skip
    store.write_json(str(built.root / "study.json"), info)


def _run(name: str, split: str, objective: str, train_on: str, seed: int, samples: int) -> dict[str, Any]:
    return {"name": name, "split": split, "objective": objective, "train_on": train_on, "seed": seed,
            "num_samples_seen": samples, "model": "conv6"}  # fmt: skip


def _write_run(built: Built, entry: dict[str, Any]) -> None:
    """Predictions that follow the gap: near images are easy. Noise per image is common to all models (paired)."""
    rng = np.random.default_rng([sum(entry["name"].encode()), entry["seed"]])
    supervised = entry["objective"] == "supervised"
    for test, images in built.tests.items():
        kept = np.where(built.keeps[entry["split"]], built.similarity[test], -1).max(axis=1)
        gap = built.tau[test] if supervised else np.maximum(built.tau[test], kept)
        strength = entry["num_samples_seen"] / 36_000 if supervised else 1.0
        score = 14 * (gap - 0.72) + (1.2 * strength - 1.6 if supervised else 0.0)
        if images.groups:
            score -= np.where(np.array(images.groups) == "counter", 0.8, 0.0)
        luck = np.random.default_rng(len(test)).logistic(size=len(gap)) + 0.3 * rng.normal(size=len(gap))
        _write_predictions(built, entry, test, score > luck)
    lines = [
        {"step": step, "samples": step * 100, "loss": 0.6 + 4.2 * np.exp(-step / 60) + 0.08 * rng.normal(), "lr": 1e-3}
        for step in range(0, entry["num_samples_seen"] // 100 + 1, 10)
    ]
    path = built.root / "runs" / entry["name"] / "metrics.jsonl"
    store.write_bytes(str(path), "".join(json.dumps(line) + "\n" for line in lines).encode())


def _write_predictions(built: Built, entry: dict[str, Any], test: str, right: np.ndarray) -> None:
    images = built.tests[test]
    records = [
        {
            "row": i,
            "uid": images.uids[i],
            "label": int(images.labels[i]),
            "prediction": int(images.labels[i] if right[i] else (images.labels[i] + 1) % len(CLASSES)),
            "correct": bool(right[i]),
            "top5": [int(images.labels[i])],
            "logit": 1.0,
            "group": images.groups[i] if images.groups else "",
            "class_name": CLASSES[images.labels[i]],
        }
        for i in range(len(right))
    ]
    table = pa.Table.from_pylist(records, schema=schema.PREDICTIONS)
    store.write_table(str(built.root / "eval" / entry["name"] / f"{test}.parquet"), table)
