"""Training loops as people write them. Each trains one adapter, plainly or with StructLoRA, and can stop half-way and go on.

`Loop` is the bare PyTorch loop; what a kind of loop does otherwise stands in its subclass, and what a set-up chooses
(model, optimizer, schedule) in its row of `tests/support/setups.py`.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from structlora_trl import StructLoRACallback, attach, load_state, save_state
from tests.support.jobs import StopAt
from tests.support.tiny import DATA, assert_same, default_dtype, lora_parameters, weights_of

STEPS, HALF = 6, 3


def look_away(run) -> None:
    """The watcher of runs that nobody watches."""


class Loop:
    """A bare PyTorch loop over one adapter.

    Args:
        setup (`Setup`): what it trains.
        method (`dict` or `None`): options of StructLoRA; None is plain LoRA.
        watch (`callable`): called with the loop at moments outside the optimizer step.
    """

    scaler = None  # of a loop that scales its loss

    def __init__(self, setup, method: dict | None, watch: Callable[[Loop], None] = look_away):
        self.setup, self.watch = setup, watch
        self.model = setup.model()
        self.device = next(self.model.parameters()).device.type
        self.forward = self.wrap(self.model)
        self.optimizer = setup.optimizer(self.model)
        self.schedule = setup.schedule(self.optimizer) if setup.schedule else None
        self.losses: list[float] = []
        self.runtime = None
        self.prepare()
        self.method = method

    def begin(self, folder: Path | None = None) -> None:
        """Attach where the method is on; go on from `folder` where one is given."""
        if folder is not None:
            self.load(torch.load(folder / "loop.pt", weights_only=True))
        self.before = weights_of(self.model)
        if self.method is not None:
            self.runtime = attach(self.forward, self.optimizer, self.method, scaler=self.scaler, **DATA)
            self.start = self.runtime.state_dict() | weights_of(self.model)
            if folder is not None:
                load_state(self.runtime, folder)

    @classmethod
    def run(cls, setup, folder: Path, method: dict | None, steps=None, resume=False, watch=look_away):
        """A whole run, or its second half from what the first left in `folder`."""
        loop = cls(setup, method, watch)
        loop.begin(folder if resume else None)
        loop.model.train()
        loop.watch(loop)
        for index in range(setup.half if resume else 0, steps or setup.steps):
            if index == setup.half and not resume:
                loop.save(folder)
            torch.manual_seed(index)  # dropout and gates draw from it
            loop.losses.append(loop.step(index))
            loop.watch(loop)
        return loop

    def wrap(self, model):
        """What the loop calls in the model's place."""
        return model

    def state(self) -> dict:
        """StructLoRA's state at the end."""
        return self.runtime.state_dict()

    def prepare(self) -> None:
        """Whatever else a loop makes before it attaches."""

    def loss(self, index: int):
        return self.forward(**self.setup.batch(index)).loss

    def step(self, index: int) -> float:
        """One optimizer step; its loss."""
        loss = self.loss(index)
        loss.backward()
        self.before_step()
        self.optimizer.step()
        self.after_step(loss)
        return loss.item()

    def before_step(self) -> None:
        """What a loop does between the backward and the optimizer's step."""

    def after_step(self, loss) -> None:
        self.optimizer.zero_grad()
        if self.schedule is not None:
            follows_loss = "metrics" in inspect.signature(self.schedule.step).parameters
            self.schedule.step(*[loss.item()] * follows_loss)

    def save(self, folder: Path) -> None:
        torch.save(
            {
                "adapter": weights_of(self.model),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule and self.schedule.state_dict(),
            },
            folder / "loop.pt",
        )
        if self.runtime is not None:
            save_state(self.runtime, folder)

    def load(self, saved: dict) -> None:
        self.model.load_state_dict(saved["adapter"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(saved["schedule"])


class Accumulating(Loop):
    """Three micro-batches to a step."""

    def step(self, index):
        losses = []
        for micro in range(3):
            self.watch(self)
            loss = self.loss(3 * index + micro) / 3
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        self.after_step(sum(losses))
        return sum(losses).item()


class SharpnessAware(Loop):
    """Sharpness-aware minimisation: the step's gradient is that at perturbed weights, which are taken back before the step."""

    def step(self, index):
        self.loss(index).backward()
        self.watch(self)
        before = weights_of(self.model)
        with torch.no_grad():
            for parameter in lora_parameters(self.model).values():
                parameter.add_(0.05 * torch.nn.functional.normalize(parameter.grad, dim=(0, 1)))
        self.optimizer.zero_grad()
        loss = self.loss(index)
        loss.backward()
        self.model.load_state_dict(before, strict=False)
        self.optimizer.step()
        self.after_step(loss)
        return loss.item()


class AsLoaded(Loop):
    """The base model stays in `eval()`, as `from_pretrained` returns it; PEFT's own modules around it are in `train()`."""

    def step(self, index):
        for name, module in self.model.named_modules():
            module.training = "lora_" in name or type(module).__module__.startswith("peft.")
        return super().step(index)


class KeptGradients(Loop):
    """Gradients are zeroed in place, not dropped."""

    def after_step(self, loss):
        super().after_step(loss)
        self.optimizer.zero_grad(set_to_none=False)


class Clipping(Loop):
    def before_step(self):
        torch.nn.utils.clip_grad_norm_(lora_parameters(self.model).values(), 0.05)


class Autocast(Loop):
    def loss(self, index):
        with torch.autocast(self.device, torch.bfloat16):
            return super().loss(index)


class WholeAutocast(Loop):
    """Forward, backward and the optimizer's step in one `with torch.autocast`."""

    def step(self, index):
        with torch.autocast(self.device, torch.bfloat16):
            return super().step(index)


class DefaultDtype(Loop):
    """A script that sets torch's default dtype at its top, for its own tensors."""

    dtype = torch.bfloat16

    def begin(self, folder=None):
        with default_dtype(self.dtype):
            super().begin(folder)

    def step(self, index):
        with default_dtype(self.dtype):
            return super().step(index)


class DefaultDouble(DefaultDtype):
    dtype = torch.float64


class Inside(Loop):
    """The PEFT model is a part of another module: a bi-encoder, a wrapper with a reward."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.encoder = model

        def forward(self, **batch):
            return self.encoder(**batch)

    def wrap(self, model):
        return self.Wrapper(model)


class Scaling(Loop):
    """A GradScaler, with clipping."""

    def prepare(self):
        self.scaler = torch.amp.GradScaler(self.device, init_scale=2.0**10)

    def step(self, index):
        loss = self.loss(index)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(lora_parameters(self.model).values(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.after_step(loss)
        return loss.item()


class WithClosure(Loop):
    """`optimizer.step(closure)`, as LBFGS wants it and Lightning always does it."""

    def step(self, index):
        losses = []

        def closure():
            self.optimizer.zero_grad()
            loss = self.loss(index)
            loss.backward()
            losses.append(loss.item())
            return loss

        self.optimizer.step(closure)
        if self.schedule is not None:
            self.schedule.step()
        return losses[0]


class Accelerated(Loop):
    """Accelerate's loop, with its accumulation and clipping."""

    def wrap(self, model):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        return self.accelerator.prepare_model(model)

    def prepare(self):
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)

    def step(self, index):
        for micro in range(2):
            with self.accelerator.accumulate(self.forward):
                loss = self.loss(2 * index + micro)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.forward.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.watch(self)
        return loss.item()


class AcceleratedState(Accelerated):
    """Resumed through `accelerator.load_state`, with the runtime registered."""

    def begin(self, folder=None):
        super().begin(None)
        if self.runtime is not None:
            self.accelerator.register_for_checkpointing(self.runtime)
        if folder is not None:
            self.accelerator.load_state(folder / "accelerate")

    def save(self, folder):
        self.accelerator.save_state(folder / "accelerate")


class Checkpointing(Loop):
    """Gradient checkpointing. What is recomputed has the noise of the forward: gradients are those without it."""

    reentrant = False

    def prepare(self):
        self.model.enable_input_require_grads()

    def step(self, index):
        self.model.gradient_checkpointing_disable()
        self.loss(index).backward()
        self.expected = self.gradients()
        self.optimizer.zero_grad()
        self.model.gradient_checkpointing_enable({"use_reentrant": self.reentrant})
        torch.manual_seed(index)
        return super().step(index)

    def gradients(self) -> dict:
        """Of what is trained, and of the gates' logits."""
        gates = self.runtime.gating.gates.items() if self.runtime else ()
        return {name: p.grad for name, p in lora_parameters(self.model).items()} | {
            f"/gates/{name}": gate.logits.grad for name, gate in gates
        }

    def before_step(self):
        found = self.gradients()
        assert found.keys() == self.expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, self.expected[name], rtol=1e-3, atol=1e-6)


