"""The search page in a real browser: type, drop, click through, classify; on a desk and on a phone."""

import shutil
import threading
import time

import pytest
import uvicorn

from clipgap_ray.config.split import Near, Random
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.coverage import Coverage
from clipgap_ray.stages import split
from tests.e2e.browser import open_page
from tests.service_fixture import serve_locally

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium; `make test-all` installs it as root"),
]


@pytest.fixture(scope="module")
def address(tiny_embeddings, tiny_scores, tmp_path_factory):
    """Where a service over the tiny pool listens, with scores and two splits."""
    folder = tmp_path_factory.mktemp("service")
    for kind in (Near(scores=tiny_scores, out=str(folder / "near.npy"), test=("val",), size="0.5"),
                 Random(scores=tiny_scores, out=str(folder / "random.npy"), size="0.5")):  # fmt: skip
        split.run(kind)
    coverage = Coverage(tiny_scores, (str(folder / "near.npy"), str(folder / "random.npy")))
    backend = serve_locally(tiny_embeddings["pool"], folder / "index", coverage=coverage)
    server = uvicorn.Server(uvicorn.Config(make_api(backend), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def page(address, tmp_path):
    with open_page(CHROMIUM, address, tmp_path / "profile") as page:
        page.wait("document.querySelectorAll('#filters input').length === 2")
        yield page
        assert page.errors == []


COUNT = "document.querySelectorAll('#results li').length"
LOADED = "[...document.querySelectorAll('#results img')].every(i => i.complete && i.naturalWidth > 0)"


def search(page, words):
    page.press("/", 191, "/")  # the shortcut
    page.run("document.activeElement.select()")
    page.type(words)
    page.press("Enter", 13, "\r")
    page.wait(f"{COUNT} > 0")


def test_words_are_typed_and_answered(page, tmp_path):
    page.size(1200, 900)
    search(page, "a photo of a cat")
    assert page.run(COUNT) == 20
    page.wait(LOADED)
    similarities = page.run("[...document.querySelectorAll('.similarity')].map(p => Number(p.textContent))")
    assert similarities == sorted(similarities, reverse=True)
    assert page.run("document.getElementById('coverage').hidden")  # words are not on the scale of images
    page.screenshot(tmp_path / "text.png")


def test_a_click_searches_by_that_image_and_back_returns(page, tmp_path):
    search(page, "a photo of a cat")
    caption = page.run("document.querySelectorAll('.caption')[1].textContent")
    page.run("document.querySelectorAll('.picture')[1].click()")
    page.wait("document.getElementById('query-words').textContent.includes('training image')")
    page.wait("document.querySelector('.similarity').textContent === '1.000'")
    # exact duplicates are planted: the row itself is among those of similarity 1
    captions = page.run(
        "[...document.querySelectorAll('#results li')].filter(li => li.querySelector('.similarity')"
        ".textContent === '1.000').map(li => li.querySelector('.caption').textContent)"
    )
    assert caption in captions
    page.wait("!document.getElementById('coverage').hidden")
    assert page.run("document.querySelectorAll('#tests figure').length") == 3
    assert page.run("document.querySelectorAll('#splits tr').length") == 2
    page.screenshot(tmp_path / "image.png")
    page.run("history.back()")
    page.wait("document.getElementById('query-words').textContent.includes('cat')")


def test_the_filter_shows_only_what_a_split_keeps(page):
    search(page, "a photo of a cat")
    kept = "[...document.querySelectorAll('.kept')].map(p => p.textContent)"
    assert not all("near" in text for text in page.run(kept))
    page.run("document.querySelector('#filters input[value=near]').click()")
    page.wait(f"{kept}.length === 20 && {kept}.every(text => text.includes('near'))")


def test_conditions_are_typed_and_mistakes_are_said(page, tmp_path):
    page.size(1200, 900)
    search(page, "a photo of a cat")
    page.run("where.value = 'width>=1 clip_score<=-0.9'; where.dispatchEvent(new Event('change'))")
    page.wait(f"{COUNT} === 0")
    page.run("where.value = 'width>=1'; where.dispatchEvent(new Event('change'))")
    page.wait(f"{COUNT} === 20")
    page.screenshot(tmp_path / "where.png")
    page.run("where.value = 'wide images'; where.dispatchEvent(new Event('change'))")
    page.wait("document.getElementById('status').textContent.includes('Expected for example')")


def test_a_dropped_image_is_searched_and_classified(page, address):
    pixels = (
        "fetch('/v1/thumbnails/3').then(r => r.blob()).then(blob => {"
        "const data = new DataTransfer(); data.items.add(new File([blob], 'dropped.jpg', {type: 'image/jpeg'}));"
        "dispatchEvent(Object.assign(new Event('drop'), {dataTransfer: data}));})"
    )
    page.run(pixels)
    page.wait("document.getElementById('query-words').textContent === 'dropped.jpg'")
    page.wait(f"{COUNT} > 0 && {LOADED}")
    page.run("document.getElementById('classes').value = 'cat\\ndog\\n\\nhouse'")
    page.run("document.getElementById('classify').click()")
    page.wait("document.querySelectorAll('#classes-found tr').length === 3")
    shares = page.run(
        "[...document.querySelectorAll('#classes-found td:last-child')].map(c => parseFloat(c.textContent))"
    )
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_fewer_results_by_the_slider(page):
    search(page, "cat")
    page.run("k.value = 5; k.dispatchEvent(new Event('input')); k.dispatchEvent(new Event('change'))")
    page.wait(f"{COUNT} === 5")


def test_it_fits_a_phone_and_dark_screens(page, tmp_path):
    page.size(390, 800, dark=True)
    search(page, "a photo of a cat")
    page.wait(LOADED)
    assert page.run("document.documentElement.scrollWidth") <= 390
    page.screenshot(tmp_path / "phone.png")


def test_texts_of_the_pool_are_never_markup(page):
    search(page, "<img src=x onerror=window.broken=1>")
    assert page.run("window.broken === undefined")
    assert page.run("document.querySelectorAll('#query-words img').length") == 0


def test_an_error_is_said_in_words(page, address):
    page.run("location.hash = 'uid=' + '0'.repeat(32) + '&row=1'; dispatchEvent(new PopStateEvent('popstate'))")
    page.wait("document.getElementById('status').classList.contains('error')")
    assert "uid" in page.run("document.getElementById('status').textContent")
    page.errors.clear()  # the browser logs the 404 that was asked for
