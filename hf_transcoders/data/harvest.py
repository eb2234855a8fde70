"""Harvest activations of a base model from token rows, one chunk at a time."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import TranscoderError
from ..files import atomic_file
from ..fingerprint import digest_of
from ..lm.capture import capture
from ..lm.devices import input_device
from ..lm.inputs import check_tokens
from ..lm.model_fingerprint import model_facts
from ..lm.modes import in_eval_mode
from ..lm.sites import Site
from ..lm.wrappers import language_model
from .batches import pad_texts, read_text, text_batches
from .row_facts import RowDigest, RowFacts, is_sized, scan_rows
from .rows import token_rows


class ActivationHarvester:
    """
    Harvests activations of chunks of token rows. Chunk i always has the same rows in the same batch, so harvesting it again,
    in another epoch or after a restart, gives the same bits.

    The activations of a row do not depend on its padding (see [`read_row`]). Tokens that would dominate the loss without
    much to learn are left out: the first `skip_first` tokens of a text (the attention sink of language models: at layer 29
    of SmolLM2 its MLP output is 11 times the usual norm), the given special tokens, and tokens whose activation at any site
    is more than `outlier_factor` times the median norm of the chunk.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Language model. It is never changed, and runs in evaluation mode.
        dataset (`Sequence` or `Iterable` of rows with `input_ids` and, where they are padded, `attention_mask`):
            Token blocks, such as those of [`pack_tokens`], or texts of any lengths.
        sites (`Iterable[str]`):
            Sites to capture.
        rows_per_chunk (`int`, *optional*, defaults to 16):
            Number of rows per forward pass.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens left out at the start of each text.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens left out everywhere.
        outlier_factor (`float`, *optional*, defaults to 10.0):
            Factor of the median norm above which tokens are left out, see above. `None` keeps all.
        dtype (`torch.dtype`, *optional*):
            Type of the stored activations. Defaults to that of the base model.
        seed (`int`, *optional*, defaults to 0):
            Seed for the assignment of rows to chunks, which is the same in all epochs.
        autocast (`Callable`, *optional*):
            Function that returns the context of the forward pass, such as `accelerator.autocast`.
        cache_dir (`str` or `Path`, *optional*):
            Folder that caches chunks as safetensors for later runs.
        memory_cache_bytes (`int`, *optional*, defaults to 0):
            Size of the cache of chunks in memory for later epochs, in bytes.
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
        self.dataset = dataset = token_rows(dataset)
        self.sites = list(dict.fromkeys(str(Site.parse(site)) for site in sites))
        self.rows_per_chunk = rows_per_chunk
        self.skip_first = skip_first
        self.outlier_factor = outlier_factor
        self.dtype = dtype or base_model.dtype
        self.autocast = autocast
        self.special_token_ids = torch.tensor(sorted(set(special_token_ids)), device=input_device(base_model))
        self.tokens_harvested = 0
        self._memory: OrderedDict[int, dict[str, torch.Tensor]] = OrderedDict()
        self._memory_left = memory_cache_bytes
        self._is_sized = is_sized(dataset)
        self._row_order = None
        if self._is_sized:
            if len(dataset) == 0:
                raise TranscoderError("The dataset has no rows: give a text that is longer than one token block.")
            self._row_order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        self.seed = seed
        self._cache_dir = None
        if cache_dir is not None:
            if not self._is_sized:
                raise TranscoderError(
                    "A streamed dataset cannot be cached on disk, because its rows have no fixed number: load it without "
                    "streaming, or leave the cache folder out."
                )
            self._cache_dir = Path(cache_dir) / self._fingerprint()

    @property
    def num_chunks(self) -> int | None:
        """Number of chunks per epoch; `None` for a stream of unknown length."""
        return -(-len(self.dataset) // self.rows_per_chunk) if self._is_sized else None

    def chunks(self, order: Iterable[int], start: int = 0, read: RowDigest | None = None):
        """
        Yields the activations of chunks, site -> `(tokens, width)`, in the given order from the `start`-th (a stream is read in
        its own order, and `order` selects its chunks). `read` is updated with the rows of a stream as they are read.
        """
        if self._is_sized:
            for index in list(order)[start:]:
                yield self.chunk(index)
            return
        rows, wanted, number = [], iter(order), 0
        picked = next(wanted, None)
        taken = 0
        for row in enumerate(self.dataset if read is None else read.watch(self.dataset)):
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

    def remember(self, memory_cache_bytes: int) -> None:
        """Keeps chunks in memory from now on, up to a number of bytes."""
        self._memory_left = memory_cache_bytes

    def chunk(self, index: int) -> dict[str, torch.Tensor]:
        """The activations of one chunk, site -> `(tokens, width)`, from the cache if it has them."""
        if index in self._memory:
            return self._memory[index]
        path = self._cache_dir / f"chunk-{index:06d}.safetensors" if self._cache_dir else None
        values = self._read(path) if path is not None and path.exists() else None
        if values is None:
            rows = self._row_order[index * self.rows_per_chunk : (index + 1) * self.rows_per_chunk].tolist()
            values = self._harvest((row, self.dataset[row]) for row in rows)  # pyright: ignore[reportIndexIssue]
            if path is not None:
                with atomic_file(path) as partial:
                    save_file({site: value.contiguous().cpu() for site, value in values.items()}, partial)
        size = sum(value.numel() * value.element_size() for value in values.values())
        if size <= self._memory_left:
            self._memory[index] = values
            self._memory_left -= size
        return values

    def _read(self, path):
        """A chunk from the cache; `None` if its file is damaged, so that it is harvested again."""
        try:
            values = load_file(path)
        except (SafetensorError, OSError):
            return None
        tokens = {value.shape[:1] for value in values.values()}
        whole = values.keys() == set(self.sites) and len(tokens) == 1
        if not whole or not all(
            v.dim() == 2 and v.dtype == self.dtype and v.isfinite().all() for v in values.values()
        ):
            return None
        return {site: value.to(input_device(self.base_model)) for site, value in values.items()}

    @torch.no_grad()
    def _harvest(self, rows: Iterable[tuple[int, Mapping]]) -> dict[str, torch.Tensor]:
        """The activations of rows, which are given with their numbers."""
        numbers, rows = zip(*rows, strict=True)
        texts = [read_text(row, f"Row {number}") for number, row in zip(numbers, rows, strict=True)]
        check_tokens(self.base_model, texts, "Row", numbers)
        if any(map(len, texts)):
            parts = [self._kept(batch, batch.real.clone()) for batch in text_batches(self.base_model, texts)]
        else:
            # Without tokens, the model is run on one that is left out, because only it knows the widths.
            nothing = pad_texts([torch.zeros(1, dtype=torch.long)], [0], input_device(self.base_model))
            parts = [self._kept(nothing, torch.zeros_like(nothing.real))]
        kept = parts[0] if len(parts) == 1 else {site: torch.cat([p[site] for p in parts]) for site in self.sites}
        inside = self._inside(kept)
        if inside is not None:
            kept = {site: value[inside] for site, value in kept.items()}
        self.tokens_harvested += sum(map(len, texts))
        return kept

    def _kept(self, batch, keep) -> dict[str, torch.Tensor]:
        """The activations of a batch at the tokens of `keep` that are neither the first of a text nor special."""
        with self.autocast(), in_eval_mode(self.base_model), capture(self.base_model, self.sites) as activations:
            self.base_model(**batch.inputs)
            # The layers of a model may be on several devices.
            shape = batch.input_ids.shape
            values = {site: activations.of_tokens(site, shape).to(batch.input_ids.device) for site in self.sites}
        keep[:, : self.skip_first] = False
        if self.special_token_ids.numel():
            keep &= ~torch.isin(batch.input_ids, self.special_token_ids)
        return {site: value[keep].to(self.dtype) for site, value in values.items()}

    def _inside(self, values) -> torch.Tensor | None:
        """Mask of the tokens that are not outliers at any site. Refuses activations that are not finite."""
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

    @cached_property
    def row_facts(self) -> RowFacts | None:
        """The length and digest of the dataset; `None` for a stream, which is read only once."""
        if not self._is_sized:
            return None
        return scan_rows(self.dataset, self.skip_first, self.special_token_ids.tolist())

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All inputs of the activations as JSON data: base model, rows and settings."""
        rows = self.row_facts
        return {
            "base_model": model_facts(self.base_model),
            "data": {"rows": rows.rows, "tokens": rows.tokens, "digest": rows.digest} if rows else {"rows": None},
            "harvest": {
                "sites": self.sites,
                "rows_per_chunk": self.rows_per_chunk,
                "skip_first": self.skip_first,
                "special_token_ids": self.special_token_ids.tolist(),
                "outlier_factor": self.outlier_factor,
                "dtype": str(self.dtype),
                "autocast": str(torch.get_autocast_dtype(input_device(self.base_model).type))
                if self._autocasts()
                else None,
                "seed": self.seed,
            },
        }

    def _fingerprint(self) -> str:
        """A key that changes with any input of the activations."""
        return digest_of(self.facts).rpartition(":")[2]

    def _autocasts(self) -> bool:
        with self.autocast():
            return torch.is_autocast_enabled(input_device(self.base_model).type)
