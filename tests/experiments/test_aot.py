"""What is read from the texts of compilers, and what makes the check fail; compiles nothing."""

import json

import pytest

from experiments.aot import __main__ as aot
from experiments.aot import dumps, gates, tables
from experiments.aot.dumps import Kernel
from experiments.aot.targets import compilers

HLO = """ENTRY %main {
  %x = bf16[4,300]{1,0} parameter(0)
  %kmeans.1 = (s32[1,8]{1,0}, f32[]) custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}], \
"estimated_cycles":"123"}
  %kmeans.2 = s32[1,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"used_scoped_memory_configs":[]}
  %fusion = f32[7,9]{1,0} fusion(%x), backend_config={"used_scoped_memory_configs":\
[{"memory_space":"1","offset":"0","size":"8192"}],"estimated_cycles":"9"}
  ROOT %attend.3 = pred[1,1201] custom-call(%x), custom_call_target="tpu_custom_call"
}"""
UTILIZATION = """== CAPACITY:
MXU, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     1     1     2
== UTILIZATION:
0 0 1 1 0
1 1 0 0 2
0 0 1 1 0
"""
PTXAS = """
ptxas info    : Compiling entry function 'fusion_3' for 'sm_90a'
    0 bytes stack frame, 99 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for attend_mosaic_gpu_kernel
    0 bytes stack frame, 48 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 178 registers, used 1 barriers
"""


def test_kernels_of_tpus():
    found = dumps.tpu_kernels(HLO, {"kmeans.1": UTILIZATION})
    assert found == {"kmeans": Kernel(4096, 2, 3), "attend": Kernel(0, 0, 0)}


def test_cycles_of_tpus():
    assert dumps.tpu_cycles(HLO.replace("kmeans.2", "transpose_jvp_other__.2")) == {
        "kmeans": 123,
        "other": 0,
        "attend": 0,
    }


def test_kernels_of_gpus():
    assert dumps.gpu_kernels(PTXAS, {"other": 7}) == {"attend": Kernel(0, 48, 178)}
    assert dumps.gpu_kernels(PTXAS, {"attend": 7}) == {"attend": Kernel(7, 48, 178)}


def test_shared_memory_of_gpus():
    constants = '  %1 = "x.arith.constant"() {value = 4 : i32} : () -> i32\n'
    constants += '  %2 = "x.arith.constant"() {value = 4096 : i32} : () -> i32\n'
    launch = '  %3 = "x.gpu.launch"(%0, %1, %2) ({\n' + constants.replace("%2", "%1")
    module = "#map = affine_map<(d0) -> (d0)>\nmodule @attend attributes {a.b} {\n" + constants
    assert dumps.shared_memory([module + launch, module.replace("attend", "empty")]) == {
        "attend": 4096
    }


def test_blocks_of_a_multiprocessor():
    kernel = {"size": 121, "spills": 0, "memory": 50 * 2**10}
    assert gates.blocks(kernel) == 4  # registers come by eights: 128 for each of 128 threads
    assert gates.blocks(kernel | {"memory": 100 * 2**10}) == 2
    assert gates.blocks(kernel | {"memory": 113 * 2**10}) == 2
    assert gates.blocks(kernel | {"memory": 114 * 2**10}) == 1


def test_largest_array():
    assert dumps.largest_array(HLO) == 1201
    assert dumps.largest_array("ENTRY %main () -> f32[] {\n  ROOT %x = f32[] constant(1)\n}") == 0
    fused = """%fused_reduce.1 (p: s32[9]) -> s32[5] {
  %equal = pred[5,9]{1,0} compare(%p, %p), direction=EQ
}

ENTRY %main (x: s32[9]) -> s32[5] {
  %x = s32[9]{0} parameter(0)
  ROOT %sum = s32[5]{0} fusion(%x), kind=kInput, calls=%fused_reduce.1
}"""
    assert dumps.largest_array(fused) == 9
    assert dumps.largest_array(fused.replace("fusion(", "call(")) == 45
    as_bytes = "  %bytes = s8[90]{0} bitcast(%x)\n  ROOT %sum"
    assert dumps.largest_array(fused.replace("  ROOT %sum", as_bytes)) == 9


def test_utilization_is_read_of_operations_only(tmp_path):
    end = "final_hlo-static-per-bundle-utilization.txt"
    for name in (f"17-kmeans.1-01-{end}", f"17-<late>-01-{end}", "17-kmeans.1-02-other.txt"):
        (tmp_path / name).write_text(name)
    assert dumps.read_utilization(tmp_path.iterdir()) == {"kmeans.1": f"17-kmeans.1-01-{end}"}


def record(**changes):
    kernel = {"memory": 2**20, "spills": 3, "size": 100}
    return {
        "case": "attention",
        "length": 8192,
        "target": "v5e",
        "error": None,
        "seconds": 1.0,
        "peak": 1000,
        "largest": 10,
        "elements": None,
        "kernels": {"kmeans": kernel},
    } | changes


