"""The two engines of the fallback: each computes one block of attention, forward and backward.

PyTorch's CPU operator is fast and takes plain softmax attention with an additive mask; matmuls take
everything, on any device. Both compute in float32 or float64, whatever the inputs are stored in, but for
`FlashEngine.stays_narrow`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fallback_plan import Limits
from .spec import AttentionSpec, Inputs

# the binding parses its arguments 4 µs faster than torch.ops; backward has none
_flash = torch._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """Query rows and keys that meet, in wide dtype unless `FlashEngine.stays_narrow`.

    q: (batch, heads_q, rows, head_dim); k, v: (batch, heads_kv, cols, ...). visible: bool, bias: any
    float, keep (dropout): bool, each broadcasting to (batch, heads_q, rows, cols) or None.
    causal: row r sees columns 0 ... r. none_empty: every row is known to see something.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | None = None
    bias: Tensor | None = None
    keep: Tensor | None = None
    causal: bool = False
    none_empty: bool = False


class RowGradients(NamedTuple):
    """What the rows of a block know in backward, in wide dtype: gradients of out and lse, and both.

    lse belongs to all keys of the row, not to those of the block; +inf where a row sees nothing. dentropy:
    gradient of the entropy, as far as it does not go through a sum over the row, as that of lse does.
    """

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    dentropy: Tensor | None = None


