"""Other tools' spellings of models: what users of clip-retrieval and CLIP_benchmark type works here too."""

from __future__ import annotations

from clipgap_ray.errors import ConfigError

# OpenAI's own spellings, which clip-retrieval takes too. Alone they mean OpenAI's weights.
ALIASES = {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}


def resolve_names(model: str, pretrained: str) -> tuple[str, str]:
    """Turn other tools' spellings of a model into open_clip's name and tag.

    Known are clip-retrieval's `open_clip:ViT-B-32/laion2b_s34b_b79k`, `hf_clip:org/name` and `ViT-B/32` (alone:
    OpenAI's weights), and CLIP_benchmark's `ViT-B-32,openai`. Anything else comes back unchanged.

    Raises:
        ConfigError: If the spelling names a tag and `pretrained` another.
    """
    tag, given = "", model
    if model.startswith("open_clip:"):
        model, _, tag = model.removeprefix("open_clip:").partition("/")
    elif model.startswith("hf_clip:"):
        model = "hf-hub:" + model.removeprefix("hf_clip:")
    elif "," in model:
        model, _, tag = model.partition(",")
    if model in ALIASES:
        tag = tag or ("" if pretrained else "openai")
        quick = "-quickgelu" if "openai" in (tag, pretrained) else ""
        model = ALIASES[model] + quick
    if tag and pretrained and tag != pretrained:
        raise ConfigError(
            f"--model {given} names the weights {tag!r}, --pretrained {pretrained!r}", hint="leave one of them out"
        )
    return model, pretrained or tag