class ReentrantCheckpointing(Checkpointing):
    reentrant = True


class CheckpointingAsLoaded(AsLoaded, Checkpointing):
    """Layers in `eval()`, LoRA's modules in `train()`."""


class Compiled(Loop):
    def wrap(self, model):
        return torch.compile(model, backend="aot_eager")


class CompiledStep(Loop):
    """PyTorch's recipe of a compiled optimizer."""

    def prepare(self):
        self.compiled = torch.compile(lambda: self.optimizer.step(), backend="eager")

    def step(self, index):
        loss = self.loss(index)
        loss.backward()
        self.compiled()
        self.after_step(loss)
        return loss.item()


class Swapping(Loop):
    """A moving average that is swapped in to be looked at, and out again before training goes on."""

    def prepare(self):
        self.average = weights_of(self.model)

    def after_step(self, loss):
        super().after_step(loss)
        own = weights_of(self.model)
        for name, value in self.average.items():
            value.lerp_(own[name], 0.5)
        for values in (self.average, own):
            self.model.load_state_dict(values, strict=False)
            self.model.eval()(**self.setup.batch(99))
        self.model.train()


class Copying(Loop):
    """The model is copied, by `copy.deepcopy`, by pickle and by torch's averages, between steps and within one; a copy is a
    plain LoRA model.
    """

    def copy(self):
        pickled = io.BytesIO()
        torch.save(self.model, pickled)
        pickled.seek(0)
        batch = self.setup.batch(99)
        average = torch.optim.swa_utils.AveragedModel(self.model).module
        for model in (copy.deepcopy(self.model), torch.load(pickled, weights_only=False), average):
            assert_same(weights_of(model), weights_of(self.model))
            # Gates of a copy do nothing.
            assert torch.equal(model.train()(**batch).logits, model.eval()(**batch).logits)

    def step(self, index):
        self.copy()
        self.loss(index).backward()
        self.copy()
        self.optimizer.zero_grad()
        return super().step(index)


