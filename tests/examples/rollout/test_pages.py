"""The page pool against a model of it: any sequence of operations, and every page is in exactly one state."""

import random

import pytest

from examples.rollout.pages import PagePool, chain_key


def test_keys_depend_on_everything_before():
    a, b = chain_key(b"", [1, 2]), chain_key(b"", [2, 1])
    assert len({a, b, chain_key(a, [1, 2]), chain_key(b, [1, 2]), chain_key(b"", [1, 2, 0])}) == 5
    assert chain_key(b"", [1, 2]) == a


@pytest.mark.parametrize("seed", range(3))
def test_random_operations(seed):
    rng, pool = random.Random(seed), PagePool(8)
    held, known = [], {}  # pages of each sequence; key -> page as `share` must find it
    for step in range(2000):
        action = rng.choice(("allocate", "publish", "release", "share"))
        if action == "allocate":
            page = pool.allocate()
            assert (page is None) == ({p for pages in held for p in pages} == set(range(8)))
            if page is not None:
                known = {k: p for k, p in known.items() if p != page}
                held.append([page])
        elif action == "publish" and held:
            (page,) = rng.choice(held)
            key = b"%d" % rng.randrange(12)
            if page not in known.values():
                pool.publish(page, key)
                known.setdefault(key, page)
        elif action == "release" and held:
            pool.release(held.pop(rng.randrange(len(held))))
        elif action == "share":
            key = b"%d" % rng.randrange(12)
            pages = pool.share([key])
            assert pages == ([known[key]] if key in known else [])
            held += [pages] if pages else []
        in_use = [p for pages in held for p in pages]
        assert pool.counts == [in_use.count(p) for p in range(8)], step
        assert pool.held == len(set(in_use)) and pool.available == 8 - pool.held
    for pages in held:
        pool.release(pages)
    assert pool.available == 8 and pool.evictions > 0


def test_the_longest_unused_goes_first_and_ends_before_beginnings():
    pool = PagePool(4)
    keys = [b"0", b"1", b"2", b"3"]
    pages = [pool.allocate() for _ in keys]
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    pool.release(pages)
    assert pool.resting == 4
    assert pool.allocate() == pages[3] and pool.share(keys) == pages[:3]
    pool.release(pages[:1])
    pool.release(pages[1:3])
    assert pool.allocate() == pages[0]  # resting longest now
    assert pool.share([b"0"]) == []
