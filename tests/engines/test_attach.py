"""`attach` in bare loops, on every engine: the noise acts, and each run is that of one process."""

from __future__ import annotations

import importlib.util
import json

import peft
import pytest
import torch
import transformers
from packaging.version import Version

from tests.support.launching import ENGINES, NAMES, ROOT, one_at_a_time, run, torchrun
from tests.support.loop_job import train

pytestmark = one_at_a_time

FOUR_PROCESSES = ("fsdp2 contexts", "hsdp", "zero3 hpz")

GATES = {"coordinator": "none"}
# Edges of both sorts: -0.5, too, is far from every cosine, and joins all depths that are no neighbours.
HYBRID = {"edges": "hybrid", "semantic_threshold": -0.5, "gate_init": 0.5}
# The gradients of an expert are smaller, so that an epsilon of 1e-6 leaves elements that rounding moves by 1e-5.
EXPERTS = {"epsilon": 1e-4}

RUNS = {
    # name: (what `loop_job.train` is told, engines in the quick suite, engines beside them)
    "plain": (
        {},
        [*ENGINES, "fsdp2 resharding", "tp", "loaded", *FOUR_PROCESSES],
        ["fsdp2 layers", "fsdp2 layers resharding"],
    ),
    "clipped": (
        {"clip": 0.1, "method": {"regularizer": "laplacian"}},
        ["zero2"],
        ["ddp", "fsdp2", "loaded", "zero1", "zero3", *FOUR_PROCESSES],
    ),
    "scaled": ({"scaled": True}, ["ddp", "zero3"], ["fsdp2", "zero1", "zero2"]),
    "scaled and clipped": ({"scaled": True, "clip": 0.1}, ["zero2"], ["ddp", "fsdp2", "zero1", "zero3"]),
    "NaN beside LoRA": (
        {"poison_at": 3},
        ["fsdp2", "zero3"],
        ["ddp", "tp", "loaded", "zero1", "zero2", *FOUR_PROCESSES],
    ),
    "frozen lora_A": (
        {"freeze": "lora_A", "method": {"side": "write"}},
        [],
        [*ENGINES, "tp", *FOUR_PROCESSES],
    ),
    "base in eval()": (
        {"as_loaded": True},
        ["fsdp2 resharding", "zero2"],
        ["ddp", "fsdp2", "tp", "zero1", "zero3"],
    ),
    "without coordinator": ({"method": GATES}, ["fsdp2", "zero2"], ["ddp", "zero1", "zero3"]),
    "gates of other kinds": (
        {
            "clip": 0.1,
            "detach_at": 3,
            "again_at": 3,
            "method": {**GATES, "hard_gates": True, "share_gates": True},
        },
        ["zero1"],
        ["ddp", "fsdp2", "zero2", "zero3"],
    ),
    "gates by chance, scaled": (
        {"scaled": True, "method": {**GATES, "filter": "random"}},
        [],
        ["zero1", "zero2"],
    ),
    "experts": (
        {**EXPERTS, "experts": "stacked", "method": HYBRID},
        [],
        ["ddp", "fsdp2", "zero1", "zero2", "zero3"],
    ),
    "experts apart": (
        {**EXPERTS, "experts": "apart", "method": HYBRID},
        ["zero3"],
        ["ddp", "fsdp2", "fsdp2 layers", "zero1", "zero2"],
    ),
    "gates of experts apart": (
        {**EXPERTS, "experts": "apart", "clip": 0.1, "method": {**GATES, "expert_gates": True}},
        [],
        ["fsdp2", "zero1", "zero2"],
    ),
    "gates of experts": (
        {**EXPERTS, "experts": "stacked", "method": {**GATES, "gate_init": 0.7, "expert_gates": True}},
        [],
        ["fsdp2", "zero2"],
    ),
    "gates of heads": (
        {"clip": 0.1, "method": {"head_gates": True, "semantic_threshold": -0.5}},
        ["zero3"],
        ["ddp", "fsdp2", "zero1", "zero2"],
    ),
    "gates of heads alone": (
        {"method": {**GATES, "head_gates": True}},
        [],
        ["ddp", "fsdp2", "zero1", "zero2", "zero3"],
    ),
    "cosines over the width": (
        {"method": {"regularizer": "cosine"}},
        ["fsdp2"],
        ["zero1", "zero2", "zero3"],
    ),
    "norms over the width": ({"method": {"coordinator": "gat"}}, [], ["fsdp2", "zero1", "zero2", "zero3"]),
    "selected": (
        {"clip": 0.1, "method": {**HYBRID, "keep": 0.5, "select_at": 3}},
        ["zero1"],
        ["ddp", "fsdp2", "zero2", "zero3", *FOUR_PROCESSES],
    ),
    "experts selected": (
        {**EXPERTS, "experts": "stacked", "method": {**GATES, "keep": 0.25, "select_at": 3}},
        [],
        ["fsdp2", "zero2", "zero3"],
    ),
    "4-bit base": (
        {"four_bits": True, "method": {"semantic_threshold": 0.02}},
        [],
        [*ENGINES, "fsdp2 layers resharding"],
    ),
    "detached": ({"detach_at": 3}, ["zero2"], ["ddp", "fsdp2", "tp", "zero1", "zero3"]),
    "attached again": ({"detach_at": 3, "again_at": 3}, ["zero3"], ["ddp", "fsdp2", "zero1", "zero2"]),
}
QUICK = [(name, engine) for name, (_, engines, _) in RUNS.items() for engine in engines]
SLOW = [(name, engine) for name, (_, _, engines) in RUNS.items() for engine in engines]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """What each run ended with. Those of one number of processes share a launch, the quick ones and the slow ones apart."""
    found = {}

    def result(row):
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
    if engine == "tp":
        return Version(transformers.__version__) >= Version("5.17") and Version(peft.__version__) >= Version(
            "0.21"
        )
    if engine == "loaded":
        return Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) >= Version(
            "0.21"
        )
    return not engine.startswith("zero") or importlib.util.find_spec("deepspeed") is not None


