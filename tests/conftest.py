"""What all tests share: compiler flags, checks of annotations, implementations under test."""

import os
from importlib import metadata

# The tests spend most of their time compiling, and their programs are too small to gain from LLVM's
# optimisation. `XLA_FLAGS= python -m pytest` runs them optimised.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):  # XLA ends a process for a flag it has not
    # This takes a third of the time away; later ones have one way to emit a fusion only.
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
    QUICK_TO_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)

from jaxtyping import install_import_hook  # noqa: E402

# Inner functions must get the shapes and dtypes that they say they take. Public ones are not held
# to that: callers have to see their own messages. This has to precede any import of clustax.
CHECKED = ("xla", "reference", "kmeans", "masks", "heads", "kernels")
install_import_hook([f"clustax.{name}" for name in CHECKED], "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from clustax import kernels  # noqa: E402

IMPLEMENTATIONS = ("xla", "pallas", "reference")

hypothesis.settings.register_profile(
    "clustax",
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,  # none of ours is changed by a test
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("clustax")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each implementation under test."""
    return request.param


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch):
    """Has the Pallas kernels interpreted where they are under test."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    is_tested = parameters.get("implementation") == "pallas"
    if is_tested:  # less to compile; tests/kernels has steps of several tiles
        monkeypatch.setattr("clustax.kernels.grouped_attention.STEP_TILES", 1)
    with kernels.interpret("tpu" if is_tested else None):
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_are_freed():
    """Drops compiled programs after each file: a process may have only so many in memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def accelerator(monkeypatch):
    """Lets the CPU run the branches of programs that accelerators run."""

    def take_default(*args, default, **_):
        return default(*args)

    jax.clear_caches()  # what was traced before has the branch of the CPU
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", take_default)
        yield
    jax.clear_caches()
