"""``draw`` by Triton, behind the signature of ``kernels.reference``: reads the scores and leaves them as they are.

Makes no host wait for the device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
from torch import Tensor

from kernels.alignment import aligned
from kernels.triton import sampling_kernels
from kernels.types import DrawRules
from kernels.upload import upload

_SPAN = 8192
_BLOCK = 1024
_CUT_BLOCK = 4096


def draw(scores: Tensor, rules: DrawRules) -> Tensor:
    assert scores.stride(1) == 1
    rows, vocab_size = scores.shape
    device = scores.device
    temperatures = upload(rules.temperature, torch.float32, device)
    keys = upload(np.array(rules.keys, dtype=np.uint64).view(np.int64), torch.int64, device)
    thresholds = _thresholds(scores, temperatures, rules)
    spans = triton.cdiv(vocab_size, _SPAN)
    best = torch.empty((rows, spans), dtype=torch.float32, device=device)
    tokens = torch.empty((rows, spans), dtype=torch.int64, device=device)
    sampling_kernels.pick[(rows, spans)](
        scores,
        temperatures,
        keys,
        thresholds,
        best,
        tokens,
        scores.stride(0),
        vocab_size,
        SPAN=_SPAN,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return tokens[:, 0] if spans == 1 else tokens.gather(1, best.argmax(1, keepdim=True))[:, 0]


def _thresholds(scores: Tensor, temperatures: Tensor, rules: DrawRules) -> Tensor:
    """float32 ``[rows]``: what is below one, by temperature, is cut off."""
    rows, vocab_size = scores.shape
    device = scores.device
    thresholds = torch.full((rows,), -math.inf, dtype=torch.float32, device=device)
    top_k = [k if 0 < k < vocab_size else 0 for k in rules.top_k]
    cutting = [row for row in rules.random_rows if rules.min_p[row] > 0 or top_k[row] or rules.top_p[row] < 1]
    if cutting:
        count = len(cutting)
        limits = np.zeros((3, aligned(count, torch.float32)), dtype=np.float32)
        limits[0, :count] = [math.log(rules.min_p[row]) if rules.min_p[row] > 0 else -math.inf for row in cutting]
        limits[1, :count] = [top_k[row] for row in cutting]
        limits[2, :count] = [rules.top_p[row] for row in cutting]
        sampling_kernels.cut[(count,)](
            scores,
            upload(cutting, torch.int64, device),
            temperatures,
            *upload(limits, torch.float32, device),
            thresholds,
            scores.stride(0),
            vocab_size,
            BLOCK=_CUT_BLOCK,
            num_warps=16,
        )
    return thresholds
