"""Edit features inside a language model that runs its own modules."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Literal

import torch
from transformers import PreTrainedModel

from ...dictionaries import find_dictionary, fitting_dictionaries
from ...errors import TranscoderError
from ...lm.architectures import locate
from ...lm.freeze import FrozenRun, frozen, record_frozen
from ...lm.modes import in_eval_mode
from ...lm.sites import Site, input_site, output_sites
from ...lm.splicing import SplicedDictionary
from ...lm.wrappers import opens_on_model
from ...models.linear_parts import decoder_rows, skip_and_bias
from ...models.modeling_transcoder import TranscoderModel
from ...models.transcoder_set import TranscoderSet
from ..prompt_tokens import prompts_of_one_length
from .edit_table import EditTable, Entries
from .feature_edits import FeatureEdit
from .prompt_end import PromptTracker


MODES = ("direct", "frozen", "free")

# Elements of the largest temporary, the features of some tokens.
_MAX_ELEMENTS = 2**23


@opens_on_model
@contextmanager
def intervene(
    base_model: PreTrainedModel,
    transcoders: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
    edits: Sequence[FeatureEdit] | Sequence[Sequence[FeatureEdit]],
    *,
    mode: Literal["direct", "frozen", "free"] = "free",
    frozen_at: torch.Tensor | Mapping | FrozenRun | None = None,
) -> Iterator[FrozenRun | None]:
    """Edit features in every forward pass of `base_model` inside the `with` block, `generate` included.

    The model keeps running its own MLPs: each is its dictionary's reconstruction plus an error that the edit leaves
    alone. So an edit adds `(new - old) * W_dec[feature]` at the output site, in its units, and without edits nothing
    changes. How the change propagates depends on the mode:

    | `mode`     | frozen at the recorded run                       | path of the change                                  |
    |------------|--------------------------------------------------|-----------------------------------------------------|
    | `"direct"` | norm scales, attention patterns, outputs of MLPs | residual stream and values: effects are linear      |
    | `"frozen"` | norm scales, attention patterns                  | these, and the model's own MLPs, which recompute    |
    | `"free"`   | nothing                                          | the whole model                                     |

    `"direct"` gives what the edges of an attribution graph predict: the change of a pre-activation further up is the
    sum over edits of `(new - old)` times a constant. The skip connections of those of `transcoders` that write to an MLP's
    output are linear paths and carry the change too. The old activation is that of the recorded run, also where
    another edit reaches the feature; in the other two modes it is that of the current forward pass, with the edits below it.
    Effects on logits are linear before a soft-cap (Gemma 2), at `module:lm_head:out`.

    With a cache, an edit acts in the forward pass that gets its position: those in the prompt when the prompt is read,
    slices that are open to the right on every new token. The frozen modes freeze the positions of the recorded prompt;
    tokens that `generate` adds have their patterns, norms and MLPs computed freely.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model, plain or wrapped. It is in evaluation mode inside the block, and
            so are the dictionaries.
        transcoders ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            Transcoders (with or without skip connection) and SAEs of any activation. Not every layer needs one.
        edits (list of [`FeatureEdit`], or list of such lists):
            The edits of all rows of a batch, or one list for each row. When there are several times as many rows as lists,
            list i belongs to the i-th group of neighboring rows, as `generate` makes them for several sequences.
        mode (`"direct"`, `"frozen"` or `"free"`, *optional*, defaults to `"free"`):
            Frozen parts, as above.
        frozen_at (`torch.LongTensor` of shape `(batch, seq)`, `Mapping` or [`FrozenRun`], *optional*):
            The prompts whose run is frozen, as token ids or as the tokenizer returned them, or what another [`intervene`] yielded for them; for the frozen modes. One
            prompt serves any number of rows.

    Yields:
        [`FrozenRun`]: the recorded run, for further calls; `None` in free mode.

    Raises:
        [`TranscoderError`]: an unknown mode, dictionary or feature; a dictionary that does not fit the model; a frozen
            mode without a recorded prompt; and, once the model is called, a position beyond the prompt, two edits of
            one activation, a wrong number of rows, or another prompt than the recorded one.

    Example:

    ```python
    >>> edits = [FeatureEdit("layers.8.mlp.transcoder", 1234, position="all", kind="scale", value=5.0)]
    >>> with intervene(model, transcoders, edits):
    ...     output = model.generate(**tokenizer("The capital of France is", return_tensors="pt"))
    ```
    """
    named = fitting_dictionaries(base_model, transcoders)
    lists = edit_lists(edits)
    if mode not in MODES:
        raise TranscoderError(f"mode='{mode}' is unknown; use 'direct', 'frozen' or 'free'.")
    if mode == "free" and frozen_at is not None:
        raise TranscoderError(
            "In mode='free' nothing is frozen: leave `frozen_at` out, or use mode 'direct' or 'frozen'."
        )
    tables = _tables(named, lists)
    run = None if mode == "free" else _frozen_run(base_model, named, mode, frozen_at)
    if run is not None:
        # Known now, so positions need not wait for the first forward pass to be found wrong.
        for table in tables.values():
            table.place(run.input_ids.shape[1])
    tracker = PromptTracker()
    workers = []
    for name, dictionary in named.items():
        skips = _live_skips(base_model, named, name) if mode == "direct" else {}
        if name in tables or skips:
            recorded = run.activations[input_site(dictionary)] if mode == "direct" else None
            workers.append(_Editor(dictionary, tables.get(name), tracker, recorded, skips))
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(base_model, *named.values()))
        stack.enter_context(nullcontext() if run is None else frozen(base_model, run, mlps=mode == "direct"))
        tracker.attach(stack, base_model)
        for worker in workers:
            worker.attach(stack, base_model)
        yield run


def edit_lists(edits) -> list[list[FeatureEdit]]:
    """Edits as a list for each row; a plain list of edits is the one list for all rows."""
    if isinstance(edits, FeatureEdit):
        edits = [edits]
    lists = [list(edits)] if all(isinstance(edit, FeatureEdit) for edit in edits) else [list(row) for row in edits]
    if not all(isinstance(edit, FeatureEdit) for row in lists for edit in row):
        raise TranscoderError("`edits` must be a list of FeatureEdit, or a list of such lists, one for each row.")
    return lists


def input_sites(named: Mapping[str, TranscoderModel]) -> list[Site]:
    """Input sites of dictionaries, without repeats."""
    return list(dict.fromkeys(input_site(dictionary) for dictionary in named.values()))


def encode_some(dictionary: TranscoderModel, inputs: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Activations of some features, `(tokens, k)`, for inputs `(tokens, d_in)`.

    All features of a token are computed, as some activations need them; only those asked for are kept.
    """
    weight = dictionary.W_enc
    features = features.to(weight.device)
    rows = max(1, _MAX_ELEMENTS // dictionary.config.num_features)
    parts = inputs.to(weight.device, weight.dtype).split(rows)
    return torch.cat([dictionary.encode(part).index_select(1, features) for part in parts])


def _tables(named, lists) -> dict[str, EditTable]:
    edits = {}
    for number, row in enumerate(lists):
        for edit in row:
            name = find_dictionary(named, edit.dictionary, edit.feature)
            edits.setdefault(name, []).append((number, edit))
    return {name: EditTable(some, len(lists)) for name, some in edits.items()}


def _frozen_run(base_model, named, mode, frozen_at) -> FrozenRun:
    if frozen_at is None:
        raise TranscoderError(
            f"mode='{mode}' freezes the model as it is on one prompt: give its token ids, (batch, seq), as `frozen_at`."
        )
    if not isinstance(frozen_at, FrozenRun):
        return record_frozen(base_model, prompts_of_one_length(base_model, frozen_at), input_sites(named))
    missing = [str(site) for site in input_sites(named) if site not in frozen_at.activations]
    if missing:
        raise TranscoderError(
            f"The recorded run has no activations at {', '.join(missing)}: call `record_frozen` with `sites` set to the "
            "input sites of the dictionaries, or give the prompt itself."
        )
    return frozen_at


def _live_skips(base_model, named, name) -> dict[Site, torch.Tensor]:
    """Skip connections of a dictionary that stands for MLPs, `(d_out, d_in)`, by output site."""
    skips = {}
    for site in _mlp_sites(named[name]):
        skip, _ = skip_and_bias(named[name], site)
        if skip is None:
            continue
        skips[site] = skip
        for other, dictionary in named.items():
            same = [place for place in _mlp_sites(dictionary) if place.layer == site.layer]
            if other != name and any(skip_and_bias(dictionary, place)[0] is not None for place in same):
                raise TranscoderError(
                    f"'{name}' and '{other}' both have a skip connection past one MLP, so its linear path would count twice "
                    "in mode 'direct': leave one of them out."
                )
    return skips


def _mlp_sites(dictionary) -> list[Site]:
    sites = output_sites(dictionary)
    return [site for site in sites if site.point in ("mlp.out", "mlp.branch")]


class _Editor:
    """Applies the edits of one dictionary: changes of activations in a forward pass, and the vectors that they add at each output site.

    Args:
        dictionary ([`TranscoderModel`]): The dictionary.
        table ([`EditTable`], *optional*): Its edits, if it has any.
        tracker ([`PromptTracker`]): Tracker of the tokens of the current forward pass.
        recorded (`torch.Tensor` of shape `(batch or 1, seq, d_in)`, *optional*):
            Inputs of the dictionary in the recorded run, where old activations are those of that run.
        skips (`dict[Site, torch.Tensor]`): By output site, skip connections `(d_out, d_in)` that carry changes.
    """

    def __init__(self, dictionary, table, tracker: PromptTracker, recorded, skips):
        self.dictionary = dictionary
        self.table = table
        self.tracker = tracker
        self.recorded = recorded
        self.skips = skips
        self.sites = output_sites(dictionary)
        self.rows = {}
        if table is not None:
            features = table.features.to(dictionary.device)
            self.rows = {site: decoder_rows(dictionary, features, site) for site in self.sites}

    def attach(self, stack: ExitStack, model: PreTrainedModel):
        source = input_site(self.dictionary)
        locations = {site: locate(model, site) for site in self.sites}
        SplicedDictionary(source, locate(model, source), locations, self._compute, self._write).attach(stack)

    def _compute(self, inputs):
        """The inputs, and edited tokens with the changes of their features, if there are any."""
        if self.table is None:
            return inputs, None
        entries = self.table.entries(self.tracker.tokens, self.tracker.length)
        return inputs, self._changes(entries, inputs) if len(entries.row) else None

    def _write(self, site, computed, value):
        inputs, changes = computed
        if site in self.skips and self.tracker.tokens.start == 0:
            length = self.recorded.shape[1]
            change = (inputs[:, :length] - self.recorded).float() @ self.skips[site].T.to(inputs.device)
            value = torch.cat([value[:, :length] + change.to(value.dtype), value[:, length:]], dim=1)
        if changes is None:
            return value
        flat, amounts = changes
        delta = (amounts @ self.rows[site]).to(value.device, value.dtype)
        return value.reshape(-1, value.shape[-1]).index_add(0, flat.to(value.device), delta).view(value.shape)

    def _changes(self, entries: Entries, inputs):
        """Edited tokens `(tokens,)`, counted over the batch, and changes of activations `(tokens, features)`."""
        device = self.dictionary.device
        flat = entries.row * self.tracker.tokens.length + entries.position - self.tracker.tokens.start
        # Tokens with an edit, each once, however many of its features are edited.
        flat, token = flat.unique(return_inverse=True)
        token, column = token.to(device), entries.column.to(device)
        factor, added = entries.factor.to(device), entries.added.to(device)
        change = added
        if (entries.factor != 1).any():
            old = encode_some(self.dictionary, self._inputs_at(flat.to(inputs.device), inputs), self.table.features)
            change = added + (factor - 1) * old[token, column].float()
        amounts = torch.zeros(len(flat), len(self.table.features), device=device)
        return flat, amounts.index_put((token, column), change)

    def _inputs_at(self, flat, inputs):
        """Inputs of the dictionary at some tokens, `(tokens, d_in)`, from the recorded run if there is one."""
        live = inputs.reshape(-1, inputs.shape[-1])[flat]
        if self.recorded is None or self.tracker.tokens.start > 0:
            return live
        row, position = flat // inputs.shape[1], flat % inputs.shape[1]
        prompts, length, _ = self.recorded.shape
        recorded = self.recorded[row if prompts > 1 else 0, position.clamp(max=length - 1)]
        return torch.where((position < length)[:, None], recorded, live)
