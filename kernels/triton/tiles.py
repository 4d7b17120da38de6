"""The vocabulary of the kernels: device functions that forward and backward are made of.

Conventions. Absent tensors and numbers are None, and `if x is not None:` is resolved by the
compiler. Strides come as one tuple per tensor, (batch, head, row, column); addresses are computed
in 64 bits. `rows` and `cols` are positions of queries and keys, already shaped to broadcast:
[BLOCK_Q, 1] and [1, BLOCK_K], or [1, BLOCK_Q] and [BLOCK_K, 1] where scores are kept transposed.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Above these, fp32 can no longer hold a base-2 score or lse to less than one unit (see the uses).
HUGE_SCORE = tl.constexpr(2.0**27)
HUGE_LSE = tl.constexpr(2.0**24)
# Multiple of every BLOCK_Q.
STATISTICS_PADDING = tl.constexpr(128)


@triton.jit
def whose_tile(pid, tiles, heads_kv, group, LAST_FIRST: tl.constexpr):
    """(tile, batch, head, head_kv) of a program in a one-dimensional grid.

    Programs that share keys are neighbours, so that these stay in L2. LAST_FIRST starts with the
    last tiles, which under a causal mask have the most work, so that the short ones fill the tail.
    """
    head_in_group = pid % group
    tile = pid // group % tiles
    plane = pid // group // tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    head_kv = plane % heads_kv
    return tile, plane // heads_kv, head_kv * group + head_in_group, head_kv


@triton.jit
def rows_of_head(
    ptr, strides, batch, head, n_rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr
):
    """Where `load_rows` finds the rows of one head: a pointer, or with TMA a tensor descriptor."""
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    if TMA:
        return tl.make_tensor_descriptor(
            ptr, [n_rows, HEAD_DIM], [strides[2], 1], [BLOCK, triton.next_power_of_2(HEAD_DIM)]
        )
    else:
        return ptr


@triton.jit
def unsigned(x):
    """A position or stride in 64 bits. Neither is negative: no register has to hold their sign."""
    x = x + tl.zeros([], tl.int32)  # a stride of 1 is a constant and has no type
    if x.dtype == tl.int32:
        x = x.to(tl.uint32)
    return x.to(tl.int64)


@triton.jit
def load_rows(
    source,
    strides,
    first,
    lo,
    hi,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
    HOIST: tl.constexpr = True,
):
    """Rows [first, first + BLOCK) as a tile [BLOCK, head_dim padded to a power of two >= 16].

    Zero in the padding and, in an EDGE tile, in rows outside [lo, hi): what is not loaded cannot
    bring in a NaN. A descriptor leaves out only rows past the last one. Without HOIST addresses are
    computed anew for each tile, a few instructions that free registers.
    """
    if TMA:
        return source.load([first, 0])
    else:
        PADDED: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
        index = tl.arange(0, BLOCK)
        dims = tl.arange(0, PADDED)
        rows = first + index[:, None]
        if HOIST:  # scalar base plus loop-invariant offsets: only the base moves from tile to tile
            ptr = source + first.to(tl.int64) * strides[2]
            ptr = ptr + (index.to(tl.int64)[:, None] * strides[2] + dims.to(tl.int64)[None, :] * strides[3])
        else:
            ptr = (
                source
                + unsigned(rows) * unsigned(strides[2])
                + unsigned(dims)[None, :] * unsigned(strides[3])
            )
        if EDGE and PADDED != HEAD_DIM:
            return tl.load(ptr, mask=(rows >= lo) & (rows < hi) & (dims[None, :] < HEAD_DIM), other=0.0)
        elif EDGE:
            return tl.load(ptr, mask=(rows >= lo) & (rows < hi), other=0.0)
        elif PADDED != HEAD_DIM:
            return tl.load(ptr, mask=dims[None, :] < HEAD_DIM, other=0.0)
        else:
            return tl.load(ptr)


@triton.jit
def store_rows(ptr, strides, first, n_rows, tile, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write a tile as rows [first, first + BLOCK) of one head, without its padding."""
    PADDED: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    index = tl.arange(0, BLOCK)
    dims = tl.arange(0, PADDED)
    ptr += first.to(tl.int64) * strides[2]
    ptr = ptr + (index.to(tl.int64)[:, None] * strides[2] + dims.to(tl.int64)[None, :] * strides[3])
    inside = ((first + index) < n_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptr, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_pairs(ptr, strides, batch, head, rows, cols, n_cols, EDGE: tl.constexpr):
    """A tile of bias or mask. None for the stride of a row or column axis of size 1.

    Then the tile has size 1 there too: a mask of keys costs one vector. rows must lie inside.
    """
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    if strides[2] is not None:
        ptr = ptr + rows.to(tl.int64) * strides[2]
    if strides[3] is None:
        if strides[2] is None:
            ptr = ptr + rows.to(tl.int64) * 0
        return tl.load(ptr)
    else:
        ptr = ptr + cols.to(tl.int64) * strides[3]
        if EDGE:
            return tl.load(ptr, mask=cols < n_cols, other=0)
        else:
            return tl.load(ptr)


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
def scores(dots, scale, softcap, bias):
    """Natural scores from q·k, or without softcap and bias the products themselves.

    Then the scale is left to `score_unit`, which costs nothing, and no multiplication is spent here.
    """
    s = dots
    if softcap is not None:
        s = softcap * tanh_and_slope(dots * (scale / softcap))[0]
    elif bias is not None:
        s = dots * scale
    if bias is not None:
        s += bias.to(tl.float32)
    return s


@triton.jit
def score_unit(scale, softcap, bias):
    """Factor from what `scores` returns to base-2 scores: it becomes one FFMA with the subtraction."""
    if softcap is None and bias is None:
        return scale * LOG2E
    else:
        return tl.full([], LOG2E, tl.float32)


@triton.jit
def tanh_and_slope(x):
    """(tanh x, 1 - tanh² x), both to fp32's relative precision, from exp2 alone.

    t = exp(-2|x|) cannot overflow; slope = 4t / (1 + t)² does not cancel where tanh saturates. Near 0,
    where 1 - t cancels, tanh is its Taylor series (next term: 1e-8 relative at 0.25).
    """
    t = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    r = 1.0 / (1.0 + t)
    saturating = (1.0 - t) * r
    y = x * x
    series = 1.0 + y * (-0.33333334 + y * (0.13333334 + y * (-0.053968254 + y * 0.021869488)))
    tanh = tl.where(y < 0.0625, x * series, tl.where(x < 0, -saturating, saturating))
    return tanh, 4.0 * t * r * r


@triton.jit
def online_softmax(s, row_max, row_sum, unit, MAY_BE_EMPTY: tl.constexpr):
    """One step of the running softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).

    s: scores [BLOCK_Q, BLOCK_K] in units of `unit`. row_max: running maximum in the same units.
    Returns (p, alpha, row_max, row_sum); what was accumulated so far is to be multiplied by alpha.
    MAY_BE_EMPTY: a row may have no finite score yet; -inf - -inf must not happen there.
    """
    next_max = tl.maximum(row_max, tl.max(s, 1))
    # fma(s, unit, -round(max·unit)) is off by the rounding of max·unit, which overflows exp2 once that
    # exceeds 2^27. Products with a power of two are exact; scores that large carry an absolute error
    # that makes the difference between it and the unit (less than a factor of 2) irrelevant.
    row_unit = tl.where(tl.abs(next_max * unit) > HUGE_SCORE, power_of_two(unit), unit)
    offset = next_max * row_unit
    if MAY_BE_EMPTY:
        offset = tl.where(next_max == float("-inf"), 0.0, offset)
    p = tl.math.exp2(s * row_unit[:, None] - offset[:, None])
    alpha = tl.math.exp2(row_max * row_unit - offset)
    return p, alpha, next_max, row_sum * alpha + tl.sum(p, 1)


@triton.jit
def power_of_two(x):
    """Largest power of two that is at most x > 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def natural_lse(row_max, row_sum, scale, softcap, bias):
    """Logarithm of the softmax's denominator, -inf for a row without any."""
    if softcap is None and bias is None:
        row_max = row_max * scale
    return tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum))


