"""Gates in trainers: on which they are, what they know of the data, and what is saved of them. They are dropout: where a trainer
has none, or compares probabilities of its own policy, there are no gates.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import IterableDataset
from peft import PeftModel
from safetensors.torch import load_file

from structlora_trl import StructLoRACallback, StructLoRAError
from structlora_trl.gates_file import GATES_NAME, read_openness
from structlora_trl.trainers.compat import why_quiet
from tests.support.jobs import JOBS, StopAt, sft
from tests.support.tiny import assert_same, base_model, differing, warm_up

LABELS = 9  # of a row of SFT: a sentence and its end


def labels(a_step: int, beta: float = 1) -> str:
    return f"{48 * LABELS} labels, {a_step * LABELS} a step, beta {beta}"


# job of 48 rows in batches of 4, its options and training arguments, and what the start says of its gates
CASES = {
    "less than an epoch": ("sft", {}, {"max_steps": 3}, labels(4)),
    "accumulation": ("sft", {}, {"max_steps": 12, "gradient_accumulation_steps": 2}, labels(8)),
    "rows at once": (
        "sft",
        {"beta": 0.5, "gates": "gumbel"},
        {"max_steps": 2, "per_device_train_batch_size": 64},
        labels(48, beta=0.5),
    ),
    "a classifier": ("trainer", {}, {"max_steps": 12}, "48 labels, 4 a step, beta 1"),
    "streamed rows": ("trainer", {}, {"max_steps": 3}, "12 labels, 4 a step, beta 1"),
    "without dropout": ("reward", {}, {}, "no gates on 9 modules (RewardTrainer switches dropout off)"),
    "off": ("sft", {"gates": "off"}, {}, "no gates on 9 modules (gates='off')"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_start_says_of_gates(case, tmp_path, capsys):
    job, options, arguments, said = CASES[case]
    callback = StructLoRACallback(options)
    trainer = JOBS[job](tmp_path, [callback], **arguments)
    if case == "streamed rows":
        trainer.train_dataset = IterableDataset.from_generator(lambda: iter(trainer.eval_dataset))
    trainer.train()
    runtime = callback.runtime
    has_gates = not said.startswith("no gates")
    start = f"{runtime.config.gates} gates on {len(runtime.gating)} modules, " if has_gates else ""
    assert f"{start}{said}" in capsys.readouterr().out
    assert bool(runtime.gating) == bool(runtime.openness()) == has_gates


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_have_the_labels_of_all_their_sequences(strategy, tmp_path):
    """The price is that of the same sequences, each in a row."""
    options = {"row_count": 384, "max_steps": 300}

    def found(**more):
        callback = StructLoRACallback()
        trainer = sft(tmp_path, [callback, StopAt(1)], **options, **more)
        trainer.train()
        return callback.runtime.gating.bottleneck

    apart, packed = found(), found(packing=True, packing_strategy=strategy)
    # Of nine tokens of a sequence, TRL before 1.0 leaves the first out of the loss where rows are packed.
    assert packed.examples == pytest.approx(apart.examples, rel=0.15)
    assert packed.batch_size > 2 * apart.batch_size


def test_keep_needs_gates(tmp_path):
    callback = StructLoRACallback(keep=0.5)
    trainer = JOBS["dpo"](tmp_path, [callback], max_steps=4)
    with pytest.raises(
        StructLoRAError,
        match="keep=0.5 and no gates to select by .DPOTrainer switches.*export ADAPTER.*--data",
    ):
        trainer.train()


def test_openness_lies_beside_the_adapter(tmp_path):
    """In checkpoints, and where the run ends; a later run without gates takes it away."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    callback = StructLoRACallback(keep=0.5)
    trainer = sft(tmp_path, [callback], **options)
    trainer.train()
    trainer.save_model()
    last = callback.runtime.openness()
    assert last.keys() == {module for kind in callback.runtime.kinds for module in kind.modules}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for module, openness in last.items():
        closed = (saved[f"{module}.lora_B.weight"] == 0).all(0)
        assert torch.equal(openness == 0, closed)
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert_same(read_openness(folder), last)
    assert differing(read_openness(tmp_path / "checkpoint-2"), last)
    assert load_file(tmp_path / GATES_NAME).keys() == last.keys()
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path)  # which takes no notice of it
    assert_same({n.replace(".default", ""): p for n, p in again.state_dict().items() if "lora_" in n}, saved)
    sft(tmp_path, [StructLoRACallback(gates="off")], **options).train()
    assert read_openness(tmp_path) is read_openness(tmp_path / "checkpoint-4") is None


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
def test_importance_ratios_hold_no_gates(job, reuse, tmp_path):
    """Each generation serves two updates: the first meets the policy that generated, the second that policy after one update."""

    def ratios(learns: bool) -> list[float]:
        arguments = {reuse: 2, "max_steps": 4, "learning_rate": 1e-2 if learns else 0.0}
        trainer = JOBS[job](tmp_path, [StructLoRACallback()], **arguments)
        warm_up(trainer.model)
        ratios = Ratios(trainer)
        trainer.train()
        assert len(ratios.seen) == 4
        return ratios.seen

    first, second, third, fourth = ratios(learns=True)
    assert max(first, third) <= 1e-6 and min(second, fourth) > 1e-4
    assert max(ratios(learns=False)) <= 1e-6


SAMPLES, DROPOUT = "trains on samples of its own policy", "switches dropout off"
# Every trainer of TRL, and why its gates are off; None where they are on.
OF_ALL = {"SFT": None, **dict.fromkeys("BCO CPO DPO KTO ORPO PRM Reward TPO".split(), DROPOUT)}
ON_SAMPLES = (
    "A2PO AsyncDistillation AsyncGRPO DPPO Distillation GFPO GKD GMPO GOLD GRPO GRPOWithReplayBuffer "
    "IWOPD MiniLLM NashMD OnlineDPO PAPO PPO RLOO SDFT SDPO ServerDistillation XPO"
)
TRL = {f"{name}Trainer": why for name, why in (OF_ALL | dict.fromkeys(ON_SAMPLES.split(), SAMPLES)).items()}


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
    assert len(found) > 5 and found.keys() <= TRL.keys(), "decide whether they have gates (`why_quiet`)"
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
