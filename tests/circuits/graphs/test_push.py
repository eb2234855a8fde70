"""Publishing attribution graphs through the Hub's protocol."""

import pytest
import torch

from hf_transcoders.circuits.graphs import AttributionGraph, graph_verdicts
from hf_transcoders.circuits.graphs.graph_card import graph_card
from hf_transcoders.circuits.graphs.verdicts import left_out, notes
from hf_transcoders.errors import TranscoderError
from hf_transcoders.hub.cards import is_generated
from hf_transcoders.testing import local_hub
from hf_transcoders.text.markdown import escape
from tests.hub.conftest import ACCOUNTS, READER, WRITER, make_dictionary

from .random_graph import random_graph


@pytest.fixture
def hub():
    with local_hub(token=WRITER, accounts=ACCOUNTS) as server:
        yield server


def test_push_and_load(hub):
    graph = random_graph(tokens=("<s>", " a | b `", " <script>"), difference=True)
    info = graph.push_to_hub("me/graph", commit_message="First")
    assert hub.log("me/graph") == ["First", "initial commit"] and info.oid == hub.repos["me/graph"].refs["main"]
    files = hub.files("me/graph")
    assert files.keys() >= {"README.md", "graph.safetensors", "graph.json", "graph.html"}
    card = files["README.md"].decode()
    assert is_generated(card) and 'from_pretrained("me/graph")' in card and "base_model: some/model" in card
    assert (
        f"| {graph.scores()['completeness']:.3f} |" in card
        and f"| `Mary` | {graph.targets[0].probability:.1%} |" in card
    )
    for verdict in graph_verdicts(graph):
        assert f"**{verdict.about.capitalize()}: {verdict.level}.** {escape(verdict.text)}" in card
    loaded = AttributionGraph.from_pretrained("me/graph")
    assert torch.equal(loaded.weight, graph.weight) and loaded.targets == graph.targets
    assert loaded.metadata == graph.metadata and loaded.tokens == graph.tokens


def test_the_card_says_what_the_page_says_of_a_pruned_graph():
    graph = random_graph(features=6).prune(0.3)
    card = graph_card(graph, "me/graph")
    assert escape(left_out(graph)) in card and "The page shows" in card
    for note in notes(graph):
        assert escape(note) in card


def test_an_edited_card_stays_and_ours_is_renewed(hub):
    from huggingface_hub import HfApi

    random_graph().push_to_hub("me/graph")
    random_graph(tokens=("<s>", " new")).push_to_hub("me/graph")
    assert "<s> new" in hub.files("me/graph")["README.md"].decode()
    HfApi().upload_file(path_or_fileobj=b"# Mine\n", path_in_repo="README.md", repo_id="me/graph")
    random_graph(seed=3).push_to_hub("me/graph")
    assert hub.files("me/graph")["README.md"] == b"# Mine\n"
    assert AttributionGraph.from_pretrained("me/graph").num_nodes == random_graph(seed=3).num_nodes


def test_beside_a_dictionary_only_in_a_folder_of_its_own(hub):
    make_dictionary().push_to_hub("me/x")
    card = hub.files("me/x")["README.md"]
    graph = random_graph()
    with pytest.raises(TranscoderError, match="give a `subfolder`"):
        graph.push_to_hub("me/x")
    graph.push_to_hub("me/x", subfolder="graphs/ioi")
    files = hub.files("me/x")
    assert files["README.md"] == card and 'subfolder="graphs/ioi"' in files["graphs/ioi/README.md"].decode()
    loaded = AttributionGraph.from_pretrained("me/x", subfolder="graphs/ioi")
    assert torch.equal(loaded.source, graph.source)


def test_mistakes_are_one_sentence(hub):
    with pytest.raises(TranscoderError, match="may not write"):
        random_graph().push_to_hub("me/graph", token=READER)
    with pytest.raises(TranscoderError, match="cannot name a repo"):
        random_graph().push_to_hub("no such name")


def test_stale_files_are_deleted_and_a_pull_request_leaves_main_alone(hub):
    from huggingface_hub import HfApi

    random_graph().push_to_hub("me/graph")
    for name in ("graph.svg", "notes.txt"):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="me/graph")
    before = hub.files("me/graph")
    info = random_graph(seed=3).push_to_hub("me/graph", create_pr=True)
    assert info.pr_url and hub.files("me/graph") == before
    with pytest.raises(TranscoderError, match="either `create_pr` or `revision`"):
        random_graph().push_to_hub("me/graph", create_pr=True, revision="other")
    random_graph(seed=3).push_to_hub("me/graph")
    assert "graph.svg" not in hub.files("me/graph") and "notes.txt" in hub.files("me/graph")
