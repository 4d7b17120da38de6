"""Who sees whom: the intervals of tiles a program visits, and the mask of elements inside an edge tile.

The twin of `kernels/visibility.py` for kernels. Conventions: `tiles`.
"""

import triton
import triton.language as tl

from .. import spec

TILE = tl.constexpr(spec.TILE)
HIDDEN = tl.constexpr(spec.HIDDEN)


@triton.jit
def row_numbers(first, n_rows, BLOCK: tl.constexpr):
    """Numbers of BLOCK rows; those past the end repeat the last one.

    A repeated row sees what the last row sees, so that it changes neither which keys a tile needs
    nor which are hidden from all of its rows, and it may be used as an index.
    """
    return tl.maximum(tl.minimum(first + tl.arange(0, BLOCK), n_rows - 1), 0)


@triton.jit
def keys_of(batch, lengths_ptr, seqlen_k):
    """How many keys a batch entry has; a length that is wrong on the device reads nothing outside."""
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + tl.maximum(batch, 0))  # -1: of a tile that nobody needs
        return tl.minimum(tl.maximum(length, 0), seqlen_k)
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
def limits_of(ranges_ptr, step, batch, first, seqlen, index, SEGMENT: tl.constexpr):
    """(lo, hi) of one segment for rows (or keys) index: they see keys (or rows) [lo, hi).

    ranges_ptr: (batch, 2 or 4, seqlen), one batch entry after step elements, 0 if all have the same; packed
    sequences start at `first`.
    """
    ptr = ranges_ptr + batch.to(tl.int64) * step + (first + tl.zeros([], tl.int64)) + index
    ptr += 2 * SEGMENT * (seqlen + tl.zeros([], tl.int64))
    return tl.load(ptr), tl.load(ptr + seqlen)


@triton.jit
def limits_of_keys(
    ranges_ptr, step, batch, first, seqlen, first_col, n_keys, BLOCK_K: tl.constexpr, SEGMENT: tl.constexpr
):
    """`limits_of` BLOCK_K keys from first_col on, [BLOCK_K, 1]; those from n_keys on see nothing."""
    cols = first_col + tl.arange(0, BLOCK_K)[:, None]
    index = tl.maximum(tl.minimum(cols, n_keys - 1), 0)
    lo, hi = limits_of(ranges_ptr, step, batch, first, seqlen, index, SEGMENT)
    return lo, tl.where(cols < n_keys, hi, 0)


@triton.jit
def seen_by_rows(ranges, first_col, n_keys, BLOCK_K: tl.constexpr):
    """Which of BLOCK_K keys some row sees, [BLOCK_K]. ranges: what `limits_of_keys` takes, SEGMENTS last."""
    ranges_ptr, step, batch, first, seqlen, SEGMENTS = ranges
    lo, hi = limits_of_keys(ranges_ptr, step, batch, first, seqlen, first_col, n_keys, BLOCK_K, 0)
    seen = lo < hi
    if SEGMENTS == 2:
        lo, hi = limits_of_keys(ranges_ptr, step, batch, first, seqlen, first_col, n_keys, BLOCK_K, 1)
        seen = seen | (lo < hi)
    return tl.reshape(seen, [BLOCK_K])


