"""Attention in Triton, for GPUs.

A kernel module holds one pass: the `@triton.jit` kernel, written as a sentence made of the device
functions of `tiles.py`, and the launcher that fills its arguments. Tile sizes are data, in
`config.py`. Nothing outside this folder imports triton, so the package works without it.
"""
