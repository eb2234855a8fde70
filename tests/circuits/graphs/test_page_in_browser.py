"""
The page of an attribution graph, opened in a real Chromium. Skipped where there is none (Debian: `apt-get install chromium`;
another one: `CHROMIUM=/path/to/it`).
"""

import pytest
import torch

from hf_transcoders.circuits.graphs.combine import union
from hf_transcoders.circuits.graphs.edge_validation import EdgeValidation
from hf_transcoders.features.feature_examples import FeatureContext, FeatureExplanation

from .open_page import EVIL, mark, open_page, shot, shown, strongest_feature
from .random_graph import random_graph


@pytest.fixture(scope="module")
def graph():
    return random_graph(
        tokens=("<s>", " When", EVIL, " and", " gave"),
        features=2,
        difference=True,
    )


def validation_of(graph):
    """The validation of one edge, whose prediction is wrong."""
    one = torch.tensor([0])
    return EdgeValidation(
        one, one, one, torch.tensor([1.25]), {"free": torch.tensor([-1.5])}, [(graph.label(0), EVIL)]
    )


@pytest.fixture(scope="module")
def address(graph, tmp_path_factory):
    """The page, with an explanation of every feature of one dictionary."""
    number = graph.dictionaries.index("layers.0.mlp.transcoder")
    features = sorted(set(graph.index[graph.is_kind("feature") & (graph.dictionary == number)].tolist()))
    context = FeatureContext([" some", EVIL, " text"], [0.5, 3.0, 0.0], 1, 0, 7)
    explained = [
        FeatureExplanation(i, 0.01, 3.0, 1.0, [context], [(" up" + EVIL, 2.0)], [(" down", -1.0)]) for i in features
    ]
    folder = tmp_path_factory.mktemp("page")
    graph = graph.with_validation(validation_of(graph))
    path = graph.to_html(folder / "graph.html", {"layers.0.mlp.transcoder": explained})
    return path.as_uri()


@pytest.fixture
def page(browser, address):
    with open_page(browser, address) as tab:
        yield tab


def test_every_node_is_drawn_in_its_layer_and_over_its_token(page, graph):
    shot(page, "graph_light.png")
    assert shown(page) == graph.num_nodes
    boxes = page.evaluate(
        "[...document.querySelectorAll('#node-svg .node')].map(n => { const r = n.querySelector('.shape')"
        ".getBoundingClientRect(); return [Number(n.dataset.number), r.x + r.width / 2, r.y + r.height / 2, r.width]; })"
    )
    middle = {number: (x, y) for number, x, y, _ in boxes}
    widths = {number: width for number, _, _, width in boxes}
    tokens = graph.is_kind("token").nonzero()[:, 0].tolist()
    assert [middle[number][0] for number in tokens] == sorted(middle[number][0] for number in tokens)
    for number in graph.is_kind("feature", "error", "mlp").nonzero()[:, 0].tolist():
        x, y = middle[number]
        token = tokens[int(graph.position[number])]
        assert abs(middle[token][0] - x) <= widths[token] / 2
        above = [middle[n][1] for n in range(graph.num_nodes) if graph.layer[n] > graph.layer[number] >= 0]
        assert all(y > other for other in above)
    # No two nodes overlap, and all are on the screen.
    places = list(middle.values())
    assert len({(round(x), round(y)) for x, y in places}) == len(places)
    assert all(0 < x < 1366 - 368 and 0 < y < 768 for x, y in places)


def test_edges_are_painted(page):
    painted = "(() => { const c = document.getElementById('edge-canvas'); return c.getContext('2d')" \
        ".getImageData(0, 0, c.width, c.height).data.reduce((n, v, i) => n + (i % 4 === 3 && v > 0 ? 1 : 0), 0); })()"  # fmt: skip
    everything = page.evaluate(painted)
    assert everything > 5000
    page.evaluate("shown.edges = []; drawEdges()")
    assert page.evaluate(painted) == 0


