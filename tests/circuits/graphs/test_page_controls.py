"""The controls of the graph page, in a real Chromium: edges at rest, labels and their files, zoom, panes, several prompts."""

import dataclasses
import json

import pytest
import torch

from hf_transcoders.circuits.graphs import AttributionGraph, TargetInfo, write_graph_page
from hf_transcoders.circuits.graphs.page_labels import FORMAT, LONGEST, page_labels, read_labels
from hf_transcoders.features.feature_examples import FeatureContext, FeatureExplanation
from tests.text.test_visible import CASES

from .open_page import EVIL, mark, open_page, shot, shown, strongest_feature
from .random_graph import random_graph


NAME = "layers.0.mlp.transcoder"


def explained(*graphs):
    """An explanation of every feature of one dictionary."""
    numbers = set()
    for graph in graphs:
        numbers |= set(
            graph.index[graph.is_kind("feature") & (graph.dictionary == graph.dictionaries.index(NAME))].tolist()
        )
    context = FeatureContext([" some", "\n", "   ", " text"], [0.5, 0.0, 3.0, 0.0], 2, 0, 7)
    promoted = [(" promoted", 2.0), (" words", 1.5), ("\n\n", 1.0)]
    return {
        NAME: [FeatureExplanation(i, 0.01, 3.0, 1.0, [context], promoted, [(" down", -1.0)]) for i in sorted(numbers)]
    }