class ReferencePass(Loop):
    """A penalty on the distance to the base model, whose logits come from the same model with the adapter disabled."""

    def prepare(self):
        self.base = self.setup.base().train()

    def loss(self, index):
        batch = self.setup.batch(index)
        with torch.no_grad(), self.model.disable_adapter():
            reference = self.forward(**batch).logits
            assert torch.equal(reference, self.base(**batch).logits)
        output = self.forward(**batch)
        return output.loss + torch.nn.functional.mse_loss(output.logits, reference)


class Freezing(Loop):
    """The first layer is frozen in every second step, and rests then."""

    rests = True

    def step(self, index):
        first = [p for name, p in self.model.named_parameters() if "lora_" in name and "layers.0" in name]
        for parameter in first:
            parameter.requires_grad_(index % 2 == 0)
        loss = super().step(index)
        for parameter in first:
            parameter.requires_grad_(True)
        return loss


class ByHand(Loop):
    """The learning rate is set by hand: a warm-up from 0, then a decay."""

    shares = (0.0, 0.5, 1.0, 0.8, 0.5, 0.2)

    def step(self, index):
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 * self.shares[index]
        return super().step(index)


class InTrainer:
    """A `transformers.Trainer` or one of TRL's, built by the set-up's `trainer` (`tests/support/jobs.py`)."""

    @classmethod
    def run(cls, setup, folder: Path, method: dict | None, steps=None, resume=False, watch=look_away):
        ours = [] if method is None else [StructLoRACallback(method)]
        run = SimpleNamespace(setup=setup, runtime=None, state=lambda: ours[0]._finished)
        trainer = setup.trainer(
            folder,
            [*ours, _Watching(run, watch, ours)],
            max_steps=setup.steps,
            save_strategy="steps",
            save_steps=setup.half,
        )
        run.model, run.before = trainer.model, weights_of(trainer.model)
        if steps is not None:
            trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{setup.half}") if resume else None)
        run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        watch(run)
        return run


class _Watching(TrainerCallback):
    def __init__(self, run, watch, ours):
        self.run, self.watch, self.ours = run, watch, ours

    def on_train_begin(self, args, state, control, **kwargs):
        if self.ours:
            self.run.runtime = self.ours[0].runtime
            self.run.start = self.run.runtime.state_dict() | weights_of(self.run.model)
        self.watch(self.run)

    def _look(self, args, state, control, **kwargs):
        self.watch(self.run)

    on_step_begin = on_substep_end = on_pre_optimizer_step = on_step_end = on_save = on_train_end = _look
