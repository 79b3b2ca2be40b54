"""`attach` in bare loops, on every engine: each run is that of one process, and outside of steps the adapter stands still."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from tests.support.launching import ENGINES, NAMES, ROOT, one_at_a_time, run, torchrun
from tests.support.loop_job import train
from tests.support.setups import TARGETS
from tests.support.tiny import LAYERS

pytestmark = one_at_a_time

WORLD = 2  # processes
ALONE = {"coordinator": "none"}
# Edges of both sorts: -0.5, too, is far from every cosine, and joins all depths that are no neighbours.
HYBRID = {"edges": "hybrid", "semantic_threshold": -0.5}
SELECTING = {"steps": 13, "clip": 0.1, "method": {**HYBRID, "keep": 0.5, "select_at": 10}}
# The gradients of an expert are smaller, so that an epsilon of 1e-6 leaves elements that rounding moves by 1e-5.
EXPERTS = {"epsilon": 1e-4, "method": HYBRID}
OWN_DRAWS = {"fixed": False}
RESHARDING = [f"fsdp2{layers} resharding" for layers in ("", " layers")]

RUNS = {
    # name: (what `loop_job.train` is told, engines, those of them in the quick suite)
    "plain": ({}, [*ENGINES, *RESHARDING, "fsdp2 layers"], [*ENGINES, RESHARDING[0]]),
    "noisy": (OWN_DRAWS, [*ENGINES, RESHARDING[1]], ENGINES),
    "noisy without coordinator": ({**OWN_DRAWS, "method": ALONE}, ENGINES, ["fsdp2", "zero3"]),
    "clipped": ({"clip": 0.1}, ENGINES, ["zero2"]),
    "scaled": ({"scaled": True}, ENGINES, ["ddp", "zero3"]),
    "scaled and clipped": ({"scaled": True, "clip": 0.1}, ENGINES, ["zero2"]),
    "NaN beside LoRA": ({"poison_at": 3}, ENGINES, ["fsdp2", "zero3"]),
    "frozen lora_A": ({"freeze": "lora_A", "method": {"side": "write"}}, ENGINES, ["zero3"]),
    "experts": ({**EXPERTS, "base": "stacked"}, ENGINES, []),
    "experts apart": ({**EXPERTS, "base": "apart"}, ENGINES, ["zero3"]),
    "norms over the width": ({"method": {"coordinator": "gat"}}, ENGINES, ["fsdp2"]),
    "selected": (SELECTING, ENGINES, ["zero1"]),
    "4-bit base": ({"base": "4 bits", "method": {"semantic_threshold": 0.02}}, ENGINES, []),
    "attached again": ({"steps": 8, "again_at": 3, "method": HYBRID}, ENGINES, ["zero3"]),
    "bypassed": ({"bypassed": True}, ENGINES, ["fsdp2", "zero1", "zero3"]),
}
QUICK = [(name, engine) for name, (_, _, quick) in RUNS.items() for engine in quick]
SLOW = [
    (name, engine) for name, (_, engines, quick) in RUNS.items() for engine in engines if engine not in quick
]
NOISY = ("noisy", "noisy without coordinator")


def rows(*names: str):
    """Parametrise a test over the engines of these runs."""
    marked = [*((row, ()) for row in QUICK), *((row, pytest.mark.slow) for row in SLOW)]
    return pytest.mark.parametrize(
        "name, engine", [pytest.param(*row, marks=marks) for row, marks in marked if row[0] in names]
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """What each run ended with. They share a launch, the quick ones and the slow ones apart."""
    found = {}

    def result(row):
        if not is_installed(row[1]):
            pytest.skip(f"what {row[1]} needs is not installed")
        if row not in found:
            rows = [r for r in (QUICK if row in QUICK else SLOW) if is_installed(r[1])]
            output = tmp_path_factory.mktemp("loops") / "finished.pt"
            told = [{"engine": engine, **RUNS[name][0]} for name, engine in rows]
            job = [str(ROOT / "tests" / "support" / "loop_job.py"), str(output), json.dumps(told)]
            done = run([*torchrun(WORLD), *job], timeout=1800)
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


def is_installed(engine: str) -> bool:
    return not engine.startswith("zero") or importlib.util.find_spec("deepspeed") is not None


LEARNT = ("offset_A", "offset_B", "theta")


def parts(finished: dict, *names: str) -> torch.Tensor:
    """What a state holds under these names, in one vector."""
    values = [value.float().flatten() for name, value in finished["state"].items() if name.endswith(names)]
    return torch.cat([torch.zeros(1), *values])


@rows(*(RUNS.keys() - {*NOISY, "bypassed"}))
def test_bare_loop(name, engine, finished, alone):
    told = RUNS[name][0]
    many, one = finished((name, engine)), alone(name)
    assert many["engine"] == NAMES[engine.split()[0]]
    assert many["stands"] and one["stands"]
    assert one["skipped"] == ("poison_at" in told)
    assert many["skipped"] == one["skipped"] * (not engine.startswith("zero"))  # DeepSpeed calls no hook then
    # fp16 under DeepSpeed: the model computes in half precision, the one process in fp32.
    half = told.get("scaled") and engine.startswith("zero")
    for key in ("losses", "evaluation_losses"):
        assert torch.tensor(many[key]).sub(torch.tensor(one[key])).abs().max() <= (3e-3 if half else 1e-5)
    if not half:
        assert max((a - b).abs().max() for a, b in zip(many["working"], one["working"], strict=True)) <= 1e-5
        assert (parts(many, *LEARNT) - parts(one, *LEARNT)).abs().max() <= 1e-5
        gates = [name for name in one["state"] if name.startswith("/gates/")]
        for of_gate in gates:
            assert (many["state"][of_gate] - one["state"][of_gate]).abs().max() <= 1e-5
    # Gradients are seen unscaled and clipped, so that the graph is the same one.
    seen, expected = (parts(run, "mean_A", "mean_B") for run in (many, one))
    assert (seen - expected).norm() <= (5e-2 if half else 1e-4) * expected.norm()
    assert torch.equal(parts(many, "graph.semantic"), parts(one, "graph.semantic"))
    assert parts(one, "graph.semantic").sum() > 0
    if "keep" in told.get("method", {}):
        assert torch.equal(parts(many, "selection.kept"), parts(one, "selection.kept"))
        assert 0 < parts(one, "selection.kept").mean() < 1


@rows(*NOISY)
def test_gates_on_every_rank(name, engine, finished):
    """All have fired, and end with equal logits, whatever each rank drew; they leave the weights alone."""
    many = finished((name, engine))
    assert many["stands"]
    first = many["gates"][0]
    assert first[0] == len(TARGETS) * LAYERS and many["gates"] == [first] * WORLD
    assert torch.tensor(first[1]).unique().numel() > len(TARGETS) * LAYERS
    assert all(abs(a - b) > 1e-5 for a, b in zip(many["losses"], many["evaluation_losses"], strict=True))


@rows("bypassed")
def test_a_gate_that_no_forward_runs(name, engine, finished):
    said = finished((name, engine))["said"]
    assert len(said) == WORLD and all("1 LoRA modules with gradients" in words for words in said)
