"""DeepSpeed ZeRO 1 to 3: hooks on the torch optimizer inside, which steps flat fp32 masters.

There, gradients are reduced, unscaled and clipped, and what the hooks make of the masters reaches the model by
DeepSpeed's own copy. ZeRO steps one parameter group at a time, ZeRO-3 one sub-group, so that one `engine.step`
calls the hooks several times.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.kinds import Kind, full_shape
from ..errors import StructLoRAError
from .base import Engine, Part, Rate, copy_values, rate_of, refuse_missing

# PEFT's optimizers that step lora_A and lora_B as pairs. DeepSpeed hands them flat vectors, which they step
# as plain AdamW does (LoRA-FA) or without their preconditioner, and say nothing.
_NEED_PAIRS = ("LoraFAOptimizer", "RiemannianPreconditionedOptimizer")


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO, stages 1 to 3.

    Args:
        engine (`deepspeed.DeepSpeedEngine`): as `deepspeed.initialize` returned it.
        kinds (`list[Kind]`): what its optimizer steps.

    Raises:
        StructLoRAError: a stage or feature of DeepSpeed that is not served, by name.
    """

    knows_loss_scale = True

    def __init__(self, engine, kinds: list[Kind]):
        self._of_engine, self.device = weakref.ref(engine), kinds[0].device
        self.stage = engine.zero_optimization_stage()
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        self._refuse_unfit()
        self.group = self._zero.dp_process_group
        self._rank = dist.get_rank(self.group)
        self._configured = float((engine.optimizer_params() or {}).get("lr") or 0.0)
        self._flat = {id(p): flat for flat, group in self._flats() for p in group}
        trained = [p for kind in kinds for p in kind.parameters if p.requires_grad]
        refuse_missing(trained, set(self._flat), type(self.optimizer).__name__)
        self._places = {id(p): self._place(p) for p in trained}
        if hasattr(self._zero, "check_grad_overflow"):  # in bf16 too: NaN is to change nothing
            self._zero.check_grad_overflow = True
        self._skips = engine.skipped_steps

    @property
    def _engine(self):
        return self._of_engine()

    @property
    def _zero(self):
        """DeepSpeed's optimizer, around the inner one."""
        return self._engine.optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    # From here to `part`, insides of DeepSpeed that nothing public leads to (0.19.8;
    # `upstream/deepspeed-fragments.md`).
    def _flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """Return what the inner optimizer steps, and the model's parameters that lie in each."""
        zero = self._zero
        if self.stage == 3:
            return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        if hasattr(zero, "bf16_groups"):  # BF16_Optimizer
            return list(zip(zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True))
        return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))

    def part(self, parameter: nn.Parameter) -> Part:
        numel = full_shape(parameter).numel()
        if self.stage == 3:
            shard = parameter.ds_tensor
            share = shard.ds_numel if hasattr(shard, "ds_numel") else shard.numel()
            return min(self._rank * share, numel), min((self._rank + 1) * share, numel)
        if id(parameter) not in self._flat:  # frozen, and whole on every rank
            return 0, numel if self._rank == 0 else 0
        if parameter._hp_mapping is None:
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def _place(self, parameter: nn.Parameter) -> slice:
        """Return where this rank's part of a parameter lies in its flat tensor."""
        start, stop = self.part(parameter)
        if self.stage == 3:
            at = self._zero.grad_position[self._zero.get_param_id(parameter)][1]
        else:
            at = parameter._hp_mapping.hp_fragment_address.start if stop > start else 0
        return slice(at, at + stop - start)

    def values(self, parameter: nn.Parameter) -> Tensor:
        flat = self._flat.get(id(parameter))
        if flat is not None:
            return flat.data[self._places[id(parameter)]]
        start, stop = self.part(parameter)
        return (
            parameter.ds_tensor.data[: stop - start]
            if self.stage == 3
            else parameter.data.view(-1)[start:stop]
        )

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        flat = self._flat.get(id(parameter))
        return None if flat is None else flat.grad[self._places[id(parameter)]]

    def holder(self, parameter: nn.Parameter) -> Tensor:
        return self._flat[id(parameter)]

    def put_gradients(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
        copy_values([self.gradient(p) for p, _ in gradients], [value for _, value in gradients])

    @torch.no_grad()
    def write(self, parameters: list[nn.Parameter], whole: Tensor) -> None:
        import deepspeed

        for parameter, row in zip(parameters, whole.flatten(1), strict=True):
            if id(parameter) in self._flat:
                self.values(parameter).copy_(row[slice(*self.part(parameter))])
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self.stage == 3):
            copy_values([p.data for p in parameters], list(whole))
        for parameter in parameters:
            parameter.ds_secondary_tensor = None  # hpZ's copy, which DeepSpeed makes anew

    def flags(self) -> Tensor:
        # With NaN or Inf, DeepSpeed has left the step out itself. One group's gradients may be zero while others' are
        # not, as those of lora_A in the first step of a fresh adapter. On the CPU: the host waits for nothing.
        return torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")

    def agreed(self, flags: Tensor) -> Tensor:
        return flags  # equal on every rank

    def dropped(self, parameters: list[nn.Parameter]) -> list[bool]:
        skips, self._skips = self._skips, self._engine.skipped_steps
        return [self._skips != skips] * len(parameters)

    def let_go(self) -> None:
        self._flat, self._places = {}, {}

    def loss_scale(self) -> float:
        return float(self._zero.loss_scale) if self._engine.fp16_enabled() else 1.0

    def rate(self, group: dict) -> Rate:
        # torch's schedulers declare a peak in the groups, DeepSpeed's start from the rate in its configuration.
        return rate_of(group, self._configured)

    def refuse_unmappable(self, kind: Kind, side: str) -> None:
        """Stop where ZeRO steps the depths of one kind one after the other, since the map has them all at once."""
        flats = {id(self._flat[id(p)]) for p in getattr(kind, side) if id(p) in self._flat}
        if len(flats) > 1:
            raise StructLoRAError(
                f"lora_{side} of '{kind.name}' in {len(flats)} groups, which {self.name} steps one after the other",
                "all layers of a kind in one parameter group, and in one sub-group of ZeRO-3",
                "give the optimizer one group for lora_A and one for lora_B at most, raise `sub_group_size` in the DeepSpeed "
                "config, or launch with DDP",
            )

    def _refuse_unfit(self) -> None:
        import deepspeed
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        served = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)
        zero, settings = self._zero, self._engine._config.zero_config
        quantised = (
            "zero_quantized_weights",
            "zero_quantized_gradients",
            "zero_quantized_nontrainable_weights",
        )
        inner = type(getattr(zero, "optimizer", None)).__name__
        standard = "use ZeRO stage 1, 2 or 3 with a standard optimizer"
        # What is met -> whether it is, and what to do.
        unfit = {
            f"DeepSpeed at ZeRO stage {self.stage}": (
                self.stage not in (1, 2, 3),
                "set `zero_optimization.stage` to 1, 2 or 3, or launch with DDP",
            ),
            "DeepSpeed pipeline parallelism": (isinstance(self._engine, deepspeed.PipelineEngine), standard),
            "ZeRO++'s quantized weights or gradients": (
                any(getattr(settings, name) for name in quantised),
                "remove `zero_quantized_*` from the DeepSpeed config",
            ),
            f"DeepSpeed's {type(zero).__name__}": (type(zero) not in served, standard),
            "DeepSpeed offload to NVMe": (
                getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False),
                "set `device: cpu` in `offload_optimizer` and `offload_param`",
            ),
            "DeepSpeed's Muon, which changes gradients before the step": (
                any(getattr(p, "use_muon", False) for p in self._engine.module.parameters()),
                "choose another optimizer",
            ),
            f"PEFT's {inner} under DeepSpeed, whose flat vectors hide the pairs of factors it needs": (
                inner in _NEED_PAIRS,
                "launch with DDP, or choose another optimizer (and freeze lora_A yourself, as LoRA-FA does)",
            ),
            "DeepSpeed's `torch_autocast` with a gradient scaler": (
                getattr(zero, "torch_autocast_gradscaler", None) is not None,
                "use its `bf16` or `fp16` section instead",
            ),
            "`offload_optimizer.ratio` below 1, with which two optimizers step the parameters": (
                getattr(zero, "backup_optimizer", None) is not None and zero.partial_offload < 1,
                "leave it at 1.0",
            ),
        }
        for found, (is_met, remedy) in unfit.items():
            if is_met:
                raise StructLoRAError(
                    found, "a ZeRO set-up whose gradients and masters StructLoRA can reach", remedy
                )
