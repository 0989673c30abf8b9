"""What tests make for themselves: a rendered world, embeddings without Ray, tars, unit rows."""

from __future__ import annotations

import dataclasses
import functools
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from clipgap_ray import embeddings, rundir, schema, store, testsets, world
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.sources import Shard, list_shards
from clipgap_ray.stages import embed

TESTS = ("val", "sketch", "r")
BATCH_SIZE = 16  # smaller than a shard, and no divisor of one: parts of several chunks with a ragged last one
SPEC = dataclasses.replace(
    world.preset("tiny", rows=600, seed=3, faults=True),
    reference_rows=120, test_rows=48, counter_rows=2, samples_per_shard=60, leak_rate=0.1,
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """A rendered world: where it is, and one dict per row of its truth table."""

    root: Path
    truth: list[dict[str, Any]]

    def path(self, *names: str) -> str:
        return str(self.root.joinpath(*names))

    def of(self, set_name: str) -> list[dict[str, Any]]:
        return [row for row in self.truth if row["set"] == set_name]


def render_world(root: Path, spec: world.WorldSpec = SPEC) -> World:
    tables = []
    for unit in world.units(spec):
        rendered = world.render(spec, unit)
        for name, data in rendered.files.items():
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        tables.append(rendered.truth)
    truth = pa.concat_tables(tables)
    store.write_table(str(root / "truth.parquet"), truth)
    return World(root, truth.to_pylist())


def embed_without_ray(
    source: str, out: str, model: str = "projection", pretrained: str = "", *, text: bool = True
) -> str:
    """Embed a source in this process with the stage's own reader and encoder: the slow twin of `embed.run`."""
    test_set = testsets.open_test_set(source) if testsets.is_test_set(source) else None
    shards = list(test_set.shards) if test_set else list_shards(source)
    encode = embed.Encode([(EncoderSettings(model, pretrained, batch_size=BATCH_SIZE), text)])
    (encoder,) = encode.encoders
    plan = embed.ReadPlan((encoder.preprocess,), BATCH_SIZE, 1.0, test_set)
    with rundir.RunDirectory(out, "embed", {"source": source}) as directory:
        parts = rundir.assign_parts(out, [shard.name for shard in shards])
        for shard in shards:
            part = parts[shard.name]
            tables = [encode(table) for table in embed.read_chunks(embed.Work(part, shard), plan)]
            chunks = [row for table in tables for row in table.to_pylist()]
            record = embed.write_part(out, part, shard.name, chunks, output=0, dim=encoder.dim, text=text)
            directory.log.append([record])
        where = {str(parts[shard.name]): shard.uri for shard in shards}
        names = list(test_set.class_names) if test_set else []
        directory.finish({"encoder": encoder.fingerprint, "class_names": names, "shards": where})
    return out


def write_embeddings(
    out: str, parts: list[np.ndarray], uids: list[list[str]], **columns: list[list[Any]]
) -> embeddings.EmbeddingSet:
    """Embeddings of given (n, d) rows per part, without images; `columns` are metadata per part."""
    with rundir.RunDirectory(out, "embed", {"made": "by hand"}) as directory:
        for number, rows in enumerate(parts):
            values: dict[str, Any] = {field.name: pa.nulls(len(rows), field.type) for field in schema.METADATA}
            values |= {
                "row_id": pa.array(schema.row_ids(number, len(rows))),
                "uid": pa.array(uids[number], pa.string()),
            }
            values["sha256"] = pa.array([""] * len(rows), pa.string())
            values |= {name: pa.array(v[number], schema.METADATA.field(name).type) for name, v in columns.items()}
            table = pa.table(values, schema=schema.METADATA)
            record = embeddings.write_part(out, number, f"{number}.tar", rows, None, table, schema.LEDGER.empty_table())
            directory.log.append([record])
        directory.finish({"encoder": {"dim": int(parts[0].shape[1]), "model": "by hand"}})
    return embeddings.EmbeddingSet.open(out)


def write_attributes(
    out: str, rows: embeddings.EmbeddingSet, attribute_of: dict[str, str], names: tuple[str, ...]
) -> str:
    """Labels of known attributes by uid, as `clipgap attributes` leaves them."""
    for part in rows.parts:
        uids = rows.metadata(part.number, ["uid"]).column("uid").to_pylist()
        values: dict[str, Any] = {field.name: pa.nulls(len(uids), field.type) for field in schema.ATTRIBUTES}
        values |= {"uid": pa.array(uids), "attribute": pa.array([attribute_of.get(uid) for uid in uids], pa.string())}
        table = pa.table(values, schema=schema.ATTRIBUTES)
        store.write_table(f"{out}/labels/part-{part.number:05d}.parquet", table)
    about = {"stage": "attributes", "embeddings": rows.uri, "digest_of_embeddings": rows.digest}
    store.write_json(f"{out}/manifest.json", {**about, "attributes": list(names)})
    return out


def score_words(made: dict[str, str], tests: tuple[str, ...] = TESTS) -> dict[str, Any]:
    """Settings of `score` for embeddings by name: pool, tests, and the reference for all of them."""
    words = tuple(f"{name}={made[name]}" for name in tests)
    return {"pool": made["pool"], "test": words, "reference": (made["reference"],), "k": 5}


def all_row_ids(pool: embeddings.EmbeddingSet) -> np.ndarray:
    return pool.all_metadata(["row_id"]).column("row_id").to_numpy()


def files_below(folder: str) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stamps_below(folder: str) -> dict[str, int]:
    """Modification times of every file below a folder, in nanoseconds."""
    root = Path(folder)
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


# --- rows ------------------------------------------------------------------------------------------------


def unit_rows(num_rows: int, dim: int, seed: int) -> np.ndarray:
    """(num_rows, dim) float16 unit rows."""
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def sign_rows(num_rows: int, dim: int, seed: int) -> np.ndarray:
    """(num_rows, dim) float16 rows of +-1/sqrt(dim), dim a power of 4: few distinct similarities, so many ties."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (num_rows, dim))
    return (signs / np.sqrt(dim)).astype(np.float16)


# --- tars ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def jpeg(number: int, size: int = 16) -> bytes:
    """A small JPEG that differs from number to number."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tar(members: list[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content) in the order given, repeated names allowed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_shard(path: Path, members: list[tuple[str, bytes]]) -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(members))
    return Shard(str(path), path.name, "tar", path.parent.name)
