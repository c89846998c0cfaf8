"""Accounting of KV pages: which ids are free, how often each is used, which sequence has which.

Owns integers only; storage is in kv_cache. Refuses to hand out what it does not have and to take
back what is not out. Called by the scheduler. Imports no jax.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from apex_jax.prefix_cache import PrefixCache


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free."""


class PagePool:
    """Reference-counted page ids 0 .. num_pages - 1.

    known: pages whose KV somebody may want again. They count as free without references, like all
    others, but are handed out last, the one released longest ago first, and then forgotten.
    """

    def __init__(self, num_pages: int, known: PrefixCache | None = None):
        self.num_pages = num_pages
        self._known = known
        self._free = list(range(num_pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # known and without references
        self._num_references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    def references(self) -> Counter[int]:
        """Return the reference count of each page in use."""
        return Counter({page: count for page, count in enumerate(self._num_references) if count})

    def is_used(self, page: int) -> bool:
        return self._num_references[page] > 0

    def allocate(self, count: int) -> list[int]:
        """Return `count` pages with one reference each; all or none."""
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages were asked for, {self.num_free} are free")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._num_references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each page, which must be in use or known."""
        for page in pages:
            if self._num_references[page] == 0:
                if page not in self._kept:
                    raise ValueError(f"page {page} is free and cannot be shared")
                del self._kept[page]
            self._num_references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; one without references is free again."""
        for page in pages:
            if self._num_references[page] == 0:
                raise ValueError(f"page {page} is free already")
            self._num_references[page] -= 1
            if self._num_references[page]:
                continue
            if self._known is not None and page in self._known:
                self._kept[page] = None
            else:
                self._free.append(page)

    def check(self) -> None:
        """Raise RuntimeError unless every page is free, kept or in use, and only one of them."""
        used = [page for page, count in enumerate(self._num_references) if count]
        if sorted([*self._free, *self._kept, *used]) != list(range(self.num_pages)):
            raise RuntimeError(f"pages free {self._free}, kept {list(self._kept)}, in use {used}")
        known = self._known
        lost = [] if known is None else [page for page in self._free if page in known]
        if lost or not all(known is not None and page in known for page in self._kept):
            raise RuntimeError(f"pages free but known {lost}, kept {list(self._kept)}")

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        assert self._known is not None
        self._known.forget(page)
        return page


class BlockTables:
    """The pages of each slot's sequence, in order.

    num_pages_s: how many there are.
    """

    def __init__(self, num_slots: int, max_pages_per_sequence: int, page_size: int):
        self.page_size = page_size
        self.num_pages_s = np.zeros(num_slots, np.int32)
        self._table = np.zeros((num_slots, max_pages_per_sequence), np.int32)

    def set(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write `pages` from entry `first` of the slot's row on."""
        self.num_pages_s[slot] = first + len(pages)
        self._table[slot, first : first + len(pages)] = pages

    def append(self, slots_b: Int32[np.ndarray, "b"], pages: Sequence[int]) -> None:
        """Write a page more in each slot's row."""
        self._table[slots_b, self.num_pages_s[slots_b]] = pages
        self.num_pages_s[slots_b] += 1

    def rows(self, slots_b: Int32[np.ndarray, "b"], num_tokens: int) -> Int32[np.ndarray, "b m"]:
        """Return a snapshot of the slots' rows, wide enough for `num_tokens` tokens each."""
        return self._table[slots_b, : num_pages_for(num_tokens, self.page_size)]


def num_pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)
