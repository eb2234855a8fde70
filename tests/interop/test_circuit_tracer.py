"""
Exported graphs in the server and client of circuit-tracer 0.5.0, as it is published.

circuit-tracer needs an older Transformers, so it gets an environment of its own, in a cache folder
(`$HF_TRANSCODERS_PEERS`, by default `peers` in this library's cache folder): the first run takes minutes. The client asks
other hosts for four libraries, which come from their npm packages instead; its own files stay as they are. Skipped with a
reason where one of these cannot be installed.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from hf_transcoders.circuits.graphs.combine import union
from hf_transcoders.circuits.graphs.viewer_files import write_viewer_files
from hf_transcoders.features.activation_histograms import RunningHistograms
from hf_transcoders.features.feature_examples import FeatureContext, FeatureExplanation
from hf_transcoders.files import cache_folder
from tests.circuits.graphs.random_graph import WORDS, random_graph


pytestmark = pytest.mark.slow

# Two steps, so that the second does not choose another PyTorch.
REQUIREMENTS = (["torch==2.13.0"], ["circuit-tracer==0.5.0", "transformers==4.57.3"])
LIBRARIES = {"d3": "7.9.0", "d3-collection": "1.0.7", "d3-jetpack": "2.3.0", "dagre": "0.8.5", "pako": "2.1.0"}
# End of an address that the client asks for -> files of packages. What is empty here, the client makes no use of.
ROUTES = {
    "/lib/d3.js": ["d3/package/dist/d3.js"],
    # D3 has had no `nest` since version 6.
    "/lib/jetpack_2024-07-20.js": [
        "d3-collection/package/dist/d3-collection.js",
        "d3-jetpack/package/build/d3-jetpack.cjs",
    ],
    "/lib/hotserver-client-ws.js": [],
    "/lib/npy_v0.js": [],
    "/dagre.min.js": ["dagre/package/dist/dagre.min.js"],
    "/pako.min.js": ["pako/package/dist/pako.min.js"],
}
# The package's file for CommonJS, in a page. The client's own copy of it draws axes through a method.
COMMON_JS = """(() => { const module = {}, exports = {}, require = () => d3; %s
  Object.assign(d3, exports);
  d3.conventions = (options) => {
    const c = exports.conventions(options);
    return Object.assign(c, { drawAxis: (svg) => exports.drawAxis({ ...c, svg: svg || c.svg }) });
  };
})();"""
VALIDATE = """
import json, pathlib, sys
from circuit_tracer.frontend import feature_models, graph_models
folder = pathlib.Path(sys.argv[1])
for metadata in json.loads((folder / "graph-metadata.json").read_text())["graphs"]:
    graph_models.Metadata.model_validate(metadata)
    graph = graph_models.Model.model_validate_json((folder / (metadata["slug"] + ".json")).read_text())
    for link in graph.links:
        graph_models.Link.model_validate(link)
    print(metadata["slug"], len(graph.nodes), len(graph.links))
for path in sorted(folder.glob("features/*/*.json")):
    if "act_max" in json.loads(path.read_text()):
        feature_models.Model.model_validate_json(path.read_text())
        print("feature", path.stem)
