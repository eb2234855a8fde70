"""
What people look at, opened in a real Chromium: the Trackio dashboard of a run, and the page that the run exports. Skipped
where there is no Chromium (Debian: `apt-get install chromium`; another one: `CHROMIUM=/path/to/it`).
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from hf_transcoders import TranscoderTrackingCallback

from .conftest import EVIL, NAME


PROJECT = "browser"


@pytest.fixture(scope="module")
def run(base, tokenizer, tmp_path_factory):
    """A recorded run: its folder."""
    from .conftest import make_trainer

    make = make_trainer.__wrapped__(base, tokenizer, tmp_path_factory.mktemp("browser"))
    trainer = make(
        callbacks=[TranscoderTrackingCallback(histogram_logs=5, num_features=4)], report_to="trackio", project=PROJECT
    )
    trainer.train()
    return Path(trainer.args.output_dir)


@pytest.fixture(scope="module")
def dashboard(run):
    """The address of `trackio show`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "trackio.cli", "show", "--project", PROJECT]
    # It looks for its port from there on, and would open the desktop's browser.
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "BROWSER": "true"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "trackio show ended"
                time.sleep(0.25)
        else:
            pytest.fail("trackio show did not answer within a minute")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture
def page(browser):
    """A tab that notes every complaint of its console, and every request that leaves this machine."""
    tab = browser.new_page(viewport={"width": 1280, "height": 1600})
    tab.set_default_timeout(60_000)
    tab.complaints, tab.outside = [], []
    tab.on(
        "console", lambda message: message.type == "error" and tab.complaints.append((message.text, message.location))
    )
    tab.on("pageerror", lambda error: tab.complaints.append((str(error), {})))

    def note(request):
        if not request.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:", "about:")):
            tab.outside.append(request.url)

    tab.on("request", note)
    yield tab
    tab.close()


def complaints(page):
    """
    What the console complained of, but for failures to reach the outside: the dashboard asks for its fonts and the like
    there, which need not answer. Such a message says at which address it failed.
    """
    return [text for text, where in page.complaints if where.get("url") not in page.outside]


def shot(page, name):
    """Keeps a picture where `SCREENSHOTS` says, for people to look at."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder, name)), full_page=True)


def test_the_dashboard_shows_the_curves(page, dashboard):
    page.goto(f"{dashboard}/?project={PROJECT}")
    page.get_by_text("fvu").first.wait_for()
    canvas = page.locator("canvas, svg.marks").first
    canvas.wait_for()
    box = canvas.bounding_box()
    shot(page, "dashboard.png")
    assert box["width"] > 200 and box["height"] > 100
    assert "owned" not in page.title()
    assert complaints(page) == []


def test_the_dashboard_shows_the_feature_table(page, dashboard):
    page.goto(f"{dashboard}/media?project={PROJECT}")
    page.get_by_text("context_1").first.wait_for()
    page.wait_for_load_state("networkidle")
    shot(page, "dashboard_media.png")
    text = page.inner_text("body")
    assert f"features/{NAME}" in text and "DENSITY" in text.upper()
    assert EVIL in text
    assert "owned" not in page.title()
    assert complaints(page) == []


def test_the_exported_page_shows_curves_and_features(page, run):
    path = run / "tracking" / "pages" / "report.html"
    page.goto(path.as_uri())
    page.wait_for_load_state()
    shot(page, "report.png")
    curves = page.locator("#training svg polyline")
    assert curves.count() >= 2 and all(curves.nth(i).bounding_box()["width"] > 100 for i in range(curves.count()))
    feature = page.locator("#features article.feature").first
    assert feature.is_visible() and "active on" in feature.inner_text()
    assert page.locator("#features mark").first.is_visible()
    assert page.locator("#metrics table").is_visible()
    assert EVIL in page.inner_text("#features") and page.locator("script").count() == 0
    assert "owned" not in page.title()
    assert page.outside == [] and page.complaints == []
