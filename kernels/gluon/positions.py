"""Who works on what, and who sees whom, in the Hopper kernels: scalars of a program, masks of a tile.

A query at row i stands at position i + shift and sees keys position - left ... position + right; a bound is
None where there is none.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def whose_rows(seqlen_q, heads_q, planes, together, ROWS: gl.constexpr, LAST_FIRST: gl.constexpr):
    """(first row, batch, head) of a program in a one-dimensional grid.

    planes: batch entries times heads. So many of them as `together` says are worked on at a time, because
    their keys fit into L2: of these, tile by tile. LAST_FIRST begins with the last tiles, which under a
    causal mask have the most work.
    """
    tiles = gl.cdiv(seqlen_q, ROWS)
    pid = gl.program_id(0)
    first = pid // (together * tiles) * together
    n_planes = gl.minimum(together, planes - first)
    rest = pid - first * tiles
    tile = rest // n_planes
    plane = first + rest % n_planes
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile * ROWS, plane // heads_q, plane % heads_q


@gluon.jit
def tiles_of_keys(
    first_row, seqlen_q, seqlen_k, shift, left, right, ROWS: gl.constexpr, BLOCK_K: gl.constexpr
):
    """(first tile, number of tiles) of keys that any of the rows sees."""
    lo = 0
    hi = seqlen_k
    if left is not None:
        lo = gl.maximum(first_row + shift - left, 0)
    if right is not None:
        hi = gl.minimum(gl.minimum(first_row + ROWS, seqlen_q) + shift + right, seqlen_k)
    return lo // BLOCK_K, gl.maximum(gl.cdiv(hi, BLOCK_K) - lo // BLOCK_K, 0)


@gluon.jit
def keys_seen_by_all(first_row, seqlen_k, shift, left, right, ROWS: gl.constexpr):
    """[lo, hi): a tile of keys inside needs no mask."""
    lo = 0
    hi = seqlen_k
    if left is not None:
        lo = gl.maximum(first_row + ROWS - 1 + shift - left, 0)
    if right is not None:
        hi = gl.minimum(first_row + shift + right + 1, seqlen_k)
    return lo, hi


@gluon.jit
def hide_keys(
    s, start, first_row, seqlen_k, shift, left, right, ROWS: gl.constexpr, BLOCK_K: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores [ROWS, BLOCK_K] of rows from first_row on and keys from start on, -inf where not seen."""
    cols = start + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
    rows = first_row + shift + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    # One limit for each row: a comparison with a difference of rows and columns would take registers.
    if right is not None:
        last = gl.minimum(rows + right, seqlen_k - 1)
        s = gl.where(cols[None, :] <= last[:, None], s, float("-inf"))
    else:
        s = gl.where((cols < seqlen_k)[None, :], s, float("-inf"))
    if left is not None:
        s = gl.where(cols[None, :] >= (rows - left)[:, None], s, float("-inf"))
    return s


@gluon.jit
def tiles_of_rows(
    first_key, seqlen_q, seqlen_k, shift, left, right, KEYS: gl.constexpr, BLOCK_Q: gl.constexpr
):
    """(first tile, number of tiles) of query rows that see any of the keys."""
    lo = 0
    hi = seqlen_q
    if right is not None:
        lo = gl.maximum(first_key - right - shift, 0)
    if left is not None:
        hi = gl.minimum(gl.minimum(first_key + KEYS, seqlen_k) + left - shift, seqlen_q)
    return lo // BLOCK_Q, gl.maximum(gl.cdiv(hi, BLOCK_Q) - lo // BLOCK_Q, 0)


@gluon.jit
def rows_see_all(
    first_row, first_key, seqlen_k, shift, left, right, KEYS: gl.constexpr, BLOCK_Q: gl.constexpr
):
    """Whether each of the rows sees each of the keys."""
    all_seen = first_key + KEYS <= seqlen_k
    if right is not None:
        all_seen = all_seen & (first_row + shift + right >= first_key + KEYS - 1)
    if left is not None:
        all_seen = all_seen & (first_row + BLOCK_Q - 1 + shift - left <= first_key)
    return all_seen


@gluon.jit
def hide_rows(
    s, first_row, first_key, seqlen_k, shift, left, right, KEYS: gl.constexpr, BLOCK_Q: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """As `hide_keys`, of transposed scores [KEYS, BLOCK_Q]."""
    keys = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
    rows = first_row + shift + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, LAYOUT))
    if right is not None:
        last = gl.minimum(rows + right, seqlen_k - 1)
        s = gl.where(keys[:, None] <= last[None, :], s, float("-inf"))
    else:
        s = gl.where((keys < seqlen_k)[:, None], s, float("-inf"))
    if left is not None:
        s = gl.where(keys[:, None] >= (rows - left)[None, :], s, float("-inf"))
    return s
