"""The miniature world: bytes are reproducible, formats are the real ones, and the truth table tells the truth."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, UnidentifiedImageError

from clipgap_ray.errors import ConfigError
from clipgap_ray.world import (
    TRUTH_SCHEMA,
    Unit,
    WorldSpec,
    animals,
    class_names,
    classes,
    evaluation_sets,
    miniature,
    plan,
    preset,
    render,
    scenes,
    styles,
    things,
    units,
)

ROOT = Path(__file__).parents[2]
SPEC = replace(
    preset("tiny", rows=1_200, seed=7), reference_rows=60, test_rows=72, counter_rows=3, samples_per_shard=50,
    leak_rate=0.1,
)  # fmt: skip
FAULTY = replace(
    SPEC, rows=330, reference_rows=24, test_rows=24, counter_rows=0, samples_per_shard=30, leak_rate=0.1, faults=True
)
Samples = list[tuple[str, dict[str, bytes]]]


@dataclass
class World:
    files: dict[str, bytes]
    truth: list[dict]
    opened: dict[str, Samples] = field(default_factory=dict)

    def of(self, set_name: str) -> list[dict]:
        return [row for row in self.truth if row["set"] == set_name]

    def image(self, row: dict) -> bytes:
        """The image bytes that a truth row points to."""
        if row["set"] == "counteranimal":
            return self.files[f"{row['shard']}/{row['key']}"]
        key, members = self.samples_of(row["shard"])[row["row"]]
        assert key == row["key"]
        return members["jpg"]

    def samples_of(self, shard: str) -> Samples:
        if shard not in self.opened:
            self.opened[shard] = samples(self.files[shard])
        return self.opened[shard]


def build(spec: WorldSpec) -> World:
    parts = [render(spec, unit) for unit in units(spec)]
    files = {path: content for part in parts for path, content in part.files.items()}
    assert len(files) == sum(len(part.files) for part in parts)
    return World(files, pa.concat_tables([part.truth for part in parts]).to_pylist())


def members_of(tar: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return [(info, archive.extractfile(info).read()) for info in archive]


def samples(tar: bytes) -> Samples:
    """Samples in written order; a repeated suffix opens a new sample."""
    found: Samples = []
    for info, content in members_of(tar):
        key, _, suffix = info.name.partition(".")
        if not found or found[-1][0] != key or suffix in found[-1][1]:
            found.append((key, {}))
        found[-1][1][suffix] = content
    return found


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB").resize((32, 32)), dtype=np.float64)


@pytest.fixture(scope="module")
def world() -> World:
    return build(SPEC)


@pytest.fixture(scope="module")
def faulty() -> World:
    return build(FAULTY)


# --- identity --------------------------------------------------------------------------------------------


def test_units_rendered_alone_in_another_process_have_the_same_bytes(world: World) -> None:
    chosen = [Unit("counteranimal", "counteranimal", 3), Unit("test", "r", 1), Unit("pool", "pool", 23)]
    program = (
        "import hashlib\nfrom clipgap_ray.world import *\n"
        f"spec = {SPEC!r}\n"
        f"for unit in {[tuple(unit) for unit in chosen]!r}:\n"
        "    for path, content in render(spec, Unit(*unit)).files.items():\n"
        "        print(hashlib.sha256(content).hexdigest(), path)\n"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    lines = output.splitlines()
    assert len(lines) == 2 * 2 * SPEC.counter_rows + 2  # photos and masks
    for line in lines:
        digest, path = line.split(" ", 1)
        assert digest == hashlib.sha256(world.files[path]).hexdigest(), path


def test_another_seed_is_another_world(world: World) -> None:
    shard = "tests/val/test/0.tar"
    other = render(replace(SPEC, seed=8), Unit("test", "val", 0)).files[shard]
    ours, theirs = samples(world.files[shard]), samples(other)
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    assert all(a["jpg"] != b["jpg"] for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_the_pool_does_not_depend_on_which_sets_are_also_rendered(world: World) -> None:
    unit = Unit("pool", "pool", 2)
    fewer = replace(SPEC, reference_rows=1, counter_rows=0)
    assert render(fewer, unit).files == {"pool/00002.tar": world.files["pool/00002.tar"]}


# --- formats ---------------------------------------------------------------------------------------------


def test_pool_tars_are_img2dataset_tars(world: World) -> None:
    tars = sorted(path for path in world.files if path.startswith("pool/"))
    assert tars == [f"pool/{shard:05d}.tar" for shard in range(24)]
    for shard, path in enumerate(tars):
        for place, (key, members) in enumerate(samples(world.files[path])):
            assert key == f"{shard:05d}{place:04d}"
            assert list(members) == ["jpg", "txt", "json"]
            fields = json.loads(members["json"])
            assert fields["key"] == key
            assert fields["caption"] == members["txt"].decode()
            assert fields["sha256"] == hashlib.sha256(members["jpg"]).hexdigest()
            assert fields["status"] == "success"
            assert re.fullmatch("[0-9a-f]{32}", fields["uid"])
            image = Image.open(io.BytesIO(members["jpg"]))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (fields["width"], fields["height"]))


def test_tar_headers_hold_no_time_and_no_owner(world: World) -> None:
    for path in ("pool/00000.tar", "reference/train/0.tar"):
        for info, _ in members_of(world.files[path]):
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")


def test_uids_urls_and_keys_are_unique(world: World) -> None:
    fields = [
        json.loads(members["json"])
        for path in world.files
        if path.startswith("pool/")
        for _, members in samples(world.files[path])
    ]
    for name in ("uid", "url", "key"):
        assert len({field[name] for field in fields}) == SPEC.rows


@pytest.mark.parametrize(
    ("folder", "split", "rows"),
    [("reference", "train", 60), *((f"tests/{name}", "test", 72) for name in evaluation_sets(SPEC))],
)
def test_sets_lie_in_the_layout_of_clip_benchmark(world: World, folder: str, split: str, rows: int) -> None:
    names = world.files[f"{folder}/classnames.txt"].decode().splitlines()
    assert tuple(names) == class_names(SPEC)
    templates = world.files[f"{folder}/zeroshot_classification_templates.txt"].decode().splitlines()
    assert templates
    assert all(template.format(c="cat") != template for template in templates)
    assert world.files[f"{folder}/dataset_type.txt"] == b"classification"
    shards = int(world.files[f"{folder}/{split}/nshards.txt"])
    assert shards == 2
    found = [sample for shard in range(shards) for sample in samples(world.files[f"{folder}/{split}/{shard}.tar"])]
    assert [key for key, _ in found] == [f"s{row:07d}" for row in range(rows)]
    assert f"{folder}/{split}/{shards}.tar" not in world.files
    labels = [int(members["cls"]) for _, members in found]
    assert labels == [row["label"] for row in world.of(folder.split("/")[-1])]
    assert set(labels) == set(range(len(names))), "every class is in every set"
    assert all(Image.open(io.BytesIO(members["jpg"])).size == (64, 64) for _, members in found)


def test_counteranimal_lies_in_the_released_layout(world: World) -> None:
    listed = world.files["counteranimal/imagenet_names.txt"].decode().splitlines()
    assert [tuple(line.split("\t")) for line in listed] == [(str(i), name) for i, name in enumerate(class_names(SPEC))]
    counts: Counter[tuple[str, str]] = Counter()
    for path in world.files:
        if not path.startswith("counteranimal/") or path.endswith(".txt"):
            continue
        match = re.fullmatch(r"counteranimal/(\d+) (\w+)/(common|counter)-(\w+)/\d+\.jpg", path)
        label, name, group, background = match.groups()
        info = classes.CLASSES[int(label)]
        assert (name, background) == (info.name, info.habitual if group == "common" else info.rare)
        counts[name, group] += 1
    assert len({name for name, _ in counts}) == 12
    assert set(counts.values()) == {SPEC.counter_rows}


def test_masks_lie_where_the_animals_are(world: World) -> None:
    """Without its animal a photo changes inside the mask, and little outside: its shadow goes, too."""
    photos = world.of("counteranimal")
    ratios = []
    for row in photos:
        mask = Image.open(io.BytesIO(world.files[f"masks/counteranimal/{row['key']}.png"]))
        inside = np.asarray(mask) > 0
        assert inside.shape == (64, 64)
        number = int(Path(row["key"]).stem)
        scene, rng = scenes.sample(SPEC, "counteranimal", number)
        empty = scene._replace(inks=[ink for ink in scene.inks if all(ink is not own for own in scene.subject)])
        whole = np.asarray(styles.photo(scene, deepcopy(rng), 64), dtype=float)
        change = np.abs(whole - np.asarray(styles.photo(empty, rng, 64), dtype=float)).mean(axis=2)
        if row["distant"]:
            assert 0 < inside.sum() < 200
        else:
            assert inside.mean() > 0.02
            ratios.append(change[inside].mean() / change[~inside].mean())
    assert sum(path.startswith("masks/") for path in world.files) == len(photos)
    assert np.median(ratios) > 4
    assert min(ratios) > 1


# --- truth -----------------------------------------------------------------------------------------------


def test_every_written_sample_has_its_row_of_truth(world: World) -> None:
    written = Counter({path: len(samples(tar)) for path, tar in world.files.items() if path.endswith(".tar")})
    written["counteranimal"] = sum(path.endswith(".jpg") for path in world.files)
    assert Counter(row["shard"] for row in world.truth) == written
    for row in world.of("pool"):
        key, members = world.samples_of(row["shard"])[row["row"]]
        assert key == row["key"]
        assert members["txt"].decode() == row["caption"]
        assert json.loads(members["json"])["uid"] == row["uid"]
    for row in world.of("counteranimal"):
        assert f"{row['shard']}/{row['key']}" in world.files
        assert f"/{row['group']}-{row['background']}/" in row["key"]


def test_truth_has_the_promised_columns() -> None:
    table = render(SPEC, Unit("labels", "val", 0)).truth
    assert table.schema == TRUTH_SCHEMA
    assert table.num_rows == 0


def test_styles_of_the_sets(world: World) -> None:
    for name in ("reference", "val", "v2", "a", "objectnet", "counteranimal"):
        assert {row["style"] for row in world.of(name)} == {"photo"}
    assert {row["style"] for row in world.of("sketch")} == {"sketch"}
    assert {row["style"] for row in world.of("r")} == {"cartoon", "painting", "silhouette"}
    pool = Counter(row["style"] for row in world.of("pool"))
    # Binomial with n = 1,200: four standard deviations are below 0.06.
    assert pool["photo"] / SPEC.rows == pytest.approx(0.85 * 0.96, abs=0.06)
    assert pool["sketch"] / SPEC.rows == pytest.approx(0.06 * 0.96, abs=0.03)
    assert pool["abstract"] / SPEC.rows == pytest.approx(0.04, abs=0.025)


def test_captions_do_what_their_kind_says(world: World) -> None:
    counts = Counter(row["caption_kind"] for row in world.of("pool"))
    assert set(counts) == {"names_class", "no_class", "wrong", "off_topic"}
    assert counts["names_class"] > 0.8 * SPEC.rows
    for row in world.of("pool"):
        named = set(re.findall(r"[a-z]+", row["caption"].lower())) & set(class_names(SPEC))
        if row["caption_kind"] == "names_class":
            assert named == {row["class_name"]}
        elif row["caption_kind"] == "wrong":
            assert len(named) == 1
            assert row["class_name"] not in named
        else:
            assert not named
        assert (row["caption_kind"] == "off_topic") == (row["label"] == -1)


def test_the_pool_has_a_long_tail(world: World) -> None:
    counts = Counter(row["label"] for row in world.of("pool") if row["label"] >= 0)
    assert len(counts) == 24
    on_topic = 1.0 - SPEC.off_topic_rate
    assert classes.pool_shares().min() * on_topic > 0.01
    assert classes.pool_shares().max() > 6 * classes.pool_shares().min()
    expected = classes.pool_shares() * on_topic * SPEC.rows
    observed = np.array([counts[label] for label in range(24)])
    assert np.all(np.abs(observed - expected) < 5 * np.sqrt(expected) + 6), "leaks and copies add a little"


# --- what is planted -------------------------------------------------------------------------------------


def test_planted_duplicates(world: World) -> None:
    groups: dict[int, list[dict]] = {}
    for row in world.of("pool"):
        if row["duplicate_group"] >= 0:
            groups.setdefault(row["duplicate_group"], []).append(row)
    kinds = Counter(row["duplicate_kind"] for rows in groups.values() for row in rows)
    assert kinds["exact"] == round(0.03 * SPEC.rows)
    assert kinds["reencode"] + kinds["resize"] + kinds["crop"] == round(0.04 * SPEC.rows)
    assert min(kinds.values()) > 10
    across = 0
    for group, rows in groups.items():
        (source,) = [row for row in rows if row["duplicate_kind"] == "source"]
        assert int(source["key"][:5]) * SPEC.samples_per_shard + source["row"] == group
        assert len(rows) in (2, 3)
        original = world.image(source)
        for copy in (row for row in rows if row is not source):
            across += copy["shard"] != source["shard"]
            assert copy["uid"] != source["uid"]
            assert [copy[name] for name in ("label", "style", "background")] == [
                source[name] for name in ("label", "style", "background")
            ]
            image = world.image(copy)
            assert (image == original) == (copy["duplicate_kind"] == "exact")
            # Cropping noise and high-frequency patterns leaves little correlation; re-encoding leaves nearly all.
            if copy["duplicate_kind"] in ("reencode", "resize"):
                assert np.corrcoef(pixels(image).ravel(), pixels(original).ravel())[0, 1] > 0.9
    assert across > 0.8 * (sum(kinds.values()) - kinds["source"])


def test_equal_images_are_planted_ones(world: World) -> None:
    """Nothing is equal by accident: equal bytes are one duplicate group or one leak."""
    seen: dict[bytes, list[dict]] = {}
    for row in world.truth:
        seen.setdefault(hashlib.sha256(world.image(row)).digest(), []).append(row)
    repeated = [rows for rows in seen.values() if len(rows) > 1]
    assert repeated
    for rows in repeated:
        groups, leaked = {row["duplicate_group"] for row in rows}, [row for row in rows if row["leak_kind"] == "exact"]
        assert len(groups) == 1
        assert groups != {-1} or len(leaked) == len(rows) - 1


@pytest.mark.parametrize("name", evaluation_sets(SPEC))
def test_planted_leaks(world: World, name: str) -> None:
    leaks = [row for row in world.of("pool") if row["leak_of_set"] == name]
    assert len(leaks) == len({row["leak_of_key"] for row in leaks}) == round(0.1 * SPEC.test_rows)
    assert Counter(row["leak_kind"] for row in leaks) == {"exact": 5, "near": 2}
    shown = {row["key"]: row for row in world.of(name)}
    for leak in leaks:
        test_row = shown[leak["leak_of_key"]]
        assert (leak["label"], leak["style"]) == (test_row["label"], test_row["style"])
        assert (world.image(leak) == world.image(test_row)) == (leak["leak_kind"] == "exact")


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_correlation_sets_how_often_a_class_is_on_its_habitual_background(correlation: float) -> None:
    spec = replace(SPEC, correlation=correlation, rows=4_000, style_shares=(("photo", 1.0),), off_topic_rate=0.0)
    facts = [scenes.sample(spec, "pool", row)[0].facts for row in range(spec.rows)]
    habitual = np.mean([fact.background == classes.CLASSES[fact.label].habitual for fact in facts])
    rare = np.mean([fact.background == classes.CLASSES[fact.label].rare for fact in facts])
    # Standard error below 0.008.
    assert habitual == pytest.approx(1 / 6 + correlation * 5 / 6, abs=0.035)
    for label in range(24):
        shares = classes.background_shares(label, correlation)
        assert shares.sum() == pytest.approx(1.0)
        assert shares[classes.BACKGROUNDS.index(classes.CLASSES[label].rare)] == pytest.approx(shares.min())
    assert rare == (0.0 if correlation == 1.0 else pytest.approx(shares.min(), abs=0.035))


def test_shifted_sets_have_shifted_backgrounds(world: World) -> None:
    def habitual(name: str) -> float:
        return float(np.mean([row["background"] == classes.CLASSES[row["label"]].habitual for row in world.of(name)]))

    # 1/6 by chance, 0.42 at the default correlation of 0.3
    assert habitual("val") > 0.35
    assert habitual("a") == 0.0
    assert habitual("objectnet") < 0.35
    assert np.mean([row["background"] == "indoor" for row in world.of("objectnet")]) > 0.3


@pytest.mark.parametrize("shape", [*animals.SHAPES.values(), *things.SHAPES.values()], ids=lambda shape: shape.__name__)
def test_shapes_stay_in_their_frame_whatever_their_proportions(shape) -> None:
    rng = np.random.default_rng(0)
    for j in (*np.full((2, 8), [[-1.0], [1.0]]), *rng.uniform(-1, 1, size=(20, 8))):
        points = np.concatenate([part.points for part in shape(j)])
        assert np.abs(points).max() < 1.25
        assert np.ptp(points, axis=0).max() > 1.4, "fills its frame"
    assert len(shape(np.zeros(8))) >= 3


def test_difficulty_makes_photos_noisier() -> None:
    def grain(difficulty: float) -> float:
        spec = replace(SPEC, difficulty=difficulty, test_rows=50)
        tar = render(spec, Unit("test", "val", 0)).files["tests/val/test/0.tar"]
        images = [np.asarray(Image.open(io.BytesIO(m["jpg"])).convert("L"), dtype=float) for _, m in samples(tar)]
        return float(np.mean([np.abs(np.diff(image[:, :6], n=2, axis=0)).mean() for image in images]))

    assert grain(0.0) < grain(0.5) < grain(1.0)


def test_some_photos_outside_the_pool_are_distant(world: World) -> None:
    for name in ("reference", *evaluation_sets(SPEC), "counteranimal"):
        rows = world.of(name)
        photos = [row for row in rows if row["style"] == "photo"]
        expected = SPEC.distant_rate * len(photos)
        assert abs(sum(row["distant"] for row in photos) - expected) < 5 * np.sqrt(expected) + 1, name
        assert not any(row["distant"] for row in rows if row["style"] != "photo")
    assert not any(row["distant"] for row in world.of("pool") if not row["leak_of_set"])


@pytest.mark.parametrize("set_name", ["val", "a", "counteranimal"])
def test_a_distant_picture_is_the_same_scene_with_a_tiny_object(set_name: str) -> None:
    distant, close = replace(SPEC, distant_rate=1.0), replace(SPEC, distant_rate=0.0)
    for row in range(20):
        far, near = miniature.draw(distant, set_name, row), miniature.draw(close, set_name, row)
        assert far.facts == near.facts._replace(distant=True, size="small")
        assert far.quality == near.quality
        shrunk = ink_extents(distant, set_name, row) / ink_extents(close, set_name, row)
        is_object = shrunk < 0.5
        assert is_object.sum() >= 3
        np.testing.assert_allclose(shrunk[is_object], 0.09, rtol=1e-3)
        np.testing.assert_allclose(shrunk[~is_object], 1.0, rtol=1e-3, err_msg="clutter stays as it is")


def ink_extents(spec: WorldSpec, set_name: str, row: int) -> np.ndarray:
    inks = scenes.sample(spec, set_name, row)[0].inks
    return np.array([np.ptp(ink.points, axis=0).max() for ink in inks])


@pytest.mark.parametrize("set_name", ["pool", "sketch", "r"])
def test_pool_pictures_and_drawings_are_never_distant(set_name: str) -> None:
    for row in range(20):
        far, near = (miniature.draw(replace(SPEC, distant_rate=rate), set_name, row) for rate in (1.0, 0.0))
        assert far.facts == near.facts
        assert (np.asarray(far.image) == np.asarray(near.image)).all()


# --- faults ----------------------------------------------------------------------------------------------


def fault_row(world: World, fault: str) -> dict:
    (row,) = [row for row in world.truth if row["fault"] == fault]
    return row


def test_each_fault_is_planted_once_and_only_on_plain_rows(faulty: World) -> None:
    planted = Counter(row["fault"] for row in faulty.truth if row["fault"] not in ("", plan.TRUNCATED_SHARD))
    assert planted == dict.fromkeys((*plan.SAMPLE_FAULTS[:-2], plan.EMPTY_SHARD), 1)
    spoilt = [row for row in faulty.truth if row["fault"] not in ("", plan.TRUNCATED_SHARD)]
    assert all(row["duplicate_group"] == -1 and row["leak_of_set"] == "" for row in spoilt)


def test_broken_images_cannot_be_decoded(faulty: World) -> None:
    for fault, error in (("broken_image", UnidentifiedImageError), ("truncated_image", OSError)):
        row = fault_row(faulty, fault)
        assert row["row"] == -1
        (image,) = [m["jpg"] for key, m in samples(faulty.files[row["shard"]]) if key == row["key"]]
        with pytest.raises(error):
            Image.open(io.BytesIO(image)).load()


def test_odd_suffixes(faulty: World) -> None:
    row = fault_row(faulty, "odd_suffix")
    key, members = samples(faulty.files[row["shard"]])[row["row"]]
    assert key == row["key"]
    assert list(members) == ["JPEG", "txt", "json"]
    names = [path for path in faulty.files if path.startswith("pool/") and path != "pool/00010.tar"]
    suffixes = {suffix for path in names for _, members in samples(faulty.files[path]) for suffix in members}
    assert suffixes == {"jpg", "JPEG", "png", "webp", "txt", "json"}


def test_missing_caption(faulty: World) -> None:
    row = fault_row(faulty, "missing_caption")
    _, members = samples(faulty.files[row["shard"]])[row["row"]]
    assert list(members) == ["jpg", "json"]
    assert json.loads(members["json"])["caption"] is None
    assert row["caption"] == ""


@pytest.mark.parametrize(("fault", "distance"), [("repeated_key", 2), ("doubled_key", 1)])
def test_repeated_keys(faulty: World, fault: str, distance: int) -> None:
    row = fault_row(faulty, fault)
    found = samples(faulty.files[row["shard"]])
    assert [place for place, (key, _) in enumerate(found) if key == row["key"]] == [row["row"] - distance, row["row"]]
    first, second = (json.loads(found[place][1]["json"]) for place in (row["row"] - distance, row["row"]))
    assert first["uid"] != second["uid"] == row["uid"]


def test_repeated_uid(faulty: World) -> None:
    row = fault_row(faulty, "repeated_uid")
    assert [count for count in Counter(r["uid"] for r in faulty.of("pool") if r["uid"]).values() if count > 1] == [2]
    assert len({r["key"] for r in faulty.of("pool") if r["uid"] == row["uid"]}) == 2


def test_the_last_shard_is_cut_and_one_more_is_empty(faulty: World) -> None:
    tar = faulty.files["pool/00010.tar"]
    read = []
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive, contextlib.suppress(tarfile.ReadError):
        for info in archive:
            read.append((info.name, len(archive.extractfile(info).read()) == info.size))
        pytest.fail("the cut was not noticed")
    complete = {name.split(".")[0] for name, _ in read if name.endswith(".json")}
    rows = [row for row in faulty.of("pool") if row["shard"] == "pool/00010.tar"]
    assert len(rows) == 30
    assert {row["key"] for row in rows if row["fault"] == ""} == complete
    lost = [row for row in rows if row["fault"] == plan.TRUNCATED_SHARD]
    assert len(lost) == 15
    assert all(row["row"] == -1 for row in lost)
    assert samples(faulty.files["pool/00011.tar"]) == []
    empty = fault_row(faulty, plan.EMPTY_SHARD)
    assert (empty["shard"], empty["key"], empty["row"], empty["uid"]) == ("pool/00011.tar", "", -1, "")


def test_a_sound_world_has_no_faults(world: World) -> None:
    assert {row["fault"] for row in world.truth} == {""}
    assert min(row["row"] for row in world.truth) == 0


# --- settings --------------------------------------------------------------------------------------------


def test_presets() -> None:
    tiny, small = preset("tiny"), preset("small", rows=5_000, seed=3, correlation=0.9, faults=True)
    assert (tiny.rows, tiny.reference_rows, tiny.test_rows) == (2_000, 320, 120)
    assert (small.rows, small.test_rows, small.seed, small.correlation) == (5_000, 1_200, 3, 0.9)
    assert small.faults
    assert len(units(small)) == len(set(units(small)))
    assert class_names(tiny)[:2] == ("fish", "whale")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"kind": "huge"}, "unknown world kind 'huge'"),
        ({"seed": -1}, "seed is -1"),
        ({"correlation": 1.5}, "correlation is 1.5"),
        ({"samples_per_shard": 10_001}, "at most 10000"),
        ({"style_shares": (("photo", 0.5),)}, "sum to 0.5"),
        ({"style_shares": (("plain", 1.0),)}, "unknown style 'plain'"),
        ({"no_class_rate": 0.7, "wrong_rate": 0.7}, "expected at most 1"),
    ],
)
def test_impossible_settings_are_refused_with_their_value(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(SPEC, **change)


def test_what_does_not_fit_is_refused_before_anything_is_rendered() -> None:
    with pytest.raises(ConfigError, match="do not fit into rows=45"):
        units(replace(SPEC, rows=45))
    with pytest.raises(ConfigError, match="room for 0 of 9 faults"):
        units(replace(FAULTY, samples_per_shard=400))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'medium'; expected one of tiny, small"):
        preset("medium")
    with pytest.raises(ConfigError, match="no unit"):
        render(SPEC, Unit("pool", "pool", 24))
