"""Cases for bench/probes/matrix_moves.cu: ldmatrix and stmatrix of 8 x 8 matrices of 16-bit elements (PTX ISA 9.7.14)."""

from __future__ import annotations

import numpy as np

from .probes import Array, Case


def _lane_elements(transposed: bool) -> tuple[Array, Array]:
    """(row, column) of the two elements that each lane holds of a matrix, both [32, 2]."""
    lane, e = np.meshgrid(np.arange(32), np.arange(2), indexing="ij")
    row, column = lane // 4, lane % 4 * 2 + e
    return (column, row) if transposed else (row, column)


def matrix_moves() -> list[Case]:
    """1, 2 and 4 matrices; lanes give row addresses in a shuffled order, so that each address is known to count."""
    result = []
    random = np.random.default_rng(11)
    for count in (1, 2, 4):
        for transposed in (False, True):
            rows = random.permutation(32).astype(np.int32)  # lane l points at row rows[l] of shared memory
            memory = random.integers(0, 65536, (32, 8)).astype(np.uint16)
            row, column = _lane_elements(transposed)
            matrices = memory[rows[: 8 * count]].reshape(count, 8, 8)
            registers = matrices[:, row, column].transpose(1, 0, 2)  # [32, count, 2]
            packed = np.zeros((32, 4), np.uint32)
            packed[:, :count] = np.ascontiguousarray(registers).view(np.uint32)[..., 0]
            tag = f"x{count}{'-transposed' if transposed else ''}"
            parameters = (0, count, int(transposed))
            result.append(
                Case(
                    f"ldmatrix-{tag}",
                    parameters,
                    (rows, memory),
                    {"out": np.zeros((32, 4), np.uint32)},
                    {"out": packed},
                )
            )
            source = random.integers(0, 2**32, (32, 4)).astype(np.uint32)
            halves = source.view(np.uint16).reshape(32, 4, 2)
            target = np.full((32, 8), 0xA5A5, np.uint16)
            expected = target.copy()
            for m in range(count):
                expected[rows[8 * m + row], column] = halves[:, m]
            result.append(
                Case(
                    f"stmatrix-{tag}",
                    (1, count, int(transposed)),
                    (rows, source),
                    {"out": target},
                    {"out": expected},
                )
            )
    return result
