"""Rivals of window attention: functions (qkv, bias_table, case) -> out, differentiable in both tensors.

What a module would make once and keep as a buffer (index, border mask, block mask) is made on the first call with a
case and kept, so that no timed call makes it.

Letters: B clips, n windows a clip, h heads, N tokens of a window, d head dimension.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_kernels.baselines.common import Baseline, compile_reasons, compiled, package_reasons
from bevt_kernels.select import Spec, float_reasons
from bevt_kernels.testing import WindowCase, relative_index
from bevt_kernels.window_attention import reference


def constants(case: WindowCase, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of the table (N * N,); (n, 1, N, N) 0, or -inf across the border of a shifted map, None without shift."""
    index = relative_index(case.window, case.table).flatten().to(device)
    return index, reference.border_bias(case.grid, case.window, case.shift, torch.empty(0, dtype=dtype, device=device))


_cached_constants = functools.lru_cache(maxsize=16)(constants)  # a model has 7 cases


def _constants(qkv: Tensor, case: WindowCase) -> tuple[Tensor, Tensor | None]:
    return _cached_constants(case, qkv.dtype, qkv.device)


def _windows(qkv: Tensor, case: WindowCase) -> Tensor:
    """(B, D, H, W, 3 * h * d) -> (3, B, n, h, N, d), contiguous: a roll where there is a shift, and one copy."""
    if any(case.shift):
        qkv = qkv.roll([-s for s in case.shift], (1, 2, 3))
    windows = reference.partition(qkv, case.heads, case.head_dim, case.window, (0, 0, 0))
    return windows.unflatten(1, (qkv.shape[0], -1))


def _in_place(out: Tensor, case: WindowCase) -> Tensor:
    """Inverse of `_windows` for the output: (B * n, h, N, d) -> (B, D, H, W, h * d)."""
    merged = reference.merge(out[None], case.grid, case.window, (0, 0, 0))
    return merged.roll(case.shift, (1, 2, 3)) if any(case.shift) else merged


def _bias(bias_table: Tensor, index: Tensor, border: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(n, h, N, N) with a border, (1, h, N, N) without.

    Read along the rows of the transposed table: with its gradient 0.9 ms where `bias_table[index]` takes 5.1 (N = 392,
    4 heads, float32, one CPU thread).
    """
    tokens = round(len(index) ** 0.5)
    bias = bias_table.t().contiguous().index_select(1, index).view(1, -1, tokens, tokens).to(dtype)
    return bias if border is None else bias + border


def eager_attention(qkv: Tensor, bias_table: Tensor, case: WindowCase, index: Tensor, border: Tensor | None) -> Tensor:
    """`eager` with the constants given."""
    q, k, v = _windows(qkv, case)
    scores = (q * case.scale) @ k.mT
    scores += _bias(bias_table, index, border, q.dtype)
    return _in_place((scores.softmax(-1) @ v).flatten(0, 1), case)


def eager(qkv: Tensor, bias_table: Tensor, case: WindowCase) -> Tensor:
    """Roll, partition, matmul, bias and mask in one addition, softmax, matmul, in the dtype of `qkv`."""
    return eager_attention(qkv, bias_table, case, *_constants(qkv, case))


def eager_compiled(qkv: Tensor, bias_table: Tensor, case: WindowCase) -> Tensor:
    """`eager` under torch.compile."""
    return compiled(eager_attention)(qkv, bias_table, case, *_constants(qkv, case))


def _folded(windows: Tensor, case: WindowCase) -> Tensor:
    """(3, B, n, h, N, d) -> (3, B, n * h, N, d) with a shift, (3, B * n, h, N, d) without.

    Windows of a shifted map differ in their bias. As heads they share one (1, n * h, N, N) bias between the clips; as
    batch entries they would need it B times.
    """
    return windows.flatten(2, 3) if any(case.shift) else windows.flatten(1, 2)


def _unfolded(out: Tensor, case: WindowCase) -> Tensor:
    return out.reshape(-1, case.heads, *out.shape[-2:])


def sdpa(qkv: Tensor, bias_table: Tensor, case: WindowCase) -> Tensor:
    """PyTorch's scaled_dot_product_attention with the bias as a dense mask, which takes a gradient."""
    q, k, v = _folded(_windows(qkv, case), case)
    bias = _bias(bias_table, *_constants(qkv, case), q.dtype).view(1, -1, *2 * (q.shape[2],))
    return _in_place(_unfolded(F.scaled_dot_product_attention(q, k, v, bias, scale=case.scale), case), case)


def xformers(qkv: Tensor, bias_table: Tensor, case: WindowCase) -> Tensor:
    """The memory_efficient_attention of xformers with the bias as a dense tensor, which takes a gradient."""
    from xformers.ops import memory_efficient_attention

    q, k, v = _folded(_windows(qkv, case), case)
    tokens = q.shape[2]
    bias = _bias(bias_table, *_constants(qkv, case), q.dtype).view(1, -1, tokens, tokens)
    aligned = F.pad(bias, (0, -tokens % 8))[..., :tokens]  # it wants rows that start at a multiple of 8 numbers
    out = memory_efficient_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=aligned.expand(len(q), -1, -1, -1), scale=case.scale
    )
    return _in_place(_unfolded(out.transpose(1, 2), case), case)


