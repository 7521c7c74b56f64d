"""Who holds which block of the cache: allocation, shared prefixes, eviction. Knows numbers and ids, no tensors.

A block keeps the keys and values of `block_size` consecutive tokens. A full block has a content key: the hash of its
ids and of the key of the block before it, so that equal keys mean equal ids from the first token on. Blocks with a key
outlive their holders until their room is needed.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

BLOCK_SIZE = 16  # measured in docs/decisions/0004: gathers cost the same from 16 to 64, waste and lost prefixes do not


class KeyChain:
    """The content keys of one sequence's full blocks, computed when first asked for."""

    def __init__(self, alpha: float, adapter: str, dtype: str, block_size: int = BLOCK_SIZE) -> None:
        # Rotated keys are cached, so a prefix is shared only under the same NTK factor, adapter and cache type.
        self._root = _digest(repr((alpha, adapter, dtype)).encode())
        self._block_size = block_size
        self._keys: list[bytes] = []

    def first(self, count: int, ids: Sequence[int]) -> list[bytes]:
        """Keys of the first `count` blocks of a sequence that begins with `ids`."""
        size = self._block_size
        assert len(ids) >= count * size, (len(ids), count)
        for i in range(len(self._keys), count):
            parent = self._keys[-1] if self._keys else self._root
            self._keys.append(_digest(parent + array("q", ids[i * size : (i + 1) * size]).tobytes()))
        return self._keys[:count]


class BlockManager:
    """Blocks 0..num_blocks-1, each free, held by one or more sequences, or cached: held by none, but with a key.

    Every operation takes constant time per block. A table, the list of a sequence's blocks in order, belongs to the
    caller, who changes it only through this class.
    """

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for their content."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks this many tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def open(self, keys: Iterable[bytes], num_tokens: int, *, reserve: int = 0) -> tuple[list[int], int] | None:
        """A table for a sequence: the blocks of its longest cached prefix, then new ones; and the prefix's tokens.

        None, and nothing changed, if that would leave fewer than `reserve` blocks available.
        """
        shared: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            shared.append(block)
        revived = sum(self._holders[block] == 0 for block in shared)
        fresh = self.blocks_for(num_tokens) - len(shared)
        if revived + fresh + reserve > self.num_available:
            return None
        for block in shared:
            self._hold(block)
        table = list(shared)
        self._extend(table, fresh)
        return table, len(shared) * self.block_size

    def cover(self, table: list[int], num_tokens: int) -> bool:
        """Extend a table to hold this many tokens; False, and nothing changed, if too few blocks are available."""
        fresh = self.blocks_for(num_tokens) - len(table)
        if fresh > self.num_available:
            return False
        self._extend(table, fresh)
        return True

    def publish(self, block: int, key: bytes) -> None:
        """Say what a held block contains, so that others can share it. The first block of equal content stays."""
        assert self._holders[block] > 0, block
        if block not in self._key_of and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Share these held blocks with nobody else: their content is not what their keys say."""
        for block in blocks:
            assert self._holders[block] > 0, block
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]

    def close(self, table: list[int]) -> None:
        """Give a table's blocks back; those with a key stay cached, the end of the prefix to be evicted first."""
        for block in reversed(table):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, block
            if self._holders[block] == 0:
                (self._cached if block in self._key_of else self._free)[block] = None
        table.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Every block is in exactly one state, keys are one to one, and the tables are all that is held."""
        held = {block for block in range(self.num_blocks) if self._holders[block]}
        assert len(held) + len(self._free) + len(self._cached) == self.num_blocks, "a block is lost or in two states"
        assert held.isdisjoint(self._free), "a held block is free"
        assert held.isdisjoint(self._cached), "a held block is cached"
        assert self._cached.keys() <= self._key_of.keys(), "a cached block has no key"
        assert self._free.keys().isdisjoint(self._key_of), "a free block has a key"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "keys and blocks do not match"
        counted = Counter(block for table in tables for block in table)
        assert counted == Counter({block: self._holders[block] for block in held}), "held blocks are in no table"

    def _extend(self, table: list[int], count: int) -> None:
        for _ in range(count):
            table.append(self._take(after=table[-1] if table else None))

    def _take(self, after: int | None) -> int:
        """A free block, the one behind `after` if possible: attention reads runs of blocks without copying."""
        if after is not None and after + 1 in self._free:
            block = after + 1
            del self._free[block]
        elif self._free:
            block, _ = self._free.popitem(last=False)
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if self._holders[block] == 0:
            del self._cached[block]
        self._holders[block] += 1


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