def test_pointing_and_clicking_tell_of_a_node(page, graph):
    number = strongest_feature(graph, "layers.0.mlp.transcoder")
    mark(page, number).hover()
    tooltip = page.locator("#tooltip")
    assert graph.label(number) in tooltip.inner_text() and "activation" in tooltip.inner_text()
    mark(page, number).click()
    panel = page.locator("#panel").inner_text()
    assert graph.label(number) in panel and "active on 1% of tokens, up to 3" in panel
    # Contexts and promoted tokens of a feature are inserted as text.
    assert EVIL in panel and page.locator("#panel mark").inner_text() == EVIL
    assert page.locator("script").count() == 3
    outgoing = graph.outgoing(number)
    assert f"{len(outgoing)} edges" in panel
    assert mark(page, number).get_attribute("aria-pressed") == "true"
    near = {number, *(end for end, _ in graph.incoming(number) + outgoing)}
    assert page.locator("#node-svg .node:not(.faded)").count() == len(near)
    # A list entry selects its node.
    page.locator("#panel .end").first.click()
    first = graph.incoming(number)[0][0]
    assert page.locator("#panel h2").inner_text() == graph.label(first).strip()
    shot(page, "graph_selected.png")


def test_the_row_is_shown_to_add_up(page, graph):
    number = int(graph.is_kind("target").nonzero()[0])
    mark(page, number).click()
    edges = sum(weight for _, weight in graph.incoming(number))
    text = page.locator("#panel dl").first.inner_text().replace("−", "-")
    total, from_edges = (f"{float(f'{value:.3g}'):g}" for value in (float(graph.total[number]), edges))
    assert f"{total} = {from_edges} from edges" in text


def test_walking_by_keyboard(page, graph):
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('node')"):
            break
    focused = "Number(document.activeElement.dataset.number)"
    seen = [page.evaluate(focused)]
    assert graph.node(seen[0]).kind == "target"
    outline = "getComputedStyle(document.activeElement.querySelector('.ring')).stroke"
    assert page.evaluate(outline) != "none"
    for _ in range(40):
        page.keyboard.press("ArrowDown")
        if page.evaluate(focused) == seen[-1]:
            break
        seen.append(page.evaluate(focused))
    layers = [graph.node(number).layer for number in seen]
    assert layers[0] == graph.num_layers and layers[-1] == -1 and layers == sorted(layers, reverse=True)
    assert len(set(layers)) >= 4
    page.keyboard.press("ArrowLeft")
    left = page.evaluate(focused)
    assert graph.node(left).position == graph.node(seen[-1]).position - 1
    page.keyboard.press("Enter")
    assert page.locator("#panel h2").inner_text() == graph.label(left).strip()
    page.keyboard.press("p")
    assert page.locator("#pinned-count").inner_text() == "1" and "pinned" in mark(page, left).get_attribute("class")
    assert page.evaluate(focused) == left
    page.keyboard.press("Escape")
    assert page.locator("#node-svg .selected").count() == 0 and page.evaluate(focused) == left
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


def test_sliders_prune(page, graph):
    everything = shown(page)
    page.locator("#nodes").fill("50")
    some = shown(page)
    assert graph.is_kind("token", "target").sum() < some < everything
    page.locator("#edges").fill("40")
    assert page.evaluate("shown.edges.length") < graph.num_edges / 3
    assert "nodes=50&edges=40" in page.url
    # The node with most influence among those that can be pruned is visible.
    influence = graph.influence().masked_fill(graph.is_kind("token", "target"), -1)
    page.locator("#edges").fill("100")
    assert mark(page, int(influence.argmax())).is_visible()
    page.locator("#nodes").fill("100")
    assert shown(page) == everything


