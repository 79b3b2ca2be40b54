"""`attach` in bare loops, on every engine: each run is that of one process, and outside of steps the adapter stands still."""

from __future__ import annotations

import importlib.util
import json

import peft
import pytest
import torch
import transformers
from packaging.version import Version

from tests.support.launching import ENGINES, NAMES, ROOT, one_at_a_time, run, torchrun
from tests.support.loop_job import TARGETS, train
from tests.support.tiny import LAYERS

pytestmark = one_at_a_time

FOUR_PROCESSES = ("fsdp2 contexts", "hsdp", "zero3 hpz")
ALL = (*ENGINES, "loaded", *FOUR_PROCESSES)

ALONE = {"coordinator": "none"}
# Edges of both sorts: -0.5, too, is far from every cosine, and joins all depths that are no neighbours.
HYBRID = {"edges": "hybrid", "semantic_threshold": -0.5}
SELECTING = {"steps": 13, "clip": 0.1}
KEEP = {"keep": 0.5, "select_at": 10}
# The gradients of an expert are smaller, so that an epsilon of 1e-6 leaves elements that rounding moves by 1e-5.
EXPERTS = {"epsilon": 1e-4}
OWN_DRAWS = {"fixed": False}

RUNS = {
    # name: (what `loop_job.train` is told, engines in the quick suite, engines beside them)
    "plain": (
        {},
        [*ALL, "fsdp2 resharding"],
        ["fsdp2 layers", "fsdp2 layers resharding"],
    ),
    "noisy": (OWN_DRAWS, ALL, ["fsdp2 layers resharding"]),
    "noisy without coordinator": (
        {**OWN_DRAWS, "method": ALONE},
        ["fsdp2", "zero3"],
        ["ddp", "zero1", "zero2"],
    ),
    "clipped": ({"clip": 0.1}, ["zero2"], [engine for engine in ALL if engine != "zero2"]),
    "scaled": ({"scaled": True}, ["ddp", "zero3"], ["fsdp2", "zero1", "zero2"]),
    "scaled and clipped": ({"scaled": True, "clip": 0.1}, ["zero2"], ["ddp", "fsdp2", "zero1", "zero3"]),
    "NaN beside LoRA": (
        {"poison_at": 3},
        ["fsdp2", "zero3"],
        ["ddp", "loaded", "zero1", "zero2", *FOUR_PROCESSES],
    ),
    "frozen lora_A": (
        {"freeze": "lora_A", "method": {"side": "write"}},
        ["zero3"],
        [e for e in ALL if e != "zero3"],
    ),
    "plain LoRA, clipped": (
        {"clip": 0.1, "method": {"gates": "off", **ALONE}},
        ["zero2"],
        ["ddp", "fsdp2", "zero1", "zero3"],
    ),
    "experts": ({**EXPERTS, "experts": "stacked", "method": HYBRID}, [], ENGINES),
    "experts apart": (
        {**EXPERTS, "experts": "apart", "method": HYBRID},
        ["zero3"],
        ["ddp", "fsdp2", "zero2"],
    ),
    "norms over the width": ({"method": {"coordinator": "gat"}}, ["fsdp2"], ["zero1", "zero2", "zero3"]),
    "selected": (
        {**SELECTING, "method": {**HYBRID, **KEEP}},
        ["zero1"],
        ["ddp", "fsdp2", "zero2", "zero3", *FOUR_PROCESSES],
    ),
    "experts selected": (
        {**SELECTING, **EXPERTS, "experts": "stacked", "method": {**ALONE, **KEEP}},
        [],
        ["fsdp2", "zero2", "zero3"],
    ),
    "4-bit base": ({"four_bits": True, "method": {"semantic_threshold": 0.02}}, [], ENGINES),
    "detached": ({"detach_at": 3}, ["zero2"], ["ddp", "fsdp2", "zero1", "zero3"]),
    "attached again": (
        {"steps": 8, "detach_at": 3, "again_at": 3, "method": HYBRID},
        ["zero3"],
        ["ddp", "fsdp2", "zero1", "zero2"],
    ),
    "bypassed": (
        {"bypassed": True},
        ["fsdp2", "zero1", "zero3"],
        ["ddp", "loaded", "zero2"],
    ),
}
QUICK = [(name, engine) for name, (_, engines, _) in RUNS.items() for engine in engines]
SLOW = [(name, engine) for name, (_, _, engines) in RUNS.items() for engine in engines]