LEARNT = ("latent_A", "latent_B", "logits", "theta")


def parts(finished: dict, *names: str) -> torch.Tensor:
    """What a state holds under these names, in one vector."""
    values = [value.float().flatten() for name, value in finished["state"].items() if name.endswith(names)]
    return torch.cat([torch.empty(0), *values])


@pytest.mark.parametrize(
    "name, engine", [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
)
def test_bare_loop(name, engine, finished, alone):
    if not is_installed(engine):
        pytest.skip(f"what {engine} needs is not installed")
    many, one = finished((name, engine)), alone(name)
    assert many["engine"] == NAMES[engine.split()[0]]
    noisy = [abs(a - b) for a, b in zip(many["losses"], many["evaluation_losses"], strict=True)]
    plain_from = RUNS[name][0].get("detach_at", len(noisy)) if name == "detached" else len(noisy)
    assert min(noisy[:plain_from]) > 1e-5  # training weights stood in the training forward
    assert max(noisy[plain_from:], default=0) <= 1e-6
    assert many["skipped"] == one["skipped"] == ("poison_at" in RUNS[name][0])
    # fp16 under DeepSpeed: the model computes in half precision, the one process in fp32.
    half = RUNS[name][0].get("scaled") and engine.startswith("zero")
    for key in ("losses", "evaluation_losses"):
        assert torch.tensor(many[key]).sub(torch.tensor(one[key])).abs().max() <= (3e-3 if half else 1e-5)
    if not half:
        assert (parts(many, *LEARNT) - parts(one, *LEARNT)).abs().max() <= 1e-5
        assert max((a - b).abs().max() for a, b in zip(many["working"], one["working"], strict=True)) <= 1e-5
    # Gradients are seen unscaled and clipped, so that the graph is the same one.
    seen, expected = (parts(run, "graph.mean_A", "graph.mean_B") for run in (many, one))
    assert (seen - expected).norm() <= (5e-2 if half else 1e-4) * expected.norm()
    assert torch.equal(parts(many, "graph.semantic"), parts(one, "graph.semantic"))
    if "detach_at" in RUNS[name][0]:
        wrappers = [] if not engine.startswith("zero") else [6] if "again_at" in RUNS[name][0] else [6, 6]
        assert many["wrapper_calls"] == wrappers and many["wrapper_stands"] == bool(wrappers)
        assert not one["is_kept"]
        assert not many["is_kept"] or engine == "zero3"  # where DeepSpeed keeps it
    if "keep" in RUNS[name][0].get("method", {}):
        assert torch.equal(parts(many, "selection.kept"), parts(one, "selection.kept"))
        assert 0 < parts(one, "selection.kept").mean() < 1
    has_graph = RUNS[name][0].get("method", {}).get("coordinator") != "none"
    assert (parts(one, "graph.semantic").sum() > 0) == has_graph
