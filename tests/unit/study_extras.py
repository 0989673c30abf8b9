"""What other commands leave in the fake study's directory, made by running them: join, discover, agreement, probes."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipgap_ray import schema, store
from clipgap_ray.config.groups import DiscoverSettings
from clipgap_ray.config.join import AgreementSettings, DropJoinSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.stages import agreement, discover, join
from tests import made
from tests.unit.study_fixture import BACKGROUNDS, ENCODER, TESTS, Built

TEST = "counteranimal"


def add_extras(built: Built, draws: int = 20) -> None:
    """Add everything that the report shows when it is there; the study must be `build_study`'s."""
    attributes = label(built)
    _join(built, attributes, draws)
    _discover(built, attributes)
    _agreement(built)
    _probes(built)
    _asked_again(built)


def label(built: Built) -> str:
    """Backgrounds of the photos as a table, and of the pool as `clipgap attributes` leaves them."""
    photos = built.tests[TEST]
    names = [BACKGROUNDS[at] for at in photos.backgrounds]
    path = str(built.root / "labels-photos.parquet")
    store.write_table(path, pa.table({"uid": photos.uids, "attribute": names}))
    pool = EmbeddingSet.open(str(built.root / "embed" / "pool"))
    shown = dict(zip(built.pool.uids, (BACKGROUNDS[at] for at in built.pool.backgrounds), strict=True))
    made.write_attributes(str(built.root / "labels-pool"), pool, shown, BACKGROUNDS)
    return path


def _join(built: Built, attributes: str, draws: int) -> None:
    runs = {"full": "full-s0", "gap-val": "gap-val-s0", **{f"sup{i}": f"supervised-{i}" for i in range(3)}}
    words = tuple(f"{name}={built.root}/eval/{run}/{TEST}.parquet" for name, run in runs.items())
    rng = np.random.default_rng(9)
    nearest, counter = built.similarity[TEST].max(axis=1), np.array(built.tests[TEST].groups) == "counter"
    for part, farther in (("foreground", 0.0), ("background", 0.08)):
        values = nearest - 0.05 - farther * counter + rng.normal(0, 0.01, len(nearest))
        table = pa.table({"uid": built.tests[TEST].uids, "similarity": values})
        store.write_table(str(built.root / f"scores-{part}.parquet"), table)
    join.run(
        DropJoinSettings(
            predictions=words, scores=(f"{built.root}/scores/queries/{TEST}.parquet",), test=TEST, draws=draws,
            out=str(built.root / "join"), pool=str(built.root / "embed" / "pool"), neighbours=5,
            attributes=attributes, pool_attributes=str(built.root / "labels-pool"), baseline=("sup0", "sup1", "sup2"),
            parts=tuple(f"{part}={built.root}/scores-{part}.parquet" for part in ("foreground", "background")),
        )
    )  # fmt: skip


def _discover(built: Built, attributes: str) -> None:
    words = tuple(f"{run}={built.root}/eval/{run}-s0/{TEST}.parquet" for run in ("full", "gap-val"))
    discover.run(
        DiscoverSettings(predictions=words, attributes=attributes, out=str(built.root / "discover"), min_photos=2,
                         splits=5, permutations=50, evaluate_on="all")
    )  # fmt: skip


def _agreement(built: Built) -> None:
    """A second score run of the same pool: the first with noise, as another encoder would have it."""
    first, second = built.root / "scores", built.root / "scores-b"
    rng = np.random.default_rng(5)
    about = {"tests": {t: {"uri": str(built.root / "embed" / t), "digest": t} for t in TESTS},
             "pool": {"uri": str(built.root / "embed" / "pool"), "digest": "p"}}  # fmt: skip
    shutil.copytree(first, second)
    for path in (second / "pool").rglob("*.parquet"):
        table = pq.read_table(path)
        for name in ("m", "margin"):
            values = table.column(name).to_numpy() + rng.normal(0, 0.03, table.num_rows)
            table = table.set_column(
                table.column_names.index(name), schema.POOL_SCORES.field(name), [pa.array(values, pa.float32())]
            )
        store.write_table(str(path), table)
    for folder, digest, model in ((first, "5", "projection"), (second, "6", "other")):
        manifest = {"stage": "score", "digest": digest * 64, "encoder": {**ENCODER, "model": model}, **about}
        store.write_json(str(folder / "manifest.json"), manifest)
    agreement.run(AgreementSettings(scores=(str(first), str(second)), out=str(built.root / "agreement"), sizes=(0.5,)))


def _probes(built: Built) -> None:
    """Few shots of two draws, and the probe on all of the reference."""
    for run, lift in (("full-s0", 0.0), ("gap-sketch-s0", -0.08), ("gap-val-s0", -0.03)):
        for test in ("val", "sketch"):
            few = {"k": [1, 1, 4, 4], "seed": [0, 1, 0, 1], "acc1": [0.31, 0.35, 0.52, 0.55], "num_samples": [80] * 4}
            everything = {"k": [0], "seed": [0], "acc1": [0.74], "num_samples": [80]}
            for folder, table in (("probes", few), ("linear", everything)):
                values = {**table, "acc1": [round(a + lift, 4) for a in table["acc1"]]}  # type: ignore[attr-defined]
                store.write_table(str(built.root / folder / run / f"{test}.fewshot.parquet"), pa.table(values))


def _asked_again(built: Built) -> None:
    """The full pool's model, asked among 20 labels per class and with other prompts."""
    for seed_path in sorted((built.root / "eval").glob("full-s*")):
        table = pq.read_table(seed_path / f"{TEST}.parquet")
        rng = np.random.default_rng(1)
        said = {"dataset": TEST, "templates_sha256": "a" * 64, "class_names_sha256": "c"}
        store.write_json(str(seed_path / f"{TEST}.json"), said)
        for way, gain, more in (
            ("1v20", 0.3, {"candidates_sha256": "d", "dataset": f"{TEST}-1v20"}),
            ("openai", 0.1, {"templates_sha256": "2232c7c5ea53d860f4ffcee7e4d768aa2c9b5f1980fca849eb6237f5ef33acf5"}),
        ):
            right = np.array(table.column("correct")) | (rng.random(table.num_rows) < gain)
            name = f"{TEST}-{way}"
            own = table.set_column(table.column_names.index("correct"), "correct", [pa.array(right)])
            store.write_table(str(seed_path / f"{name}.parquet"), own)
            store.write_json(str(seed_path / f"{name}.json"), {**said, "dataset": name, **more})
