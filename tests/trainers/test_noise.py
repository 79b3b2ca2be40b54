"""Noise on the gates is dropout: where a trainer has no dropout or compares probabilities of its own policy, there is none."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from transformers import TrainerCallback

from structlora_trl import StructLoRACallback, StructLoRAConfig, StructLoRAError, attach
from structlora_trl.trainers.compat import why_quiet
from tests.support.jobs import JOBS, sft
from tests.support.left import LEAST_MOVE
from tests.support.tiny import adamw, evaluation_factors, peft_model, warm_up

NOISE = {
    # job: the noise under `auto`, and what the line at the start says of it
    "sft": "noise on",
    "trainer": "noise on",
    "dpo": "noise off (DPOTrainer switches dropout off)",
    "kto": "noise off (KTOTrainer switches dropout off)",
    "reward": "noise off (RewardTrainer switches dropout off)",
    "grpo": "noise off (GRPOTrainer trains on samples of its own policy)",
    "rloo": "noise off (RLOOTrainer trains on samples of its own policy)",
}


@pytest.mark.parametrize("job", NOISE)
def test_noise_is_off_where_dropout_is(job, tmp_path, capsys):
    """Off, training weights are the evaluation weights, and gates learn all the same."""

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            weights = torch.cat([p.detach().flatten() for p in callback.runtime.lora_parameters()])
            expected = [f for pair in evaluation_factors(callback.runtime) for f in pair]
            stood = [torch.stack(list(side)) for kind in callback.runtime.kinds for side in (kind.A, kind.B)]
            equal.append(all(map(torch.equal, stood, expected)) and bool(weights.any()))

    equal, callback = [], StructLoRACallback()
    JOBS[job](tmp_path, [callback, Look()], gradient_accumulation_steps=2).train()
    is_off = "off" in NOISE[job]
    assert f"gates), {NOISE[job]}, coordinator" in capsys.readouterr().out
    assert equal == [is_off] * 3 or equal == [True, False, False]  # B is zero before the first step
    assert callback.runtime.is_noisy is not is_off
    start = torch.tensor(callback.config.gate_init).logit()
    assert (callback.runtime.step, callback.runtime.skipped_steps) == (3, 0)
    for m in callback.runtime.maps:
        assert (m.filter.logits - start).abs().min() > LEAST_MOVE and m.kind.depth_count == 3
        assert all(coordinator.theta.abs().sum() > 0 for coordinator in m.coordinators.values())


class Ratios:
    """Probability ratios between the policy that is trained and the one that generated, as an online trainer's loss meets them."""

    def __init__(self, trainer):
        self.seen: list[float] = []  # the largest |ratio - 1| of each loss
        self.logps = None
        self.get, self.loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss
        trainer._get_per_token_logps_and_entropies, trainer._compute_loss = self.keep_logps, self.compute_loss

    def keep_logps(self, *args, **kwargs):
        found = self.get(*args, **kwargs)
        self.logps = found[0].detach()
        return found

    def compute_loss(self, model, inputs):
        loss = self.loss(model, inputs)
        mask = inputs["completion_mask"]
        if "old_logps" in inputs:  # RLOO's are of whole sequences
            difference = (self.logps * mask).sum(1) - inputs["old_logps"]
        else:
            difference = (self.logps - inputs["old_per_token_logps"]) * mask
        self.seen.append((difference.exp() - 1).abs().max().item())
        return loss


@pytest.mark.parametrize("reuse", ["num_iterations", "steps_per_generation"])
@pytest.mark.parametrize("job", ["grpo", "rloo"])
def test_importance_ratios_hold_no_noise(job, reuse, tmp_path):
    """Each generation serves two updates: the first meets the policy that generated, the second that policy after one update."""

    def ratios(learns: bool, **options) -> list[float]:
        rates = {"gate_lr": 0.03 if learns else 0.0}
        arguments = {reuse: 2, "max_steps": 4, "learning_rate": 1e-2 if learns else 0.0}
        trainer = JOBS[job](tmp_path, [StructLoRACallback(**rates, **options)], **arguments)
        warm_up(trainer.model)
        ratios = Ratios(trainer)
        trainer.train()
        assert len(ratios.seen) == 4
        return ratios.seen

    first, second, third, fourth = ratios(learns=True)
    assert max(first, third) <= 1e-6 and min(second, fourth) > 1e-4
    assert max(ratios(learns=False)) <= 1e-6
    assert max(ratios(learns=False, noise="on")) > 1e-3


