"""`clipgap cutout`: photos by masks, the same uids, and what cannot be cut."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipgap_ray import testsets
from clipgap_ray.config.cutout import CutoutSettings
from clipgap_ray.errors import ConfigError, DataError, StaleOutputError
from clipgap_ray.kernels import cutout as kernel
from clipgap_ray.stages import cutout

GRASS, FOX = (40, 180, 60), (220, 120, 20)


def test_foreground_stands_on_grey_and_background_grows_inwards() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    mask = np.zeros((5, 7), bool)
    mask[1:4, 2:5] = True
    kept, filled = kernel.foreground(pixels, mask), kernel.background(pixels, mask)
    assert (kept[mask] == pixels[mask]).all()
    assert (kept[~mask] == kernel.GREY).all()
    assert (filled[~mask] == pixels[~mask]).all()
    rows, columns = np.nonzero(~mask)
    for row, column in np.argwhere(mask):  # the slow twin looks at all pixels outside
        distance = (rows - row) ** 2 + (columns - column) ** 2
        nearest = {tuple(pixels[rows[i], columns[i]]) for i in np.nonzero(distance == distance.min())[0]}
        assert tuple(filled[row, column]) in nearest
    with pytest.raises(ValueError, match="nothing is behind it"):
        kernel.background(pixels, np.ones((5, 7), bool))


def picture(colour: tuple[int, int, int], size: int = 24, form: str = "PNG") -> bytes:
    values = np.full((size, size, 3), GRASS, np.uint8)
    values[8:16, 8:16] = colour
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


def write_mask(path: Path, value: int = 255, size: int = 24, mode: str = "L") -> None:
    mask = np.zeros((size, size), np.uint8)
    mask[8:16, 8:16] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).convert(mode).save(path)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A CounterAnimal tree of one class: two photos that can be cut, and one of every other kind."""
    folder = tmp_path / "animals" / "0 fox" / "common-grass"
    folder.mkdir(parents=True)
    (tmp_path / "animals" / "imagenet_names.txt").write_text("0\tfox\n")
    names = ("a.png", "b.jpg", "unmasked.png", "empty.png", "all.png", "small.png", "torn.png")
    for name in names:
        (folder / name).write_bytes(picture(FOX, form="JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    masks = tmp_path / "masks" / "0 fox" / "common-grass"
    write_mask(masks / "a.png.png", value=1)  # labels of 0 and 1 are masks too
    write_mask(masks / "b.png")
    write_mask(masks / "empty.png", value=0)
    write_mask(masks / "small.png", size=20)
    write_mask(masks / "broken.png")
    (masks / "torn.png").write_bytes(b"no image")
    Image.fromarray(np.full((24, 24), 9, np.uint8)).save(masks / "all.png")
    return tmp_path


def settings(tree: Path, **more) -> CutoutSettings:
    words = {"source": str(tree / "animals"), "masks": str(tree / "masks"), "out": str(tree / "cut")}
    return CutoutSettings.load({**words, **more}, "cutout")


def test_cut_photos_keep_their_uids_and_the_rest_is_counted(tree) -> None:
    summary = cutout.run(settings(tree))
    summary.check()
    assert (summary.read, summary.kept) == (8, 2)
    assert summary.dropped == {"mask_of_everything": 1, "broken_image": 1, "empty_mask": 1, "mask_of_another_size": 1,
                               "broken_mask": 1, "no_mask": 1}  # fmt: skip
    whole = {sample.key: sample for sample in _samples(tree / "animals")}
    for part in ("foreground", "background"):
        cut = {sample.key: sample for sample in _samples(tree / "cut" / part / "animals")}
        assert set(cut) == {"0 fox/common-grass/a.png", "0 fox/common-grass/b.jpg"}
        for key, sample in cut.items():
            assert (sample.uid, sample.group, sample.label) == (whole[key].uid, "common", 0)
        values = np.asarray(Image.open(io.BytesIO(cut["0 fox/common-grass/a.png"].image)))
        centre, corner = tuple(values[12, 12]), tuple(values[0, 0])
        assert (centre, corner) == ((FOX, (kernel.GREY,) * 3) if part == "foreground" else (GRASS, GRASS))
    assert len((tree / "cut" / "skipped.csv").read_text().splitlines()) == 7
    again = cutout.run(settings(tree))
    assert (again.kept, again.parts_skipped) == (2, 1)
    with pytest.raises(StaleOutputError, match="quality"):
        cutout.run(settings(tree, quality=50))


def _samples(folder: Path) -> list:
    test_set = testsets.open_test_set(str(folder))
    return [item for shard in test_set.shards for item in test_set.read(shard) if hasattr(item, "image")]


def test_sets_that_cannot_be_cut_are_refused(tree, tmp_path) -> None:
    with pytest.raises(DataError, match=r"could be cut: \{'no_mask': 7"):
        cutout.run(settings(tree, masks=str(tmp_path / "nowhere"), out=str(tmp_path / "none")))
    (tmp_path / "m.csv").write_text("path,class_name\na.png,fox\n")
    with pytest.raises(ConfigError, match="read as manifest"):
        cutout.run(settings(tree, source=str(tmp_path / "m.csv")))
    (tree / "animals").rename(tree / "foreground")
    (tree / "x").mkdir()
    (tree / "foreground").rename(tree / "x" / "animals")
    (tree / "x").rename(tree / "foreground")
    with pytest.raises(ConfigError, match="overwrite the test set"):
        cutout.run(settings(tree, source=str(tree / "foreground" / "animals"), out=str(tree)))