@triton.jit
def lse_offset(lse, softcap, bias):
    """What `probabilities` subtracts for a row: its lse, +inf where it is empty.

    In base 2 if `scores` returns products; then a rounding error of a huge lse must not let p
    overflow, so it is moved up by more than that.
    """
    offset = lse
    if softcap is None and bias is None:
        offset = lse * LOG2E
        size = tl.abs(offset)
        offset = tl.where(size > HUGE_LSE, offset + size * 2.0**-22, offset)
    return tl.where(lse == float("-inf"), float("inf"), offset)


@triton.jit
def probabilities(s, unit, offset, softcap, bias):
    """exp(score - lse) from `scores`, `score_unit` and the row's `lse_offset`, shaped to broadcast."""
    if softcap is None and bias is None:
        return tl.math.exp2(s * unit - offset)
    else:  # subtract first: both may be as large as the lowest float, which people use for a mask
        return tl.math.exp2((s - offset) * LOG2E)


@triton.jit
def zero_unless(keep, tile):
    """Rows of the tile that are not kept become 0, whatever they hold. keep: [BLOCK]."""
    return tl.where(keep[:, None], tile, tl.zeros_like(tile))


@triton.jit
def any_row(ok):
    """Keys that at least one row sees: [BLOCK_K] from [BLOCK_Q, BLOCK_K]."""
    return tl.max(ok.to(tl.int32), 0) != 0


