"""Random attribution graphs with every kind of node, in which each row sums to its total."""

import torch

from hf_transcoders.circuits.graphs import KINDS, AttributionGraph, TargetInfo


WORDS = (
    "<s>", "When", " Mary", " and", " John", " went", " to", " the", " store", ",", " John", " gave", " a", " bottle",
    " of", " milk", " to", " his", " dear", " friend",
)  # fmt: skip
ANSWERS = (" Mary", " John", " the", " her", " him", " a", " them", " his")


def random_graph(
    *,
    num_layers=4,
    tokens=WORDS[:6],
    features=3,
    targets=3,
    seed=0,
    density=0.25,
    difference=False,
    metadata=None,
):
    """
    A graph in which nodes of higher layers have random edges from lower nodes.

    Layer 1 has two dictionaries, the last layer none. There is a bias in layer 0, and one after the last block.

    Args:
        num_layers, tokens, features: Number of layers, tokens of the prompt, and features per token and dictionary.
        targets: Number of logits of the last token that are targets.
        density: Share of the possible edges that exist.
        difference: Whether a difference of logits is a target as well.
    """
    random = torch.Generator().manual_seed(seed)
    names = [f"layers.{layer}.mlp.transcoder" for layer in range(num_layers - 1)] + ["layers.1.attn.sae"]
    on_layer = {layer: [layer] if layer < num_layers - 1 else [] for layer in range(num_layers)}
    on_layer[1].append(len(names) - 1)
    rows = []  # kind, layer, position, index, dictionary

    def add(kind, layer, position, index=-1, dictionary=-1):
        rows.append((KINDS.index(kind), layer, position, index, dictionary))

    ids = [10 * i + len(word) for i, word in enumerate(tokens)]
    for position, token in enumerate(ids):
        add("token", -1, position, token)
    for position in range(len(tokens)):
        add("position", -1, position)
    add("bias", 0, -1)
    for layer in range(num_layers):
        for position in range(len(tokens)):
            for dictionary in on_layer[layer]:
                count = int(torch.randint(0, 2 * features + 1, (), generator=random))
                for index in sorted(torch.randperm(4096, generator=random)[:count].tolist()):
                    add("feature", layer, position, index, dictionary)
                if position:
                    add("error", layer, position, -1, dictionary)
            if not on_layer[layer]:
                add("mlp", layer, position)
    add("bias", num_layers, -1)
    weights = torch.rand(targets, generator=random).pow(3).sort(descending=True).values
    weights = 0.9 * weights / weights.sum()
    infos = [
        TargetInfo(ANSWERS[i], len(tokens) - 1, float(weights[i]), float(weights[i]), 100 + i) for i in range(targets)
    ]
    if difference:
        infos.append(TargetInfo(" Mary - John", len(tokens) - 1, 0.1))
    for number in range(len(infos)):
        add("target", num_layers, len(tokens) - 1, number)

    kind, layer, position, index, dictionary = torch.tensor(rows).T.contiguous()
    has_row = (kind == KINDS.index("feature")) | (kind == KINDS.index("target"))
    # From lower layers and from the same or earlier positions; biases (position -1) reach all nodes above them.
    can = (layer[None] < layer[:, None]) & (position[None] <= position[:, None]) & has_row[:, None]
    is_target = kind == KINDS.index("target")
    can[:, is_target] = False
    last_bias = (kind == KINDS.index("bias")) & (layer == num_layers)
    can |= is_target[:, None] & last_bias[None]
    there = can & (torch.rand(can.shape, generator=random) < density)
    target, source = there.nonzero().T
    # A few strong edges among many weak ones, as in real graphs.
    weight = torch.randn(len(source), generator=random).double() ** 3 + 0.05
    rest = torch.where(has_row, torch.randn(len(rows), generator=random).double() * 0.3, 0.0)
    total = rest.index_add(0, target, weight).masked_fill(~has_row, float("nan"))
    value = torch.where(is_target, 0.0, torch.rand(len(rows), generator=random).double() * 6)
    return AttributionGraph(
        kind=kind,
        layer=layer,
        position=position,
        index=index,
        dictionary=dictionary,
        value=value.float(),
        total=total.float(),
        rest=rest.float(),
        rest_abs=rest.abs().float() * 1.5,
        rest_error=rest.abs().float() * 0.2,
        source=source.contiguous(),
        target=target.contiguous(),
        weight=weight.float(),
        input_ids=ids,
        tokens=list(tokens),
        targets=infos,
        dictionaries=names,
        num_layers=num_layers,
        target_vector=torch.zeros(len(infos), 8),
        target_bias=torch.zeros(len(infos)),
        metadata={
            "model": "some/model",
            "revision": "abc123",
            "settings": {"max_features": 2048, "max_logits": 10, "logit_mass": 0.95},
            "dictionaries": [
                {
                    "name": name,
                    "from": "me/set",
                    "output_site": name.replace(".transcoder", ".out").replace(".sae", ".out"),
                }
                for name in names
            ],
            **(metadata or {}),
        },
    )