SAMPLES, DROPOUT = "trains on samples of its own policy", "switches dropout off"
# Every trainer of TRL, and why its noise is off; None where it is on.
TRL = {
    "A2POTrainer": SAMPLES,
    "AsyncDistillationTrainer": SAMPLES,
    "AsyncGRPOTrainer": SAMPLES,
    "BCOTrainer": DROPOUT,
    "CPOTrainer": DROPOUT,
    "DPOTrainer": DROPOUT,
    "DPPOTrainer": SAMPLES,
    "DistillationTrainer": SAMPLES,
    "GFPOTrainer": SAMPLES,
    "GKDTrainer": SAMPLES,
    "GMPOTrainer": SAMPLES,
    "GOLDTrainer": SAMPLES,
    "GRPOTrainer": SAMPLES,
    "GRPOWithReplayBufferTrainer": SAMPLES,
    "IWOPDTrainer": SAMPLES,
    "KTOTrainer": DROPOUT,
    "MiniLLMTrainer": SAMPLES,
    "NashMDTrainer": SAMPLES,
    "ORPOTrainer": DROPOUT,
    "OnlineDPOTrainer": SAMPLES,
    "PAPOTrainer": SAMPLES,
    "PPOTrainer": SAMPLES,
    "PRMTrainer": DROPOUT,
    "RLOOTrainer": SAMPLES,
    "RewardTrainer": DROPOUT,
    "SDFTTrainer": SAMPLES,
    "SDPOTrainer": SAMPLES,
    "SFTTrainer": None,
    "ServerDistillationTrainer": SAMPLES,
    "TPOTrainer": DROPOUT,
    "XPOTrainer": SAMPLES,
}


CLASS = re.compile(r"^class (\w+)\(([^)]*)\):(.*?)(?=^class |\Z)", re.MULTILINE | re.DOTALL)
DISABLES = re.compile(r"disable_dropout: bool = field\(\s*default=(\w+)")


def found_in_trl() -> dict[str, str | None]:
    """What `why_quiet` says of each trainer in TRL's source: some import what is not here."""
    classes = {}
    for path in Path(trl.__path__[0]).rglob("*.py"):
        for name, listed, body in CLASS.findall(path.read_text(encoding="utf-8")):
            bases = re.findall(r"[\w.]+", listed)
            # A class that derives from its namesake elsewhere says less than that one.
            if name not in [base.lstrip("_") for base in bases]:
                classes[name] = bases, body

    def lineage(name: str) -> list[str]:
        return [name, *(above for base in classes.get(name, ([], ""))[0] for above in lineage(base))]

    def said(name: str) -> str | None:
        above = [classes.get(c, ([], ""))[1] for c in lineage(name.replace("Trainer", "Config"))]
        disables = next((match[1] == "True" for match in map(DISABLES.search, above) if match), False)
        kind = object
        for c in reversed(lineage(name)):
            kind = type(c, (kind,), {})
        trainer = kind()
        trainer.args = SimpleNamespace(disable_dropout=disables)
        return why_quiet(trainer)

    public = [n for n in classes if n.endswith("Trainer") and not n.startswith(("_", "Base"))]
    return {name: said(name) for name in public if "Trainer" in lineage(name)}


def test_every_trainer_of_trl():
    found = found_in_trl()
    assert len(found) > 5 and found.keys() <= TRL.keys(), "decide whether they have noise (`why_quiet`)"
    assert found == {name: TRL[name] and f"{name} {TRL[name]}" for name in found}


@pytest.mark.parametrize(
    "bases, arguments, reason",
    [
        (["AsyncGRPOTrainer"], {"disable_dropout": False}, SAMPLES),
        (["_UnslothGRPOTrainer", "UnslothGRPOTrainer"], {}, SAMPLES),
        (["DPOTrainer"], {}, DROPOUT),  # LLaMA-Factory's, whose arguments do not say so
        (["DPOTrainer"], {"disable_dropout": False}, None),
        (["ORPOTrainer"], {"disable_dropout": True}, DROPOUT),
        (["SFTTrainer"], {}, None),
    ],
)
def test_subclasses_count(bases, arguments, reason):
    """Also of trainers that are not installed here, or whose dependencies are not."""
    trainer = type("MyTrainer", tuple(type(name, (), {}) for name in bases), {})()
    trainer.args = SimpleNamespace(**arguments)
    assert why_quiet(trainer) == (reason and f"MyTrainer {reason}")


def test_noise_can_be_chosen(tmp_path):
    off, on = StructLoRACallback(noise="off"), StructLoRACallback(noise="on")
    sft(tmp_path, [off], max_steps=1).train()
    assert not off.runtime.is_noisy and "noise off (as configured)" in repr(off.runtime)
    JOBS["reward"](tmp_path, [on], max_steps=1).train()
    assert on.runtime.is_noisy
    model = peft_model(init="warm")
    assert attach(model, adamw(model)).is_noisy


def test_a_random_filter_needs_noise(tmp_path):
    with pytest.raises(StructLoRAError, match="filter='random' and noise='off'.*remove `noise`"):
        StructLoRAConfig(filter="random", noise="off")
    with pytest.raises(
        StructLoRAError, match="filter='random' where the noise is off .RewardTrainer.*noise='on'"
    ):
        JOBS["reward"](tmp_path, [StructLoRACallback(filter="random")]).train()