@triton.jit
def keep_mask(seed, last_dropped, plane, rows, first_col, BLOCK_K: tl.constexpr):
    """Which elements dropout keeps, [BLOCK_Q, BLOCK_K]; the same bits as `philox.keep_mask`.

    plane: batch·heads_q + head. rows: [BLOCK_Q, 1]. first_col: a multiple of 4. last_dropped: int32
    with the bits of round(p·2³²) - 1, so that p = 1 fits too.
    """
    blocks = first_col // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
    # Full shapes from the start: the rounds of Philox mix all four words anyway.
    w0, w1, w2, w3 = tl.philox(
        seed, blocks + rows * 0, rows + blocks * 0, plane + rows * 0 + blocks * 0, rows * 0 + blocks * 0
    )
    last = last_dropped.to(tl.uint32, bitcast=True)
    even_odd = tl.join(tl.join(w0 > last, w2 > last), tl.join(w1 > last, w3 > last))
    return tl.reshape(even_odd, [rows.shape[0], BLOCK_K])


@triton.jit
def zero_hidden(x, ok):
    """0 where a row does not see a key, whatever x holds there. ok: as `element_mask` returns it."""
    if ok is not None:
        return tl.where(ok, x, 0.0)
    else:
        return x


@triton.jit
def dropped(x, keep, kept_scale):
    """Dropout applied to p or dp. keep: as `keep_mask` returns it, or None."""
    if keep is not None:
        return tl.where(keep, x * kept_scale, 0.0)
    else:
        return x


@triton.jit
def softcap_slope(dots, scale, softcap):
    """Derivative of the capped score with respect to the score: 1 - tanh²(score / softcap)."""
    return tanh_and_slope(dots * (scale / softcap))[1]


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
def statistics_of(plane, seqlen_q):
    """Where the statistics of one query head start: heads are padded to whole tiles of any size, so
    that the compiler sees the alignment and loads need no mask."""
    return plane.to(tl.int64) * (tl.cdiv(seqlen_q, STATISTICS_PADDING) * STATISTICS_PADDING)


@triton.jit
def row_offsets(offset_ptr, first_row, seqlen_q, BLOCK_Q: tl.constexpr, MAY_BE_EMPTY: tl.constexpr):
    """(lse offset, lo) of BLOCK_Q query rows; lo is what `load_rows` takes for their q and dout.

    Rows that are empty or past the end have offset +inf, and a lo that keeps them from being loaded.
    """
    offset = tl.load(offset_ptr + first_row + tl.arange(0, BLOCK_Q))
    if MAY_BE_EMPTY:
        return offset, tl.where(offset == float("inf"), seqlen_q, 0)[:, None]
    else:
        return offset, 0