@pytest.fixture(scope="module")
def graphs():
    """Three graphs of different prompts, of which two share a dictionary's features."""
    first = random_graph(tokens=("<s>", " When", "   ", "\n", " gave"), features=4, density=0.6, seed=1)
    first = dataclasses.replace(first, targets=[TargetInfo("\xa0", 4, 0.5, 0.5), *first.targets[1:]])
    second = random_graph(tokens=("<s>", " The", " keys"), features=2, seed=2)
    number = strongest_feature(first, NAME)
    index = second.index.clone()
    index[strongest_feature(second, NAME)] = first.index[number]
    second = dataclasses.replace(second, index=index)
    return [first, second, random_graph(tokens=("<s>", EVIL), features=2, seed=3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("controls")


@pytest.fixture(scope="module")
def address(graphs, folder):
    return graphs[0].to_html(folder / "one.html", explained(graphs[0])).as_uri()


@pytest.fixture(scope="module")
def three(graphs, folder):
    """A page of three graphs."""
    return write_graph_page(folder / "three.html", graphs, explained(*graphs[:2])).as_uri()


@pytest.fixture
def page(browser, address):
    with open_page(browser, address) as tab:
        yield tab


def saved_file(page, path):
    with page.expect_download() as waiting:
        page.locator("#save").click()
    assert waiting.value.suggested_filename == "graph_labels.json"
    waiting.value.save_as(path)
    return json.loads(path.read_text())


def load(page, path):
    page.locator("#file").set_input_files(str(path))
    page.wait_for_function("!document.getElementById('message').hidden")
    return page.locator("#message-text").inner_text()


def label(page, number, text):
    mark(page, number).click()
    page.locator("#label").fill(text)


# ---------------------------------------------------------------------------------------------------- at rest


def test_at_rest_only_the_strongest_edges_are_drawn(page, graphs):
    drawn = "drawnEdges().map(edge => [edge.source, edge.target])"
    flow = graphs[0].edge_influence()
    order = flow.argsort(descending=True).tolist()
    ends = list(zip(graphs[0].source.tolist(), graphs[0].target.tolist(), strict=True))
    assert len(order) > 100
    assert sorted(page.evaluate(drawn)) == sorted(list(ends[edge]) for edge in order[:50])
    assert page.locator("#edge-count").inner_text() == f"of {len(order):,}"
    # All edges of selected and pinned nodes are drawn, too.
    number = strongest_feature(graphs[0])
    own = [list(each) for each in ends if number in each]
    mark(page, number).click()
    selected = page.evaluate(drawn)
    assert all(each in selected for each in own) and len(selected) > 50
    page.keyboard.press("p")
    page.keyboard.press("Escape")
    strongest = {tuple(ends[edge]) for edge in order[:50]} | set(
        [ends[edge] for edge in order if number in ends[edge]][:50]
    )
    assert {tuple(each) for each in page.evaluate(drawn)} == strongest and len(strongest) > 50
    page.locator("#lines").select_option("25")
    assert len(page.evaluate(drawn)) <= 50 and "lines=25" in page.url
    page.locator("#lines").select_option("all")
    assert len(page.evaluate(drawn)) == len(order)
    page.reload()
    assert page.locator("#lines").evaluate("list => list.selectedOptions[0].text") == "all"


def test_white_space_can_be_seen_everywhere(page, graphs):
    assert page.evaluate("cases => cases.map(text => [visible(text), visible(text, true)])", list(CASES)) == [
        list(shown) for shown in CASES.values()
    ]
    texts = page.locator("#node-svg .token text").all_text_contents()
    assert texts == ["<s>", "␣When", "␣␣␣", "⏎", "␣gave"]
    assert page.locator("#node-svg .target text").all_text_contents()[0] == r"\xa0"
    assert page.locator("#panel .ends-list .name").all_inner_texts()[:2] == [r"\xa0", "␣John"]
    mark(page, strongest_feature(graphs[0], NAME)).click()
    assert page.locator("#panel .contexts .text").first.text_content() == " some⏎␣␣␣ text"
    assert page.locator("#panel mark").first.inner_text() == "␣␣␣"
    assert page.locator("#panel .raised").all_inner_texts() == ["␣promoted", "␣words", "⏎⏎"]


def test_small_influences_have_digits(page, graphs):
    assert page.evaluate("[0.5, 0.042, 0.00042, 0.0000423, 0.000001, 0].map(percent)") == [
        "50%", "4.2%", "0.042%", "0.0042%", "<0.001%", "0%",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- verdicts and notes


def test_a_page_without_features_says_why_and_what_to_do(browser, graphs, folder):
    pruned = graphs[0].prune(0.01)
    assert not pruned.is_kind("feature").any()
    pruned = pruned.with_note(f"Nothing was searched {EVIL}.")
    with open_page(browser, pruned.to_html(folder / "bare.html").as_uri()) as page:
        notes = page.locator("#notes").inner_text()
        count = int(graphs[0].is_kind("feature").sum())
        assert (
            f"No feature is strong enough for the page: the set covers 3 of 4 layers, and {count} features together have"
            in notes
        )
        share = pruned.metadata["pruning"]["features_from"]
        shows = int(graphs[0].prune(share).is_kind("feature").sum())
        assert f"Try --nodes {share:g}" in notes and f"which shows {shows} feature" in notes and shows > 0
        assert f"Nothing was searched {EVIL}." in notes
        left_out = page.locator("#left-out").inner_text()
        assert f"{pruned.num_nodes:,} of {graphs[0].num_nodes:,} nodes" in left_out
        assert f"{pruned.num_edges:,} of {graphs[0].num_edges:,} edges" in left_out
        shot(page, "graph_without_features.png")


def test_scores_have_a_verdict_and_no_note_stands_where_all_is_there(page):
    verdicts = page.locator("#verdicts li").all_inner_texts()
    assert len(verdicts) == 2 and all(text.split()[0].lower() in ("good", "fair", "poor") for text in verdicts)
    assert "of the inputs of nodes come from errors" in verdicts[0]
    assert page.locator("#notes").is_hidden() and page.locator("#left-out").count() == 0


# ---------------------------------------------------------------------------------------------------- labels


def test_a_label_is_for_the_feature_and_survives_a_reload(page, graphs):
    number = strongest_feature(graphs[0], NAME)
    label(page, number, f"plural: <b> {EVIL}")
    text = f"plural: <b> {EVIL}"
    assert text in mark(page, number).get_attribute("aria-label")
    page.locator("#search").fill("plural: <b>")
    same = (
        graphs[0].is_kind("feature")
        & (graphs[0].index == graphs[0].index[number])
        & (graphs[0].dictionary == graphs[0].dictionary[number])
    )
    assert page.locator("#search-count").inner_text() == f"{int(same.sum())} found"
    page.keyboard.press("Escape")
    page.reload()
    assert text in mark(page, number).get_attribute("aria-label")
    mark(page, number).click()
    # The key e selects the text of the field, so that typing replaces it.
    page.keyboard.press("e")
    page.keyboard.type("other")
    assert page.locator("#label").input_value() == "other"
    page.locator("#label").fill("")
    assert "other" not in mark(page, number).get_attribute("aria-label") and "label=" not in page.url


def test_labels_pins_and_groups_are_saved_and_loaded(browser, graphs, folder, three, tmp_path):
    first = strongest_feature(graphs[0], NAME)
    feature = int(graphs[0].index[first])
    with open_page(browser, three) as page:
        label(page, first, "from the first")
        page.keyboard.press("Escape")
        for number in (first, graphs[0].outgoing(first)[0][0]):
            mark(page, number).click()
            page.locator("#pin").click()
        page.locator("#view-pinned").click()
        for box in page.locator(".pinned-item input").all():
            box.check()
        page.locator("#group").click()
        page.keyboard.type("both")
        # The name was selected when the field got the focus.
        assert page.locator("#rename").input_value() == "both"
        page.locator("#prompt").select_option("1")
        page.locator("#view-graph").click()
        second = strongest_feature(graphs[1], NAME)
        assert "from the first" in mark(page, second).get_attribute("aria-label")
        mark(page, second).click()
        page.keyboard.press("p")
        saved = saved_file(page, tmp_path / "labels.json")
        assert page.locator("#message-text").inner_text() == "Saved 1 label, 3 pins and 1 group as graph_labels.json."
    assert saved["format"] == FORMAT and saved["labels"] == {NAME: {str(feature): "from the first"}}
    assert [len(each["pins"]) for each in saved["graphs"]] == [2, 1, 0]
    assert [group["name"] for group in saved["graphs"][0]["groups"]] == ["both"]
    # Python reads what the page wrote, and the page what Python put into it.
    assert read_labels(tmp_path / "labels.json")["graphs"] == saved["graphs"]
    with open_page(browser, three) as page:
        assert load(page, tmp_path / "labels.json") == "Loaded 1 label, 3 pins and 1 group from labels.json."
        assert page.locator("#pinned-count").inner_text() == "2"
        assert "from the first" in mark(page, first).get_attribute("aria-label")
    made = write_graph_page(folder / "labelled.html", graphs, labels=tmp_path / "labels.json").as_uri()
    with open_page(browser, made) as page:
        assert "from the first" in mark(page, first).get_attribute("aria-label")
        page.locator("#view-pinned").click()
        assert page.locator(".pinned-item.group b").inner_text() == "both"
        page.keyboard.press("]")
        assert page.locator("#pinned-count").inner_text() == "1"
        page.reload()
        assert page.locator("#prompt").input_value() == "1" and page.locator("#pinned-count").inner_text() == "1"
        # Pins that were taken away stay away.
        page.locator(".pinned-item button").click()
        page.keyboard.press("p")
        page.reload()
        assert page.locator("#pinned-count").inner_text() == "0"
    # Another page takes the labels, and says which pins it lacks.
    other = random_graph(tokens=("<s>", " other"), seed=4).to_html(folder / "other.html").as_uri()
    with open_page(browser, other) as page:
        assert load(page, tmp_path / "labels.json") == (
            "Loaded 1 label, 0 pins and 0 groups from labels.json. Pins of 3 other prompts were left out."
        )


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "it is not JSON"),
        ("[1]", "it holds no labels of a graph page"),
        ("null", "it holds no labels of a graph page"),
        (json.dumps({"format": FORMAT, "labels": [], "graphs": []}), "its labels are damaged"),
        (json.dumps({"format": FORMAT, "labels": {"a": {"one": "x"}}, "graphs": []}), "not of numbered features"),
        (json.dumps({"format": FORMAT, "labels": {"a": {"1": "x" * 201}}, "graphs": []}), "up to 200 characters"),
        (json.dumps({"format": FORMAT, "labels": {}, "graphs": [{"prompt": "", "pins": 3, "groups": []}]}), "its pins are damaged"),
        (json.dumps({"format": FORMAT, "labels": {}, "graphs": [{"prompt": "", "pins": [], "groups": [{"name": 1}]}]}), "names of groups"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_in_a_sentence_and_changes_nothing(page, graphs, tmp_path, text, sentence):
    label(page, strongest_feature(graphs[0], NAME), "kept")
    before = page.evaluate("savedText()")
    (tmp_path / "<i>wrong.json").write_text(text)
    told = load(page, tmp_path / "<i>wrong.json")
    assert told.startswith("<i>wrong.json could not be loaded: ") and sentence in told
    assert told.endswith("Choose a file that this page saved.") and page.evaluate("savedText()") == before
    page.locator("#close-message").click()
    assert page.locator("#message").is_hidden()


def test_labels_with_planted_markup_are_text(browser, graphs, folder, tmp_path):
    number = strongest_feature(graphs[0], NAME)
    content = {
        "format": FORMAT,
        "labels": {NAME: {str(int(graphs[0].index[number])): EVIL}, "__proto__": {"1": EVIL}},
        "graphs": [{"prompt": "".join(graphs[0].tokens), "pins": ["9_9_9", EVIL], "groups": [{"name": EVIL, "members": [EVIL]}]}],
    }  # fmt: skip
    (tmp_path / "evil.json").write_text(json.dumps(content))
    with open_page(browser, graphs[0].to_html(folder / "evil.html", labels=tmp_path / "evil.json").as_uri()) as page:
        assert EVIL in mark(page, number).get_attribute("aria-label")
        told = load(page, tmp_path / "evil.json")
        assert "2 pinned nodes are not on this page" in told and page.locator("#pinned-count").inner_text() == "0"
        assert page.locator("script").count() == 3 and page.evaluate("({}).x === undefined")
        assert json.loads(page.evaluate("savedText()"))["labels"].keys() == {NAME, "__proto__"}


# ---------------------------------------------------------------------------------------------------- zoom, pan, panes


def place_of(page, number):
    return page.evaluate(
        "number => { const r = marks[number].querySelector('.shape').getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2, r.width]; }",
        number,
    )


def test_wheel_buttons_and_keys_zoom(page, graphs):
    number = strongest_feature(graphs[0])
    x, y, width = place_of(page, number)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)
    page.wait_for_function("grid.zoom > 1.5")
    zoomed = place_of(page, number)
    # The node under the pointer stays there.
    assert zoomed[:2] == pytest.approx([x, y], abs=2) and zoomed[2] > 1.5 * width
    shot(page, "graph_zoomed.png")
    # Tokens and targets stay on the screen.
    stage = page.locator("#graph").bounding_box()
    token, target = (int(graphs[0].is_kind(kind).nonzero()[-1]) for kind in ("token", "target"))
    assert all(stage["y"] < place_of(page, each)[1] < stage["y"] + stage["height"] for each in (token, target))
    page.locator("#zoom-fit").click()
    assert page.locator("#zoom-value").inner_text() == "100%" and page.locator("#zoom-out").is_disabled()
    assert place_of(page, number) == pytest.approx([x, y, width], abs=1)
    page.locator("#zoom-in").click()
    assert page.locator("#zoom-value").inner_text() == "125%"
    page.locator("#zoom-in").blur()
    page.keyboard.press("+")
    assert page.locator("#zoom-value").inner_text() == "156%"
    page.keyboard.press("-")
    page.keyboard.press("0")
    assert page.locator("#zoom-value").inner_text() == "100%"
    painted = "(() => { const c = document.getElementById('edge-canvas'); return c.getContext('2d')" \
        ".getImageData(0, 0, c.width, c.height).data.reduce((n, v, i) => n + (i % 4 === 3 && v > 0 ? 1 : 0), 0); })()"  # fmt: skip
    assert page.evaluate(painted) > 5000


def test_the_graph_moves_by_dragging_and_by_keys(page, graphs):
    page.keyboard.press("+")
    page.keyboard.press("+")
    page.keyboard.press("+")
    mark(page, strongest_feature(graphs[0])).click()
    title = page.locator("#panel h2").inner_text()
    stage = page.locator("#graph").bounding_box()
    before = page.evaluate("[stage.scrollLeft, stage.scrollTop]")
    # A place without a node.
    spot = page.evaluate(
        "([left, top, width, height]) => { for (let y = top + height / 2; y < top + height - 80; y += 7)"
        " for (let x = left + width / 2; x < left + width - 40; x += 7)"
        " if (!document.elementFromPoint(x, y).closest('.node')) return [x, y]; }",
        [stage["x"], stage["y"], stage["width"], stage["height"]],
    )
    page.mouse.move(*spot)
    page.mouse.down()
    page.mouse.move(spot[0] - 60, spot[1] - 50, steps=4)
    page.mouse.up()
    after = page.evaluate("[stage.scrollLeft, stage.scrollTop]")
    assert after != before and abs(after[0] - before[0]) <= 60
    # Dragging does not clear the selection; a click does.
    assert page.locator("#panel h2").inner_text() == title
    page.keyboard.press("Shift+ArrowLeft")
    page.wait_for_function("before => stage.scrollLeft < before", arg=after[0])
    page.wait_for_timeout(80)
    page.mouse.click(*spot)
    assert page.locator("#panel h2").inner_text() == "Attribution graph"


def test_panes_are_resized_and_remembered(browser, address):
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    page = context.new_page()
    page.goto(address)
    width = "document.getElementById('panel').offsetWidth"
    assert page.evaluate(width) == 368
    box = page.locator("#splitter").bounding_box()
    page.mouse.move(box["x"] + 3, 400)
    page.mouse.down()
    page.mouse.move(box["x"] - 147, 400, steps=5)
    page.mouse.up()
    assert page.evaluate(width) == pytest.approx(518, abs=2)
    page.locator("#splitter").focus()
    page.keyboard.press("ArrowRight")
    wide = page.evaluate(width)
    assert wide == pytest.approx(494, abs=2)
    assert int(page.locator("#splitter").get_attribute("aria-valuenow")) == wide
    # The graph takes the rest, and every node is in it.
    page.wait_for_timeout(50)
    assert page.evaluate("grid.width") <= 1366 - wide
    again = context.new_page()
    again.goto(address)
    assert again.evaluate(width) == wide
    again.locator("#splitter").focus()
    again.keyboard.press("Home")
    assert again.evaluate(width) == 180
    # Below 900 pixels, the height of the graph is changed instead.
    again.set_viewport_size({"width": 390, "height": 844})
    again.locator("#splitter").focus()
    height = again.evaluate("document.getElementById('stages').offsetHeight")
    again.keyboard.press("ArrowUp")
    assert again.evaluate("document.getElementById('stages').offsetHeight") == height - 24
    assert again.locator("#splitter").get_attribute("aria-orientation") == "horizontal"
    context.close()


def test_pinned_cards_show_the_promoted_tokens(page, graphs):
    number = strongest_feature(graphs[0], NAME)
    label(page, number, "a label of some length for one feature")
    page.locator("#pin").click()
    page.locator("#view-pinned").click()
    lines = page.locator(".pinned-item b, .pinned-item small")
    assert lines.all_inner_texts()[1] == "“␣␣␣” direct path → promoted, words, ⏎⏎"
    cut = "line => line.scrollWidth > line.clientWidth || line.scrollHeight > line.clientHeight + 1"
    assert not any(line.evaluate(cut) for line in lines.all()[1:])
    box = page.locator(".pinned-item").bounding_box()
    assert all(
        line.bounding_box()["y"] + line.bounding_box()["height"] <= box["y"] + box["height"] for line in lines.all()
    )
    shot(page, "graph_pinned_label.png")


# ---------------------------------------------------------------------------------------------------- several prompts


def test_several_prompts_in_one_page(browser, graphs, three):
    with open_page(browser, three) as page:
        assert page.locator("#prompt option").all_inner_texts()[1] == "<s> The keys"
        assert page.evaluate("graphs.length") == 1 and shown(page) == graphs[0].num_nodes
        mark(page, strongest_feature(graphs[0])).click()
        page.keyboard.press("p")
        page.locator("#prompt").focus()
        page.keyboard.press("ArrowDown")
        assert shown(page) == graphs[1].num_nodes and page.locator("#pinned-count").inner_text() == "0"
        assert page.locator("#node-svg .token text").all_text_contents() == ["<s>", "␣The", "␣keys"]
        assert page.locator("#panel h2").inner_text() == "Attribution graph"
        page.locator("#prompt").blur()
        page.keyboard.press("]")
        assert shown(page) == graphs[2].num_nodes and "graph=3" in page.url
        page.keyboard.press("]")
        # The first graph still has its selection and pin.
        assert shown(page) == graphs[0].num_nodes and page.locator("#pinned-count").inner_text() == "1"
        assert page.locator("#node-svg .selected").count() == 1
        page.keyboard.press("[")
        page.reload()
        assert page.locator("#prompt").input_value() == "2" and shown(page) == graphs[2].num_nodes
        page.keyboard.press("]")
        assert page.locator("#pinned-count").inner_text() == "1"
        shot(page, "graph_three_prompts.png")


def test_every_control_is_reached_by_tab(browser, three):
    with open_page(browser, three) as page:
        seen = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            seen.add(page.evaluate("document.activeElement.id || document.activeElement.className.baseVal"))
        assert {
            "prompt",
            "view-graph",
            "nodes",
            "edges",
            "lines",
            "zoom-in",
            "search",
            "save",
            "load",
            "overview",
            "reset",
        } <= seen
        assert "splitter" in seen and any("node" in each for each in seen)


@pytest.mark.parametrize("size", [(390, 844), (1366, 768), (1920, 1080)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_part_is_wider_than_the_screen(browser, three, size, scheme):
    with open_page(browser, three, *size, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        shot(page, f"graph_three_{size[0]}_{scheme}.png")


# ---------------------------------------------------------------------------------------------------- labels in Python


def test_labels_as_a_mapping(graphs):
    assert page_labels({NAME: {7: " plural "}}, graphs[:1]) == {"labels": {NAME: {"7": "plural"}}, "graphs": []}
    assert page_labels(None, graphs) == {"labels": {}, "graphs": []}


@pytest.mark.parametrize(
    "labels, sentence",
    [
        (
            {"layers.9.mlp.transcoder": {1: "x"}},
            "has labels for layers.9.mlp.transcoder, but the page has features of",
        ),
        ({NAME: {-1: "x"}}, "is not the number of a feature"),
        ({NAME: {1: "  "}}, "give 1 to 200"),
        ({NAME: {1: "x" * (LONGEST + 1)}}, "has 201 characters"),
        ({NAME: {1: 3}}, "must be text"),
    ],
)
def test_labels_that_do_not_fit_are_refused(graphs, tmp_path, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        graphs[0].to_html(tmp_path / "graph.html", labels=labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x"}', json.dumps({"format": FORMAT}), json.dumps({"format": FORMAT, "labels": {"a": 3}, "graphs": []})])  # fmt: skip
def test_files_that_are_no_labels_are_refused(graphs, tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match="labels.json"):
        write_graph_page(tmp_path / "graph.html", graphs, labels=tmp_path / "labels.json")


def test_a_page_needs_a_graph(tmp_path):
    with pytest.raises(ValueError, match="There is no graph for the page"):
        write_graph_page(tmp_path / "graph.html", [])


def test_notes_are_saved_with_the_graph(graphs, tmp_path):
    graphs[0].with_note("Nothing was searched.").save_pretrained(tmp_path)
    assert AttributionGraph.from_pretrained(tmp_path).metadata["notes"] == ["Nothing was searched."]
    assert torch.equal(AttributionGraph.from_pretrained(tmp_path).kind, graphs[0].kind)
