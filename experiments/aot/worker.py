"""A process that compiles the programs for one target, and says what came out, a line each.

Compilers abort on some programs: whoever starts this sees by the lines how far it came.
"""

import fnmatch
import json
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import core as mosaic_gpu
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh
from jaxlib.mlir import ir

from experiments.aot import cases, dumps
from experiments.aot.targets import GPUS, TPUS, gpu_config

MEMORY_LIMIT = 8 << 30  # the estimate of cycles can run away


def main(job: Mapping[str, Any]) -> None:
    """Compiles what a job names.

    Args:
        job: "target"; "kind", one of ``targets.KINDS``; "selection"; "only", a pattern of the
            programs wanted; "done", those to leave out; "seconds" for each; and the paths
            "events", "dumps", and "log", to which the output of this process goes.
    """
    target, folder, log = job["target"], Path(job["dumps"]), Path(job["log"])
    if job["kind"] == "estimated":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    device = _device(target)
    selection = cases.Selection(**{k: _tuple(v) for k, v in job["selection"].items()})
    wanted = {
        "programs": lambda: cases.programs(target, device, selection),
        "counted": lambda: cases.kernels(target, selection, counted=True),
        "estimated": lambda: cases.kernels(target, selection, counted=False),
    }[job["kind"]]()
    with open(job["events"], "a", buffering=1, encoding="utf-8") as events:

        def say(**record: Any) -> None:
            print(json.dumps(record), file=events)

        for case in wanted:
            if case.label in job["done"] or not fnmatch.fnmatch(case.label, job["only"]):
                continue
            name = {"case": case.name, "length": case.length, "target": target}
            say(**name)
            before, size = set(folder.iterdir()), log.stat().st_size
            # Ends this process, even inside a compiler, after so much work.
            signal.setitimer(signal.ITIMER_PROF, job["seconds"])
            try:
                found = _compile(case, device)
                hlo = found.pop("hlo")
                if target in TPUS:
                    texts = dumps.read_utilization(set(folder.iterdir()) - before)
                    kernels = dumps.tpu_kernels(hlo, texts)
                else:
                    output = log.read_bytes()[size:].decode(errors="replace")
                    kernels = dumps.gpu_kernels(output, dumps.shared_memory(_modules()))
                found["kernels"] = {key: kernel._asdict() for key, kernel in kernels.items()}
                if job["kind"] != "programs":
                    found["cycles"] = dumps.tpu_cycles(hlo)
                    found["floor"], found["steps"] = case.floor, case.steps
                else:
                    found["largest"], found["elements"] = dumps.largest_array(hlo), case.elements
                say(**name, error=None, **found)
            except Exception as error:  # whatever it is belongs in the table
                say(**name, error=f"{type(error).__name__}: {error}")
            signal.setitimer(signal.ITIMER_PROF, 0)
            for path in set(folder.iterdir()) - before:
                path.unlink()


def _modules() -> Iterator[str]:
    """The kernels that Mosaic has made for GPUs since this was asked last."""
    while mosaic_gpu.KNOWN_KERNELS:
        _, module = mosaic_gpu.KNOWN_KERNELS.popitem()
        context = mlir.make_ir_context()
        context.allow_unregistered_dialects = True
        mgpu.dialect.register_dialect(context)  # pyright: ignore[reportPrivateImportUsage]
        context.load_all_available_dialects()
        with context:
            yield str(ir.Module.parse(module))


def _tuple(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x


def _device(target: str) -> Any:
    if target in TPUS:
        return topologies.get_topology_desc(TPUS[target], "tpu").devices[0]
    options = {"topology": "1x1x1", "target_config": gpu_config(GPUS[target])}
    return topologies.get_topology_desc("", "cuda", **options).devices[0]


def _compile(case: cases.Case, device: Any) -> dict[str, Any]:
    is_tpu = device.platform == "tpu"
    cores = device.num_cores if is_tpu else None
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform=device.platform)
    sharding = SingleDeviceSharding(device)

    def place(x):
        return x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    function: Any = case.function
    function = function if hasattr(function, "lower") else jax.jit(function)
    begun = time.perf_counter()
    # Says to kernels, while they are traced, what they are compiled for.
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        compiled = function.lower(*jax.tree.map(place, case.arguments)).compile()
    return {
        "seconds": time.perf_counter() - begun,
        "peak": compiled.memory_analysis().peak_memory_in_bytes,
        "hlo": compiled.as_text(),
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
