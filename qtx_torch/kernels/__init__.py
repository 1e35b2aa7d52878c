"""Kernels in Triton, each equal to the torch operations that it stands in for, to the bit.

Not in the reference: it has the operations.
"""
