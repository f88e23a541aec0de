"""The breakdown: which stage an instruction is of, who shares time with whom, and the floors."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments import breakdown
from experiments.breakdown import REST, STAGES, Event, Instruction, Settings, Work

# Of much smaller programs XLA makes one instruction.
SMALL = {"lengths": (2048,), "heads": 2, "head_dim": 16, "clusters": 10, "topk": 8, "rounds": 2}


@pytest.fixture(scope="module")
def optimised():
    """Calls a function in a process whose programs are compiled as those of users are."""
    context = multiprocessing.get_context("spawn")
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(max_workers=1, mp_context=context) as pool,
    ):
        patch.setenv("XLA_FLAGS", "")
        pool.submit(int).result()  # It has started with that.
        patch.undo()
        yield lambda function, *args: pool.submit(function, *args).result()


def instructions(attention):
    query = jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32)
    settings = Settings(attention=attention, clusters=10, topk=8)
    program = jax.jit(settings.clustered).lower(query, query, query).compile()
    return breakdown.instructions_of(program.as_text())


@pytest.mark.once
@pytest.mark.parametrize("attention", ["paper", "default"])
def test_instructions_of_every_stage_are_found(attention, optimised):
    # Fails when a function of clustax has another name or its lines another form: see STAGE_OF.
    found = optimised(instructions, attention)
    assert {each.stage for each in found.values()} == set(STAGES)
    main_work = [each for each in found.values() if each.opcode in ("dot", "sort")]
    assert main_work
    assert REST not in {each.stage for each in main_work}


def test_instructions_share_time_and_loops_get_what_is_left():
    instructions = {
        "loop": Instruction("while", "K-means", ""),
        "a": Instruction("fusion", "hash", ""),
        "b": Instruction("fusion", "select", ""),
    }
    events = [
        Event("1", "loop", 0, 10),
        Event("1", "a", 1, 3),
        Event("1", "a", 3, 5),
        Event("2", "b", 4, 7),
        Event("2", "b", 12, 13),
    ]
    times = breakdown.share_out(events, instructions)
    # b alone from 5 to 7 and 12 to 13, beside a from 4 to 5; nobody from 10 to 12.
    assert times == {"loop": 4, "a": 3.5, "b": 3.5, "": 2}
    assert sum(times.values()) == 13
    stages = breakdown.in_stages(times, instructions)
    assert {stage: taken for stage, taken in stages.items() if taken} == {
        "hash": 3.5,
        "K-means": 4,
        "select": 3.5,
        REST: 2,
    }


def test_floors_add_up_arithmetic_and_hide_the_shorter_of_it_and_memory():
    rates = Work(100, 10, 20, 50)
    assert breakdown.floor_of(Work(200, 10, 20, 100), rates) == (4.0, "products")
    assert breakdown.floor_of(Work(100, 10, 0, 250), rates) == (5.0, "memory")
    assert breakdown.floor_of(Work(), rates) == (0.0, "")


def test_work_is_what_the_paper_counts():
    settings = Settings(heads=6, head_dim=64, clusters=100, topk=32)
    forward = breakdown.work_of(settings, 1024)
    assert tuple(forward) == STAGES
    assert forward["hash"].multiply_adds == 6 * 1024 * 64 * 64
    assert forward["K-means"].compared_words == 6 * 10 * 1024 * 100 * 2
    assert forward["centroid attention"][:2] == (6 * 2 * 100 * 1024 * 64, 6 * 100 * 1024)
    assert forward["recompute"][:2] == (6 * 2 * 1024 * 32 * 64, 6 * 1024 * 32)
    default = breakdown.work_of(Settings(attention="default"), 1024)
    assert default["K-means"].multiply_adds == 6 * 3 * 1024 * 100 * 64
    assert default["centroid attention"].exponentials == 4 * forward["centroid attention"][1]


def printed(settings):
    breakdown.measure_rates = lambda: Work(1e11, 1e9, 1e10, 1e10)  # in a process of its own
    console = Console(record=True, width=200)
    breakdown.run(settings, console)
    return console.export_text()


def test_a_small_run_writes_every_figure(tmp_path, optimised):
    settings = Settings(**SMALL, listed=3, output=tmp_path / "breakdown")
    text = optimised(printed, settings)
    record = json.loads((tmp_path / "breakdown.json").read_text())
    assert [part["stage"] for part in record["parts"]] == list(STAGES)
    (whole,) = record["wholes"]
    stages = [part["seconds"] for part in record["parts"]]
    assert min(stages) > 0
    # Medians of parts do not add up to that of sums, but two runs leave nothing between.
    assert sum(stages) == pytest.approx(whole["profiled_seconds"])
    assert (tmp_path / "breakdown.png").read_bytes().startswith(b"\x89PNG")
    assert "Milliseconds, forward" in text
    assert text.count(" ms  ") == 3


def test_settings_are_checked():
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        Settings(rounds=1)
    with pytest.raises(ValueError, match="lengths must be above clusters = 100"):
        Settings(lengths=(64,))
