"""Endless streams of shuffled activation batches that resume exactly."""

from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import TranscoderError
from ..fingerprint import differences
from .harvest import ActivationHarvester
from .row_facts import RowDigest


class ActivationStream:
    """
    A stream of activation batches in random order.

    Neighboring tokens have similar activations. The stream fills a block of `buffer_tokens` activations from chunks in
    random order, permutes it and yields it batch by batch; then it fills the next block. No token is lost: the remaining
    tokens of a chunk begin the next block.

    The state of the stream is four numbers and the seed ([`~ActivationStream.state_dict`]): the first chunk of the block, the
    number of its tokens in earlier blocks, and the number of tokens of the block that were used. Loading a state restores
    the block bit for bit. For a streamed dataset the state also has a digest of the rows up to the end of the block, which
    are read again and must be the same.

    Args:
        harvester ([`ActivationHarvester`]):
            Source of activations.
        batch_size (`int`, *optional*, defaults to 2048):
            Number of tokens per batch.
        buffer_tokens (`int`, *optional*, defaults to 65536):
            Number of tokens per block, rounded down to whole batches, and to one epoch if the data is shorter.
        seed (`int`, *optional*, defaults to 0):
            Seed for the order of chunks in an epoch and of tokens in a block.
        shard, num_shards (`int`, *optional*, defaults to 0 and 1):
            Part of the data for this stream, and number of parts. Each part has its own chunks.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar while a block is filled.
    """

    def __init__(
        self,
        harvester: ActivationHarvester,
        *,
        batch_size: int = 2048,
        buffer_tokens: int = 65536,
        seed: int = 0,
        shard: int = 0,
        num_shards: int = 1,
        progress: bool = False,
    ):
        self.harvester = harvester
        self.batch_size = batch_size
        self.seed = seed
        self.shard = shard
        self.num_shards = num_shards
        self.progress = progress
        self._num_chunks = harvester.num_chunks
        if self._num_chunks is not None:
            if self._num_chunks < num_shards:
                raise TranscoderError(
                    f"The data makes {self._num_chunks} chunks for {num_shards} data shards: give more text, or lower "
                    "`harvest_batch_size` or `data_shards`."
                )
            found = harvester.row_facts
            epoch = found.rows // num_shards * found.kept // found.rows
            # Data without any activations is refused when it is read.
            if 0 < epoch < batch_size:
                raise TranscoderError(
                    f"The text is too short: {found.rows} rows of {found.tokens / found.rows:.4g} tokens leave {epoch} "
                    f"activations per data shard, less than one batch of {batch_size}; give more text or a smaller batch "
                    "size."
                )
            buffer_tokens = min(buffer_tokens, epoch)
        self.batches_per_block = max(1, buffer_tokens // batch_size)
        self._chunks: Iterator | None = None
        self._carry: dict[str, torch.Tensor] | None = None
        self._block: dict[str, torch.Tensor] | None = None
        # Position of the next chunk, and number of its tokens to skip.
        self._epoch, self._position, self._skip = 0, 0, 0
        # Start of the current block, and number of its tokens that were used.
        self._block_start = (0, 0, 0)
        self._block_number, self._offset = 0, 0
        # For a streamed dataset: rows read in this epoch, and rows read when the block was full, by epoch.
        self._read: RowDigest | None = None
        self._block_rows: list[str] = []
        self._expected_rows: list[str] | None = None

    @property
    def block_tokens(self) -> int:
        """Number of tokens per block."""
        return self.batches_per_block * self.batch_size

    @property
    def epoch(self) -> float:
        """Number of passes over the data in the blocks filled so far."""
        return self._epoch + (self._position / len(self._order(self._epoch)) if self._num_chunks else 0.0)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            self._fill()
            order = self._permutation()
            for number in range(self._offset, self.batches_per_block):
                chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
                # Before the batch is yielded, so that a state saved meanwhile counts it as used.
                self._offset = number + 1
                yield {site: values[chosen] for site, values in self._block.items()}
            self._block = None
            self._block_number += 1
            self._offset = 0

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        """Up to `tokens` activations of the current block, site -> `(tokens, width)`, without consuming them."""
        self._fill()
        chosen = self._permutation()[:tokens]
        return {site: values[chosen] for site, values in self._block.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state of the stream for a checkpoint, as plain numbers."""
        return {
            "block_start": list(self._block_start),
            "block_number": self._block_number,
            "offset": self._offset * self.batch_size,
            "seed": self.seed,
            "block_tokens": self.block_tokens,
            "num_shards": self.num_shards,
            **({"rows_read": self._expected_rows or self._block_rows} if self._num_chunks is None else {}),
        }

    def mismatches(self, state: dict[str, Any]) -> list[str]:
        """The [`differences`] that keep this stream from continuing from a saved state."""
        settings = {"seed": self.seed, "block tokens": self.block_tokens, "num shards": self.num_shards}
        return differences({name: state[name.replace(" ", "_")] for name in settings}, settings)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continues from a saved state. The batch size may differ if it divides the number of used tokens of the block: another
        number of processes or accumulated batches splits the same tokens differently.
        """
        state = checked_state(state)
        if found := self.mismatches(state):
            raise TranscoderError(
                f"The checkpoint was made with {'; '.join(found)}: resume with the same data and settings, or start again."
            )
        if state["offset"] % self.batch_size:
            raise TranscoderError(
                f"The checkpoint is {state['offset']} tokens into a block, which is not a multiple of the batch size {self.batch_size}: "
                "resume with the batch size of the checkpoint, or one that divides it."
            )
        self._block_start = tuple(state["block_start"])
        self._epoch, self._position, self._skip = self._block_start
        self._block_number, self._offset = state["block_number"], state["offset"] // self.batch_size
        self._chunks = self._carry = self._block = None
        self._expected_rows = state.get("rows_read") or None
        if self._offset == self.batches_per_block:
            # The block was fully used: fill it once more to find the start of the next one.
            self._fill()
            self._block = None
            self._block_number += 1
            self._offset = 0

    def _order(self, epoch: int) -> range | list[int]:
        """The chunks of this shard in an epoch."""
        if self._num_chunks is None:
            return range(self.shard, 1 << 62, self.num_shards)
        generator = torch.Generator().manual_seed(_mix(self.seed, 1, epoch))
        return torch.randperm(self._num_chunks, generator=generator)[self.shard :: self.num_shards].tolist()

    def _permutation(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_mix(self.seed, 2, self._block_number, self.shard))
        order = torch.randperm(self.block_tokens, generator=generator)
        return order.to(next(iter(self._block.values())).device)

    def _fill(self) -> None:
        if self._block is not None:
            return
        wanted = self.block_tokens
        self._block_start = (self._epoch, self._position, self._skip)
        self._block_rows = []
        block: dict[str, torch.Tensor] = {}
        filled = 0
        with tqdm(total=wanted, desc="Reading activations", unit="tok", leave=False, disable=not self.progress) as bar:
            while filled < wanted:
                chunk = self._next_chunk()
                tokens = next(iter(chunk.values())).shape[0]
                taken = min(tokens, wanted - filled)
                for site, values in chunk.items():
                    if site not in block:
                        block[site] = values.new_empty(wanted, values.shape[1])
                    block[site][filled : filled + taken] = values[:taken]
                filled += taken
                bar.update(taken)
                if taken < tokens:
                    self._carry = {site: values[taken:] for site, values in chunk.items()}
                    self._skip += taken
                else:
                    self._position, self._skip = self._position + 1, 0
        if self._read is not None:
            self._block_rows.append(self._read.digest())
        if self._expected_rows not in (None, self._block_rows):
            raise TranscoderError(
                "The streamed dataset has other rows than those of the checkpoint: resume with the same "
                "text in the same order, or start again."
            )
        self._expected_rows = None
        self._block = block

    def _next_chunk(self) -> dict[str, torch.Tensor]:
        """The chunk at the cursor, without its used tokens."""
        if self._carry is not None:
            carry, self._carry = self._carry, None
            return carry
        empty_epochs = 0
        while True:
            if self._chunks is None:
                self._read = RowDigest() if self._num_chunks is None else None
                self._chunks = self.harvester.chunks(self._order(self._epoch), self._position, self._read)
            chunk = next(self._chunks, None)
            if chunk is None:
                if self._position == 0 or empty_epochs:
                    raise TranscoderError(
                        "The data gives no activations: it is empty, or every token is masked; give more text, or check "
                        "`skip_first` and the special tokens."
                    )
                empty_epochs += 1
                self._chunks = None
                if self._read is not None:
                    self._block_rows.append(self._read.digest())
                self._epoch, self._position = self._epoch + 1, 0
                continue
            left = {site: values[self._skip :] for site, values in chunk.items()}
            if next(iter(left.values())).shape[0]:
                return left
            self._position, self._skip = self._position + 1, 0


class ShardedStream:
    """
    A stream of batches that take equally from several shards of the data, each of which is shuffled separately.

    The tokens of a step then depend only on the number of shards, not on the number of processes: process r of n reads the
    shards r, r + n, r + 2n ..., and the batches of all processes together are those of one process that reads all shards.
    With a single shard, a process gets the batches of its [`ActivationStream`] unchanged.

    Args:
        harvester ([`ActivationHarvester`]):
            Source of activations, shared by all shards with its caches.
        batch_size (`int`):
            Number of tokens per batch of this process.
        num_shards (`int`, *optional*, defaults to 1):
            Number of shards over all processes: a multiple of `world_size` that divides `batch_size * world_size`.
        rank, world_size (`int`, *optional*, defaults to 0 and 1):
            Rank of this process, and number of processes.
        kwargs:
            `buffer_tokens` (of each shard), `seed` and `progress`, same as in [`ActivationStream`].
    """

    def __init__(
        self,
        harvester: ActivationHarvester,
        *,
        batch_size: int,
        num_shards: int = 1,
        rank: int = 0,
        world_size: int = 1,
        **kwargs,
    ):
        if num_shards % world_size:
            raise TranscoderError(
                f"{num_shards} data shards cannot be shared equally by {world_size} processes: set `data_shards` to a "
                "multiple of the number of processes."
            )
        if batch_size * world_size % num_shards:
            raise TranscoderError(
                f"A batch of {batch_size} tokens on each of {world_size} processes cannot be taken equally from "
                f"{num_shards} data shards: make the batch size times the processes a multiple of `data_shards`."
            )
        self.harvester = harvester
        size = batch_size * world_size // num_shards
        self.shards = {
            shard: ActivationStream(harvester, batch_size=size, shard=shard, num_shards=num_shards, **kwargs)
            for shard in range(rank, num_shards, world_size)
        }

    @property
    def epoch(self) -> float:
        """Number of passes over the data in the blocks filled so far."""
        return next(iter(self.shards.values())).epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for parts in zip(*self.shards.values(), strict=True):
            yield _joined(parts)

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        """Up to `tokens` activations of the first shard, site -> `(tokens, width)`, without consuming them."""
        return next(iter(self.shards.values())).sample(tokens)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Shard -> state of its stream."""
        return {shard: stream.state_dict() for shard, stream in self.shards.items()}

    def load_state_dict(self, states: dict[int, dict[str, Any]]) -> None:
        """Continues from the saved states of this process's shards."""
        for shard, stream in self.shards.items():
            stream.load_state_dict(states[shard])


def checked_state(state: Any) -> dict[str, Any]:
    """Checks a saved state, and raises a [`TranscoderError`] if it is damaged."""
    numbers = ("block_number", "offset", "block_tokens", "num_shards")
    has_numbers = isinstance(state, dict) and all(
        type(state.get(name)) is int and state[name] >= 0 for name in numbers
    )
    start = state.get("block_start") if has_numbers else None
    whole = isinstance(start, list | tuple) and [type(x) is int and x >= 0 for x in start] == [True] * 3
    if not whole or type(state.get("seed")) is not int or not isinstance(state.get("rows_read", []), list):
        raise TranscoderError("The position in the data in the checkpoint is damaged: take another checkpoint.")
    return state


def _joined(parts):
    if len(parts) == 1:
        return parts[0]
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def _mix(*numbers: int) -> int:
    """One seed from several numbers, so that no two uses share a sequence."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 12345) % (2**63 - 1)
    return mixed
