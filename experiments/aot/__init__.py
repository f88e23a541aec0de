"""Compiles kernels and programs for accelerators that are not there, and checks what came out."""
