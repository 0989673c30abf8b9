"""A checkpoint is data: a pickle in one that would run something is refused, by every loader, and runs nothing."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import clipgap_ray
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError
from clipgap_ray.stages import evaluate_models


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    trace, checkpoint = tmp_path / "it-ran", tmp_path / "checkpoint.pt"
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}, "more": Bomb(trace)}, checkpoint)
    torch.load(checkpoint, weights_only=False)
    assert trace.exists(), "the bomb works"
    trace.unlink()
    return checkpoint


def test_an_encoder_refuses_it(bomb: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.pt holds more than weights and is not loaded"):
        EncoderSettings("conv-64-test", str(bomb), batch_size=8).build()
    assert not (bomb.parent / "it-ran").exists()


def test_a_timm_encoder_refuses_it(bomb: Path) -> None:
    with pytest.raises(ConfigError, match="does not load into timm:test_vit"):
        EncoderSettings("timm:test_vit.r160_in1k", str(bomb), batch_size=4).build()
    assert not (bomb.parent / "it-ran").exists()


def test_an_evaluation_refuses_it(bomb: Path) -> None:
    assert evaluate_models._own_state(EncoderSettings("conv-64-test", str(bomb))) == {}
    with pytest.raises(ConfigError, match="holds more than weights"):
        evaluate_models._torchvision(EncoderSettings("torchvision:resnet18", str(bomb)))
    assert not (bomb.parent / "it-ran").exists()


def test_no_code_loads_anything_else_than_weights() -> None:
    """Also the states of trainings, which only Ray Train opens."""
    found = 0
    for path in Path(clipgap_ray.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert words.get("allow_pickle", "False") == "False", path
            assert ast.unparse(call.func) not in ("pickle.load", "pickle.loads"), path
            if ast.unparse(call.func) in ("torch.load", "load_state_dict"):
                assert words.get("weights_only") == "True", path
                found += 1
    assert found >= 4
