"""The report and the audit in a real browser: they draw, load nothing from outside, and lose nothing on paper."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from clipgap_ray.config.audit import AuditSettings
from clipgap_ray.config.report import ReportSettings
from clipgap_ray.stages import audit, report
from tests.e2e.browser import FLAGS, open_page
from tests.e2e.pdf import text_of
from tests.unit.study_extras import add_extras
from tests.unit.study_fixture import build_study

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium; `make test-all` installs it as root"),
]

LOADED = "document.readyState === 'complete' && [...document.images].every(image => image.complete)"
BROKEN = "[...document.images].filter(image => image.naturalWidth === 0).length"
FOLDED = "document.querySelectorAll('details:not([open])').length"
INK = "getComputedStyle(document.body).color + ' on ' + getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("study")
    add_extras(build_study(folder))
    report.run(ReportSettings(study=str(folder)))
    embed = folder / "embed"
    tests = tuple(f"{name}={embed / name}" for name in ("val", "sketch"))
    audit.run(AuditSettings(pool=str(embed / "pool"), test=tests, out=str(folder / "audit"), duplicate=0.98))
    return {"report": folder / "report" / "index.html", "audit": folder / "audit" / "index.html"}


@pytest.mark.parametrize("name", ["report", "audit"])
def test_no_script_fails_no_image_is_broken_and_nothing_overflows(pages, tmp_path, name) -> None:
    with open_page(CHROMIUM, pages[name].as_uri(), tmp_path / "profile") as page:
        page.wait(LOADED)
        shades = []
        for dark in (False, True):
            page.size(1200, 2000, dark)
            page.wait(LOADED)
            assert page.run("document.images.length") > 4
            assert page.run(BROKEN) == 0
            assert page.run("document.documentElement.scrollWidth") <= 1200
            shades.append(page.run(INK))
        assert len(set(shades)) == 2, "light and dark look alike"
        # Figures have a file of their own for dark pages, which the browser takes in its own time.
        page.wait("[...document.querySelectorAll('picture img')].every(i => i.currentSrc !== i.src)")
        assert page.errors == []


def test_what_is_folded_on_the_screen_is_on_paper(pages, tmp_path) -> None:
    """Long tables of the report, and the audit's closest pairs."""
    with open_page(CHROMIUM, pages["report"].as_uri(), tmp_path / "look") as page:
        page.wait(LOADED)
        assert page.run(FOLDED) > 0
        folded = page.run("document.querySelector('#provenance details:not([open]) td').textContent")
    printed = _printed(pages["report"], tmp_path)
    assert "Isthegapmatched?" in printed
    assert folded.replace(" ", "") in printed
    digests = json.loads(pages["report"].with_name("manifest.json").read_text())["inputs"]
    assert all(record["digest"][:16] in printed for record in digests)
    pairs = json.loads(pages["audit"].with_name("audit.json").read_text())["tests"][1]["pairs"]
    printed = _printed(pages["audit"], tmp_path)
    assert all(f"{pair['similarity']:.4f}" in printed for pair in pairs)


def _printed(page: Path, folder: Path) -> str:
    target = folder / f"{page.parent.name}.pdf"
    own = [flag for flag in FLAGS if "debugging" not in flag]
    command = [CHROMIUM, *own, f"--user-data-dir={folder / 'print'}", f"--print-to-pdf={target}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    return text_of(target.read_bytes())
