"""Page accounting against a plain model of it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from apex_jax.pages import BlockTables, OutOfPagesError, PagePool, num_pages_for
from apex_jax.prefix_cache import PrefixCache

NUM_PAGES = 7


class PagePoolMachine(RuleBasedStateMachine):
    """kept: known pages without references, the one released longest ago first."""

    def __init__(self):
        super().__init__()
        self.known = PrefixCache(page_size=1)
        self.pool = PagePool(NUM_PAGES, self.known)
        self.held: list[int] = []
        self.kept: list[int] = []
        self.num_known = 0

    @rule(count=st.integers(0, NUM_PAGES + 2))
    def allocate(self, count):
        num_free = NUM_PAGES - len(set(self.held))
        if count > num_free:
            with pytest.raises(OutOfPagesError, match=f"{count} pages .* {num_free} are free"):
                self.pool.allocate(count)
            return
        num_kept_left = min(len(self.kept), num_free - count)
        pages = self.pool.allocate(count)
        assert not set(pages) & set(self.held)
        assert len(set(pages)) == count
        self.held += pages
        taken = self.kept[: len(self.kept) - num_kept_left]
        del self.kept[: len(taken)]
        assert set(taken) <= set(pages)
        assert not any(page in self.known for page in pages)

    @rule(data=st.data())
    def make_known(self, data):
        pages = sorted(page for page in set(self.held) if page not in self.known)
        if pages:
            self.num_known += 1
            page = data.draw(st.sampled_from(pages))
            self.known.add(self.known.root, [self.num_known], [page], 1)
            assert page in self.known

    @rule(data=st.data())
    def share(self, data):
        if self.held or self.kept:
            page = data.draw(st.sampled_from(self.held + self.kept))
            self.pool.share([page])
            self.held.append(page)
            self.kept = [one for one in self.kept if one != page]

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            page = data.draw(st.sampled_from(self.held))
            self.pool.release([page])
            self.held.remove(page)
            if page not in self.held and page in self.known:
                self.kept.append(page)

    @invariant()
    def counts_agree(self):
        assert self.pool.references() == Counter(self.held)
        assert self.pool.num_free == NUM_PAGES - len(set(self.held))
        assert all(page in self.known for page in self.kept)
        self.pool.check()


TestPagePool = PagePoolMachine.TestCase


def test_releasing_a_free_page_is_an_error():
    pool = PagePool(2)
    [page] = pool.allocate(1)
    pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} is free already"):
        pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} is free and cannot be shared"):
        pool.share([page])


def test_a_pool_notices_pages_that_are_nowhere_or_forgotten():
    known = PrefixCache(page_size=1)
    pool = PagePool(2, known)
    [page] = pool.allocate(1)
    known.add(known.root, [5], [page], 1)
    pool.release([page])
    pool.check()
    known.forget(page)
    with pytest.raises(RuntimeError, match=r"pages free but known \[\], kept \[0\]"):
        pool.check()
    pool._kept.clear()
    with pytest.raises(RuntimeError, match=r"pages free \[1\], kept \[\], in use \[\]"):
        pool.check()


def test_block_tables_snapshot_their_rows():
    tables = BlockTables(num_slots=3, max_pages_per_sequence=4, page_size=8)
    tables.set(1, 0, [5, 6])
    tables.set(1, 2, [9])
    rows = tables.rows(np.array([1, 0], np.int32), num_tokens=17)
    tables.set(1, 0, [7])
    assert rows.tolist() == [[5, 6, 9], [0, 0, 0]]


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (8, 1), (9, 2)])
def test_num_pages_for(num_tokens, expected):
    assert num_pages_for(num_tokens, 8) == expected