def rows(*names: str):
    """Parametrise a test over the engines of these runs; where none is named, of those that no other test has."""
    chosen = names or [
        name for name in RUNS if name not in ("bypassed", "noisy", "noisy without coordinator")
    ]
    marked = [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
    chosen = [
        row for row in marked if (row.values if isinstance(row, type(pytest.param())) else row)[0] in chosen
    ]
    return pytest.mark.parametrize("name, engine", chosen)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """What each run ended with. Those of one number of processes share a launch, the quick ones and the slow ones apart."""
    found = {}

    def result(row):
        if not is_installed(row[1]):
            pytest.skip(f"what {row[1]} needs is not installed")
        if row not in found:
            world = processes(row[1])
            suite = QUICK if row in QUICK else SLOW
            rows = [r for r in suite if is_installed(r[1]) and processes(r[1]) == world]
            output = tmp_path_factory.mktemp("loops") / "finished.pt"
            told = [{"engine": engine, **RUNS[name][0]} for name, engine in rows]
            job = [str(ROOT / "tests" / "support" / "loop_job.py"), str(output), json.dumps(told)]
            done = run([*torchrun(world), *job], timeout=1800)
            assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
            found.update(zip(rows, torch.load(output), strict=True))
        return found[row]

    return result


@pytest.fixture(scope="session")
def alone():
    """The same runs in one process."""
    found = {}

    def result(name):
        if name not in found:
            found[name] = train(**RUNS[name][0])
        return found[name]

    return result


def processes(engine: str) -> int:
    return 4 if engine in FOUR_PROCESSES else 2


def is_installed(engine: str) -> bool:
    if engine == "loaded":
        return Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) >= Version(
            "0.21"
        )
    return not engine.startswith("zero") or importlib.util.find_spec("deepspeed") is not None


LEARNT = ("offset_A", "offset_B", "theta")


def parts(finished: dict, *names: str) -> torch.Tensor:
    """What a state holds under these names, in one vector."""
    values = [value.float().flatten() for name, value in finished["state"].items() if name.endswith(names)]
    return torch.cat([torch.zeros(1), *values])


@rows()
def test_bare_loop(name, engine, finished, alone):
    told = RUNS[name][0]
    many, one = finished((name, engine)), alone(name)
    assert many["engine"] == NAMES[engine.split()[0]]
    assert many["stands"] and one["stands"]
    assert one["skipped"] == ("poison_at" in told)
    assert many["skipped"] == (
        0 if engine.startswith("zero") else one["skipped"]
    )  # DeepSpeed calls no hook then
    # fp16 under DeepSpeed: the model computes in half precision, the one process in fp32.
    half = told.get("scaled") and engine.startswith("zero")
    for key in ("losses", "evaluation_losses"):
        assert torch.tensor(many[key]).sub(torch.tensor(one[key])).abs().max() <= (3e-3 if half else 1e-5)
    if not half:
        assert max((a - b).abs().max() for a, b in zip(many["working"], one["working"], strict=True)) <= 1e-5
    if "detach_at" in told:
        assert not one["is_kept"]
        assert not many["is_kept"] or engine == "zero3"  # where DeepSpeed keeps it
    if one["state"] is None:
        return
    if not half:
        assert (parts(many, *LEARNT) - parts(one, *LEARNT)).abs().max() <= 1e-5
        gates = [name for name in one["state"] if name.startswith("/gates/")]
        assert bool(gates) == (told.get("method", {}).get("gates") != "off")
        for of_gate in gates:
            assert (many["state"][of_gate] - one["state"][of_gate]).abs().max() <= 1e-5
    # Gradients are seen unscaled and clipped, so that the graph is the same one.
    seen, expected = (parts(run, "mean_A", "mean_B") for run in (many, one))
    assert (seen - expected).norm() <= (5e-2 if half else 1e-4) * expected.norm()
    assert torch.equal(parts(many, "graph.semantic"), parts(one, "graph.semantic"))
    has_graph = told.get("method", {}).get("coordinator") != "none"
    assert (parts(one, "graph.semantic").sum() > 0) == has_graph
    if "keep" in told.get("method", {}):
        assert torch.equal(parts(many, "selection.kept"), parts(one, "selection.kept"))
        assert 0 < parts(one, "selection.kept").mean() < 1


@rows("noisy", "noisy without coordinator")
def test_gates_on_every_rank(name, engine, finished):
    """All have fired, and end with equal logits, whatever each rank drew; they leave the weights alone."""
    many = finished((name, engine))
    assert many["stands"]
    first = many["gates"][0]
    assert first[0] == len(TARGETS) * LAYERS and many["gates"] == [first] * processes(engine)
    assert torch.tensor(first[1]).unique().numel() > len(TARGETS) * LAYERS
    assert all(abs(a - b) > 1e-5 for a, b in zip(many["losses"], many["evaluation_losses"], strict=True))


@rows("bypassed")
def test_a_gate_that_no_forward_runs(name, engine, finished):
    said = finished((name, engine))["said"]
    assert len(said) == processes(engine) and all("1 LoRA modules with gradients" in words for words in said)
