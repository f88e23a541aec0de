"""Pallas kernels of the hot path, one file a kernel; ``attend`` composes those of attention."""
