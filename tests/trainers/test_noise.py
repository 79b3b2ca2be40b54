"""Noise on the gates is dropout: where a trainer has no dropout or compares probabilities of its own policy, there is none."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from datasets import IterableDataset

from structlora_trl import StructLoRACallback
from structlora_trl.core.gates import noise_share
from structlora_trl.trainers.compat import why_quiet
from tests.support.jobs import JOBS
from tests.support.tiny import warm_up

ROWS_AT_ONCE = {"max_steps": -1, "per_device_train_batch_size": 24, "gradient_accumulation_steps": 2}
SOME = f"variance {noise_share(12):.2g} for 12 passes over the data)"
CASES = {  # job of 48 rows, noise, training arguments, and what the start says of its gates
    "few passes": ("sft", "auto", {}, "no gates on 9 modules (0.25 passes over the data, too few for noise)"),
    "some passes": ("sft", "auto", {**ROWS_AT_ONCE, "num_train_epochs": 12}, f"gates on 9 modules ({SOME}"),
    "a short last step": (
        "sft",
        "auto",
        {**ROWS_AT_ONCE, "gradient_accumulation_steps": 8, "num_train_epochs": 12},
        f"gates on 9 modules ({SOME}",
    ),
    "streamed rows": ("trainer", "auto", {}, "no gates on 6 modules (passes over the data unknown)"),
    "without dropout": ("reward", "auto", {}, "no gates on 9 modules (RewardTrainer switches dropout off)"),
    "on": ("reward", "on", {}, "gates on 9 modules (variance 1)"),
    "off": ("sft", "off", {}, "no gates on 9 modules (noise='off')"),
}


@pytest.mark.parametrize("case", CASES)
def test_noise_and_what_is_said_of_it(case, tmp_path, capsys):
    job, noise, options, said = CASES[case]
    callback = StructLoRACallback(noise=noise)
    trainer = JOBS[job](tmp_path, [callback], **options)
    if case == "streamed rows":
        trainer.train_dataset = IterableDataset.from_generator(lambda: iter(trainer.eval_dataset))
    trainer.train()
    assert said in capsys.readouterr().out
    assert bool(callback.runtime.gated_count) == said.startswith("gates on")


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


@pytest.mark.parametrize("job, reuse", [("grpo", "num_iterations"), ("rloo", "steps_per_generation")])
def test_importance_ratios_hold_no_noise(job, reuse, tmp_path):
    """Each generation serves two updates: the first meets the policy that generated, the second that policy after one update."""

    def ratios(learns: bool, **options) -> list[float]:
        arguments = {reuse: 2, "max_steps": 4, "learning_rate": 1e-2 if learns else 0.0}
        trainer = JOBS[job](tmp_path, [StructLoRACallback(options)], **arguments)
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
