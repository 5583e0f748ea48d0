"""Triton's products with one order of sums: equal to the reference, and a row's bits ignore its batch."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference

pytest.importorskip("triton")

from kernels.triton.batch_invariant import InvariantLinears
from kernels.triton.runtime import find_target

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LINEARS = InvariantLinears(find_target(DEVICE))
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 70, 33), (5, 64, 128), (70, 200, 96)])
def test_linear(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(columns, depth).to(dtype).to(DEVICE), torch.randn(columns).to(dtype).to(DEVICE)
    x = torch.randn(rows, depth + 8).to(dtype).to(DEVICE)[:, :depth]
    linear = LINEARS.linear([weight[:13], weight[13:]], bias)
    found, expected = linear(x), reference.linear([weight.float()], bias.float())(x.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(LINEARS.linear([weight], None)(x), found - bias, atol=0.1, rtol=0.1)
    for first, last in {(0, 1), (rows - 1, rows), (rows // 3, rows)}:
        assert torch.equal(linear(x[first:last]), found[first:last]), "a row's bits depend on its batch"
    index = torch.tensor([columns - 1, 0, 3], device=DEVICE)
    assert torch.equal(linear.rows(index), weight[index])


@pytest.mark.parametrize("seed", range(5))
def test_random_shapes_and_strides(seed: int) -> None:
    """Inputs that are columns of something wider, weights in parts that are rows of something larger."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    dtype = dice.choice(list(TOLERANCE))
    rows, columns, depth = dice.randrange(1, 80), dice.randrange(2, 140), dice.randrange(1, 150)
    before, behind, step = dice.randrange(9), dice.randrange(9), dice.randrange(1, 3)
    x = torch.randn(step * rows, before + depth + behind).to(dtype).to(DEVICE)[::step, before : before + depth]
    weight = torch.randn(columns, before + depth).to(dtype).to(DEVICE)[:, before:]
    bias = torch.randn(columns).to(dtype).to(DEVICE) if dice.random() < 0.5 else None
    cut = dice.randrange(1, columns)
    linear = LINEARS.linear([weight[:cut], weight[cut:]], bias)
    found = linear(x)
    expected = reference.linear([weight.float()], None if bias is None else bias.float())(x.float())
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    row = dice.randrange(rows)
    assert torch.equal(linear(x[row : row + 1]), found[row : row + 1]), "a row's bits depend on its batch"
