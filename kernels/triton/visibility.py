"""Who sees whom: the intervals of tiles a program visits, and the mask of elements inside an edge tile.

The twin of `kernels/visibility.py` for kernels. Conventions: `tiles`.
"""

import triton
import triton.language as tl


@triton.jit
def row_numbers(first, n_rows, BLOCK: tl.constexpr):
    """Positions of BLOCK query rows; those past the end repeat the last one.

    A repeated row sees what the last row sees, so that it changes neither which keys a tile needs
    nor which are hidden from all of its rows, and it may be used as an index.
    """
    return tl.minimum(first + tl.arange(0, BLOCK), n_rows - 1)


@triton.jit
def keys_of(batch, lengths_ptr, seqlen_k):
    """How many keys a batch entry has; a length that is wrong on the device reads nothing outside."""
    if lengths_ptr is not None:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), seqlen_k)
    else:
        return seqlen_k


@triton.jit
def seen_keys(seqlen_q, n_keys, shift, left, right):
    """Keys [lo, hi) that some query row sees, as far as causal, window and lengths say."""
    lo = 0
    hi = n_keys
    if left is not None:
        lo = tl.maximum(shift - left, 0)
    if right is not None:
        hi = tl.minimum(seqlen_q + shift + right, n_keys)
    return lo, hi


@triton.jit
def visible_keys(
    first_row,
    seqlen_q,
    n_keys,
    shift,
    left,
    right,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Keys of a query tile: (lo, full_lo, full_hi, hi).

    [lo, hi) is what at least one row sees; the tiles of [full_lo, full_hi) are seen whole by every
    row, and both are multiples of BLOCK_K. Visit lo // BLOCK_K * BLOCK_K ... full_lo ... full_hi ... hi.
    """
    last_row = tl.minimum(first_row + BLOCK_Q, seqlen_q) - 1
    lo = 0
    hi = n_keys
    every_lo = 0
    every_hi = n_keys
    if left is not None:
        lo = tl.maximum(first_row + shift - left, 0)
        every_lo = tl.maximum(last_row + shift - left, 0)
    if right is not None:
        hi = tl.maximum(tl.minimum(last_row + shift + right + 1, n_keys), 0)
        every_hi = tl.maximum(tl.minimum(first_row + shift + right + 1, n_keys), 0)
    full_lo = tl.minimum(tl.cdiv(every_lo, BLOCK_K), tl.cdiv(hi, BLOCK_K)) * BLOCK_K
    full_hi = tl.maximum(every_hi // BLOCK_K * BLOCK_K, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def visible_queries(
    first_col,
    seqlen_q,
    n_keys,
    shift,
    left,
    right,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Queries of a key tile, the mirror of `visible_keys`: (lo, full_lo, full_hi, hi).

    [lo, hi) are the rows that see at least one key of the tile; the tiles of [full_lo, full_hi) see
    it whole. A key tile with fewer than BLOCK_K keys is whole for nobody.
    """
    last_col = tl.minimum(first_col + BLOCK_K, n_keys) - 1
    lo = 0
    hi = tl.where(last_col < first_col, 0, seqlen_q)
    every_lo = 0
    every_hi = tl.where(first_col + BLOCK_K > n_keys, 0, seqlen_q)
    if right is not None:
        lo = tl.maximum(first_col - shift - right, 0)
        every_lo = tl.maximum(last_col - shift - right, 0)
    if left is not None:
        hi = tl.maximum(tl.minimum(last_col - shift + left + 1, hi), 0)
        every_hi = tl.maximum(tl.minimum(first_col - shift + left + 1, every_hi), 0)
    full_lo = tl.minimum(tl.cdiv(every_lo, BLOCK_Q), tl.cdiv(hi, BLOCK_Q)) * BLOCK_Q
    full_hi = tl.maximum(every_hi // BLOCK_Q * BLOCK_Q, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def element_mask(rows, cols, n_keys, shift, left, right, mask, EDGE: tl.constexpr):
    """True where a row sees a key; None where nothing can be hidden. mask: loaded tile or None."""
    if EDGE:
        # The end of the keys joins the row's own bound: one comparison per element, not two.
        last = n_keys - 1
        if right is not None:
            last = tl.minimum(rows + (shift + right), last)
        ok = cols <= last
        if left is not None:
            ok = ok & (cols >= rows + (shift - left))
        if mask is not None:
            ok = ok & mask
        return ok
    elif mask is not None:
        return mask


@triton.jit
def element_mask_of_keys(rows, cols, n_keys, shift, left, right, mask, EDGE: tl.constexpr):
    """`element_mask` for transposed scores: bounds per key, of which a thread holds few, not per row.

    rows may run past the end: their p vanishes, since they have an lse offset of +inf.
    """
    if EDGE:
        ok = cols < n_keys
        if right is not None:  # one comparison per score instead of two
            ok = rows >= tl.where(ok, cols - (shift + right), 2147483647)
        if left is not None:
            ok = ok & (rows <= cols - (shift - left))
        if mask is not None:
            ok = ok & mask
        return ok
    elif mask is not None:
        return mask


@triton.jit
def any_row(ok):
    """Keys that at least one row sees: [BLOCK_K] from [BLOCK_Q, BLOCK_K]."""
    return tl.max(ok.to(tl.int32), 0) != 0


@triton.jit
def zero_hidden(x, ok):
    """0 where a row does not see a key, whatever x holds there. ok: as `element_mask` returns it."""
    if ok is not None:
        return tl.where(ok, x, 0.0)
    else:
        return x
