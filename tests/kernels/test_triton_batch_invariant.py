"""Triton's products with one order of sums: equal to the reference, and a row's bits ignore its batch."""

from __future__ import annotations

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