class BlockGradients(NamedTuple):
    """A block's share of the gradients; dbias is that of every score."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dscores: Tensor | None


class FlashEngine:
    """PyTorch's CPU flash attention.

    In 16 bits it rounds P, as kernels do, and its lse was seen to be off by 5e-5: forward may use that. Its
    backward sums dv in 16 bits, a rounding per 256 rows or fewer, which no error budget allows.
    """

    @staticmethod
    def takes_whole(inputs: Inputs, spec: AttentionSpec) -> bool:
        """Whether the problem is one block for one call, without a mask. Asked at every small call."""
        q, k = inputs.q, inputs.k
        return (
            inputs.bias is None
            and _ABSENT.issuperset(map(type, inputs[_AFTER_SINKS:-1]))
            and spec.left is None
            and (spec.right is None or FlashEngine.is_causal(inputs, spec) or _last_row_only(q, spec))
            and (
                q.element_size() > 2
                or q.shape[2] > _FEW_ROWS
                or k.shape[2] <= _FEW_COLS
                or FlashEngine.stays_narrow(inputs, spec)
            )
        )

    @staticmethod
    def is_causal(inputs: Inputs, spec: AttentionSpec) -> bool:
        """Whether the operator's own causal mask, row r sees columns 0 ... r, is the right bound."""
        return spec.right == 0 and inputs.q.shape[2] == inputs.k.shape[2]

    @staticmethod
    def stays_narrow(inputs: Inputs, spec: AttentionSpec) -> bool:
        """Whether forward uses 16-bit operands as they are, where nobody wants lse to its last digit.

        Few rows wait for memory: converting all keys to float32 would take longer than the rest. Many are
        worth it where the CPU has matrix instructions for them. Neither parts nor sinks may need merging,
        which would round twice.
        """
        q = inputs.q
        if spec.want_lse or q.element_size() != 2 or inputs.sinks is not None:
            return False
        return q.shape[2] <= _FEW_ROWS or (q.dtype == torch.bfloat16 and multiplies_bf16())

    @staticmethod
    def takes(inputs: Inputs, spec: AttentionSpec) -> bool:
        """Whether the operator can compute the problem. It masks before it scales, so scale > 0."""
        return inputs.q.is_cpu and spec.softcap is None and spec.dropout_p == 0.0 and spec.scale > 0.0

    @staticmethod
    def limits(inputs: Inputs, spec: AttentionSpec) -> Limits:
        q, k = inputs.q, inputs.k
        narrow = FlashEngine.stays_narrow(inputs, spec)
        rows = _rows_of_mask(inputs, spec)
        if (
            spec.left is not None
        ):  # more rows see fewer of their keys; fewer make small products (192: in 64s)
            rows = min(rows, 192 if narrow else 128)
        rows = max(32, rows)
        cols = k.shape[2]
        if q.shape[2] <= _FEW_ROWS and q.element_size() == 2 and not narrow:
            # few rows wait for the conversion of keys to float32: do it in slices that stay in the cache
            cols = max(64, _CONVERTED_ELEMENTS // (k.shape[0] * k.shape[1] * k.shape[3]))
        one_part = not narrow or spec.right is None
        nothing_added = all(x is None for x in (inputs.bias, inputs.slopes, inputs.table))
        return Limits(rows, cols, whole=nothing_added and not _stacks(q, k) and one_part)

    @staticmethod
    def forward(block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """(out, lse) of the rows over the keys of the block.

        With few rows the heads of a group are stacked into rows: keys are then read once per group.
        """
        q, k, v = block.q, block.k, block.v
        added = added_rows = _added(block)
        stack = _stacks(q, k) and not block.causal
        if stack:
            added_rows = None if added is None else _stack_added(added, q, k)
            q = group(q, k)
        width = max(q.shape[3], v.shape[3])
        q, k, v = operand(q, width), operand(k, width), operand(v, width)
        if stack and added is None and _joins(k) and _joins(v):  # then no result has to be laid out anew
            q, k, v = _heads_as_batch(q), _heads_as_batch(k), _heads_as_batch(v)
        out, lse = _flash(q, k, v, 0.0, block.causal, attn_mask=added_rows, scale=spec.scale)
        if stack:
            shape = block.q.shape[:3]
            out, lse = out.reshape(*shape, width), lse.reshape(shape)
        if block.v.shape[3] != width:
            out = out[..., : block.v.shape[3]]
        return (out, lse) if added is None or block.none_empty else _mark_empty(out, lse, added)

    @staticmethod
    def backward(block: Block, rows: RowGradients, spec: AttentionSpec, dscores: bool) -> BlockGradients:
        """Exact shares of the gradients: the operator only needs the rows' out and lse.

        It computes rowsum(dout·out) itself. One more column, 1 in dout and -dlse in out, subtracts dlse
        there, and a 0 in v keeps it out of everything else.
        """
        assert not dscores
        q, k, v, dout, out = block.q, block.k, block.v, rows.dout, rows.out
        head_dim, head_dim_v = q.shape[3], v.shape[3]
        width = max(head_dim, head_dim_v)
        if rows.dlse is not None:
            dout = torch.cat([dout, torch.ones_like(dout[..., :1])], -1)
            out = torch.cat([out, -rows.dlse[..., None]], -1)
            width = max(head_dim, head_dim_v + 1)
        q, k, v, dout, out = (operand(x, width) for x in (q, k, v, dout, out))
        dq, dk, dv = _flash_backward(
            dout, q, k, v, out, rows.lse, 0.0, block.causal, attn_mask=_added(block), scale=spec.scale
        )
        return BlockGradients(dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim_v], None)


class MatmulEngine:
    """The formula on a block, by matrix products: every option, every device."""

    @staticmethod
    def limits(inputs: Inputs, spec: AttentionSpec) -> Limits:
        q, k = inputs.q, inputs.k
        elements = _BLOCK_ELEMENTS if q.device.type == "cpu" else 16 * _BLOCK_ELEMENTS
        if spec.dropout_p > 0.0:
            elements //= 4  # Philox works in int64 with several words per element
        cols = min(k.shape[2], _COLS)
        return Limits(max(16, elements // (q.shape[0] * q.shape[1] * cols)), cols, False)

    @staticmethod
    def forward(block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """(out, lse) of the rows over the keys of the block."""
        s, _ = scores(block, spec)
        peak = s.amax(-1, keepdim=True)
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        p = torch.exp(s - peak)
        total = p.sum(-1, keepdim=True)
        out = ungroup(group(dropped(p, block.keep, spec), block.k) @ block.v, block.q)
        out = out / total.masked_fill(total == 0.0, 1.0)
        return out, (peak + total.log()).squeeze(-1)

    @staticmethod
    def backward(block: Block, rows: RowGradients, spec: AttentionSpec, dscores: bool) -> BlockGradients:
        """FlashAttention-2 (Dao 2023), section 3.2, on one block; delta includes the gradient of lse."""
        k, v, dout = block.k, block.v, rows.dout
        delta = (dout * rows.out).sum(-1, keepdim=True)
        if rows.dlse is not None:
            delta = delta - rows.dlse[..., None]
        s, slope = scores(block, spec)
        p = torch.exp(s - rows.lse[..., None])
        dv = group(dropped(p, block.keep, spec), k).mT @ group(dout, k)
        dp = dropped(ungroup(group(dout, k) @ v.mT, dout), block.keep, spec)
        if rows.dentropy is not None:  # d(-p ln p) = (-ln p - 1) dp
            surprise = (rows.lse[..., None] - s).masked_fill(p == 0.0, 0.0)
            dp = dp + rows.dentropy[..., None] * (surprise - 1.0)
        ds = p * (dp - delta)
        if block.visible is not None:
            ds = torch.where(block.visible, ds, 0.0)
        dqk = spec.scale * (ds if slope is None else ds * slope)
        dq = ungroup(group(dqk, k) @ k, block.q)
        dk = group(dqk, k).mT @ group(block.q, k)
        return BlockGradients(dq, dk, dv, ds if dscores else None)


# elements of a block, so that its memory stays within tens of MiB whatever the sequence
_MASK_ELEMENTS = 2**22
_BLOCK_ELEMENTS = 2**21
_COLS = 512
_FEW_ROWS = 16
_ABSENT = {type(None)}
_AFTER_SINKS = Inputs._fields.index("sinks") + 1
_FEW_COLS = 1024
_CONVERTED_ELEMENTS = 2**18


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has tiles to multiply bf16 in (AMX): three times as fast as float32."""
    return torch.cpu._is_amx_tile_supported()


def _stacks(q: Tensor, k: Tensor) -> bool:
    """Whether the heads of a group are worth stacking into rows."""
    return q.shape[1] != k.shape[1] and q.shape[2] <= _FEW_ROWS


def _joins(x: Tensor) -> bool:
    """Whether batch and heads are one axis in memory."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _heads_as_batch(x: Tensor) -> Tensor:
    """[batch * heads, 1, rows, head_dim]."""
    return x.reshape(-1, 1, x.shape[2], x.shape[3])


def _last_row_only(q: Tensor, spec: AttentionSpec) -> bool:
    """Whether the only query is the last one, which has no key to its right."""
    return q.shape[2] == 1 and not spec.top_left


def _rows_of_mask(inputs: Inputs, spec: AttentionSpec) -> int:
    """How many query rows an element mask may have, so that it is not larger than a block should be."""
    q, mask, bias = inputs.q, inputs.mask, inputs.bias
    given = [x for x in (mask, bias, inputs.slopes) if x is not None]
    given += [] if inputs.table is None else [inputs.table[None, 0]]  # as many planes as heads
    given += [] if inputs.tiles is None else [inputs.tiles]
    made = (inputs.slopes, inputs.table, inputs.ranges, inputs.tiles, spec.left, spec.right)
    if all(x is None for x in made):
        is_row = all(x.shape[2] == 1 for x in given)
        is_there = mask is None and bias is not None and bias.dtype == q.dtype and bias.stride(3) == 1
        if is_row or is_there:
            return q.shape[2]
    planes = math.prod(max((x.shape[axis] for x in given), default=1) for axis in (0, 1))
    return _MASK_ELEMENTS // (planes * inputs.k.shape[2])


def operand(x: Tensor, width: int) -> Tensor:
    """(..., rows, head_dim) as the operator reads it: padded to `width`, rows that BLAS can step over."""
    head_dim = x.shape[-1]
    if head_dim != width:
        return F.pad(x, (0, width - head_dim))
    row_stride, stride = x.stride()[-2:]
    return x if stride == 1 and row_stride >= width else x.contiguous()


def _added(block: Block) -> Tensor | None:
    """What the operator adds to the scores, in float32 or wider: the bias, -inf where hidden."""
    dtype = torch.float32 if block.q.element_size() == 2 else block.q.dtype
    bias = block.bias
    if bias is not None and (block.visible is not None or bias.dtype != block.q.dtype):
        bias = bias.to(dtype)
    if block.visible is not None:
        shown = block.q.new_zeros((), dtype=dtype) if bias is None else bias
        return torch.where(block.visible[(None,) * (4 - block.visible.ndim)], shown, -torch.inf)
    return bias if bias is None or bias.stride(3) == 1 else bias.contiguous()


def _stack_added(added: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The additive mask of rows that are heads of a group times query rows."""
    group = q.shape[1] // k.shape[1]
    heads = max(added.shape[1], group)
    added = added.expand(-1, heads, q.shape[2], -1)
    return added.reshape(added.shape[0], heads // group, -1, added.shape[3])


def _mark_empty(out: Tensor, lse: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """out 0 and lse -inf where all scores are -inf: the operator says lse 0, or NaN if q is."""
    if bool(((lse == 0.0) | lse.isnan()).any()):
        empty = (added.amax(-1) == -torch.inf).expand(lse.shape)
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def scores(block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """Scores of a block, -inf where hidden, [batch, heads_q, rows, cols], and softcap's derivative."""
    s = ungroup(group(spec.scale * block.q, block.k) @ block.k.mT, block.q)
    slope = None
    if spec.softcap is not None:
        t = torch.tanh(s / spec.softcap)
        s, slope = spec.softcap * t, 1.0 - t * t
    if block.bias is not None:
        s = s + block.bias.to(s.dtype)
    if block.visible is not None:
        s = s.masked_fill(~block.visible, -torch.inf)
    return s, slope


def dropped(p: Tensor, keep: Tensor | None, spec: AttentionSpec) -> Tensor:
    """Dropout applied to p or dp; keep: as `philox.kept` returns it."""
    return p if keep is None else torch.where(keep, p / (1.0 - spec.dropout_p), 0.0)


def group(x: Tensor, k: Tensor) -> Tensor:
    """Heads of a group below each other: [batch, heads_kv, group * rows, ...]."""
    batch, heads_q, rows, width = x.shape
    heads_kv = k.shape[1]
    return x if heads_q == heads_kv else x.reshape(batch, heads_kv, heads_q // heads_kv * rows, width)


def ungroup(x: Tensor, q: Tensor) -> Tensor:
    """Back to [batch, heads_q, rows, ...]."""
    return x if x.shape[1] == q.shape[1] else x.reshape(x.shape[0], q.shape[1], -1, x.shape[3])
