"""Where a study's data lies: what its file names, or a world that is rendered first."""

from __future__ import annotations

from dataclasses import dataclass, field

from clipgap_ray.config.study import StudyFile
from clipgap_ray.config.world import WorldSettings
from clipgap_ray.stages import world as world_stage
from clipgap_ray.stages.progress import logger


@dataclass(frozen=True)
class Data:
    """Where the study's data lies."""

    pool: str
    reference: str
    tests: dict[str, str]
    crop: dict[str, int] = field(default_factory=dict)  # border by test set, for embedding and evaluation alike

    def sources(self) -> dict[str, str]:
        """Return everything that is embedded, by the name of its folder."""
        return {"pool": self.pool, "reference": self.reference, **self.tests}


def prepare(file: StudyFile, out: str) -> Data:
    """Render the study's world, unless it names real data."""
    if file.world is not None:
        logger.info("-- world")
        world_stage.run(WorldSettings(out=f"{out}/world", **file.world.model_dump(exclude={"tests"})))
    return locate(file, out)


def locate(file: StudyFile, out: str) -> Data:
    """Return where the study's data lies, rendered or not yet."""
    if file.data is not None:
        return Data(file.data.pool, file.data.reference, dict(file.data.tests), dict(file.data.crop))
    assert file.world is not None  # StudyFile checks that one of the two is there
    folders = {"counteranimal": f"{out}/world/counteranimal"}
    tests = {name: folders.get(name, f"{out}/world/tests/{name}") for name in file.world.test_names()}
    return Data(f"{out}/world/pool", f"{out}/world/reference", tests)
