"""What is asked of a test set and what is answered, without Ray: label spaces, candidates, tables, classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from clipgap_ray import presets, store
from clipgap_ray.config.evaluate import EvaluateSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.stages import evaluate, evaluate_models
from clipgap_ray.stages.evaluate_sets import Question, questions, read_lists
from clipgap_ray.testsets import TestSet, open_test_set
from tests import made

MODEL = EncoderSettings("conv-64-test", "random", batch_size=16)


@pytest.fixture(scope="module")
def places(tiny_world: made.World) -> dict[str, str]:
    return {"val": tiny_world.path("tests/val"), "counter": tiny_world.path("counteranimal")}


def ask(places: dict[str, str], name: str, **more: Any) -> Question:
    values = {"model": "conv-64-test", "pretrained": "random", "test": (f"{name}={places[name]}",), "out": "x"}
    return questions(EvaluateSettings.load({**values, **more}, "test"))[name]


def answer(question: Question, out: Path, encoder: EncoderSettings = MODEL) -> tuple[dict[str, Any], list[dict]]:
    preprocess = evaluate_models.check_model(encoder)
    record = evaluate._evaluate(str(out), question, encoder, preprocess, 2)
    return record, store.read_table(str(out / f"{question.name}.parquet")).to_pylist()


@pytest.fixture(scope="module")
def plain(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return answer(ask(places, "val"), tmp_path_factory.mktemp("plain"))[1]


def test_a_mask_leaves_only_its_classes_as_candidates(
    places: dict[str, str], plain: list[dict], tmp_path: Path
) -> None:
    names = open_test_set(places["val"]).class_names
    (tmp_path / "mask.txt").write_text(f"{names[3]}\n0\n{names[5]}\n7\n")
    question = ask(places, "val", mask=(f"val={tmp_path}/mask.txt",))
    assert question.allowed == (0, 3, 5, 7)
    record, rows = answer(question, tmp_path)
    inside = [row for row in plain if row["label"] in (0, 3, 5, 7)]
    assert [row["uid"] for row in rows] == [row["uid"] for row in inside]
    assert record["dropped"] == {"outside_mask": len(plain) - len(inside)}
    assert {row["prediction"] for row in rows} <= {0, 3, 5, 7}
    result = store.read_json(str(tmp_path / "val.json"))
    assert result["mask"]["classes"] == 4
    for text, message in (("zebu\n", "'zebu' is neither a class name"), ("\n", "names no class"), ("999\n", "'999'")):
        (tmp_path / "mask.txt").write_text(text)
        with pytest.raises(ConfigError, match=message):
            ask(places, "val", mask=(f"val={tmp_path}/mask.txt",))


def test_own_class_names_and_prompts_are_hashed_and_checked(places: dict[str, str], tmp_path: Path) -> None:
    names = open_test_set(places["val"]).class_names
    (tmp_path / "names.txt").write_text("\n".join(f"big {name}" for name in names))
    (tmp_path / "prompts.txt").write_text("look: {c}\n")
    words = {"classnames": (f"val={tmp_path}/names.txt",), "templates": (f"val={tmp_path}/prompts.txt",)}
    question = ask(places, "val", **words)
    assert question.test_set.class_names[0] == f"big {names[0]}"
    assert question.test_set.templates == ("look: {c}",)
    record, _ = answer(question, tmp_path)
    assert record["options"] == {key: value[0].split("=")[1] for key, value in words.items()}
    result = store.read_json(str(tmp_path / "val.json"))
    assert result["class_names_sha256"] == store.digest([f"big {name}" for name in names])
    assert result["templates_sha256"] == store.digest(["look: {c}"])
    assert len(ask(places, "val", templates=("val=openai",)).test_set.templates) == 80
    with pytest.raises(ConfigError, match=rf"has 1000 class names, .* has {len(names)} classes"):
        ask(places, "val", classnames=("val=imagenet",))
    (tmp_path / "prompts.txt").write_text("look\n")
    with pytest.raises(ConfigError, match=r"'look' has no \{c\}"):
        ask(places, "val", **words)


def test_a_folder_of_few_classes_becomes_a_question_among_a_thousand(tmp_path: Path) -> None:
    for name in ("tabby cat", "goldfish"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.jpg").write_bytes(made.jpeg(len(name)))
    found = ask({"two": f"{tmp_path}/set"}, "two", classnames=("two=imagenet",)).test_set
    assert len(found.class_names) == 1000
    samples = [item for shard in found.shards for item in found.read(shard)]
    assert sorted((s.class_name, s.label) for s in samples) == [("goldfish", 1), ("tabby cat", 281)]


def test_candidates_are_the_labels_most_alike_and_the_true_one(places: dict[str, str], tmp_path: Path) -> None:
    record, rows = answer(ask(places, "counter", candidates_k=3), tmp_path)
    table = store.read_json(str(tmp_path / "counter.candidates.json"))
    lists = {int(label): found for label, found in table["lists"].items()}
    assert set(lists) == {row["label"] for row in rows}
    assert all(label in found and len(set(found)) == 3 for label, found in lists.items())
    # slow twin: one image after the other
    encoder = MODEL.build()
    test_set = open_test_set(places["counter"])
    weights = np.stack(
        [encoder.encode_texts([t.format(c=c) for t in test_set.templates]).mean(0) for c in test_set.class_names]
    )
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    total: dict[int, np.ndarray] = {}
    for shard in test_set.shards:
        for sample in test_set.read(shard):
            logits = weights @ encoder.encode_images(encoder.preprocess.decode(sample.image)[None])[0]
            total[sample.label] = total.get(sample.label, 0) + logits
    for label, found in lists.items():
        best = np.argsort(-total[label])[:3].tolist()
        assert found == (best if label in best else [*best[:2], label])
        assert (label in table["forced"]) == (label not in best)
    assert table["forced"], "no list needed its true label: the test proves nothing"
    among = store.read_table(str(tmp_path / "counter-1v3.parquet")).to_pylist()
    assert all(row["prediction"] in lists[row["label"]] for row in among)
    hits = [row["prediction"] == row["label"] for row in rows], [row["correct"] for row in among]
    assert sum(hits[1]) >= sum(hits[0])
    assert store.read_json(str(tmp_path / "counter-1v3.json"))["true_label_forced"] == table["forced"]
    assert set(record["files"]) == {"predictions", "among"}
    # the lists of another model are read back, and those of other classes refused
    given = ask(places, "counter", candidates=(f"counter={tmp_path}/counter.candidates.json",))
    assert given.lists == lists
    with pytest.raises(ConfigError, match="made for other class names"):
        read_lists(str(tmp_path / "counter.candidates.json"), ("cat",))


def test_results_by_group_say_what_the_rows_say(places: dict[str, str], tmp_path: Path) -> None:
    _, rows = answer(ask(places, "counter"), tmp_path)
    groups = store.read_json(str(tmp_path / "counter.json"))["groups"]
    for name in ("common", "counter"):
        own = [row for row in rows if row["group"] == name]
        by_class: dict[int, list[bool]] = {}
        for row in own:
            by_class.setdefault(row["label"], []).append(row["correct"])
        assert groups[name]["n"] == len(own)
        assert groups[name]["acc1"] == pytest.approx(sum(row["correct"] for row in own) / len(own))
        balanced = np.mean([np.mean(hits) for hits in by_class.values()])
        assert groups[name]["mean_per_class_recall"] == pytest.approx(balanced)


@pytest.mark.parametrize("kind", ["key-csv", "uid-parquet"])
def test_a_table_of_predictions_is_scored_like_a_model(
    places: dict[str, str], plain: list[dict], tmp_path: Path, kind: str
) -> None:
    test_set = open_test_set(places["val"])
    samples = [item for shard in test_set.shards for item in test_set.read(shard)]
    right = {s.uid: i % 3 == 0 for i, s in enumerate(samples)}
    guesses = [s.label if right[s.uid] else (s.label + 1) % len(test_set.class_names) for s in samples]
    column = kind.split("-")[0]
    rows = [
        {column: getattr(s, column), "prediction": test_set.class_names[g]}
        for s, g in zip(samples, guesses, strict=True)
    ]
    path = str(tmp_path / f"table.{kind.split('-')[1]}")
    write_rows(path, rows[:-2])
    question = ask(places, "val", pretrained="", predictions=(f"val={path}",))
    record = evaluate._evaluate(str(tmp_path), question, EncoderSettings("gpt", ""), None, 1)
    assert record["dropped"] == {"no_prediction": 2}
    found = store.read_table(str(tmp_path / "val.parquet")).to_pylist()
    assert [row["correct"] for row in found] == [right[row["uid"]] for row in plain[:-2]]
    assert "acc5" not in store.read_json(str(tmp_path / "val.json"))["metrics"]
    for bad, message in (
        ([{**rows[0], "prediction": "no such thing"}], "'no such thing' is no class of"),
        ([rows[0], rows[0]], "occurs twice"),
        ([{column: "elsewhere", "prediction": 0}], "none of its 1 rows is of"),
        ([{"image": "a", "prediction": 0}], r"has the columns \['image', 'prediction'\]"),
    ):
        write_rows(path, bad)
        with pytest.raises(DataError, match=message):
            evaluate._evaluate(str(tmp_path), question, EncoderSettings("gpt", ""), None, 1)


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    if path.endswith(".parquet"):
        store.write_table(path, pa.Table.from_pylist(rows))
        return
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    store.write_bytes(path, "\n".join(lines).encode())


def test_a_named_benchmark_must_be_whole(places: dict[str, str]) -> None:
    classes = len(open_test_set(places["val"]).class_names)
    with pytest.raises(DataError) as error:
        ask(places, "val", expect=("val=imagenet-r",))
    assert f"classes: {classes} instead of 200; images: 48 instead of 30,000" in str(error.value)
    with pytest.raises(DataError, match="images of group common: "):
        ask(places, "counter", expect=("counter=counteranimal",))
    with pytest.raises(ConfigError, match="unknown benchmark 'imagenet-q'"):
        ask(places, "val", expect=("val=imagenet-q",))


def test_known_counts_are_those_of_the_papers() -> None:
    assert presets.BENCHMARKS["counteranimal"].num_images == 7_408 + 5_926
    assert len(presets.imagenet_class_names()) == presets.BENCHMARKS["imagenet1k"].num_classes
    assert (len(presets.templates("openai")), len(presets.templates("simple"))) == (80, 7)
    assert presets.main_metric("x/wds_vtab-pets") == presets.main_metric("y/fgvc_aircraft/") == "mean_per_class_recall"
    assert presets.main_metric("x/wds_imagenet1k") == "acc1"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mask": ("r=x",)}, "--mask r=...: no --test is named 'r'"),
        ({"pretrained": ""}, "--pretrained is required"),
        ({"shots": (1,)}, "are for --task linear-probe"),
        ({"crop": ("val=x",)}, "expected a number of pixels"),
        ({"metric": ("val=acc7",)}, "expected acc1 or mean_per_class_recall"),
        ({"class_map": ("val=missing.json",)}, "missing.json does not exist"),
        ({"candidates": ("val=missing.json",)}, "make it with --candidates-k"),
        ({"candidates_k": 99}, "--candidates-k 99"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_at_once(places: dict[str, str], more: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        ask(places, "val", **more)


# --- classifiers -----------------------------------------------------------------------------------------


def thousand(tmp_path: Path) -> dict[str, str]:
    """A folder of two ImageNet classes, one image each."""
    for name in ("tabby cat", "goldfish"):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name / "a.jpg").write_bytes(made.jpeg(len(name), 64))
    return {"two": f"{tmp_path}/set"}


@pytest.mark.parametrize("model", ["torchvision:resnet18", "timm:resnet18.a1_in1k"])
def test_baselines_with_a_thousand_outputs_are_asked_for_the_set_s_classes(tmp_path: Path, model: str) -> None:
    places = thousand(tmp_path)
    encoder = EncoderSettings(model, "random", batch_size=2)
    question = ask(places, "two", model=model)
    preprocess = evaluate_models.check_model(encoder)
    score = evaluate_models.logits_of(encoder, question)
    wide = evaluate_models.logits_of(encoder, ask(places, "two", model=model, classnames=("two=imagenet",)))
    test_set = open_test_set(places["two"])
    pixels = np.stack([preprocess.decode(s.image) for shard in test_set.shards for s in test_set.read(shard)])
    assert preprocess.size == 224
    assert wide(pixels).shape == (2, 1000)
    assert np.array_equal(score(pixels), wide(pixels)[:, [1, 281]])
    (tmp_path / "map.json").write_text(json.dumps({"goldfish": [5, 1, 9], "tabby cat": [281]}))
    mapped = evaluate_models.logits_of(
        encoder, ask(places, "two", model=model, class_map=(f"two={tmp_path}/map.json",))
    )
    assert np.array_equal(mapped(pixels)[:, 0], wide(pixels)[:, [5, 1, 9]].max(axis=1))


def test_torchvision_s_pixels_are_its_own_transform_s(tmp_path: Path) -> None:
    import io

    import torchvision
    from PIL import Image

    encoder = EncoderSettings("torchvision:resnet18", "random", batch_size=2)
    ours = evaluate_models.check_model(encoder).decode(made.jpeg(4, 300))
    transform = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    theirs = transform(Image.open(io.BytesIO(made.jpeg(4, 300))).convert("RGB"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.mean, transform.std))
    assert np.abs(((theirs * std + mean) * 255).round().numpy() - ours.transpose(2, 0, 1)).max() <= 1


def test_names_and_weights_of_baselines_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nearest names: torchvision:resnet50"):
        evaluate_models.check_model(EncoderSettings("torchvision:resnet5", "random"))
    with pytest.raises(ConfigError, match=r"is neither a file nor weights of .*\n.*IMAGENET1K_V1"):
        evaluate_models.check_model(EncoderSettings("torchvision:resnet50", "IMAGENET"))
    question = ask(thousand(tmp_path), "two", model="torchvision:resnet18")
    assert evaluate_models.columns(question, 1000, presets.imagenet_class_names(), "x") == [[1], [281]]
    with pytest.raises(DataError, match=r"has 3 classes, .* names 2"):
        evaluate_models.columns(question, 3, (), "x")
    with pytest.raises(DataError, match="no output called 'goldfish'"):
        evaluate_models.columns(question, 3, ("a", "b", "tabby cat"), "x")


# --- parity ----------------------------------------------------------------------------------------------


def test_open_clip_s_own_pipeline_gives_the_same_predictions(
    places: dict[str, str], plain: list[dict], tmp_path: Path
) -> None:
    """open_clip's transform, tokenizer and model, and the classifier as CLIP_benchmark builds it, on the bare tars."""
    import io
    import tarfile

    from PIL import Image

    encoder = MODEL.build()
    checkpoint = str(tmp_path / "weights.pt")
    torch.save({"state_dict": encoder.model.state_dict()}, checkpoint)  # type: ignore[attr-defined]
    model, _, transform = open_clip.create_model_and_transforms("conv-64-test", pretrained=checkpoint)
    model.eval()
    tokenizer = open_clip.get_tokenizer("conv-64-test")
    root = Path(places["val"])
    classes = root.joinpath("classnames.txt").read_text().splitlines()
    templates = root.joinpath("zeroshot_classification_templates.txt").read_text().splitlines()
    with torch.no_grad():
        weights = []
        for name in classes:
            rows = model.encode_text(tokenizer([template.replace("{c}", name) for template in templates]))
            mean = (rows / rows.norm(dim=-1, keepdim=True)).mean(dim=0)
            weights.append(mean / mean.norm())
        matrix = torch.stack(weights, dim=1)
        found, labels = [], []
        for path in sorted(root.joinpath("test").glob("*.tar"), key=lambda p: int(p.stem)):
            with tarfile.open(path) as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
            for name in members:
                stem, suffix = name.rsplit(".", 1)
                if suffix not in ("jpg", "png", "webp"):
                    continue
                rows = model.encode_image(transform(Image.open(io.BytesIO(members[name])))[None])
                logits = 100 * rows / rows.norm(dim=-1, keepdim=True) @ matrix
                found.append(int(logits.argmax()))
                labels.append(int(members[f"{stem}.cls"]))
    assert labels == [row["label"] for row in plain]
    assert found == [row["prediction"] for row in plain]


def test_a_set_without_readable_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "s" / "test").mkdir(parents=True)
    (tmp_path / "s" / "classnames.txt").write_text("a\n")
    (tmp_path / "s" / "test" / "0.tar").write_bytes(made.tar([("a.cls", b"0"), ("a.jpg", b"x")]))
    with pytest.raises(DataError, match=r"no readable image: skipped \{'broken_image': 1\}"):
        answer(ask({"s": f"{tmp_path}/s"}, "s"), tmp_path)
    found: TestSet = open_test_set(f"{tmp_path}/s")
    assert found.layout == "wds"
