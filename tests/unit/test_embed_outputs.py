"""The folders of one embed run, without Ray: common part numbers, one decoding for all, the guard of each alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgap_ray import store
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.embeddings import identity
from clipgap_ray.errors import ConfigError
from clipgap_ray.stages import embed, embed_outputs

TIMM = "timm:test_vit.r160_in1k,random"


def settings(**more: object) -> EmbedSettings:
    return EmbedSettings(**{"source": "pool", "out": "a", "model": "projection", **more})  # type: ignore[arg-type]


def test_outputs_are_named_in_order_and_image_encoders_have_no_text() -> None:
    one, two = embed_outputs.named(settings(also=(f"b/={TIMM}",)))
    assert [(o.uri, o.encoder.model, o.encoder.pretrained, o.text) for o in (one, two)] == [
        ("a", "projection", "", True),
        ("b", "timm:test_vit.r160_in1k", "random", False),
    ]
    assert (one.preprocess.size, two.preprocess.size) == (64, 160)
    assert {o.preprocess.shrink_to for o in (one, two)} == {0}


def test_one_fast_decoding_serves_the_largest() -> None:
    outputs = embed_outputs.named(settings(also=(f"b={TIMM}",), decode="fast"))
    side = max(o.preprocess.resize_to or o.preprocess.size for o in outputs)
    assert side >= 160
    for output in outputs:
        assert output.preprocess.shrink_to == side
        assert output.encoder.build().preprocess == output.preprocess


def test_the_guard_of_a_folder_is_that_of_its_encoder_alone() -> None:
    def guard(which: int, **words: object) -> dict[str, object]:
        wanted = settings(**words)
        output = embed_outputs.on_this_device(embed_outputs.named(wanted)[which], wanted, "cpu")
        built = embed_outputs.described(output, output.encoder.build())
        return embed_outputs.guarded(built, wanted, None)

    model, pretrained = TIMM.split(",")
    assert guard(1, also=(f"b={TIMM}",)) == guard(0, out="b", model=model, pretrained=pretrained)
    assert guard(0, also=(f"b={TIMM}",)) == guard(0)
    fast, exact = guard(0, decode="fast"), guard(0)
    assert fast != exact  # one folder is decoded one way
    assert fast["encoder"] == exact["encoder"]  # but both meet in a score
    assert "shrink_to" not in str(identity({"preprocess": {"size": 64, "shrink_to": 64}}))


def test_the_driver_describes_gpu_encoders_without_a_gpu() -> None:
    model, pretrained = TIMM.split(",")
    wanted = settings(model=model, pretrained=pretrained)
    on_gpu = embed_outputs.on_this_device(embed_outputs.named(wanted)[0], wanted, "cuda")
    (built,), forecast = embed._built([on_gpu], wanted, [])
    assert forecast is None  # there is nothing here to time a GPU's encoder with
    assert (built.encoder.device, built.encoder.precision) == ("cuda", "fp16")
    assert (built.fingerprint["precision"], built.dim) == ("fp16", 64)


def test_part_numbers_are_common_and_never_change(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert embed_outputs.common_parts([a], ["x", "z"]) == {"x": 0, "z": 1}
    assert embed_outputs.common_parts([a, b], ["x", "y", "z"]) == {"x": 0, "y": 2, "z": 1}
    assert store.read_json(f"{a}/parts.json") == store.read_json(f"{b}/parts.json") == {"x": 0, "z": 1, "y": 2}
    assert embed_outputs.common_parts([b], ["w"]) == {"w": 3}
    assert embed_outputs.common_parts([a, b], ["v", "w"]) == {"v": 4, "w": 3}  # what b alone has seen keeps its number


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"x": 0, "y": 1}, {"y": 0}, "b gives part 0 to shard y, .*a gives it 1"),
        ({"x": 0}, {"y": 0}, "b gives part 0 to shard y, .*a gives it to x"),
    ],
)
def test_folders_that_were_numbered_apart_are_refused(
    tmp_path: Path, first: dict[str, int], second: dict[str, int], message: str
) -> None:
    for name, parts in (("a", first), ("b", second)):
        store.write_json(str(tmp_path / name / "parts.json"), parts)
    with pytest.raises(ConfigError, match=message):
        embed_outputs.common_parts([str(tmp_path / "a"), str(tmp_path / "b")], ["x"])
    assert store.read_json(str(tmp_path / "b" / "parts.json")) == second


@pytest.mark.parametrize(
    ("private", "room", "shards", "workers", "least", "first"),
    [
        (True, 8, 100, 2, 1, 1),  # a private Ray: the pool grows with its queue
        (True, 8, 100, 2, 2, 2),
        (False, 4, 100, 2, 1, 2),  # two nodes of one core: one encoder each, before their cores are full of reads
        (False, 4, 1, 2, 1, 1),  # one shard keeps one encoder busy
        (False, 0, 100, 8, 1, 1),  # an autoscaler that starts at the head alone
        (False, 3, 100, 8, 4, 4),
    ],
)
def test_encoders_come_before_reads_on_the_nodes_that_live(
    monkeypatch: pytest.MonkeyPatch, private: bool, room: int, shards: int, workers: int, least: int, first: int
) -> None:
    monkeypatch.setattr(embed, "is_private", lambda: private)
    monkeypatch.setattr(embed, "slots", lambda needs: room)
    given = settings(workers=workers, min_workers=least)
    assert embed._encoders_first(given, workers, shards, 0.0) == first