def test_nothing_fails_where_all_is_well():
    long = record(length=65536, peak=8500, elements=11)
    assert gates.failures([record(), long, record(target="h100")]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": "it died"}, "v5e: attention, T=8192: does not compile: it died"),
        ({"elements": 10}, "an array has 10 elements, where T·C are 10"),
        (
            {"kernels": {"kmeans": {"memory": 0, "spills": 21, "size": 1}}},
            "kmeans spills 21 registers, more than 20",
        ),
        (
            {"kernels": {"kmeans": {"memory": 17 * 2**20, "spills": 0, "size": 1}}},
            "kmeans takes 17.0 MiB on the chip, more than 16",
        ),
        (
            {"target": "h100", "kernels": {"kmeans": {"memory": 0, "spills": 20, "size": 1}}},
            "kmeans spills 20 bytes, more than 16",
        ),
    ],
)
def test_what_fails_is_said(changes, message):
    (reason,) = gates.failures([record(), record(**{"case": "attention"} | changes)])
    assert message in reason


def test_memory_is_to_be_linear():
    lengths = [record(length=2048, peak=900), record(), record(length=65536, peak=8501)]
    (reason,) = gates.failures(lengths)
    assert reason == "v5e: attention, T=65536: needs 8.5 times the memory of T=8192, not 8"
    assert gates.failures([lengths[0], record(case="other"), lengths[2]]) == []


def test_new_records_take_the_place_of_old_ones(tmp_path):
    path, other, kernel = tmp_path / "aot.json", record(target="v4"), record(case="kmeans")
    aot.store(path, {"jax": "1"}, {"programs": [record(peak=1), other], "kernels": [kernel]})
    aot.store(path, {"jax": "1"}, {"programs": [record(peak=2)], "kernels": []})
    found = json.loads(path.read_text())
    assert found["programs"] == [other, record(peak=2)]
    assert found["kernels"] == [kernel]
    aot.store(path, {"jax": "2"}, {"programs": [], "kernels": [other]})
    assert json.loads(path.read_text()) == {
        "versions": {"jax": "2"},
        "programs": [],
        "kernels": [other],
    }


def test_long_kernels_may_spill_more_where_there_are_few_registers():
    kernel = {"memory": 0, "spills": 100, "size": 1200}
    assert gates.failures([record(target="v4", kernels={"kmeans": kernel})]) == []
    (reason,) = gates.failures([record(target="v4", kernels={"kmeans": kernel | {"spills": 101}})])
    assert "kmeans spills 101 registers, more than 100" in reason


def estimated(case, cycles, length=16384, steps=None):
    found = {"kernels": {"last": {"memory": 0, "spills": 0, "size": 7}}, "floor": [197 * 10**9, 1]}
    cycles = {"first": 5, "last": cycles}
    return record(case=case, length=length, cycles=cycles, steps=steps, **found)


def test_tables_show_cycles_memory_and_what_fails():
    kernels = [
        estimated("K-means, Hamming, an assignment", 1000),
        estimated("centroid attention, R=1", 3000),
        estimated("grouped attention", 0, steps=1000),  # counted: 7000
        estimated("flash attention, its default blocks", 40000, length=8192),
        estimated("flash attention, blocks of 512", 0),
    ]
    long = record(length=65536, peak=8 * 2**20)
    programs = [record(peak=2**20), long, record(target="h100", error="no")]
    text = tables.aot({"versions": {"jax": "1"}, "programs": programs, "kernels": kernels})
    for line in (
        "| grouped attention | 1000.0 (products) | 170.8 (products) | 7,000 |",
        "| flash attention, its default blocks, T = 8192 | 1000.0 (products) "
        "| 170.8 (products) | 40,000 |",
        "| 10 × K-means, Hamming, an assignment + centroid attention, R=1 + grouped attention "
        "|  |  | 20,000 |",
        "| flash attention, its default blocks, over that sum |  |  | 8.0× |",
        "| attention | 8 (8.0×) |",
        "| attention | fails |",
        "| kmeans, attention | 1.0 MiB, 3 spilled |",
        "| kmeans, attention | 100 registers, 3 B spilled, 1024 KiB, 0 at once |",
        "- h100: attention, T=8192: does not compile: no",
    ):
        assert line in text.splitlines()


def test_why_a_compiler_died():
    fatal = "I1126 x] fine\nF1126 01:17:07.5 62 llo.cc:15] It failed: sorry\nF1126 01 x] *** more\n"
    assert aot.died(-6, fatal) == "its compiler died: It failed: sorry"
    assert aot.died(1, "Traceback\nValueError: no\n") == "its compiler died: ValueError: no"
    assert aot.died(-9, "") == "its compiler died: exit status -9"
    assert aot.died(-27, "") == "takes too long to compile"


def test_compilers_are_those_of_this_jax():
    libtpu, *cuda = compilers()
    assert libtpu.startswith("libtpu==")
    assert cuda[0].startswith("jax-cuda13-plugin==")


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=r"targets must be some of v4, v5e, .*'cpu'"):
        aot.Settings(targets=("cpu",))
