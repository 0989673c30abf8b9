"""The report in a real browser: it draws, loads nothing from outside, and no image is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipgap_ray.config.report import ReportSettings
from clipgap_ray.stages import report
from tests.unit.study_extras import add_extras
from tests.unit.study_fixture import build_study

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run", "--disable-quic",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium; `make test-all` installs it as root"),
]

PROBE = """<script>window.addEventListener('load', () => {
  const images = [...document.images];
  const broken = images.filter(image => !image.complete || image.naturalWidth === 0).length;
  document.title = `images ${images.length} broken ${broken} width ${document.documentElement.scrollWidth}`;
});</script>"""


def _browse(page: Path, profile: Path, *flags: str) -> str:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--window-size=1200,2000", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    add_extras(build_study(folder))
    report.run(ReportSettings(study=str(folder)))
    return folder / "report" / "index.html"


def test_no_image_is_broken_and_nothing_overflows(page, tmp_path):
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text() + PROBE)
    dom = _browse(probed, tmp_path, "--dump-dom", "--virtual-time-budget=5000")
    title = dom.split("<title>")[1].split("</title>")[0].split()
    images, broken, width = int(title[1]), int(title[3]), int(title[5])
    assert images > 10
    assert broken == 0
    assert width <= 1200


def test_it_prints_to_a_pdf(page, tmp_path):
    target = tmp_path / "report.pdf"
    _browse(page, tmp_path / "profile", f"--print-to-pdf={target}")
    assert target.read_bytes().startswith(b"%PDF"), sys.platform
