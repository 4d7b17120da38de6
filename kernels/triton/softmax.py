"""From products to weights: scores, the running softmax, its recomputation in backward, dropout.

Conventions: `tiles`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Above these, fp32 can no longer hold a base-2 score or lse to less than one unit (see the uses).
HUGE_SCORE = tl.constexpr(2.0**27)
HUGE_LSE = tl.constexpr(2.0**24)


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
def added(bias, slope, rows, cols, shift):
    """What is added to scores: a tile of the bias, ALiBi's -slope·|position - key|, both, or None."""
    if slope is not None:
        alibi = -slope * distances(rows, cols, shift)
        if bias is not None:
            return bias.to(tl.float32) + alibi
        else:
            return alibi
    elif bias is not None:
        return bias


@triton.jit
def distances(rows, cols, shift):
    """|position - key| in fp32."""
    return tl.abs(rows + shift - cols).to(tl.float32)


@triton.jit
def slope_of(slopes_ptr, slopes_step, batch, head):
    """ALiBi's slope of one query head. slopes_step: from one batch entry to the next."""
    entry = tl.maximum(batch, 0)  # -1: of a tile that nobody needs
    return tl.load(slopes_ptr + entry.to(tl.int64) * slopes_step + head)


@triton.jit
def either(bias_ptr, slopes_ptr):
    """None if nothing is added to the scores."""
    if bias_ptr is not None:
        return bias_ptr
    elif slopes_ptr is not None:
        return slopes_ptr


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
def softcap_slope(dots, scale, softcap):
    """Derivative of the capped score with respect to the score: 1 - tanh²(score / softcap)."""
    return tanh_and_slope(dots * (scale / softcap))[1]


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
    top = next_max
    if MAY_BE_EMPTY:
        top = tl.where(next_max == float("-inf"), 0.0, next_max)
    # Of a difference, so that it is 1 while the maximum stays: row_max·unit - offset would be the rounding of
    # offset, once for each tile, and row_sum would drift away with it.
    alpha = tl.math.exp2((row_max - top) * row_unit)
    offset = top * row_unit
    p = tl.math.exp2(s * row_unit[:, None] - offset[:, None])
    return p, alpha, next_max, row_sum * alpha + tl.sum(p, 1)


@triton.jit
def power_of_two(x):
    """Largest power of two that is at most x > 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def natural_lse(row_max, row_sum, scale, softcap, bias):
    """Logarithm of the softmax's denominator, -inf for a row without any."""
    return tl.where(
        row_sum == 0.0, float("-inf"), natural_max(row_max, scale, softcap, bias) + tl.log(row_sum)
    )


@triton.jit
def natural_max(row_max, scale, softcap, bias):
    """A row's largest score, -inf for a row without any, from the running maximum of `online_softmax`."""
    if softcap is None and bias is None:
        row_max = row_max * scale
    return row_max


@triton.jit
def join_sink(lse, sink):
    """(lse with the sink in the denominator, the keys' share of it); a row without keys keeps lse -inf."""
    top = tl.maximum(lse, sink)
    total = top + tl.log(tl.exp(lse - top) + tl.exp(sink - top))
    alone = lse == float("-inf")  # -inf - -inf must not happen
    return tl.where(alone, lse, total), tl.where(alone, 0.0, tl.exp(lse - total))


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
def dropped(x, keep, kept_scale):
    """Dropout applied to p or dp. keep: as `keep_mask` returns it, or None."""
    if keep is not None:
        return tl.where(keep, x * kept_scale, 0.0)
    else:
        return x
