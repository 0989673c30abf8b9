"""What a study may ask for beyond its accuracies: each item is a command that also exists by itself."""

from __future__ import annotations

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Settings
from clipgap_ray.errors import ConfigError

PROMPT_SETS = ("openai", "simple")
WORLD_MASKS = "world"


class SecondEncoder(Settings):
    """Another encoder for `agreement`: a model of the study, or any other."""

    run: str = ""
    """Name of a CLIP of the study (its first seed): no further weights are needed."""
    model: str = ""
    """Or an open_clip model, as `embed --model` takes it."""
    pretrained: str = ""
    """Its weights."""

    @pydantic.model_validator(mode="after")
    def _one(self) -> SecondEncoder:
        if bool(self.run) == bool(self.model):
            raise ConfigError(
                f"second_encoder needs one of run ({self.run!r}) and model ({self.model!r})",
                hint="for example second_encoder: {run: full}",
            )
        if self.run and self.pretrained:
            raise ConfigError(f"second_encoder: run {self.run!r} has its own weights; pretrained belongs to model")
        return self


class AnalysesSection(Settings):
    """Analyses that `run` adds to a study's report; what is left out is not run."""

    test: str = "counteranimal"
    """The test set with groups (common and counter, or those that `groups` names) that prompts, candidates_k, join and
    discover are about."""
    prompts: tuple[str, ...] = ()
    """Ask every CLIP about it with these prompts, too: openai, simple, or a file of one prompt per line."""
    candidates_k: pydantic.NonNegativeInt = 0
    """Ask every model among the K labels most alike each class, too, with all prompts (CounterAnimal: 20); 0: no."""
    linear_probe: bool = False
    """Logistic regression on every CLIP's features of the reference, tested on the test sets of the same classes."""
    backgrounds: str = ""
    """Label the backgrounds of `test` and of the pool by zero-shot, for join and discover: prompts as `attributes
    --prompts` takes them (backgrounds, backgrounds-miniature, or a YAML file)."""
    join: bool = False
    """What the neighbours of its photos are, for CLIPs trained on the whole pool; and, with two supervised runs or
    more, effective robustness at equal similarity, for every model beside its own training data."""
    masks: str = ""
    """Folder of masks of the photos of `test`, as `cutout --masks` takes it (`world`: those of the rendered world): the
    join then says how much farther the animal alone and the background alone lie, and what each explains."""
    discover: bool = False
    """Which backgrounds the CLIPs are good and bad at, and how much of such a drop is selection; needs backgrounds."""
    min_photos: pydantic.PositiveInt = 20
    """discover: backgrounds of a class with fewer photos take no part."""
    second_encoder: SecondEncoder | None = None
    """Embed and score everything by another encoder, too, and compare. It also labels the backgrounds, if it knows
    text: the models under test then do not label their own test."""

    @property
    def about_groups(self) -> bool:
        """Whether anything is asked of the grouped test set."""
        return bool(self.prompts or self.candidates_k or self.backgrounds or self.join or self.discover)

    def ways(self) -> dict[str, str]:
        """Return prompts by the name of the way of asking: of the set, or the file's without suffix."""
        return {word if word in PROMPT_SETS else _stem(word): word for word in self.prompts}

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> AnalysesSection:
        if self.discover and not self.backgrounds:
            raise ConfigError(
                "analyses.discover is true without backgrounds: groups are discovered among labelled backgrounds",
                hint="add backgrounds: backgrounds (CounterAnimal's 14) or a YAML file of prompts",
            )
        if self.masks and not self.join:
            raise ConfigError(f"analyses.masks is {self.masks!r} without join, which uses them", hint="join: true")
        if self.candidates_k == 1:
            raise ConfigError("analyses.candidates_k is 1: expected 2 or more, one label is no choice", hint="20")
        for name in self.ways():
            schema.check_name(name, "analyses.prompts: way of asking")
        if len(self.ways()) < len(self.prompts):
            raise ConfigError(f"analyses.prompts {list(self.prompts)} name a way of asking twice", hint="rename a file")
        return self


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
