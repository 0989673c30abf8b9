"""jobs/: a script for every stage, and an upload without data."""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

from clipgap_ray.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
UPLOAD_BYTES = 4_000_000
PLANTED = ("demo/embed/x.npy", "out/tiny/y.parquet", "data/00000.tar", "runs/model.pt", ".venv/bin/python")


def test_every_stage_has_a_job():
    called = {re.search(r'main\(\["([a-z-]+)"', path.read_text())[1] for path in (ROOT / "jobs").glob("*.py")}
    stages = {name for name, verb in VERBS.items() if verb.runner.startswith("stages.")} - {"demo"}
    assert stages <= called
    assert called <= {*VERBS, "split"}


def test_a_job_uploads_code_and_no_data(tmp_path):
    """What Ray would upload of a checkout in which somebody has worked."""
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path / "checkout"
    for name in [*_tracked(), *PLANTED]:
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in PLANTED:
            target.write_bytes(b"data")
        else:
            shutil.copy(ROOT / name, target)
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True)
    names = set(zipfile.ZipFile(package).namelist())
    assert {"jobs/embed.py", "serve/app.py", "studies/tiny.yaml", "clipgap_ray/cli.py"} <= names
    assert not names & set(PLANTED)
    assert not [
        n for n in names if n.split("/")[0] in ("tests", "docs", "benchmarks", "deploy", ".git") and n[-1] != "/"
    ]
    assert package.stat().st_size < UPLOAD_BYTES


def _tracked() -> list[str]:
    """Files of the package, jobs and the like, as a checkout has them."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [name for name in done.stdout.split("\n") if name and (ROOT / name).is_file()]
    kept = ("clipgap_ray", "jobs", "serve", "studies", "tests")  # an export without git
    files = [path for folder in kept for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [
        str(p.relative_to(ROOT))
        for p in [*files, ROOT / ".gitignore", ROOT / ".rayignore"]
        if "__pycache__" not in p.parts
    ]