"""


def run_or_skip(command, what, **kwargs):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment, **kwargs)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{what} cannot be installed: {error}")
    if done.returncode:
        pytest.skip(f"{what} cannot be installed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")


def peers_folder():
    return Path(os.environ.get("HF_TRANSCODERS_PEERS") or cache_folder() / "peers")


@pytest.fixture(scope="module")
def peer():
    """The `bin` folder of an environment with circuit-tracer."""
    folder = peers_folder() / f"circuit-tracer-0.5.0-python-{sys.version_info.major}.{sys.version_info.minor}"
    ready = folder / "installed.json"
    if not ready.exists() or json.loads(ready.read_text()) != list(REQUIREMENTS):
        shutil.rmtree(folder, ignore_errors=True)
        run_or_skip([sys.executable, "-m", "venv", str(folder)], "an environment for circuit-tracer")
        for requirements in REQUIREMENTS:
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements]
            run_or_skip(pip, " and ".join(requirements))
        ready.write_text(json.dumps(REQUIREMENTS))
    return folder / "bin"


@pytest.fixture(scope="module")
def libraries():
    """The folder of the libraries that the client asks other hosts for."""
    folder = peers_folder() / "npm"
    for name, version in LIBRARIES.items():
        place = folder / f"{name}-{version}"
        if not (place / "package").is_dir():
            place.mkdir(parents=True, exist_ok=True)
            run_or_skip(["npm", "pack", f"{name}@{version}", "--silent"], f"{name} {version}", cwd=place)
            with tarfile.open(next(place.glob("*.tgz"))) as archive:
                archive.extractall(place, filter="data")
    return library_texts(folder)


def library_texts(folder):
    """End of an address -> the library there."""

    def text(path):
        name = path.split("/")[0]
        content = (folder / path.replace(name, f"{name}-{LIBRARIES[name]}", 1)).read_text()
        return COMMON_JS.replace("%s", content) if path.endswith(".cjs") else content

    return {end: "\n".join(map(text, paths)) for end, paths in ROUTES.items()}


class Client:
    """A page of the client, which must log no error and ask no other host for anything but the libraries."""

    def __init__(self, browser, address, libraries):
        self.page = browser.new_page(viewport={"width": 1366, "height": 900})
        self.errors, self.failed, self.elsewhere = [], [], []
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("response", lambda answer: answer.status >= 400 and self.failed.append(answer.url))

        def serve(route):
            url = route.request.url
            if url.startswith(address):
                return route.continue_()
            for end, text in libraries.items():
                if url.endswith(end):
                    return route.fulfill(body=text, content_type="text/javascript")
            self.elsewhere.append(url)
            return route.abort()

        self.page.route("**/*", serve)
        self.address = address

    def open(self, slug):
        self.page.goto(f"{self.address}/index.html?slug={slug}")
        self.page.wait_for_selector(".link-graph text.node")

    def drawn(self):
        """(id, mark) of each node that is drawn."""
        script = "d3.selectAll('.link-graph text.node').nodes().map((e) => [e.__data__.node_id, e.textContent])"
        return [tuple(pair) for pair in self.page.evaluate(script)]

    def count_links(self):
        return self.page.evaluate(
            "d3.sum(d3.selectAll('.link-graph text.node').data(), (node) => node.sourceLinks.length)"
        )

    def click(self, node_id):
        """Click on a node, at its place on the canvas."""
        place = self.page.evaluate(
            "(id) => { const node = d3.selectAll('.link-graph text.node').nodes().find((e) => e.__data__.node_id === id);"
            " const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }",
            node_id,
        )
        self.page.mouse.click(*place)
        self.page.wait_for_function(
            "(id) => d3.selectAll('.link-graph text.node.clicked').data().some((d) => d.node_id === id)", arg=node_id
        )
        # The pointer would show the details of what is under it.
        self.page.mouse.move(3, 3)
        self.page.wait_for_timeout(600)

    def close(self):
        favicon = [url for url in self.failed if url.endswith("/favicon.ico")]
        errors = [error for error in self.errors if not (favicon and "404" in error)]
        assert (errors, self.elsewhere, self.failed) == ([], [], favicon)
        self.page.close()


@pytest.fixture(scope="module")
def serve(peer, tmp_path_factory):
    """Start the server of circuit-tracer on a folder, and return its address."""
    started = []

    def start(folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log.txt"
        command = [str(peer / "circuit-tracer"), "start-server", "--graph_file_dir", str(folder)]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, "--port", str(port)],
                stdout=file,
                stderr=file,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            )
        started.append(process)
        address = f"http://localhost:{port}"
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                return address
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server does not answer: {log.read_text()}")

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def explained(graph, name):
    """An explanation, with a histogram of planted activations, of each feature that a graph has of a dictionary."""
    number = graph.dictionaries.index(name)
    features = sorted(set(graph.index[graph.is_kind("feature") & (graph.dictionary == number)].tolist()))
    random = torch.Generator().manual_seed(0)
    activations = torch.randn(2000, len(features), generator=random).relu()
    running = RunningHistograms(len(features), activations.device)
    running.update(activations[None])
    contexts = [
        FeatureContext([" some", f" word{i}", " of", " text"], [0.0, 3.5 - i, 0.5, 0.0], 1, i, 7) for i in range(3)
    ]
    return [
        FeatureExplanation(
            feature,
            (activations[:, i] > 0).float().mean().item(),
            activations[:, i].max().item(),
            1.0,
            contexts,
            [(" up", 2.0), (" <b>", 1.0)],
            [(" down", -1.0)],
            histogram=running.histogram(i),
        )
        for i, feature in enumerate(features)
    ]


@pytest.fixture(scope="module")
def graphs():
    """Graphs with every kind of node: a whole one, a pruned one, one of one token, and one without positions."""
    graph = random_graph(tokens=WORDS[:8], features=4, difference=True, metadata={"model": "some/tiny"})
    return {
        "whole": graph,
        "pruned": graph.prune(0.8, 0.95),
        "one-token": random_graph(tokens=WORDS[1:2]),
        "summed": union([graph, graph], align="feature").prune(0.9),
    }


@pytest.fixture(scope="module")
def folder(graphs, tmp_path_factory):
    """The graphs in one folder, written by a call each; one dictionary of all but one of them is explained."""
    folder, name = tmp_path_factory.mktemp("viewer"), "layers.0.mlp.transcoder"
    for slug, graph in graphs.items():
        write_viewer_files(folder, {slug: graph}, None if slug == "one-token" else {name: explained(graph, name)})
    return folder


def test_the_files_fit_its_models(peer, graphs, folder):
    done = subprocess.run(
        [str(peer / "python"), "-c", VALIDATE, str(folder)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line for line in said if not line.startswith("feature")] == [
        f"{slug} {graph.num_nodes} {graph.num_edges}" for slug, graph in graphs.items()
    ]
    assert sum(line.startswith("feature") for line in said) > 10


def test_its_client_draws_every_node_and_link(browser, serve, libraries, graphs, folder):
    client = Client(browser, serve(folder), libraries)
    marks = {"feature": "●", "token": "■", "position": "■", "target": "■"}
    for slug, graph in graphs.items():
        client.open(slug)
        nodes = json.loads((folder / f"{slug}.json").read_text())["nodes"]
        assert dict(client.drawn()) == {
            node["node_id"]: marks.get(graph.node(number).kind, "◆") for number, node in enumerate(nodes)
        }
        assert len(client.drawn()) == graph.num_nodes and client.count_links() == graph.num_edges
    options = client.page.locator(".graph-prompt-select option")
    assert options.count() == len(graphs)
    client.close()


def test_its_client_shows_features(browser, serve, libraries, folder):
    client = Client(browser, serve(folder), libraries)
    client.open("pruned")
    page = client.page
    data = json.loads((folder / "pruned.json").read_text())
    (place,) = {path.parent for path in folder.glob("features/*/*.json")} & {
        folder / data["metadata"]["scan"].removeprefix("./data/")
    }
    features = [node for node in data["nodes"] if node["feature_type"] == "cross layer transcoder"]
    known = [node for node in features if node["layer"] == "0"]
    unknown = [node for node in features if node["layer"] == "2"]
    assert len(known) > 2 and unknown
    detail = page.locator(".feature-detail")
    for node in known[:3]:
        client.click(node["node_id"])
        content = json.loads((place / f"{node['feature']}.json").read_text())
        assert node["clerp"].startswith("“word0”, “word1” ") and node["clerp"].endswith("→ up, ‹b›")
        assert detail.locator(".pp-clerp").text_content() == node["clerp"]
        assert detail.locator(".feature-example-list .ctx-container").count() == 3
        assert "some word0 of text" in detail.locator(".feature-example-list").text_content()
        assert detail.locator(".feature-example-logits .token").all_text_contents() == [" up", " <b>", " down"]
        percent = next(
            (i + 1 for i, value in enumerate(content["quantile_values"]) if node["activation"] <= value), 100
        )
        title = detail.locator(".feature-title").first.text_content()
        assert (
            f"Act: {node['activation']:.2f} {percent}pct, Freq: {100 * content['activation_frequency']:.3f}%" in title
        )
        assert detail.locator("rect.bar").count() == len(content["histogram"]) > 32
        assert "NaN" not in detail.inner_html()
        # Its inputs and outputs.
        for side, end in (("input", "target"), ("output", "source")):
            count = sum(link[end] == node["node_id"] and link["weight"] != 0 for link in data["links"])
            assert page.locator(f".node-connections .features.{side} .feature-row").count() == count
    client.click(unknown[0]["node_id"])
    assert "No text was searched" in detail.text_content()
    bias = next(node for node in data["nodes"] if node["clerp"].startswith("bias") or "bias" in node["clerp"])
    client.click(bias["node_id"])
    assert detail.locator(".feature-title").text_content() == bias["clerp"]
    client.close()
