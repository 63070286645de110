"""Who holds which page of the latent cache: reference counts, pages shared by content, eviction.

A page holds 64 tokens and is never written again once it is full, so that sequences that begin alike may share it and
copying on write is never needed. A full page is known by a chain of SHA-256: its own tokens and the key of the page
before it, hence by the whole text up to its end; two different texts cannot meet in one key, so contents are not compared.

    free ── allocate ──> held (count >= 1) ── publish ──> held, found by `share`
     ^                     │ last release                   │ last release
     └─────────────────────┘                                v
     └──────────── evicted, longest unused first ─────── resting (count 0, still found by `share`)
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from examples.errors import UserError


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page: its tokens after everything before it."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class PagePool:
    """Pages 0 .. `total` - 1. Not thread-safe: the engine's thread owns it."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise UserError(f"pages: must be at least 1; got {total}")
        self.total = total
        self.counts = [0] * total
        self.evictions = 0
        self._free = list(range(total - 1, -1, -1))
        self._resting: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can give: never used, given back, or resting."""
        return len(self._free) + len(self._resting)

    @property
    def held(self) -> int:
        """Pages with at least one holder."""
        return self.total - self.available

    @property
    def resting(self) -> int:
        """Pages that nobody holds and that the next equal prefix can have."""
        return len(self._resting)

    def allocate(self) -> int | None:
        """An empty page with one holder; None if every page is held."""
        if self._free:
            page = self._free.pop()
        elif self._resting:
            page, _ = self._resting.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self.evictions += 1
        else:
            return None
        self.counts[page] = 1
        return page

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """One more holder for the page of each key, up to the first that is not known."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._resting.pop(page, None)
            self.counts[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Say that a held page is full. If another page has this content already, this one stays private."""
        assert self.counts[page] > 0 and page not in self._key_of
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page of a sequence. Its end rests longest unused: a beginning without its end still
        serves a prefix, an end without its beginning does not."""
        for page in reversed(pages):
            self.counts[page] -= 1
            assert self.counts[page] >= 0, f"page {page} was released more often than held"
            if self.counts[page] == 0:
                if page in self._key_of:
                    self._resting[page] = None
                else:
                    self._free.append(page)