@functools.lru_cache(maxsize=2)
def _flex_constants(case: WindowCase, device: torch.device) -> tuple[Tensor, int, Any]:
    """What the modifications read: a code for each token, the code of distance zero, and the block mask or None.

    The row of the table is separable: code[i] - code[j] + zero. Region numbers compare equal inside a border.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    index = relative_index(case.window, case.table).to(device, torch.int32)
    code, zero = index[:, 0] - index[0, 0], int(index[0, 0])
    _, border = constants(case, torch.float32, device)
    if border is None:
        return code, zero, None
    region = (border[:, 0] == 0).int().argmax(-1)  # (n, N): the first token of the window that a token attends to

    def same_region(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        window = batch % len(region)
        return region[window, i] == region[window, j]

    mask = create_block_mask(same_region, case.batch * len(region), None, len(code), len(code), device=str(device))
    return code, zero, mask


def _flex(qkv: Tensor, bias_table: Tensor, case: WindowCase, code: Tensor, zero: int, mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    table = bias_table.t().contiguous()

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[head, code[i] - code[j] + zero]

    q, k, v = _windows(qkv, case).flatten(1, 2)
    return _in_place(flex_attention(q, k, v, score_mod=add_bias, block_mask=mask, scale=case.scale), case)


def flex(qkv: Tensor, bias_table: Tensor, case: WindowCase) -> Tensor:
    """Compiled FlexAttention: the bias is gathered from the table in the kernel, border blocks are skipped.

    The roll and the partition are compiled with it.
    """
    return compiled(_flex)(qkv, bias_table, case, *_flex_constants(case, qkv.device))


def _flex_reasons(spec: Spec) -> list[str]:
    reasons = compile_reasons(spec)
    if spec.device == "cpu":
        reasons.append("FlexAttention has no backward on the CPU")
    if spec.head_dim is not None and spec.head_dim < 16:  # torch/_inductor/kernel/flex
        reasons.append(f"FlexAttention takes head dimensions from 16, not {spec.head_dim}")
    return reasons


WINDOW_ATTENTION: dict[str, Baseline] = {
    "eager": Baseline(eager, float_reasons),
    "eager compiled": Baseline(eager_compiled, compile_reasons, compiles=True),
    "sdpa": Baseline(sdpa, float_reasons),
    "flex": Baseline(flex, _flex_reasons, compiles=True),
    "xformers": Baseline(xformers, package_reasons("xformers"), "xformers"),
}
"""By the name that a benchmark's row carries."""
