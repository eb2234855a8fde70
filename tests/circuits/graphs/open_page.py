"""Graph pages in a browser tab, which must log nothing to the console and make no requests."""

import contextlib
import os
from pathlib import Path


EVIL = "</script><script>document.title = 'owned'</script><!--"


@contextlib.contextmanager
def open_page(browser, address, width=1366, height=768, **options):
    """A tab with a page, by default of a laptop's size."""
    tab = browser.new_page(viewport={"width": width, "height": height}, **options)
    said, asked = [], []
    tab.on("console", lambda message: message.type == "error" and said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or asked.append(request.url))
    tab.goto(address)
    try:
        yield tab
        assert tab.title() != "owned" and said == [] and asked == []
    finally:
        tab.close()


def shot(page, name):
    """Save a picture to the folder in `SCREENSHOTS`, if it is set."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder, name)))


def mark(page, number):
    return page.locator(f"#node-svg [data-number='{number}']")


def shown(page):
    return page.evaluate(
        "[...document.querySelectorAll('#node-svg .node')].filter(n => n.style.display !== 'none').length"
    )


def strongest_feature(graph, dictionary=None):
    influence = graph.influence().masked_fill(~graph.is_kind("feature"), -1)
    if dictionary is not None:
        influence = influence.masked_fill(graph.dictionary != graph.dictionaries.index(dictionary), -1)
    return int(influence.argmax())