@triton.jit
def span_of(limits, stop, BLOCK: tl.constexpr):
    """What `visible_keys` returns, from limits [..., 1] of rows (or keys) that see [lo, hi) below stop."""
    lo, hi = limits
    hi = tl.minimum(hi, stop)
    sees = lo < hi
    first = tl.min(tl.where(sees, lo, stop))
    last = tl.max(tl.where(sees, hi, 0))
    full_lo = tl.minimum(tl.cdiv(tl.max(lo), BLOCK), tl.cdiv(last, BLOCK)) * BLOCK
    full_hi = tl.maximum(tl.minimum(tl.min(hi), last) // BLOCK * BLOCK, full_lo)
    return tl.minimum(first, last), full_lo, full_hi, last


@triton.jit
def hull_of(ranges, rows, n_keys, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr):
    """Keys [lo, hi) of which rows [BLOCK_Q, 1] see some. ranges: what `limits_of` takes before its index."""
    ranges_ptr, step, batch, first, seqlen = ranges
    lo, _, _, hi = span_of(limits_of(ranges_ptr, step, batch, first, seqlen, rows, 0), n_keys, BLOCK_K)
    if SEGMENTS == 2:
        limits = limits_of(ranges_ptr, step, batch, first, seqlen, rows, 1)
        other_lo, _, _, other_hi = span_of(limits, n_keys, BLOCK_K)
        lo = tl.minimum(lo, other_lo)
        hi = tl.maximum(hi, other_hi)
    return lo, hi


@triton.jit
def in_ranges(ranges, rows, cols, SEGMENTS: tl.constexpr):
    """Element mask of all segments together; ranges as for `hull_of`."""
    ranges_ptr, step, batch, first, seqlen = ranges
    lo, hi = limits_of(ranges_ptr, step, batch, first, seqlen, rows, 0)
    ok = (cols >= lo) & (cols < hi)
    if SEGMENTS == 2:
        lo, hi = limits_of(ranges_ptr, step, batch, first, seqlen, rows, 1)
        ok = ok | ((cols >= lo) & (cols < hi))
    return ok


@triton.jit
def visits_of(visits_ptr, visits_strides, batch, head, tile):
    """(where the list of a row of tiles starts, how many of them are whole, how many there are).

    A tile that no packed sequence needs, of batch -1, has no list.
    """
    ptr = visits_ptr + batch.to(tl.int64) * visits_strides[0] + head.to(tl.int64) * visits_strides[1]
    ptr += tile.to(tl.int64) * visits_strides[2]
    n_whole = tl.load(ptr, mask=batch >= 0, other=0)
    return ptr + 2, n_whole, n_whole + tl.load(ptr + 1, mask=batch >= 0, other=0)


@triton.jit
def listed(visits, index, BLOCK: tl.constexpr):
    """The index-th tile of BLOCK rows or keys in a list of tiles of `TILE`."""
    PARTS: tl.constexpr = TILE // BLOCK
    nth = index // PARTS
    return tl.load(visits + nth) * PARTS + (index - nth * PARTS)


@triton.jit
def number_of(tiles_ptr, tiles_strides, batch, head, row, col):
    """HIDDEN, WHOLE, or which bits the tile of (row, col) has."""
    ptr = tiles_ptr + batch.to(tl.int64) * tiles_strides[0] + head.to(tl.int64) * tiles_strides[1]
    return tl.load(ptr + (row // TILE).to(tl.int64) * tiles_strides[2] + col // TILE)


@triton.jit
def bits_at(bits_ptr, number, rows, cols):
    """Who sees whom in a tile that has bits; all in a whole one, nobody in a hidden one."""
    WORDS: tl.constexpr = TILE // 32
    inside = rows % TILE * WORDS + cols % TILE // 32
    # -1, a whole tile's number, has all bits set; a hidden one's is -2
    word = tl.load(bits_ptr + number.to(tl.int64) * (TILE * WORDS) + inside, mask=number >= 0, other=-1)
    return ((word >> (cols % 32)) & 1 != 0) & (number != HIDDEN)


@triton.jit
def element_mask(rows, cols, n_keys, shift, left, right, limits, mask, EDGE: tl.constexpr):
    """True where a row sees a key; None where nothing can be hidden.

    limits: of the rows, from `limits_of`, or None. mask: loaded tile or None.
    """
    if EDGE:
        # The end of the keys joins the row's own bound: one comparison per element, not two.
        last = n_keys - 1
        if right is not None:
            last = tl.minimum(rows + (shift + right), last)
        ok = cols <= last
        if left is not None:
            ok = ok & (cols >= rows + (shift - left))
        if limits is not None:
            ok = ok & (cols >= limits[0]) & (cols < limits[1])
        if mask is not None:
            ok = ok & mask
        return ok
    elif mask is not None:
        return mask


@triton.jit
def element_mask_of_keys(rows, cols, n_keys, shift, left, right, limits, mask, EDGE: tl.constexpr):
    """`element_mask` for transposed scores: bounds per key, of which a thread holds few, not per row.

    rows may run past the end: their p vanishes, since they have an lse offset of +inf.
    """
    if EDGE:
        ok = cols < n_keys
        if right is not None:  # one comparison per score instead of two
            ok = rows >= tl.where(ok, cols - (shift + right), 2147483647)
        if left is not None:
            ok = ok & (rows <= cols - (shift - left))
        if limits is not None:
            ok = ok & (rows >= limits[0]) & (rows < limits[1])
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
