"""Token blocks -> activations of a base model, one chunk of rows at a time."""

import contextlib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import TranscoderError
from ..files import atomic_file
from ..lm import Site, capture
from ..lm.modes import in_eval_mode
from ..lm.wrappers import language_model


# Rows of the base model's weights that enter a cache's key: enough to tell two models apart, cheap to read.
_FINGERPRINT_VALUES = 64


class ActivationHarvester:
    """
    Activations of chunks of token rows. Chunk i is always the same rows in the same batch, so that asking for it again,
    in another epoch or after a restart, gives the same bits.

    Left out are tokens that would teach a dictionary little and dominate its loss: the first `skip_first` positions of
    a row (language models park an attention sink there: at SmolLM2's layer 29 its MLP output is 11 times the usual
    norm), padding, the given special tokens, and tokens whose activation at any site is more than `outlier_factor`
    times as long as the chunk's median.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            The language model. It is never changed, and runs in evaluation mode.
        dataset (`Sequence` or `Iterable` of rows with `input_ids` and, where lengths differ, `attention_mask`):
            Token blocks, as [`pack_tokens`] makes them.
        sites (`Iterable[str]`):
            Where to read.
        rows_per_chunk (`int`, *optional*, defaults to 16):
            Rows of one forward.
        skip_first (`int`, *optional*, defaults to 1):
            Positions left out at the start of each row.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens left out wherever they stand.
        outlier_factor (`float`, *optional*, defaults to 10.0):
            See above; `None` keeps all.
        dtype (`torch.dtype`, *optional*):
            What activations are stored in. Defaults to the base model's own.
        seed (`int`, *optional*, defaults to 0):
            Decides, once for all epochs, which rows share a chunk.
        autocast (`Callable`, *optional*):
            Makes the context of the forward, such as `accelerator.autocast`.
        cache_dir (`str` or `Path`, *optional*):
            Folder in which chunks are kept as safetensors for later runs.
        memory_cache_bytes (`int`, *optional*, defaults to 0):
            How many bytes of chunks to keep in memory for later epochs.
    """

    def __init__(
        self,
        base_model,
        dataset: Sequence | Iterable,
        sites: Iterable[str],
        *,
        rows_per_chunk: int = 16,
        skip_first: int = 1,
        special_token_ids: Sequence[int] = (),
        outlier_factor: float | None = 10.0,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        autocast=contextlib.nullcontext,
        cache_dir: str | Path | None = None,
        memory_cache_bytes: int = 0,
    ):
        self.base_model = base_model = language_model(base_model)
        self.dataset = dataset
        self.sites = list(dict.fromkeys(str(Site.parse(site)) for site in sites))
        self.rows_per_chunk = rows_per_chunk
        self.skip_first = skip_first
        self.outlier_factor = outlier_factor
        self.dtype = dtype or base_model.dtype
        self.autocast = autocast
        self.special_token_ids = torch.tensor(sorted(set(special_token_ids)), device=base_model.device)
        self.tokens_harvested = 0
        self._memory: OrderedDict[int, dict[str, torch.Tensor]] = OrderedDict()
        self._memory_left = memory_cache_bytes
        self._is_sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        self._row_order = None
        if self._is_sized:
            if len(dataset) == 0:
                raise TranscoderError("The dataset has no rows: give a text that is longer than one token block.")
            self._row_order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        self._cache_dir = None
        if cache_dir is not None:
            if not self._is_sized:
                raise TranscoderError(
                    "A streamed dataset cannot be cached on disk, because its rows have no fixed number: load it without "
                    "streaming, or leave the cache folder out."
                )
            self._cache_dir = Path(cache_dir) / self._fingerprint(seed)

    @property
    def num_chunks(self) -> int | None:
        """Chunks of one epoch; `None` for a stream, whose end is not known."""
        return -(-len(self.dataset) // self.rows_per_chunk) if self._is_sized else None

    def chunks(self, order: Iterable[int], start: int = 0):
        """
        Yields `(site -> (tokens, width))` for the chunks of `order` (a stream has its own order; of it `order` picks the
        numbers to read), beginning at the `start`-th of them.
        """
        if self._is_sized:
            for index in list(order)[start:]:
                yield self.chunk(index)
            return
        rows, wanted, number = [], iter(order), 0
        picked = next(wanted, None)
        taken = 0
        for row in self.dataset:
            rows.append(row)
            if len(rows) == self.rows_per_chunk:
                if number == picked:
                    if taken >= start:
                        yield self._harvest(rows)
                    taken += 1
                    picked = next(wanted, None)
                rows, number = [], number + 1
                if picked is None:
                    return
        if rows and number == picked and taken >= start:
            yield self._harvest(rows)

    def chunk(self, index: int) -> dict[str, torch.Tensor]:
        """Activations of one chunk: site -> `(tokens, width)`, from the cache where it has them."""
        if index in self._memory:
            return self._memory[index]
        path = self._cache_dir / f"chunk-{index:06d}.safetensors" if self._cache_dir else None
        values = self._read(path) if path is not None and path.exists() else None
        if values is None:
            rows = self._row_order[index * self.rows_per_chunk : (index + 1) * self.rows_per_chunk].tolist()
            values = self._harvest([self.dataset[row] for row in rows])
            if path is not None:
                with atomic_file(path) as partial:
                    save_file({site: value.contiguous().cpu() for site, value in values.items()}, partial)
        size = sum(value.numel() * value.element_size() for value in values.values())
        if size <= self._memory_left:
            self._memory[index] = values
            self._memory_left -= size
        return values

    def _read(self, path):
        try:
            return {site: value.to(self.base_model.device) for site, value in load_file(path).items()}
        except SafetensorError:
            return None  # Cut short by a crash of the machine: harvested again and replaced.

    @torch.no_grad()
    def _harvest(self, rows) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = _pad(rows, self.base_model.device)
        with self.autocast(), in_eval_mode(self.base_model), capture(self.base_model, self.sites) as activations:
            if bool(attention_mask.all()):
                self.base_model(input_ids=input_ids)
            else:
                self.base_model(input_ids=input_ids, attention_mask=attention_mask)
            values = {site: activations[site] for site in self.sites}
        keep = attention_mask.clone()
        keep[:, : self.skip_first] = False
        if self.special_token_ids.numel():
            keep &= ~torch.isin(input_ids, self.special_token_ids)
        kept = {site: value[keep].to(self.dtype) for site, value in values.items()}
        inside = self._inside(kept)
        if inside is not None:
            kept = {site: value[inside] for site, value in kept.items()}
        self.tokens_harvested += input_ids.numel()
        return kept

    def _inside(self, values) -> torch.Tensor | None:
        """Which tokens are no outliers at any site; refuses activations that are not numbers."""
        inside = None
        for site, value in values.items():
            if value.shape[0] == 0:
                return None
            norms = value.float().norm(dim=-1)
            if not bool(norms.isfinite().all()):
                raise TranscoderError(
                    f"The base model's activations at {site} contain NaN or infinity: load it in float32 or bfloat16 "
                    "instead of float16, and check that its weights are intact."
                )
            if self.outlier_factor is not None:
                ok = norms <= self.outlier_factor * norms.median()
                inside = ok if inside is None else inside & ok
        return inside

    def _fingerprint(self, seed: int) -> str:
        """A key that changes with everything the activations depend on."""
        parameters = list(self.base_model.parameters())
        sampled = [p.detach().flatten()[:: max(1, p.numel() // _FINGERPRINT_VALUES)] for p in parameters]
        weights = torch.stack([torch.stack([s.double().sum(), s.double().abs().sum()]) for s in sampled])
        ends = [
            list(map(int, self.dataset[i]["input_ids"])) for i in (0, len(self.dataset) // 2, len(self.dataset) - 1)
        ]
        facts = {
            "weights": weights.cpu().numpy().tobytes().hex(),
            "base_dtype": str(self.base_model.dtype),
            "dataset": getattr(self.dataset, "_fingerprint", None) or ends,
            "rows": len(self.dataset),
            "sites": self.sites,
            "rows_per_chunk": self.rows_per_chunk,
            "skip_first": self.skip_first,
            "special_token_ids": self.special_token_ids.tolist(),
            "outlier_factor": self.outlier_factor,
            "dtype": str(self.dtype),
            "autocast": str(torch.get_autocast_dtype(self.base_model.device.type)) if self._autocasts() else None,
            "seed": seed,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _autocasts(self) -> bool:
        with self.autocast():
            return torch.is_autocast_enabled(self.base_model.device.type)


def _pad(rows, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `(rows, longest)`, padded on the right."""
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    masks = [
        torch.as_tensor(row["attention_mask"], dtype=torch.bool)
        if "attention_mask" in row
        else torch.ones(len(i)).bool()
        for row, i in zip(rows, ids, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True).to(device), pad(masks, batch_first=True).to(device)
