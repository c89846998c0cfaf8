"""Page accounting against a plain model of it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from apex_jax.pages import BlockTables, OutOfPagesError, PagePool, num_pages_for

NUM_PAGES = 7


class PagePoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.held: list[int] = []

    @rule(count=st.integers(0, NUM_PAGES + 2))
    def allocate(self, count):
        num_free = NUM_PAGES - len(set(self.held))
        if count > num_free:
            with pytest.raises(OutOfPagesError, match=f"{count} pages .* {num_free} are free"):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert not set(pages) & set(self.held)
        assert len(set(pages)) == count
        self.held += pages

    @rule(data=st.data())
    def share(self, data):
        if self.held:
            page = data.draw(st.sampled_from(self.held))
            self.pool.share([page])
            self.held.append(page)

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            page = data.draw(st.sampled_from(self.held))
            self.pool.release([page])
            self.held.remove(page)

    @invariant()
    def counts_agree(self):
        assert self.pool.references() == Counter(self.held)
        assert self.pool.num_free == NUM_PAGES - len(set(self.held))


TestPagePool = PagePoolMachine.TestCase


def test_releasing_a_free_page_is_an_error():
    pool = PagePool(2)
    [page] = pool.allocate(1)
    pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} is free already"):
        pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} is free and cannot be shared"):
        pool.share([page])


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