def test_pins_groups_and_a_link_that_brings_them_back(page, browser, graph, address):
    one = strongest_feature(graph)
    ends = [end for end, _ in graph.outgoing(one)][:2]
    for number in (one, *ends):
        mark(page, number).click()
        page.locator("#pin").click()
    page.locator("#view-pinned").click()
    page.keyboard.press("Escape")
    items = page.locator(".pinned-item")
    assert items.count() == 3
    weights = [float(text.replace("−", "-")) for text in page.locator(".edge-weight").all_text_contents()]
    among = {one, *ends}
    expected = sorted(
        float(w)
        for s, t, w in zip(graph.source.tolist(), graph.target.tolist(), graph.weight, strict=True)
        if {s, t} <= among
    )
    assert sorted(weights) == pytest.approx(expected, rel=5e-3)
    for number in ends:
        page.locator(f".pinned-item[data-key='{number}'] input").check()
    page.locator("#group").click()
    # The name has the focus.
    page.keyboard.press("Control+a")
    page.keyboard.type("said: <b>")
    page.locator(".pinned-item.group button").click()
    assert items.count() == 2 and page.locator(".pinned-item.group").inner_text().startswith("said: <b>")
    shot(page, "graph_pinned.png")
    summed = sum(weight for end, weight in graph.outgoing(one) if end in ends)
    assert [
        float(text.replace("−", "-")) for text in page.locator(".edge-weight").all_text_contents()
    ] == pytest.approx([summed], rel=5e-3)
    link = page.url
    again = browser.new_page()
    again.goto(link)
    assert again.locator(".pinned-item").count() == 2
    assert (
        again.locator(".pinned-item.group b").inner_text() == "said: <b>"
        and again.locator("#view-graph").get_attribute("aria-pressed") == "false"
    )
    again.locator(".pinned-item.group button").click()
    again.locator("#ungroup").click()
    assert again.locator(".pinned-item").count() == 3
    again.locator("#reset").click()
    assert again.locator("#pinned-count").inner_text() == "0" and again.url == address
    # Links of other pages are harmless.
    again.goto(address + "#pins=9_9_9,&node=x&group=9_9:a&nodes=-3&edges=a")
    again.reload()
    assert again.locator("#pinned-count").inner_text() == "0" and again.locator("#nodes").input_value() == "100"
    again.close()


def test_search(page, graph):
    page.locator("#search").fill("attn.sae")
    found = int(
        (graph.is_kind("feature", "error") & (graph.dictionary == graph.dictionaries.index("layers.1.attn.sae"))).sum()
    )
    assert page.locator("#search-count").inner_text() == f"{found} found"
    assert page.locator("#node-svg .node:not(.faded)").count() == found
    page.keyboard.press("Enter")
    assert "layers.1.attn.sae" in page.locator("#panel .kind").inner_text()


def test_the_overview_has_validation_protocol_and_pruning(page, graph):
    page.get_by_text("4 dictionaries").click()
    text = page.locator("#panel").inner_text()
    assert page.locator("#validation td").all_inner_texts()[:4] == ["nothing", "1", "–", "0%"]
    page.get_by_text("Individual edges").click()
    cells = page.locator("#validated-edges td").all_inner_texts()
    assert cells == [f"{graph.label(0)} → {EVIL}", "+1.25", "−1.5"]
    assert "some/model" in text and "abc123" in text and "layers.1.attn.sae" in text
    scores = graph.scores()
    assert f"{100 * scores['replacement']:.0f}% of the influence comes from tokens" in text


def test_dark_and_narrow(browser, address, graph):
    tab = browser.new_page(viewport={"width": 420, "height": 800}, color_scheme="dark")
    tab.goto(address)
    shot(tab, "graph_dark_narrow.png")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert shown(tab) == graph.num_nodes
    assert tab.evaluate("document.documentElement.scrollWidth") <= 420
    tab.close()


def test_a_union_over_positions(browser, graph, tmp_path):
    whole = union([graph, graph], align="feature")
    tab = browser.new_page(viewport={"width": 1366, "height": 768})
    complaints = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(whole.to_html(tmp_path / "union.html").as_uri())
    shot(tab, "graph_union.png")
    assert shown(tab) == whole.num_nodes
    mark(tab, strongest_feature(whole)).click()
    assert tab.locator("#panel h2").inner_text() == whole.label(strongest_feature(whole))
    assert complaints == []
    tab.close()
