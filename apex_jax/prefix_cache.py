"""Which pages hold the beginnings of which token sequences, so that nobody computes them twice.

Owns the tree of full pages whose KV is written (or will be, by a stage planned already) and stays
as long as the page does. A page is found by its tokens and all those before it, compared and not
only hashed. Which pages are in use is the pool's business. Called by a lane. Imports no jax.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class PageNode:
    """A full page behind those of its parents.

    depth: how many pages that makes. tokens: of the page, 4 bytes each. page: -1 of the root alone.
    """

    page: int
    depth: int
    tokens: bytes
    parent: "PageNode | None"
    children: dict[bytes, "PageNode"] = field(default_factory=dict[bytes, "PageNode"])


class PrefixCache:
    """The known pages of one pool.

    num_changes: so far, of what can be found.

    A page may be forgotten before those behind it: they are then found no more, until they are
    forgotten themselves or the page before them is known again under a node of its own.
    """

    def __init__(self, page_size: int):
        self._page_size = page_size
        self.root = PageNode(page=-1, depth=0, tokens=b"", parent=None)
        self._nodes: dict[int, PageNode] = {}
        self.num_changes = 0

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def tokens_of(self, token_ids: Sequence[int], page_index: int) -> bytes:
        """Return the tokens of one page of a sequence, as nodes have them."""
        first = page_index * self._page_size
        return array("i", token_ids[first : first + self._page_size]).tobytes()

    def find(self, token_ids: Sequence[int], max_pages: int) -> list[PageNode]:
        """Return the known pages with which a sequence begins, in order, at most so many."""
        found: list[PageNode] = []
        node: PageNode | None = self.root
        while len(found) < max_pages:
            node = node.children.get(self.tokens_of(token_ids, len(found)))
            if node is None:
                break
            found.append(node)
        return found

    def add(
        self, node: PageNode, token_ids: Sequence[int], pages: Sequence[int], num_pages: int
    ) -> PageNode:
        """Make a sequence's first `num_pages` pages known; return the node of the last.

        node: of those of them that are known. Where others hold the same tokens, they stay the
        ones to be found.
        """
        while node.depth < num_pages:
            tokens = self.tokens_of(token_ids, node.depth)
            child = node.children.get(tokens)
            if child is None:
                page = pages[node.depth]
                assert page not in self._nodes, f"page {page} holds other tokens"
                child = PageNode(page, node.depth + 1, tokens, node)
                node.children[tokens] = self._nodes[page] = child
                self.num_changes += 1
            node = child
        return node

    def forget(self, page: int) -> None:
        """Drop a page whose KV is about to be overwritten."""
        node = self._nodes.pop(page)
        self.num_changes += 1
        assert node.parent is not None
        del node.parent.children[node.tokens]
