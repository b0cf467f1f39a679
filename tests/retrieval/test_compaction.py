"""Which shards a compaction writes anew."""

from hypothesis import given
from hypothesis import strategies as st

from retrieval.compaction import CompactionPolicy, Fill, shards_to_merge
from retrieval.config import IndexConfig

FILLS = st.lists(
    st.integers(1, 2000).flatmap(lambda rows: st.builds(Fill, st.just(rows), st.integers(0, rows))), max_size=12
)


def policy(compact_above: float = 0.2, max_small_shards: int = 16) -> CompactionPolicy:
    return CompactionPolicy(1000, compact_above, max_small_shards)


def test_policy_is_the_recipes() -> None:
    config = IndexConfig(shard_chunks=7, compact_above=0.4, max_small_shards=3)
    assert CompactionPolicy.of(config) == CompactionPolicy(7, 0.4, 3)


def test_nothing_is_merged_while_neither_limit_is_passed() -> None:
    assert shards_to_merge(policy(), [Fill(1000, 100), Fill(50, 0)], 10) == set()
    assert shards_to_merge(policy(), [], 10) == set()


def test_a_full_shard_without_deletions_is_left_alone_while_others_go() -> None:
    assert shards_to_merge(policy(), [Fill(1000, 0), Fill(1000, 800), Fill(50, 1), Fill(1000, 100)], 0) == {1, 2}
    crowd = [Fill(1000, 10), *[Fill(50, 0)] * 16]
    assert shards_to_merge(policy(), crowd, 0) == set()
    assert shards_to_merge(policy(), crowd, 10) == set(range(1, 17))
    assert shards_to_merge(policy(), crowd, 500) == set()  # the new shard is not small


@given(FILLS, st.integers(0, 300), st.floats(0.01, 1.0), st.integers(1, 5))
def test_afterwards_both_limits_hold(shards: list[Fill], new_rows: int, above: float, most: int) -> None:
    merged = shards_to_merge(policy(above, most), shards, new_rows)
    left = [shard for place, shard in enumerate(shards) if place not in merged]
    written = new_rows + sum(shards[place].live for place in merged)
    total = written + sum(shard.rows for shard in left)
    assert sum(shard.deleted for shard in left) <= above * total
    small = sum(shard.live < 100 for shard in left) + (0 < written % 1000 < 100)
    assert small <= max(most, 1)
