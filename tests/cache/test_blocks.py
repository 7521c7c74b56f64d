"""Laws of the block manager: nothing lost, nothing shared that differs, the end of a prefix evicted first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kiloq.cache.blocks import BlockManager, KeyChain

SIZE = 4


def chain(alpha: float = 1.0, adapter: str = "", dtype: str = "float32") -> KeyChain:
    return KeyChain(alpha, adapter, dtype, SIZE)


def store(manager: BlockManager, ids: list[int], **seed: object) -> tuple[list[int], int]:
    """Open a table for these ids and publish its full blocks, as if all were computed."""
    count = len(ids) // SIZE
    keys = chain(**seed).first(count, ids)
    opened = manager.open(keys, len(ids))
    assert opened is not None
    for block, key in zip(opened[0], keys, strict=False):
        manager.publish(block, key)
    return opened


def test_equal_prefixes_share_blocks_and_different_ones_do_not() -> None:
    manager = BlockManager(16, SIZE)
    first, cached = store(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (len(first), cached) == (3, 0)
    second, cached = store(manager, [1, 2, 3, 4, 5, 6, 7, 0, 9])
    assert cached == SIZE
    assert second[0] == first[0]
    assert set(second[1:]).isdisjoint(first)
    # Equal ids behind a different beginning are different content.
    third, cached = store(manager, [0, 2, 3, 4, 5, 6, 7, 8])
    assert cached == 0
    manager.check_integrity([first, second, third])


@pytest.mark.parametrize("seed", [{"alpha": 3.0}, {"adapter": "lora"}, {"dtype": "int8"}])
def test_a_prefix_is_not_shared_across_factor_adapter_or_type(seed: dict[str, object]) -> None:
    manager = BlockManager(16, SIZE)
    ids = list(range(8))
    store(manager, ids)
    assert store(manager, ids, **seed)[1] == 0
    assert store(manager, ids)[1] == 8


def test_the_least_recently_used_prefix_goes_first_and_from_its_end() -> None:
    manager = BlockManager(4, SIZE)
    old, new = [1] * 8, [2] * 8
    for ids in (old, new):
        manager.close(store(manager, ids)[0])
    assert (manager.num_cached, manager.num_available) == (4, 4)
    taken = manager.open([], SIZE)
    assert taken is not None
    manager.close(store(manager, new)[0])
    table, cached = manager.open(chain().first(2, old), SIZE) or pytest.fail("no room")
    assert cached == SIZE, "the first block of the old prefix outlives its second"
    manager.check_integrity([taken[0], table])


def test_shared_blocks_count_once_when_room_is_judged() -> None:
    manager = BlockManager(3, SIZE)
    ids = list(range(12))
    manager.close(store(manager, ids)[0])
    keys = chain().first(2, ids)
    assert manager.open(keys, 4 * SIZE) is None
    assert manager.open(keys, 3 * SIZE, reserve=1) is None
    manager.check_integrity()
    table, cached = manager.open(keys, 3 * SIZE) or pytest.fail("no room")
    assert cached == 8
    assert manager.num_available == 0
    assert not manager.cover(table, 13)
    assert manager.cover(table, 12)
    manager.close(table)
    manager.check_integrity()


def test_forgotten_blocks_are_shared_with_nobody() -> None:
    manager = BlockManager(4, SIZE)
    table, _ = store(manager, list(range(8)))
    manager.forget(table)
    assert store(manager, list(range(8)))[1] == 0
    manager.close(table)
    assert manager.num_available == 2


def test_a_table_grows_into_neighbouring_blocks_while_they_are_free() -> None:
    manager = BlockManager(8, SIZE)
    table, _ = manager.open([], SIZE) or pytest.fail("no room")
    for tokens in range(SIZE, 5 * SIZE):
        assert manager.cover(table, tokens)
    assert table == [0, 1, 2, 3, 4]


class AnyUse(RuleBasedStateMachine):
    """Sequences of few distinct ids open, grow, publish and close in any order in a pool that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(10, SIZE)
        self.tables: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # what the blocks would hold, if they were tensors

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=20), reserve=st.integers(0, 2))
    def open(self, ids: list[int], reserve: int) -> None:
        available = self.manager.num_available
        opened = self.manager.open(chain().first(len(ids) // SIZE, ids), len(ids), reserve=reserve)
        if opened is None:
            assert self.manager.num_available == available
            return
        table, cached = opened
        assert self.manager.num_available >= reserve
        for i in range(cached // SIZE):
            assert self.content[table[i]] == tuple(ids[: (i + 1) * SIZE])
        self.tables.append((table, ids))
        self.publish(table, ids)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0), more=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def grow(self, which: int, more: list[int]) -> None:
        table, ids = self.tables[which % len(self.tables)]
        before = list(table)
        if self.manager.cover(table, len(ids) + len(more)):
            ids += more
            self.publish(table, ids)
        else:
            assert table == before

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0), forget=st.booleans())
    def close(self, which: int, forget: bool) -> None:
        table, _ = self.tables.pop(which % len(self.tables))
        if forget:
            self.manager.forget(table)
        self.manager.close(table)

    def publish(self, table: list[int], ids: list[int]) -> None:
        for i, key in enumerate(chain().first(len(ids) // SIZE, ids)):
            self.content[table[i]] = tuple(ids[: (i + 1) * SIZE])
            self.manager.publish(table[i], key)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_integrity(table for table, _ in self.tables)


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 2**40), max_size=30), st.lists(st.integers(0, 8), max_size=6))
def test_keys_do_not_depend_on_when_they_are_asked_for(ids: list[int], asked: list[int]) -> None:
    most = len(ids) // SIZE
    piecewise = chain()
    for count in asked:
        piecewise.first(min(count, most), ids)
    assert piecewise.first(most, ids) == chain().first(most, ids)
