"""The attribution graph of a model with a planted circuit shows this circuit and nothing else."""

import pytest
import torch

from hf_transcoders.circuits import attribution_graph, validate_edges
from hf_transcoders.circuits.graphs import head_loadings
from tests.circuits.planted import ANSWER, OTHER, START, planted


@pytest.mark.parametrize("method", ["adjoint", "autograd"])
def test_the_graph_is_the_circuit(method):
    model, dictionaries = planted()
    prompt = [OTHER, START, OTHER, OTHER]
    graph = attribution_graph(
        model, dictionaries, prompt, targets=[(ANSWER, OTHER)], skip_first=0, method=method, progress=False
    )
    late, early = graph.find("t1", 5, 3), graph.find("t0", 3, 1)
    target, token = graph.num_nodes - 1, int((graph.is_kind("token") & (graph.position == 1)).nonzero())
    noise = 1e-5 * float(graph.weight.abs().max())

    def sources(node):
        return [source for source, weight in graph.incoming(node) if abs(weight) > noise]

    # Only the late feature raises the answer; the last token of the prompt, which is the other answer, lowers it.
    assert sources(target)[0] in (late, target) and set(sources(target)) <= {late, *range(len(prompt))}
    assert sources(late) == [early] and sources(early) == [token]
    assert graph.influence()[token] > 0.1
    pruned = graph.prune(nodes=0.99, edges=0.999)
    assert [pruned.node(n).index for n in pruned.is_kind("feature").nonzero()[:, 0].tolist()].count(3) >= 1

    edge = int(((graph.source == early) & (graph.target == late)).nonzero())
    loadings = head_loadings(model, dictionaries, graph, [edge])
    (_, layer, head, value), *others = loadings.top(2)
    assert (layer, head) == (1, 1) and value == pytest.approx(float(graph.weight[edge]), rel=1e-4)
    assert all(abs(other[3]) < 1e-6 for other in others) and abs(float(loadings.direct[0])) < 1e-6

    found = validate_edges(model, dictionaries, graph, [(early, late)])
    # One attention step from one active feature to another: nothing in between can respond.
    for mode in ("direct", "frozen"):
        torch.testing.assert_close(found.measured[mode], found.predicted, rtol=1e-4, atol=1e-5)
