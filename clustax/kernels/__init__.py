"""Pallas kernels of the hot path, one file a kernel; ``attend`` composes those of attention.

They run on TPUs. ``with clustax.kernels.interpret(True):`` has them interpreted instead, wherever
that is: slowly, for tests and debugging.
"""

import jax

interpret = jax.make_user_context(default_value=False)
