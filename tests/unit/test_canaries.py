"""The audit's positive control: what it says would be found is found when it is planted, and it refuses to guess."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from clipgap_ray import alterations, schema
from clipgap_ray.config.audit import AuditSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.encoder import ImageError
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import phash
from clipgap_ray.pixels import grey_thumbnail, open_picture
from clipgap_ray.stages import audit
from clipgap_ray.stages.canaries import Laboratory
from tests import made

LIMIT, BITS = 0.9, 4


@pytest.fixture(scope="module")
def val(tiny_embeddings) -> EmbeddingSet:
    return EmbeddingSet.open(tiny_embeddings["val"])


@pytest.fixture(scope="module")
def images(val) -> list[bytes]:
    rows = val.all_metadata(["row_id", "image_path", "image_offset", "image_bytes"]).to_pylist()
    return [val.image_bytes(row["row_id"] >> 32, row) for row in rows]


@pytest.fixture(scope="module")
def audited(tiny_embeddings, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("audit")
    run_audit(out, tiny_embeddings["pool"], tiny_embeddings["val"])
    return json.loads((out / "audit.json").read_text()), out


def run_audit(out: Path, pool: str, val: str, **more) -> None:
    words = {"duplicate": LIMIT, "hash_bits": BITS, "canaries": 1000, "near": (0.8, 0.9)}
    audit.run(AuditSettings(**{**words, "pool": pool, "test": (f"val={val}",), "out": str(out), **more}))


@pytest.mark.parametrize("name", list(alterations.ALTERATIONS))
def test_an_altered_copy_is_another_file_of_the_same_picture(images, name) -> None:
    copy = alterations.alter(images[0], name)
    assert copy != images[0]
    assert copy == alterations.alter(images[0], name)
    before, after = (np.asarray(open_picture(data).convert("RGB"), float) for data in (images[0], copy))
    height, width = before.shape[:2]
    shapes = {"resized": (height // 2, width // 2), "cropped": (height - 2 * (height // 10), width - 2 * (width // 10)),
              "captioned": (height + int(0.18 * height), width)}  # fmt: skip
    assert after.shape[:2] == shapes.get(name, (height, width))
    if name == "grey":
        assert np.ptp(after, axis=2).max() <= 2
    if name in ("flipped", "re-encoded"):
        assert np.abs(after - (before[:, ::-1] if name == "flipped" else before)).mean() < 12


def test_bytes_that_are_no_image_are_named() -> None:
    with pytest.raises(ImageError):
        alterations.alter(b"no image", "grey")


@pytest.mark.parametrize("name", ["flipped", "cropped", "watermarked"])
def test_planted_copies_are_found_as_often_as_the_control_said(
    audited, images, tmp_path, tiny_embeddings, name
) -> None:
    members = [(f"{i:03d}.jpg", alterations.alter(image, name)) for i, image in enumerate(images)]
    made.tar_shard(tmp_path / "pool" / "0.tar", members)
    planted = made.embed_without_ray(str(tmp_path / "pool"), str(tmp_path / "emb"))
    run_audit(tmp_path / "out", planted, tiny_embeddings["val"], canaries=0)
    found = json.loads((tmp_path / "out" / "audit.json").read_text())["tests"][0]["duplicates"]["duplicated"]["count"]
    control = next(a for a in audited[0]["tests"][0]["control"]["alterations"] if a["name"] == name)
    # Beyond its own copy an image may meet the copy of a lookalike.
    assert found >= control["found"]["count"] > 0
    assert found - control["found"]["count"] <= len(images) // 4


def test_the_page_shows_the_control_and_the_verdict_rests_on_it(audited, tiny_embeddings, tmp_path) -> None:
    result, out = audited
    val = result["tests"][0]
    assert val["verdict"] == "CONTAMINATED"  # the world leaks a tenth of its test images
    html = (out / "index.html").read_text()
    assert "Would altered copies be found?" in html
    assert all(name in html for name in alterations.ALTERATIONS)
    assert html.count("data:image/jpeg") > 10
    unrelated = made.write_embeddings(
        str(tmp_path / "far"), [made.unit_rows(50, 64, 5)], [[f"{i:032x}" for i in range(50)]]
    )
    manifest = json.loads(Path(tiny_embeddings["val"], "manifest.json").read_text())
    path = Path(unrelated.uri, "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder": manifest["encoder"]}))
    run_audit(tmp_path / "out", unrelated.uri, tiny_embeddings["val"], images=False)
    clean = json.loads((tmp_path / "out" / "audit.json").read_text())["tests"][0]
    assert clean["verdict"] == f"CLEAN AT RECALL {clean['control']['recall']:.3g}"
    assert clean["hash_rate"] is None  # that pool has no hashes, so the control counts none
    assert clean["control"]["alterations"][0]["hash"] is None
    assert "data:image/jpeg" not in (tmp_path / "out" / "index.html").read_text()


def test_another_encoder_or_missing_images_leave_the_control_out_and_say_why(val, tiny_embeddings, tmp_path) -> None:
    other = {**val.encoder, "crop_border": 12}
    with pytest.raises(DataError, match="unaltered test images come out at similarity"):
        Laboratory(other, "", "cpu").make(val, 5, np.random.default_rng(0))
    shutil.copytree(val.uri, tmp_path / "val")
    manifest = json.loads((tmp_path / "val" / "manifest.json").read_text())
    (tmp_path / "val" / "manifest.json").write_text(json.dumps({**manifest, "shards": {}}))
    run_audit(tmp_path / "out", tiny_embeddings["pool"], str(tmp_path / "val"), canaries=5)
    result = json.loads((tmp_path / "out" / "audit.json").read_text())["tests"][0]
    assert result["control"] is None
    assert "images are not at hand" in result["why_no_control"]
    assert "no positive control" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(ConfigError, match="no-such-model"):
        Laboratory({**val.encoder, "model": "no-such-model"}, "", "cpu")
    with pytest.raises(ConfigError, match="--canaries makes one"):
        AuditSettings.load({"pool": "p", "out": "o", "test": ("val=v",), "recall": "r.json"}, "audit")


def test_hash_search_is_brute_force_over_both_mirrors(images) -> None:
    own, mirrored = phash.perceptual_hashes(np.stack([grey_thumbnail(open_picture(image)) for image in images]))
    rng = np.random.default_rng(0)
    pool = np.concatenate([own[:3] ^ 5, mirrored[3:6] ^ 1, rng.integers(-(2**62), 2**62, 200), np.zeros(2, np.int64)])
    ids = schema.row_ids(2, len(pool))
    blocks = [(pool[:90], ids[:90]), (pool[:0], ids[:0]), (pool[90:], ids[90:])]
    bits, rows = phash.nearest_hashes(own, mirrored, iter(blocks))
    apart = np.minimum(*(np.bitwise_count((s[:, None] ^ pool[None]).view(np.uint64)) for s in (own, mirrored)))
    apart = np.where(phash.telling(pool), apart, 64)
    assert phash.telling(own).all()
    assert (bits == apart.min(axis=1)).all()
    assert (apart[np.arange(len(own)), rows - ids[0]] == bits).all()
    flat = phash.perceptual_hashes(np.full((1, 32, 32), 200, np.uint8))
    assert phash.nearest_hashes(*flat, iter(blocks))[0].tolist() == [64]


def test_own_captions_are_matched_letter_by_letter_and_normalised(tmp_path, val) -> None:
    def write(name: str, captions: list[str | None], classes: list[str]) -> str:
        count = len(captions)
        made.write_embeddings(
            str(tmp_path / name), [made.unit_rows(count, 8, count)], [[f"{i:032x}" for i in range(count)]],
            caption=[captions], class_name=[classes],
        )  # fmt: skip
        return str(tmp_path / name)

    test = ["A dog, on a hill", "two cats", "two cats", "a photo of a fox.", "Boats at dawn", None]
    pool = ["a dog on a HILL!", "two cats", "a photo of a fox.", "Boats at dawn", "boats"]
    emb = write("test", test, ["", "", "", "fox", "", ""])
    out = tmp_path / "out"
    run_audit(out, write("pool", pool, [""] * 5), emb, canaries=0, fail_on=("caption_rate>0.9",))
    result = json.loads((out / "audit.json").read_text())
    captions = result["tests"][0]["captions"]
    # Repeated captions and prompts around the class name are no evidence; two are left.
    assert captions["num_captions"] == 2
    assert (captions["exact"]["count"], captions["normalised"]["count"]) == (1, 2)
    assert result["failed_rules"] == ["val: caption_rate is 1, rule caption_rate>0.9"]
    with pytest.raises(ConfigError, match=r"caption_rate.* for val needs a test set with captions of its own"):
        run_audit(out, str(tmp_path / "pool"), write("plain", [None], [""]), canaries=0, fail_on=("caption_rate>0",))
