"""Contributions of writers sum to the value that is read, step by step, in every family."""

import pytest
import torch

from hf_transcoders.circuits.graphs.adjoint import Adjoint
from hf_transcoders.circuits.graphs.attribution import measured
from hf_transcoders.circuits.graphs.read_vectors import ReadVectors
from hf_transcoders.circuits.paths.contributions import Contributions
from hf_transcoders.circuits.paths.expansion import Expander
from hf_transcoders.circuits.paths.steps import KINDS
from tests.tiny_models import HIDDEN_SIZE, TINY_CONFIGS

from .setups import DICTIONARIES, recorded, transcoders


def functionals_of(run, *places):
    generator = torch.Generator().manual_seed(0)
    return ReadVectors(
        layer=torch.tensor([layer for layer, _ in places]),
        point=[point for _, point in places],
        position=torch.full((len(places),), len(run.input_ids) - 1),
        vector=torch.randn(len(places), HIDDEN_SIZE, generator=generator),
        bias=torch.randn(len(places), generator=generator),
    )


def reads_of(expander, functionals):
    parts = [
        expander.read(
            int(functionals.layer[row]), functionals.point[row],
            functionals.position[[row]], functionals.vector[[row]], functionals.bias[[row]],
        )
        for row in range(len(functionals))
    ]  # fmt: skip
    return type(parts[0]).cat(parts)


def assert_sums(run, reads, sums, totals, found):
    """Equal to 1e-5 of the largest term, or to 1e-6 of the products where these cancel in the terms."""
    largest = torch.zeros(len(totals)).scatter_reduce(0, found.row, found.contribution.abs(), "amax")
    stream = max(value.norm(dim=-1).max() for value in run.activations.values())
    product = reads.scale.abs() * reads.vector.norm(dim=-1) * stream
    difference = (sums.sum(1) - totals).abs()
    assert (difference <= 1e-5 * torch.maximum(totals.abs(), largest) + 1e-6 * product).all(), difference / totals


def strongest(found, count):
    return found[found.strongest(count, found.continues)]


def check(run, functionals, depth=3, beam=40):
    """Expand, follow the strongest contributions, expand these, and so on."""
    expander = Expander(run)
    reads, totals = reads_of(expander, functionals), measured(run, functionals)
    followed = set()
    for _ in range(depth):
        found, sums = expander.expand(reads)
        assert_sums(run, reads, sums, totals, found)
        by_row = torch.zeros(len(reads), dtype=torch.float64).index_add(0, found.row, found.contribution.double())
        torch.testing.assert_close(by_row, sums.sum(1))
        torch.testing.assert_close(
            found.contribution, reads.scale[found.row] * found.activation * found.weight, rtol=1e-6, atol=0
        )
        steps = strongest(found, beam)
        followed |= {KINDS[kind] for kind in steps.kind.tolist()}
        reads, totals = expander.follow(steps, reads), steps.contribution
    return followed


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_expansion_sums_in_every_family(family):
    run = recorded(family, transcoders(0, 2))
    assert check(run, functionals_of(run, (3, "final"), (2, "mlp.in"))) >= {"head", "feature"}


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text", "opt"])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_every_expansion_sums_with_every_dictionary(family, name):
    dictionaries = DICTIONARIES[name]()
    run = recorded(family, dictionaries)
    places = [(3, "final"), (2, "resid_pre"), (1, "resid_post"), (1, "attn.in"), (2, "attn.out"), (1, "attn.branch")]
    followed = check(run, functionals_of(run, *places), beam=200)
    assert "feature" in followed
    assert ("skip" in followed) == any(d.config.skip_connection for d in dictionaries.values())


@pytest.mark.parametrize("name", ["transcoders", "relu with skip", "stream SAEs"])
def test_paths_through_heads_add_up_to_the_edges_of_the_graph(name):
    """An edge of an attribution graph is the sum of all paths through heads and skips only between its ends."""
    run = recorded("llama", DICTIONARIES[name]())
    functionals = functionals_of(run, (3, "final"), (2, "mlp.in"))
    adjoint = Adjoint(run)
    rows = adjoint.rows(functionals)
    expander = Expander(run)
    reads = reads_of(expander, functionals)
    reader = torch.arange(len(reads))
    totals = {}
    while len(reads):
        found, _ = expander.expand(reads)
        ends = found[(found.kind != KINDS.index("head")) & (found.kind != KINDS.index("skip"))]
        for row, kind, layer, position, index, dictionary, amount in zip(
            reader[ends.row].tolist(), ends.kind.tolist(), ends.layer.tolist(), ends.position.tolist(),
            ends.index.tolist(), ends.dictionary.tolist(), ends.contribution.tolist(), strict=True,
        ):  # fmt: skip
            key = (row, KINDS[kind], layer, position, index if KINDS[kind] == "feature" else -1, dictionary)
            totals[key] = totals.get(key, 0.0) + amount
        through: Contributions = found[(found.kind == KINDS.index("head")) | (found.kind == KINDS.index("skip"))]
        reader = reader[through.row]
        reads = expander.follow(through, reads) if len(through) else reads[:0]
    compared = 0
    scale = rows.abs().amax(1)
    for segment in adjoint.sources.segments:
        if segment.kind == "bias":
            continue
        for number in range(segment.start, segment.end):
            position, index, dictionary = number - segment.start, -1, -1
            if segment.writer is not None or segment.features is not None:
                dictionary = (segment.features or segment.writer).dictionary
            if segment.kind == "feature":
                position, index = (
                    int(column[position]) for column in (segment.features.position, segment.features.feature)
                )
            for row in range(len(rows)):
                key = (row, segment.kind, segment.layer, position, index, dictionary)
                assert abs(totals.get(key, 0.0) - rows[row, number]) < 1e-5 * scale[row], key
                compared += key in totals
    assert compared > 30


def test_only_the_strongest_are_kept_in_batches_too(monkeypatch):
    run = recorded("llama", transcoders(0, 1, 2))
    functionals = functionals_of(run, (3, "final"), (2, "mlp.in"), (1, "resid_post"))
    expander = Expander(run)
    reads = reads_of(expander, functionals)
    everything, sums = expander.expand(reads)
    expander._rows_per_chunk = 1
    kept, kept_sums = expander.expand(reads, keep=6)
    assert len(kept) < len(everything)
    torch.testing.assert_close(kept_sums, sums, rtol=1e-5, atol=1e-5)
    for among in ("row", "continues"):
        one, other = (
            found[found.strongest(6, found.continues if among == "continues" else None)]
            for found in (kept, everything)
        )
        assert one.row.tolist() == other.row.tolist()
        torch.testing.assert_close(one.contribution, other.contribution)
