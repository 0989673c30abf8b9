"""The house rules that a machine can check: who imports whom, names of scripts, docstrings, README commands."""

import ast
import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import clipgap_ray

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "clipgap_ray"

# A module may import its own tier and those to its left (CONTRIBUTING.md). `stages` and `serving` share a tier but
# not each other. Longest prefix wins.
TIERS = {
    "redaction": 0, "errors": 0, "schema": 0, "environment": 0, "worker_memory": 0,
    "kernels": 1,
    "filesystems": 2, "store": 2, "lease": 2, "rundir": 2, "sources": 2, "tars": 2, "shards": 2, "idlists": 2,
    "blocklist": 2, "pixels": 2, "alterations": 2,
    "testsets": 2, "encoder": 2, "encoder_names": 2, "encoder_projection": 2, "encoder_timm": 2, "embeddings": 2,
    "index": 2, "index_manifest": 2, "download": 2, "uidmap": 2, "regions": 2, "world": 2,
    "presets": 2,
    "config": 3, "hidden": 3,
    "reporting": 4, "stages": 4, "serving": 4, "client": 4, "status": 4, "doctor": 4,
    "cli": 5,
}  # fmt: skip
RAY_ALLOWED = ("stages", "serving")


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("")
        parts = [part for part in relative.parts if part != "__init__"]
        if parts:
            yield ".".join(parts), path


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _tier(module):
    return TIERS[module.split(".")[0]]


@pytest.mark.parametrize(("name", "path"), list(_modules()), ids=[name for name, _ in _modules()])
def test_imports_point_to_the_left(name, path):
    for imported in _imports(path):
        if not imported.startswith("clipgap_ray."):
            continue
        target = imported.removeprefix("clipgap_ray.")
        if target.split(".")[0] not in TIERS:
            continue  # a name of the package itself, such as __version__
        assert _tier(target) <= _tier(name), f"{name} imports {target}, which stands to its right"
        sides = {name.split(".")[0], target.split(".")[0]}
        assert sides != {"stages", "serving"}, f"{name} imports {target}: stages and serving do not know each other"


@pytest.mark.parametrize(("name", "path"), list(_modules()), ids=[name for name, _ in _modules()])
def test_only_stages_and_serving_know_ray(name, path):
    if name.split(".")[0] in RAY_ALLOWED:
        return
    assert not [i for i in _imports(path) if i == "ray" or i.startswith("ray.")], f"{name} imports ray"


def test_every_module_has_a_tier():
    assert {name.split(".")[0] for name, _ in _modules()} <= set(TIERS)


@pytest.mark.parametrize("folder", ["jobs", "serve"])
def test_scripts_do_not_shadow_importable_modules(folder):
    # Running a script puts its folder first on sys.path: jobs/queue.py would break the standard library.
    for path in (ROOT / folder).glob("*.py"):
        if path.stem != "__init__":
            assert importlib.util.find_spec(path.stem) is None, f"{folder}/{path.name} shadows module {path.stem}"


def test_serve_is_bound_only_from_ray():
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("jobs/*.py"), *ROOT.glob("serve/*.py")]:
        assert not re.search(r"^\s*(import serve\b|from serve\b)", path.read_text(), re.M), path


def _public_functions():
    for info in pkgutil.walk_packages(clipgap_ray.__path__, "clipgap_ray."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                continue
            if inspect.isfunction(value):
                yield f"{info.name}.{name}", value
            elif inspect.isclass(value):
                yield f"{info.name}.{name}", value
                for method, function in vars(value).items():
                    if (
                        inspect.isfunction(function)
                        and not method.startswith("_")
                        and not hasattr(value, "model_fields")
                    ):
                        yield f"{info.name}.{name}.{method}", function


def test_everything_public_has_a_docstring():
    missing = [name for name, value in _public_functions() if not inspect.getdoc(value)]
    assert not missing


def test_kernels_document_shapes():
    """A public kernel that takes or returns arrays says their shapes."""
    silent = []
    for name, value in _public_functions():
        if ".kernels." not in name or not inspect.isfunction(value):
            continue
        if "ndarray" in str(inspect.signature(value)) and "(" not in (inspect.getdoc(value) or ""):
            silent.append(name)
    assert not silent


def test_every_setting_is_explained():
    from clipgap_ray.config.base import Settings

    silent = []
    for info in pkgutil.walk_packages((PACKAGE / "config").__fspath__().split("\0"), "clipgap_ray.config."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if inspect.isclass(value) and issubclass(value, Settings) and value is not Settings:
                silent += [f"{name}.{field}" for field, f in value.model_fields.items() if not f.description]
    assert not silent


def _readme_commands():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.split("  #")[0].strip()


def test_every_readme_command_exists():
    from clipgap_ray.cli import SPLITS, VERBS

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    seen = 0
    for command in _readme_commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "clipgap":
            assert words[1] in VERBS or (words[1] == "split" and words[2] in SPLITS), command
        elif words[:3] == ["ray", "job", "submit"]:
            script = next(word for word in words if word.startswith("jobs/"))
            assert (ROOT / script).is_file(), command
        seen += 1
    assert seen >= 8, "the README's commands were not found"


def test_readme_clipgap_commands_parse():
    """Every `clipgap` line of the README is accepted by its own settings class."""
    import tyro

    from clipgap_ray.cli import SPLITS, VERBS, _load

    for command in _readme_commands():
        words = shlex.split(command)
        if words[0] != "clipgap" or words[1] in ("doctor",):
            continue
        verb, rest = (SPLITS[words[2]], words[3:]) if words[1] == "split" else (VERBS[words[1]], words[2:])
        tyro.cli(_load("clipgap_ray.config." + verb.settings), args=rest)


def _requirements():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = config["project"]["optional-dependencies"].values()
    said = [*config["build-system"]["requires"], *config["project"]["dependencies"], *itertools.chain(*extras)]
    return sorted({Requirement(text) for text in said}, key=str)


@pytest.mark.parametrize("required", _requirements(), ids=str)
def test_every_dependency_ends_somewhere_and_admits_the_tested_version(required):
    assert {"<", "<=", "==", "~="} & {one.operator for one in required.specifier}, "the next major one is not tested"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    tested = {canonicalize_name(name): version for name, version in pins.items()}.get(canonicalize_name(required.name))
    assert tested is None or required.specifier.contains(tested)


def test_no_actor_has_a_name_by_which_two_jobs_could_meet():
    paths = [path for folder in ("clipgap_ray", "jobs", "serve") for path in (ROOT / folder).rglob("*.py")]
    for path in paths:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            words, name = {word.arg for word in call.keywords}, ast.unparse(call.func)
            assert not {"namespace", "lifetime", "get_if_exists"} & words, f"{path}:{call.lineno}"
            assert not name.endswith("get_actor"), f"{path}:{call.lineno}"
            if name.endswith(".options") and "serving" not in path.parts:  # there they name deployments of Serve
                assert "name" not in words, f"{path}:{call.lineno}"
