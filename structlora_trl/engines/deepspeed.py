"""DeepSpeed ZeRO 1 to 3: the latents are DeepSpeed's own fp32 masters, the model holds effective weights.

Under DeepSpeed, Accelerate steps inside `backward`, so that Trainer's events and gradient callbacks come too
late (accelerate issues 2951 and 3303, DeepSpeed issue 5199). `engine.step` is wrapped on the instance
instead: at an accumulation boundary the gradients are complete, reduced and not yet clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from ..core.expert_storage import to_storage
from ..core.kinds import SIDES, Factors, Kind, full_shape
from ..errors import StructLoRAError
from .base import checksums, copies_of, copy_values, flags_of
from .schedule import Rate, rate_of
from .sharded import ShardedEngine
from .slices import Piece, join_slices
from .slicing import Exchange

_GATHERED_BYTES = 2**25  # of whole factors, in one all-gather

# PEFT's optimizers that step lora_A and lora_B as pairs. DeepSpeed hands them flat vectors, which they step
# as plain AdamW does (LoRA-FA) or without their preconditioner, and say nothing.
_NEED_PAIRS = ("LoraFAOptimizer", "RiemannianPreconditionedOptimizer")


class DeepSpeedEngine(ShardedEngine):
    """DeepSpeed ZeRO, stages 1 to 3.

    Args:
        engine (`deepspeed.DeepSpeedEngine`): as `deepspeed.initialize` returned it.
        kinds (`list[Kind]`): what its optimizer steps.

    Raises:
        StructLoRAError: a stage or feature of DeepSpeed that is not served, by name.
    """

    keeps_gradients, knows_loss_scale = False, True

    def __init__(self, engine, kinds: list[Kind]):
        self.engine, self.kinds = engine, kinds
        self.optimizer = engine.optimizer  # DeepSpeed's wrapper, which owns the masters
        self.stage = engine.zero_optimization_stage()
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        self._refuse_unfit()
        parameters = [p for kind in kinds for p in kind.parameters]
        self._parameters = [p for p in parameters if p.requires_grad]
        self._trained_ids = {id(p) for p in self._parameters}
        self._frozen_ids = {id(p) for p in parameters} - self._trained_ids
        self._spans: dict[nn.Parameter, tuple[int, int]] = {}
        self._shard(kinds, self.optimizer.dp_process_group, self._span)
        # How effective values reach shards, and of which sides.
        self._scattered: tuple[list[tuple[str, ...]], Exchange] | None = None
        stepped = [p for group in self._stepped() for p in group]
        held = next(filter(self._is_held, stepped), stepped[0])  # a rank may hold padding alone
        self._first_held = held, self._owner(held)
        self._is_stepping = False
        self._clip_still_to_come = 1.0  # factor by which DeepSpeed will shrink this step's gradients
        self._groups = self._groups_of_lora()

    def install(
        self,
        before_step: Callable[[], bool],
        after_step: Callable[[bool], None],
        mapped: list[tuple[str, ...]],
    ) -> None:
        super().install(before_step, after_step, mapped)
        self._latent_slices = self._mapped.to_slices(self._master)
        step = self.engine.step
        self._covered_step = vars(self.engine).get("step")  # set on the instance by someone before us

        def step_through_the_map(*args, **kwargs):
            # After `remove`, someone who wrapped it may still call it.
            if self.engine is None or not self.engine.is_gradient_accumulation_boundary():
                return step(*args, **kwargs)
            with self._clipping_before_the_map():
                if not before_step():
                    return self._skip(step, after_step, *args, **kwargs)
                self._stood = copies_of([(p, self._held(p)) for p in self._stepped_and_mapped()])
                self._is_stepping = True
                try:
                    result = step(*args, **kwargs)
                    overflow = bool(self.optimizer.overflow)
                    if not overflow:
                        self._latent_slices = self._mapped.to_slices(self._master)
                    after_step(not overflow)
                except BaseException:
                    self.put_back()
                    raise
                self._is_stepping = False
            return result

        self.engine.step = self._step = step_through_the_map
        self._note_written()

    @property
    def is_stepping(self) -> bool:
        return self._is_stepping

    @property
    def is_replaced(self) -> bool:  # as a second `deepspeed.initialize` does
        parameter, owner = self._first_held
        return self._owner(parameter) is not owner

    @torch.no_grad()
    def put_back(self) -> None:
        self._is_stepping = False
        copy_values([self._held(p) for p, _ in self._stood], [value for _, value in self._stood])
        for parameter, _ in self._stood if self.stage == 3 else ():
            parameter.ds_secondary_tensor = None
            if self._is_whole(parameter):
                parameter.partition()  # a persistent one, which the next forward gathers anew
        self._stood = []

    @torch.no_grad()
    def remove(self) -> None:
        super().remove()
        if vars(self.engine).get("step") is self._step:
            del self.engine.step  # the class's own shows again
            if self._covered_step is not None:
                self.engine.step = self._covered_step
        if not self.is_replaced:
            mapped = self._stepped_and_mapped()
            copy_values([self._master(p) for p in mapped], [self._working(p) for p in mapped])
        self.engine = self.optimizer = self._step = self._covered_step = None

    def read_gradients(self) -> list[Factors] | None:
        return self._mapped.to_slices(self._gradient)

    def gradient_flags(self) -> torch.Tensor:
        gradients = [self._gradient(p) for group in self._stepped() for p in group if self._is_held(p)]
        return flags_of(gradients, self.sharding.device)

    @torch.no_grad()
    def write_gradients(self, gradients: list[Factors], fill_missing: list[bool]) -> None:
        values = [(p, v) for p, v in self._mapped.to_fragments(gradients) if id(p) in self._trained_ids]
        if self.stage == 3:
            for parameter, value in values:
                # Zero-padded: `safe_set_full_grad` fails on the last rank where the ranks' shares are uneven.
                missing = parameter.ds_tensor.numel() - len(value)
                self.optimizer.set_local_grad_for_param(
                    pad(value, (0, missing)) if missing else value, parameter
                )
            return
        if self._keeps_whole_gradients():
            has_gradient = self._mark_gradients(fill_missing)
            values = [(p, v) for p, v in values if id(p) in has_gradient]
        values = [(p, v) for p, v in values if self._is_held(p)]
        copy_values([self._gradient(p) for p, _ in values], [v for _, v in values])

    @torch.no_grad()
    def write_latents(self, latents: list[Factors]) -> None:
        values = [(p, v) for p, v in self._everything().to_fragments(latents) if id(p) in self._trained_ids]
        copy_values([self._master(p) for p, _ in values], [value for _, value in values])
        self._latent_slices = self._mapped.to_slices(self._master)
        self._put(latents, self._unmapped, Exchange(self.sharding, self._in_shards(self._unmapped)))

    def write_working(self, effective: list[Factors]) -> None:
        mapped = self._mapped.sides
        in_shards = self._in_shards(mapped)
        # Persistent parameters of stage 3 are whole from the first forward on.
        if self._scattered is None or self._scattered[0] != in_shards:
            sides_equal = self.stage == 3 and in_shards == mapped
            self._scattered = in_shards, self._mapped if sides_equal else Exchange(self.sharding, in_shards)
        self._put(effective, mapped, self._scattered[1])
        self._note_written()

    def _in_shards(self, places: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Keep, of some sides of each kind, those that the model holds in shards alone: none before stage 3."""
        return [
            tuple(side for side in chosen if not self._is_whole(getattr(kind, side)[0]))
            for kind, chosen in zip(self.kinds, places, strict=True)
        ]

    @torch.no_grad()
    def _put(
        self,
        values: list[Factors],
        places: list[tuple[str, ...]],
        exchange: Exchange,
    ) -> None:
        """Put values on some sides where the model reads them; `exchange` has those it holds in shards."""
        fragments = [(p, v) for p, v in exchange.to_fragments(values) if id(p) in self._trained_ids]
        copy_values([self._working(p) for p, _ in fragments], [value for _, value in fragments])
        for parameter, _ in fragments:
            # hpZ's copy; DeepSpeed too drops it after a step, and makes it anew.
            parameter.ds_secondary_tensor = None
        wholes = [
            (
                parameters,
                (slices, to_storage(getattr(factors, side), side, kind).to(parameters[0].dtype), side),
            )
            for kind, slices, factors, chosen in zip(self.kinds, self.slices, values, places, strict=True)
            for side, parameters in zip(SIDES, (kind.A, kind.B), strict=True)
            # All of stages 1 and 2, and persistent parameters of stage 3: of one shape, so all depths of a
            # kind or none.
            if side in chosen and self._is_whole(parameters[0])
            if id(parameters[0]) in self._trained_ids
        ]
        for lot in _in_lots(wholes):
            gathered = join_slices([piece for _, piece in lot])
            for (parameters, _), whole in zip(lot, gathered, strict=True):
                copy_values([p.data for p in parameters], list(whole))
                if self.stage == 3:  # persistent parameters have shards too
                    own = [v.view(-1)[slice(*self._span(p))] for p, v in zip(parameters, whole, strict=True)]
                    copy_values([self._working(p) for p in parameters], own)

    def written(self) -> torch.Tensor:
        is_written = super().written()
        if self.stage == 3:  # persistent ones stand twice
            whole = [(i, p) for i, p in enumerate(self._stepped_and_mapped()) if self._is_whole(p)]
            parts = [p.data.view(-1)[slice(*self._span(p))] for _, p in whole]
            expected = self._written[[i for i, _ in whole]]
            is_written = is_written.maximum(
                (checksums(parts, self.sharding.device) != expected).any().float()
            )
        return is_written

    def _checksums(self) -> torch.Tensor:
        """Of what the model holds of the mapped sides: this rank's part at stage 3, without padding."""
        of = self._working if self.stage == 3 else self._held
        return checksums([of(p) for p in self._stepped_and_mapped()], self.sharding.device)

    def _stepped_and_mapped(self) -> list[nn.Parameter]:
        return [p for p in self._mapped.parameters if id(p) in self._trained_ids]

    def _held(self, parameter: nn.Parameter) -> torch.Tensor:
        """What the model holds of a parameter: this rank's shard at stage 3, else the whole."""
        return parameter.ds_tensor.data if self.stage == 3 else parameter.data

    def loss_scale(self) -> float:
        return float(self.optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0

    def gradient_scale(self) -> float | torch.Tensor:
        return self.loss_scale() / self._clip_still_to_come

    def learning_rate(self) -> Rate:
        rate = rate_of(self.optimizer.param_groups[i] for i in self._groups)
        # torch's schedulers declare a peak in the groups, DeepSpeed's start from the rate in its
        # configuration.
        configured = (self.engine.optimizer_params() or {}).get("lr") or 0.0
        return Rate(rate.current, rate.declared_peak or float(configured))

    # From here to `_mark_gradients`, insides of DeepSpeed that nothing public leads to (0.19.8;
    # `upstream/deepspeed-fragments.md`).
    def _groups_of_lora(self) -> list[int]:
        """Places of the optimizer's groups of LoRA parameters; the groups themselves hold flat masters."""
        ours = {id(p) for p in self._parameters}
        found = [i for i, parameters in enumerate(self._stepped()) if any(id(p) in ours for p in parameters)]
        return sorted({self.optimizer.sub_group_to_group_id[i] for i in found}) if self.stage == 3 else found

    def _share(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this rank's part of a parameter begins and ends, without padding."""
        if self.stage < 3:
            address = parameter._hp_mapping.lp_fragment_address
            return address.start, address.start + address.numel
        shard = parameter.ds_tensor
        share = shard.ds_numel if hasattr(shard, "ds_numel") else shard.numel()
        rank = dist.get_rank(self.optimizer.dp_process_group)
        numel = full_shape(parameter).numel()
        return min(rank * share, numel), min((rank + 1) * share, numel)

    def _span(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this rank's part of a trained or frozen factor begins and ends. Frozen ones have no masters:
        they lie in shards at stage 3, and before that whole on every rank, of which the first one is taken.
        """
        if parameter not in self._spans:  # which never change
            is_first = dist.get_rank(self.optimizer.dp_process_group) == 0
            unheld = 0, parameter.numel() if id(parameter) in self._frozen_ids and is_first else 0
            self._spans[parameter] = self._share(parameter) if self._is_held(parameter) else unheld
        return self._spans[parameter]

    def _owner(self, parameter: nn.Parameter) -> object:
        """What leads from a parameter to its master: another object where another engine owns it."""
        return getattr(parameter, "_z3_optimizer" if self.stage == 3 else "_hp_mapping", None)

    def _is_held(self, parameter: nn.Parameter) -> bool:
        """Whether this rank owns a part of it."""
        return self.stage == 3 or self._owner(parameter) is not None

    def _is_whole(self, parameter: nn.Parameter) -> bool:
        """Whether the model holds the whole parameter on every rank."""
        return parameter.data.numel() == full_shape(parameter).numel()

    def _own_part(self, parameter: nn.Parameter, values: torch.Tensor) -> torch.Tensor:
        """This rank's part, flat, of values that lie as the parameter does: in shards only at stage 3."""
        start, stop = self._span(parameter)
        return values.view(-1)[: stop - start] if self.stage == 3 else values.view(-1)[start:stop]

    def _working(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's part of what the model computes with."""
        return self._own_part(parameter, parameter.ds_tensor.data if self.stage == 3 else parameter.data)

    def _master(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's part of the fp32 master; of a frozen factor, which has none, of the factor, and of one that
        another engine has taken over.
        """
        if id(parameter) not in self._trained_ids or not self._is_held(parameter) or self.is_replaced:
            return self._working(parameter)
        if self.stage == 3:
            return self._own_part(parameter, self.optimizer._get_fp32_opt_state_partition(parameter, True)[0])
        return parameter._hp_mapping.hp_fragment.data.view(-1)

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's part of the gradient; zeros of a frozen factor."""
        if id(parameter) in self._frozen_ids or not self._is_held(parameter):
            start, stop = self._span(parameter)
            return torch.zeros(stop - start, dtype=torch.float32, device=self.sharding.device)
        if self.stage == 3:
            return self._own_part(parameter, self.optimizer.get_local_fp32_grad_for_param(parameter))
        gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        is_whole = gradient.numel() != parameter._hp_mapping.lp_fragment_address.numel
        return self._own_part(parameter, gradient) if is_whole else gradient

    def _masters_are_working(self) -> bool:
        """Whether masters of stage 3 share memory with what the model computes with: latents would be lost."""
        working = {s.data_ptr() for s in self.optimizer.fp16_partitioned_groups_flat if s is not None}
        return any(m.numel() and m.data_ptr() in working for m in self.optimizer.fp32_partitioned_groups_flat)

    def _stepped(self) -> list[list[nn.Parameter]]:
        """The model's parameters that the optimizer steps, LoRA's or not, by group; at stage 3 sub-group."""
        if self.stage == 3:
            return self.optimizer.fp16_groups
        return self.optimizer.bf16_groups if self._keeps_whole_gradients() else self.optimizer.bit16_groups

    def _keeps_whole_gradients(self) -> bool:
        """BF16_Optimizer: every rank holds whole gradients, and clips by the norm of them."""
        return hasattr(self.optimizer, "fp32_groups_gradients")

    def _mark_gradients(self, fill_missing: list[bool]) -> set[int]:
        """Mark LoRA parameters of a BF16_Optimizer that have, or get, a gradient; their ids."""
        # `safe_set_full_grad` changes nothing here, in DeepSpeed 0.19.
        groups = list(zip(self.optimizer.bf16_groups, self.optimizer.fp32_groups_has_gradients, strict=True))
        has_gradient = {
            id(p) for group, flags in groups for p, flag in zip(group, flags, strict=True) if flag
        }
        marked = has_gradient | self._to_fill(fill_missing, lambda p: id(p) not in has_gradient)
        marked &= self._trained_ids
        for group, flags in groups:
            for index, parameter in enumerate(group):
                flags[index] = flags[index] or id(parameter) in marked
        return marked

    @contextmanager
    def _clipping_before_the_map(self) -> Iterator[None]:
        """Clip by the norm of the gradients that the backward left, as Trainer does under every other engine.

        DeepSpeed takes the norm inside its step, after the map, and under optimizer offload partly before it.
        """
        optimizer, limit = self.optimizer, self.engine.gradient_clipping()
        if not self._mapped.parameters:
            yield
        elif self._keeps_whole_gradients():
            # Also without a limit: of the pulled gradients, each rank writes its own part alone.
            gradients = optimizer.get_grads_for_norm(for_clipping=True)
            norm = torch.nn.utils.get_total_norm(gradients)
            if limit:
                torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
            optimizer.clip_grad = 0.0
            try:
                yield
            finally:
                optimizer.clip_grad = limit
            optimizer._global_grad_norm = norm  # what it reports
        elif not limit:
            yield
        else:
            method = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
            found = getattr(optimizer, method)()
            norms = [
                torch.as_tensor(norm, dtype=torch.float32, device=self.sharding.device)
                for norm in (found if self.stage == 3 else [found])
            ]
            scale = float(optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0
            self._clip_still_to_come = 1 / ((torch.stack(norms).norm() / scale + 1e-6) / limit).clamp(min=1.0)
            setattr(optimizer, method, lambda: found)
            try:
                yield
            finally:
                delattr(optimizer, method)
                self._clip_still_to_come = 1.0

    def _skip(self, step, after_step, *args, **kwargs):
        """Let DeepSpeed's own overflow check, switched on in bf16 too, see the bad gradients and skip."""
        checks = getattr(self.optimizer, "check_grad_overflow", None)
        if checks is not None:
            self.optimizer.check_grad_overflow = True
        result = step(*args, **kwargs)
        if checks is not None:
            self.optimizer.check_grad_overflow = checks
        if not self.optimizer.overflow:
            raise StructLoRAError(
                f"gradients with NaN or Inf that {self.name} stepped with",
                "DeepSpeed to skip that step",
                "resume from the last checkpoint with a lower learning rate",
            )
        after_step(False)
        return result

    def _refuse_unfit(self) -> None:
        import deepspeed
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        served = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)
        found, remedy = None, "use ZeRO stage 1, 2 or 3 with a standard optimizer"
        zero = self.engine._config.zero_config
        if self.stage not in (1, 2, 3):
            found, remedy = (
                f"DeepSpeed at ZeRO stage {self.stage}",
                "set `zero_optimization.stage` to 1, 2 or 3, or launch with DDP",
            )
        elif isinstance(self.engine, deepspeed.PipelineEngine):
            found = "DeepSpeed pipeline parallelism"
        elif (
            zero.zero_quantized_weights
            or zero.zero_quantized_gradients
            or zero.zero_quantized_nontrainable_weights
        ):
            found, remedy = (
                "ZeRO++'s quantized weights or gradients",
                "remove `zero_quantized_*` from the DeepSpeed config",
            )
        elif type(self.optimizer).__name__ == "MiCS_Optimizer":  # up to DeepSpeed 0.19.6
            found, remedy = (
                "MiCS, which DeepSpeed 0.19.7 removed",
                "replace `mics_shard_size` by `zero_hpz_partition_size` in the DeepSpeed config",
            )
        elif type(self.optimizer) not in served:
            found = f"DeepSpeed's {type(self.optimizer).__name__}"
        elif getattr(self.optimizer, "swap_optimizer", False) or getattr(
            self.optimizer, "params_in_nvme_and_cpu", False
        ):
            found, remedy = (
                "DeepSpeed offload to NVMe",
                "set `device: cpu` in `offload_optimizer` and `offload_param`",
            )
        elif any(getattr(p, "use_muon", False) for p in self.engine.module.parameters()):
            found, remedy = (
                "DeepSpeed's Muon, which changes gradients before the step",
                "choose another optimizer",
            )
        elif type(self.optimizer.optimizer).__name__ in _NEED_PAIRS:
            found, remedy = (
                f"PEFT's {type(self.optimizer.optimizer).__name__} under DeepSpeed, whose flat vectors hide the pairs of "
                "factors it needs",
                "launch with DDP, or choose another optimizer (and freeze lora_A yourself, as LoRA-FA does)",
            )
        elif getattr(self.optimizer, "torch_autocast_gradscaler", None) is not None:
            found, remedy = (
                "DeepSpeed's `torch_autocast` with a gradient scaler",
                "use its `bf16` or `fp16` section instead",
            )
        elif self.stage == 3 and self._masters_are_working():
            found, remedy = (
                "ZeRO-3 in fp32 whose masters are the model's own shards, as no DeepSpeed up to 0.19 makes them",
                "use the `bf16` or `fp16` section, or stage 1 or 2",
            )
        if found:
            raise StructLoRAError(
                found, "a ZeRO set-up whose gradients and masters StructLoRA can reach", remedy
            )


def _in_lots(
    wholes: list[tuple[list[nn.Parameter], Piece]],
) -> Iterator[list[tuple[list[nn.Parameter], Piece]]]:
    """Which factors share an all-gather: small ones, to wait once; a large one has its own, to hold less."""
    lot, size = [], 0
    for parameters, piece in wholes:
        nbytes = sum(p.data.nbytes for p in parameters)
        if lot and (size + nbytes > _GATHERED_BYTES or parameters[0].dtype != lot[0][0][0].dtype):
            yield lot
            lot, size = [], 0
        lot.append((parameters, piece))
        size += nbytes
    if lot:
        yield lot
