"""What is asked of each test set: label space, prompts, candidates, crop, metric; checked before a model is built."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from clipgap_ray import presets, schema, store, testsets
from clipgap_ray.config.evaluate import PER_TEST, EvaluateSettings
from clipgap_ray.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """One test set and how it is scored.

    Attributes:
        name: Of the test set.
        test_set: With its final class names and templates.
        crop_border: Pixels cut from every side.
        metric: The main one.
        allowed: Sorted class indices that are candidates; None: all.
        class_map: Outputs of a classifier by class; None: by name or position.
        lists: Candidate labels by class; None: none given.
        candidates_k: Make such lists of this length; 0: do not.
        predictions: Table to score; empty: run the model.
        options: What was asked for in the user's words, as the commit record remembers it.
    """

    name: str
    test_set: testsets.TestSet
    crop_border: int
    metric: str
    allowed: tuple[int, ...] | None = None
    class_map: dict[str, list[int]] | None = None
    lists: dict[int, list[int]] | None = None
    candidates_k: int = 0
    predictions: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def mask(self) -> np.ndarray | None:
        """Return the candidates as a (c,) bool mask."""
        if self.allowed is None:
            return None
        mask = np.zeros(len(self.test_set.class_names), bool)
        mask[list(self.allowed)] = True
        return mask


def questions(settings: EvaluateSettings) -> dict[str, Question]:
    """Open every test set and resolve what the settings say of it.

    Raises:
        ConfigError: A set that is missing, a list of the wrong length, an unknown name in a list.
        DataError: A folder that is not the benchmark it was expected to be.
    """
    return {name: _question(settings, name, uri) for name, uri in schema.named(settings.test, "--test").items()}


def _question(settings: EvaluateSettings, name: str, uri: str) -> Question:
    test_set = testsets.open_test_set(uri)
    if word := settings.of("expect", name):
        presets.expect(test_set, word)
    if word := settings.of("classnames", name):
        names = presets.imagenet_class_names() if word == "imagenet" else _lines(word, "--classnames")
        test_set = testsets.with_class_names(test_set, names, f"--classnames {name}={word}")
    if word := settings.of("templates", name):
        known = word in ("openai", "simple")
        test_set = replace(test_set, templates=presets.templates(word) if known else _templates(word, name))
    classes = test_set.class_names
    options: dict[str, Any] = {key: word for key in PER_TEST if (word := settings.of(key, name))}
    if settings.candidates_k:
        options["candidates_k"] = settings.candidates_k
        if not 1 < settings.candidates_k <= len(classes):
            raise ConfigError(f"--candidates-k {settings.candidates_k}: {uri} has {len(classes)} classes")
    word = settings.of("mask", name)
    path = settings.of("candidates", name)
    return Question(
        name,
        test_set,
        int(settings.of("crop", name) or settings.crop_border),
        settings.of("metric", name) or presets.main_metric(uri),
        _indices(_lines(word, "--mask"), classes, f"--mask {name}={word}") if word else None,
        _class_map(settings.of("class_map", name), classes),
        read_lists(path, classes) if path else None,
        settings.candidates_k,
        settings.of("predictions", name),
        options,
    )


def _lines(uri: str, flag: str) -> tuple[str, ...]:
    if not store.exists(uri):
        raise ConfigError(f"{flag}: {uri} does not exist")
    return tuple(line.strip() for line in store.read_bytes(uri).decode().splitlines() if line.strip())


def _templates(uri: str, name: str) -> tuple[str, ...]:
    templates = _lines(uri, "--templates")
    bad = next((template for template in templates if "{c}" not in template), None)
    if bad is not None or not templates:
        raise ConfigError(f"--templates {name}={uri}: prompt {bad!r} has no {{c}} for the class name")
    return templates


def _indices(words: tuple[str, ...], classes: tuple[str, ...], where: str) -> tuple[int, ...]:
    by_name: dict[str, list[int]] = {}
    for index, class_name in enumerate(classes):
        by_name.setdefault(class_name, []).append(index)
    chosen: set[int] = set()
    for word in words:
        if word in by_name:
            chosen.update(by_name[word])
        elif word.isdigit() and int(word) < len(classes):
            chosen.add(int(word))
        else:
            raise ConfigError(f"{where}: {word!r} is neither a class name of the set nor an index below {len(classes)}")
    if not chosen:
        raise ConfigError(f"{where} names no class")
    return tuple(sorted(chosen))


def _class_map(uri: str, classes: tuple[str, ...]) -> dict[str, list[int]] | None:
    if not uri:
        return None
    mapping = store.read_json(uri)
    lacking = [name for name in classes if not (isinstance(mapping, dict) and mapping.get(name))]
    if lacking:
        raise ConfigError(
            f"--class-map {uri} lacks {len(lacking)} of {len(classes)} classes, the first is {lacking[0]!r}",
            hint="expected JSON: {class name: [indices of the classifier's outputs]}",
        )
    return {name: [int(index) for index in mapping[name]] for name in classes}


def read_lists(uri: str, classes: tuple[str, ...]) -> dict[int, list[int]]:
    """Read candidate lists: {"lists": {class index: [class indices]}}, as `evaluate --candidates-k` writes them.

    Raises:
        ConfigError: If the file is no such table, was made for other classes, or a list lacks its own class.
    """
    if not store.exists(uri):
        raise ConfigError(f"--candidates: {uri} does not exist", hint="make it with --candidates-k 20")
    table = store.read_json(uri)
    if not isinstance(table, dict) or not isinstance(table.get("lists"), dict):
        raise ConfigError(f'--candidates {uri}: expected {{"lists": {{class: [classes]}}}}')
    if table.get("class_names_sha256") not in (None, store.digest(list(classes))):
        raise ConfigError(f"--candidates {uri} was made for other class names", hint="use the same --classnames")
    lists = {int(label): [int(one) for one in found] for label, found in table["lists"].items()}
    for label, found in lists.items():
        if label not in found or not all(0 <= one < len(classes) for one in found):
            raise ConfigError(
                f"--candidates {uri}: the list of class {label} is {json.dumps(found)}, expected its label"
            )
    return lists
