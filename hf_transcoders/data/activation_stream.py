"""An endless, shuffled, exactly resumable stream of activation batches."""

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
    Batches of activations in random order.

    Neighbouring tokens are alike, so a batch of them would be one long sentence. The stream fills a block of
    `buffer_tokens` activations from chunks in random order, permutes it and hands it out batch by batch; then it fills
    the next. No token is lost: what a chunk has left over begins the next block.

    Where it stands is four numbers and the seed ([`~ActivationStream.state_dict`]): the chunk that the block began with,
    how many of its tokens an earlier block had used, and how many tokens of the block are gone. Loading them makes the
    block again, bit for bit. Of a streamed dataset there is also a digest of the rows that were read up to the end of the
    block; they are read again, and must be the same.

    Args:
        harvester ([`ActivationHarvester`]):
            Where activations come from.
        batch_size (`int`, *optional*, defaults to 2048):
            Tokens of one batch.
        buffer_tokens (`int`, *optional*, defaults to 65536):
            Tokens of one block; rounded down to whole batches, and to one epoch where the data is shorter.
        seed (`int`, *optional*, defaults to 0):
            Of both orders, that of chunks in an epoch and that of tokens in a block.
        shard, num_shards (`int`, *optional*, defaults to 0 and 1):
            Which part of the data this stream reads, and how many parts there are: each has chunks of its own.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a bar while a block is filled.
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
            # Where nothing is left at all, reading says so.
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
        # Where the next chunk comes from, and how many tokens of it to pass over.
        self._epoch, self._position, self._skip = 0, 0, 0
        # Where the current block began, and what is gone of it.
        self._block_start = (0, 0, 0)
        self._block_number, self._offset = 0, 0
        # Of a stream: what was read of this epoch, and what had been read when the block was full, epoch by epoch.
        self._read: RowDigest | None = None
        self._block_rows: list[str] = []
        self._expected_rows: list[str] | None = None

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return self.batches_per_block * self.batch_size

    @property
    def epoch(self) -> float:
        """Passes over the data so far, as far as blocks have been filled."""
        return self._epoch + (self._position / len(self._order(self._epoch)) if self._num_chunks else 0.0)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            self._fill()
            order = self._permutation()
            for number in range(self._offset, self.batches_per_block):
                chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
                # Before the batch is handed out, so that a state saved while it is in use counts it as gone.
                self._offset = number + 1
                yield {site: values[chosen] for site, values in self._block.items()}
            self._block = None
            self._block_number += 1
            self._offset = 0

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        """Up to `tokens` activations of the current block, site -> `(tokens, width)`. Nothing is used up."""
        self._fill()
        chosen = self._permutation()[:tokens]
        return {site: values[chosen] for site, values in self._block.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain numbers, to be saved with a checkpoint."""
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
        """What keeps this stream from continuing where a saved one stood, as [`differences`] says it."""
        settings = {"seed": self.seed, "block tokens": self.block_tokens, "num shards": self.num_shards}
        return differences({name: state[name.replace(" ", "_")] for name in settings}, settings)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continues where a saved stream stood. The batch size may be another, as long as it divides what is gone of the
        block: another number of processes or of accumulated batches takes the same tokens in other portions.
        """
        state = checked_state(state)
        if found := self.mismatches(state):
            raise TranscoderError(
                f"The checkpoint was made with {'; '.join(found)}: resume with the same data and settings, or start anew."
            )
        if state["offset"] % self.batch_size:
            raise TranscoderError(
                f"The checkpoint stands {state['offset']} tokens into a block, which batches of {self.batch_size} do not "
                "reach: resume with the batch size of the checkpoint, or one that divides it."
            )
        self._block_start = tuple(state["block_start"])
        self._epoch, self._position, self._skip = self._block_start
        self._block_number, self._offset = state["block_number"], state["offset"] // self.batch_size
        self._chunks = self._carry = self._block = None
        self._expected_rows = state.get("rows_read") or None
        if self._offset == self.batches_per_block:
            # The block was used up to the last batch: make it once more to know where the next begins.
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
                "The streamed dataset gives other rows than those that the checkpoint was made with: resume with the same "
                "text in the same order, or start anew."
            )
        self._expected_rows = None
        self._block = block

    def _next_chunk(self) -> dict[str, torch.Tensor]:
        """The chunk at the cursor, without the tokens that were used already."""
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
    Batches that take equally from several shards of the data, each shuffled by itself.

    Which tokens a step sees then depends on the number of shards alone, and not on how many processes share them: of
    `num_shards` shards process r of n reads the shards r, r + n, r + 2n ..., and the batches of all processes together
    are those of one process that reads all shards. With a single shard of its own, a process gets the batches of its
    [`ActivationStream`] as they are.

    Args:
        harvester ([`ActivationHarvester`]):
            Where activations come from; all shards share it and its caches.
        batch_size (`int`):
            Tokens of one batch of this process.
        num_shards (`int`, *optional*, defaults to 1):
            Shards of the data, over all processes: a multiple of `world_size` that divides `batch_size * world_size`.
        rank, world_size (`int`, *optional*, defaults to 0 and 1):
            This process, and how many there are.
        kwargs:
            `buffer_tokens` (of each shard), `seed` and `progress`, as for [`ActivationStream`].
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
        """Passes over the data so far, as far as blocks have been filled."""
        return next(iter(self.shards.values())).epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for parts in zip(*self.shards.values(), strict=True):
            yield _joined(parts)

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        """Up to `tokens` activations of the first shard, site -> `(tokens, width)`. Nothing is used up."""
        return next(iter(self.shards.values())).sample(tokens)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Shard -> where its stream stands."""
        return {shard: stream.state_dict() for shard, stream in self.shards.items()}

    def load_state_dict(self, states: dict[int, dict[str, Any]]) -> None:
        """Continues where the shards of this process stood."""
        for shard, stream in self.shards.items():
            stream.load_state_dict(states[shard])


def checked_state(state: Any) -> dict[str, Any]:
    """A saved state, or the error that says it is damaged."""
    numbers = ("block_number", "offset", "block_tokens", "num_shards")
    has_numbers = isinstance(state, dict) and all(
        type(state.get(name)) is int and state[name] >= 0 for name in numbers
    )
    start = state.get("block_start") if has_numbers else None
    whole = isinstance(start, list | tuple) and [type(x) is int and x >= 0 for x in start] == [True] * 3
    if not whole or type(state.get("seed")) is not int or not isinstance(state.get("rows_read", []), list):
        raise TranscoderError("The place in the data that the checkpoint gives is damaged: take another checkpoint.")
    return state


def _joined(parts):
    if len(parts) == 1:
        return parts[0]
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def _mix(*numbers: int) -> int:
    """One seed of several numbers, so that no two uses share a sequence."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 12345) % (2**63 - 1)
    return mixed
