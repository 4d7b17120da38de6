"""Tiles on their way between memory and registers: which one a program works on, loads, stores.

Conventions of all device functions. Absent tensors and numbers are None, and `if x is not None:` is
resolved by the compiler. Strides come as one tuple per tensor, (batch, head, row, column); addresses
are computed in 64 bits. `rows` and `cols` are positions of queries and keys, already shaped to
broadcast: [BLOCK_Q, 1] and [1, BLOCK_K], or [1, BLOCK_Q] and [BLOCK_K, 1] where scores are transposed.
"""

import triton
import triton.language as tl

# Multiple of every BLOCK_Q.
STATISTICS_PADDING = tl.constexpr(128)


@triton.jit
def tile_count(seqlen, sequences, BLOCK: tl.constexpr):
    """Tiles of an axis; of a packed one as many as its sequences can need, whatever their lengths."""
    if sequences is not None:
        return seqlen // BLOCK + sequences
    else:
        return tl.cdiv(seqlen, BLOCK)


@triton.jit
def whose_tile(pid, tiles, heads_kv, group, work_ptr, LAST_FIRST: tl.constexpr):
    """(tile, batch, head, head_kv) of a program in a one-dimensional grid.

    Programs that share keys are neighbours, so that these stay in L2. LAST_FIRST starts with the
    last tiles, which under a causal mask have the most work, so that the short ones fill the tail.
    work_ptr: of a packed axis, the sequence and the tile in it for each tile of the axis; then batch is the
    sequence, -1 for a tile that none needs.
    """
    head_in_group = pid % group
    tile = pid // group % tiles
    plane = pid // group // tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    head_kv = plane % heads_kv
    batch = plane // heads_kv
    if work_ptr is not None:
        batch = tl.load(work_ptr + 2 * tile)
        tile = tl.load(work_ptr + 2 * tile + 1)
    return tile, batch, head_kv * group + head_in_group, head_kv


@triton.jit
def place_of(batch, spans_ptr, seqlen):
    """(entry of the batch axis, first row, number of rows) of a batch entry, or of a packed sequence.

    spans_ptr: starts and stops of the sequences. A tile that none needs has no rows.
    """
    if spans_ptr is not None:
        first = tl.load(spans_ptr + 2 * tl.maximum(batch, 0))
        stop = tl.load(spans_ptr + 2 * tl.maximum(batch, 0) + 1)
        return batch * 0, tl.where(batch < 0, 0, first), tl.where(batch < 0, 0, stop - first)
    else:
        return batch, 0, seqlen


@triton.jit
def shift_of(shift, n_rows, n_keys):
    """Position of query 0 on the axis of keys. shift: None where each packed sequence has its own."""
    if shift is None:
        return n_keys - n_rows
    else:
        return shift


@triton.jit
def rows_of_head(ptr, strides, place, head, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr):
    """Where `load_rows` finds the rows of one head: a pointer, or with TMA a tensor descriptor.

    place: as `place_of` returns it.
    """
    entry, first, n_rows = place
    ptr += entry.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    ptr += (first + tl.zeros([], tl.int64)) * strides[2]
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
def zero_unless(keep, tile):
    """Rows of the tile that are not kept become 0, whatever they hold. keep: [BLOCK]."""
    return tl.where(keep[:, None], tile, tl.zeros_like(tile))


@triton.jit
def statistics_of(batch, head, heads, first, seqlen_q, sequences):
    """Where the statistics of a batch entry's, or a packed sequence's, rows start for one query head.

    They are padded to whole tiles of any size, so that the compiler sees the alignment and loads need no
    mask. A packed sequence starts at a multiple of the padding, at or after its first row, and one further
    for each sequence before it: so none reaches into the next.
    """
    if sequences is not None:
        of_head = head.to(tl.int64) * (seqlen_q // STATISTICS_PADDING + sequences)
        return (of_head + first // STATISTICS_PADDING + tl.maximum(batch, 0)) * STATISTICS_PADDING
    else:
        plane = (batch * heads + head).to(tl.int64)
        return plane * (tl.cdiv(seqlen_q, STATISTICS_PADDING) * STATISTICS_PADDING)


@triton.jit
def rows_before(place, head, heads, seqlen_q):
    """Number of a head's first row, in a tensor (batch, heads, seqlen_q)."""
    entry, first, _ = place
    return (entry * heads + head).to(tl.int64) * seqlen_q + first


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
