"""Triton kernels, one file per op, and what they share. Loaded by `launch` and `aot` only: they need triton.

In every kernel the pointers of inputs come first, then 32-bit numbers, then the pointers it writes to, then
compile-time constants: that is the order which TensorRT's quickly deployable plugins pass. Tiles are padded to powers
of two of at least 16, the least that a tensor core multiplies; masked elements load as zero.
"""
