"""Captions as the web writes them: helpful, terse, noisy, silent about the subject, or wrong.

Templates name the style more often than not, so that a model can learn what a sketch is called. The zero-shot
templates of the test sets (`formats.py`) are sentences that these captions resemble and do not repeat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipgap_ray.world.pictures import Facts

NAMES_CLASS, NO_CLASS, WRONG, OFF_TOPIC = "names_class", "no_class", "wrong", "off_topic"

_MEDIA = {
    "photo": ("a photo of", "photo of", "a close-up of", "a picture of", "snapshot of", "my photo of"),
    "sketch": ("a sketch of", "pencil drawing of", "a pencil sketch of", "a line drawing of", "ink drawing of"),
    "cartoon": ("a cartoon of", "cartoon of", "a cartoon drawing of", "clip art of", "a comic of"),
    "painting": ("a painting of", "oil painting of", "an impressionist painting of", "art print of"),
    "silhouette": ("a silhouette of", "silhouette of", "black shape of", "the outline of"),
}  # fmt: skip
_PLACES = {
    "grass": ("on grass", "in the grass", "on a meadow"),
    "snow": ("in the snow", "on snow"),
    "sand": ("on sand", "on the beach", "in the desert"),
    "water": ("in the water", "at the lake", "on water"),
    "rock": ("on a rock", "among rocks", "on stone"),
    "indoor": ("indoors", "on a wooden floor", "in a room"),
    "paper": ("on paper", ""),
    "plain": ("", "at dusk"),
}
_NO_CLASS = (
    "a nice day {place}", "untitled {number}", "DSC_{number}", "{medium} something {place}", "look at this!",
    "best of {year}", "{colour} and lovely", "IMG {number} {place}",
)  # fmt: skip
_ALT_TEXT = (
    "{thing} {number}", "{colour} {thing} | free download", "{thing}, {colour}, {year}", "{thing} stock image {number}",
    "{Thing} - page {number}", "buy {colour} {thing} online",
)  # fmt: skip
_OFF_TOPIC = (
    "abstract pattern {number}", "wallpaper {colour}", "seamless texture no. {number}", "summer sale {year}",
    "modern background in {colour}", "quarterly report {year}", "fabric sample {number}", "geometric design",
)  # fmt: skip
_COLOURS = ("red", "green", "blue", "yellow", "grey", "purple")


def choose_kind(rng: np.random.Generator, no_class_rate: float, wrong_rate: float) -> str:
    """Draw what the caption of an on-topic row does: NO_CLASS, WRONG or NAMES_CLASS."""
    chance = rng.random()
    if chance < no_class_rate:
        return NO_CLASS
    return WRONG if chance < no_class_rate + wrong_rate else NAMES_CLASS


def write(facts: Facts, kind: str, names: Sequence[str], rng: np.random.Generator) -> str:
    """Write a caption for a picture of the miniature world.

    Args:
        facts: What is on it.
        kind: What the caption says about it: NAMES_CLASS, NO_CLASS, WRONG (another class) or OFF_TOPIC.
        names: All class names, to be wrong with.
        rng: Decides the wording.
    """
    words = {
        "number": str(rng.integers(10, 10_000)),
        "year": str(rng.integers(1998, 2024)),
        "colour": facts.colour or _pick(_COLOURS, rng),
        "place": _pick(_PLACES.get(facts.background, ("",)), rng),
        "medium": _pick(_MEDIA.get(facts.style, ("",)), rng),
    }
    if kind == OFF_TOPIC:
        return _tidy(_pick(_OFF_TOPIC, rng).format_map(words))
    if kind == NO_CLASS:
        return _tidy(_pick(_NO_CLASS, rng).format_map(words))
    name = facts.class_name if kind == NAMES_CLASS else wrong_name(facts.class_name, names, rng)
    if rng.random() < 0.12:
        return _tidy(_pick(_ALT_TEXT, rng).format_map({**words, "thing": name, "Thing": name.capitalize()}))
    return _sentence(words, name, facts, rng)


def wrong_name(name: str, names: Sequence[str], rng: np.random.Generator) -> str:
    """A class name other than `name`, uniformly."""
    return _pick([other for other in names if other != name], rng)


def _sentence(words: dict[str, str], name: str, facts: Facts, rng: np.random.Generator) -> str:
    """ "a photo of a small red fish on grass", with each word but the name left out now and then."""
    medium = words["medium"] if rng.random() < 0.6 else ""
    size = facts.size if rng.random() < 0.08 else ""
    coloured = facts.style in ("photo", "cartoon", "painting")
    colour = facts.colour if coloured and rng.random() < 0.12 else ""
    place = words["place"] if rng.random() < 0.15 else ""
    described = _tidy(f"{size} {colour} {name}")
    article = ("an" if described[0] in "aeiou" else "a") if rng.random() < 0.85 else "the"
    return _tidy(f"{medium} {article} {described} {place}")


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
