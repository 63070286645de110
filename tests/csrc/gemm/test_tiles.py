"""Tile schedulers and the tile chooser: C++ that runs on any machine, compiled here and run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc import building
from tests.csrc.building import ROOT, output_of

M = (64, 128, 512, 4096, 16384)
# What the cost model chooses on 132 SMs for the dense shapes of DeepSeek-V3, (N, K) by M; /a and /b: the cluster of two
# that shares A or B. A change of the model shows up here, and must be meant.
PINNED = {
    (2112, 7168): "64x128/a 64x128/a 128x96/a 128x192/a 128x192/b",
    (576, 7168): "64x128/a 64x128/a 64x128/a 128x160/a 128x192/b",
    (1536, 7168): "64x128/a 64x128/a 64x128/a 128x192/a 128x192/a",
    (24576, 1536): "64x256/a 128x192/a 128x192/a 128x192/a 128x192/a",
    (32768, 512): "64x256/a 128x256 256x128 128x192/a 256x128",
    (7168, 16384): "64x128/a 64x128/a 256x128 256x128 128x192/a",
    (36864, 7168): "64x128/a 128x160/a 128x192/a 128x192/a 128x192/a",
    (7168, 18432): "64x128/a 64x128/a 256x128 256x128 128x192/a",
    (4096, 7168): "64x128/a 64x128/a 128x128/a 256x128 256x128",
    (7168, 2048): "64x128/a 64x128/a 256x128 256x128 128x192/a",
}
# The same for groups of equal size, expert gate+up and down and their gradients: by G, for ROWS per group.
ROWS = (16, 128, 512, 2048, 8192)
PINNED_GROUPS: dict[tuple[int, int], dict[int, str]] = {
    (4096, 7168): {
        4: "64x128/a 128x192/a 128x192/a 128x256 128x192/a",
        8: "64x256/a 128x192/a 128x192/a 128x256 128x256",
        16: "64x256/a 128x192/a 128x192/a 128x256 128x256",
        32: "64x256/a 128x192/a 128x192/a 128x256 128x256",
    },
    (7168, 2048): {
        4: "64x256/a 128x192/a 128x256 128x256 128x256",
        8: "64x256/a 128x192/a 128x256 128x256 128x256",
        16: "64x256/a 128x192/a 128x192/a 128x256 128x256",
        32: "64x256/a 128x192/a 128x256 128x256 128x256",
    },
    (7168, 4096): {
        4: "64x256/a 128x192/a 128x256 128x256 128x256",
        8: "64x256/a 128x192/a 128x256 128x256 128x256",
        16: "64x256/a 128x192/a 128x192/a 128x256 128x256",
        32: "64x256/a 128x192/a 128x256 128x256 128x256",
    },
    (2048, 7168): {
        4: "64x128/a 128x128/a 128x160/a 128x256 128x256",
        8: "64x128/a 128x192 128x192 128x256 128x192",
        16: "64x256/a 128x192 128x192 128x256 128x256",
        32: "64x256/a 128x192 128x192 128x256 128x256",
    },
}


@pytest.fixture(scope="module")
def program() -> Path:
    sources = [Path(__file__).with_name("tile_test.cpp"), ROOT / "csrc/common/tile_chooser.cpp"]
    return building.program("tiles", sources, building.STRICT)


def test_every_tile_once_and_clusters_within_groups(program):
    output_of(program)


def test_choices_for_v3_shapes_are_pinned(program):
    chosen: dict[tuple[int, int], list[str]] = {}
    for line in output_of(program, "choices").splitlines():
        m, n, k, tile = line.split()
        assert int(m) == M[len(chosen.setdefault((int(n), int(k)), []))]
        chosen[int(n), int(k)].append(tile)
    assert {shape: " ".join(tiles) for shape, tiles in chosen.items()} == PINNED


def test_choices_for_v3_experts_are_pinned(program):
    chosen: dict[tuple[int, int], dict[int, list[str]]] = {}
    for line in output_of(program, "grouped").splitlines():
        groups, rows, n, k, tile = line.split()
        tiles = chosen.setdefault((int(n), int(k)), {}).setdefault(int(groups), [])
        assert int(rows) == ROWS[len(tiles)]
        tiles.append(tile)
    assert {s: {g: " ".join(t) for g, t in c.items()} for s, c in chosen.items()} == PINNED_GROUPS
