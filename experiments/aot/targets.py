"""The accelerators that programs are compiled for, and what compiles for them."""

import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

KIB, MIB = 2**10, 2**20
VMEM_LIMIT = 16 * MIB
"""What a TPU's compiler gives a kernel that does not ask for more."""

TPUS: Mapping[str, str] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""Names of topologies, of which programs here use one device."""


class Gpu(NamedTuple):
    """What XLA wants to know of a GPU, in NVIDIA's published figures."""

    name: str
    capability: int
    multiprocessors: int
    lanes: int
    shared_memory: int
    l2: int
    gigahertz: float
    bandwidth: int
    memory: int


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 40 << 20, 1.41, 2039, 80),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 50 << 20, 1.98, 3352, 79),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 233472, 126 << 20, 1.965, 7672, 178),
}
TARGETS = (*TPUS, *GPUS)
KINDS = ("programs", "counted", "estimated")
"""What is compiled in a process: programs, or kernels whose cycles are counted, or estimated."""


def gpu_config(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto, in text form."""
    feature = " feature_extension: ACCELERATED_FEATURES" if gpu.capability >= 9 else ""
    return f"""
      gpu_device_info {{
        name: "{gpu.name}" device_vendor: "NVIDIA Corporation" core_count: {gpu.multiprocessors}
        cuda_compute_capability {{ major: {gpu.capability} minor: 0{feature} }}
        fpus_per_core: {gpu.lanes} threads_per_warp: 32 threads_per_block_limit: 1024
        threads_per_core_limit: 2048 l2_cache_size: {gpu.l2} shared_memory_per_block: 49152
        shared_memory_per_core: {gpu.shared_memory}
        shared_memory_per_block_optin: {gpu.shared_memory - 1024}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        memory_bandwidth: {gpu.bandwidth * 10**9} device_memory_size: {gpu.memory << 30}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        clock_rate_ghz: {gpu.gigahertz} driver_version: "13.0.0" runtime_version: "13.0.0"
        compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
      }}
      platform_name: "CUDA" device_description_str: "{gpu.name}"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }}"""


def compilers() -> list[str]:
    """The packages, for pip, that compile for all targets, of versions that go with this JAX."""
    requirements = importlib.metadata.requires("jax") or []
    (libtpu,) = [r.split(";")[0].strip() for r in requirements if r.startswith("libtpu")]
    version = importlib.metadata.version("jaxlib")
    cuda = [f"jax-cuda13-{part}=={version}" for part in ("plugin", "pjrt")]
    return [libtpu, *cuda, "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-runtime"]


def compiler_versions(folder: Path) -> dict[str, str]:
    """Those that are in a folder."""
    found = importlib.metadata.distributions(path=[str(folder)])
    versions = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in found}
    return {name: v for name, v in sorted(versions.items()) if re.match("libtpu|jax-|nvidia", name)}


def environment(target: str, compilers: Path, dumps: Path, kind: str) -> dict[str, str]:
    """That of a process which compiles for a target: compilers read it once, when they start."""
    path = os.pathsep.join(filter(None, (str(compilers), os.environ.get("PYTHONPATH"))))
    env = dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS="cpu")
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if target in TPUS:
        dump = (
            "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_hlo.* "
            f"--xla_jf_dump_to={dumps}"
        )
        if kind == "estimated":
            dump += f" --xla_jf_dump_static_llo_profile_to={dumps}"
        return env | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-1",
            "TPU_LOG_DIR": "disabled",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": dump,
        }
    return env | {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        # What ptxas says of registers is printed, by XLA and by Mosaic.
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "subprocess_compilation=5",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "XLA_FLAGS": "--xla_gpu_enable_libnvjitlink=false",
    }


if __name__ == "__main__":
    print(*compilers())
