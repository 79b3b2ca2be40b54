"""From a PEFT model and an optimizer to a runtime: what StructLoRA can act on is checked here, once."""

from __future__ import annotations

import logging
import math
import re
from functools import partial
from numbers import Real
from pathlib import Path

import peft
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType
from torch import nn
from torch.amp import GradScaler

from . import __version__
from .config import StructLoRAConfig
from .core.gates import GATES, Bottleneck, Forward
from .core.kinds import FACTOR, Kind
from .core.mapping import DEFAULT_PARTS, Parts, refuse_unmappable
from .engines import select_engine
from .errors import StructLoRAError
from .gating import Gating
from .peft_adapter import Start, gates_of, is_lora, start_of
from .rank_check import refuse_disagreement, world_size
from .runtime import Runtime
from .yaml_block import read_given

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: StructLoRAConfig | dict | str | Path | None = None,
    *,
    examples: float | None = None,
    batch_size: float | None = None,
    scaler: GradScaler | None = None,
    parts: Parts = DEFAULT_PARTS,
    **overrides,
) -> Runtime:
    """Train StructLoRA in a custom PyTorch or Accelerate loop.

    Build the optimizer over the adapter first; then one call is all:

        runtime = attach(model, optimizer, examples=len(dataset), batch_size=16)

    From then on a forward under `model.train()` has gates with noise, as dropout is noise, and
    `optimizer.step()` steps the gates and the coordinator, too. The model's parameters are the adapter, plain
    LoRA, at any moment: evaluate, copy, save and write them as ever.

    The call may change lora_A of a fresh adapter (B = 0): by default all depths of a kind of module get the
    same one. Code that keeps a copy of the weights, such as a moving average, has to copy them afterwards.

    Args:
        model (`PeftModel`): a model with a trainable LoRA adapter, or a module that holds one such model
            (`peft_module` names it where there are several).
        optimizer (`torch.optim.Optimizer`): owns all trainable LoRA parameters; Accelerate's wrapper is seen
            through.
        config (`StructLoRAConfig`, `dict`, `str` or `Path`, *optional*): options, or a YAML or JSON file that
            has them under the key `structlora`; defaults where omitted.
        examples (`float`): N, the number of terms that the loss is a mean of, over the training data: the rows of
            a classifier, the answer tokens of a language model. They set the price of what gates let through.
            Of a stream, those that the run will see. Needed unless `gates="off"`.
        batch_size (`float`): how many of these an optimizer step sees, over all processes and accumulated
            batches. Needed unless `gates="off"`.
        scaler (`torch.amp.GradScaler`, *optional*): the scaler of an fp16 loop, since the gates' gradients hold
            its scale. Accelerate's and Fabric's optimizers know theirs.
        parts (`Parts`, *optional*): gates, graph, coordinator or kinds of your own, for research.
        **overrides: single options, as keywords.

    Returns:
        `Runtime`: for `metrics()`, `state_dict()` and `detach()`.

    Raises:
        StructLoRAError: StructLoRA cannot act on this model and optimizer; the message says why and what to
            do.

    Example:
        >>> model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        >>> optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        >>> runtime = attach(model, optimizer, examples=labels, batch_size=labels / len(batches), beta=0.5)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> runtime.step == len(batches)
        True
        >>> model.save_pretrained(folder)  # a plain LoRA adapter
    """
    config = read_given(config, "`attach`", "the call of `attach`")
    config = StructLoRAConfig.build(config, **overrides)
    return build_runtime(
        model, optimizer, config, parts, data=_data_of_loop(config, examples, batch_size), scaler=scaler
    )


def build_runtime(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: StructLoRAConfig,
    parts: Parts = DEFAULT_PARTS,
    quiet: str | None = None,
    steps: int | None = None,
    data: tuple[float, float] | None = None,
    scaler: GradScaler | None = None,
) -> Runtime:
    """Attach with a configuration that is built; see `attach`.

    Args:
        quiet (`str`, *optional*): why gates are off in this run; where omitted, `config.gates` decides.
        steps (`int`, *optional*): optimizer steps of the run, where they are known. Whether directions can be
            selected in them is for the caller to ask (`refuse_unreachable`), once it has loaded what the run goes on from.
        data (`tuple[float, float]`, *optional*): training examples, and those of one optimizer step.
        scaler (`torch.amp.GradScaler`, *optional*): see `attach`.
    """
    wrapped, (_, model) = model, find_peft_model(model, config)
    optimizer, found_scaler = _unwrapped_optimizer(optimizer)
    adapter_name = _adapter(model, config)
    start = start_of(model.peft_config[adapter_name])
    kinds = parts.discover(model, adapter_name)
    refuse_unmappable(kinds, config)
    select_step = _select_step(config, model.peft_config[adapter_name], steps)
    if steps is None:
        refuse_unreachable(config, select_step)
    quiet = "gates='off'" if config.gates == "off" else quiet
    forward = Forward()
    if quiet is None:
        gate = parts.gate or GATES[config.gates]
        build = partial(gate, openness=config.gate_openness, forward=forward)
        gated, silent = gates_of(model, kinds, adapter_name, build)
    else:
        gated, silent = [], {quiet: sum(len(kind.modules) for kind in kinds)}
    if config.keep is not None and not gated:
        raise StructLoRAError(
            f"keep={config.keep!r} and no gates to select by ({'; '.join(silent)})",
            "gates on some LoRA modules",
            "remove `keep`; `structlora export ADAPTER SMALL --keep 0.25 --data ROWS` makes the finished adapter smaller",
        )
    engine = select_engine(wrapped, optimizer, kinds)
    _detach_earlier(kinds)
    bottleneck = Bottleneck(*data, config.beta, config.gate_lr) if gated else None
    runtime = Runtime(
        model,
        kinds,
        config,
        engine,
        Gating(gated, bottleneck, engine, forward, scaler or found_scaler),
        quiet=silent,
        align=config.coordinator != "none" and config.align_init and start.is_drawn,
        moves_base=start.moves_base,
        parts=parts,
        frozen=_frozen_factors(model, adapter_name),
        select_step=select_step,
    )
    if world_size() > 1:
        try:
            refuse_disagreement(_facts(runtime), kinds[0].device)
        except StructLoRAError:
            runtime.detach()
            raise
    _warn_of_moved_base(adapter_name, model.peft_config[adapter_name], start)
    aligned = (
        "; one lora_A for all depths of a kind from now on: copy weights (a moving average, say) after this"
    )
    logger.info("%r%s", runtime, aligned if runtime.has_aligned else "")
    if runtime.is_off:
        logger.warning(
            "StructLoRA: gates, coordinator and `keep` are all off; this run trains as without StructLoRA: %s.",
            runtime.describe()[1],
        )
    return runtime


def _data_of_loop(
    config: StructLoRAConfig, examples: float | None, batch_size: float | None
) -> tuple[float, float] | None:
    """Return what a loop of one's own says of its data; None where no gate needs it."""
    if config.gates == "off":
        return None
    given = {"examples": examples, "batch_size": batch_size}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise StructLoRAError(
                f"{name}={value!r} in a run with gates, which learn by the number of training examples",
                "a number above 0",
                "call `attach(model, optimizer, examples=len(dataset), batch_size=16)`, where `batch_size` is of one optimizer "
                "step over all processes; of a language model, give answer tokens in place of rows; or set `gates='off'`",
            )
    if batch_size > examples:
        raise StructLoRAError(
            f"batch_size={batch_size} and examples={examples}",
            "no more examples in a step than there are",
            "correct one of them",
        )
    return float(examples), float(batch_size)


def _select_step(config: StructLoRAConfig, adapter: PeftConfig, steps: int | None) -> int | None:
    """Optimizer steps after which directions are selected; None where they are not."""
    if config.keep is None:
        return None
    if not start_of(adapter).is_zero:
        raise StructLoRAError(
            f"keep={config.keep!r} and init_lora_weights={adapter.init_lora_weights!r}, whose directions do not start at zero",
            "directions that start at zero, so that one may be closed",
            "choose `init_lora_weights=True`, or remove `keep`",
        )
    if config.select_at < 1 and steps is None:
        raise StructLoRAError(
            f"select_at={config.select_at}, a share of a run whose length is not known",
            "in a loop of your own, a number of optimizer steps",
            "set `select_at=100`, say",
        )
    return int(config.select_at) if config.select_at >= 1 else round(config.select_at * steps)


def refuse_unreachable(config: StructLoRAConfig, step: int | None, steps: int | None = None) -> None:
    """Stop where directions are to be selected before the first step of a run, or after its end.

    Args:
        step (`int`, *optional*): after which they are selected; None where they are not.
        steps (`int`, *optional*): of the run, where they are known.

    Raises:
        StructLoRAError: it names the option.
    """
    if step is None:
        return
    length = "" if steps is None else f" of a run of {steps} steps"
    found = f"keep={config.keep!r} and select_at={config.select_at}, which is step {step}{length}"
    if steps is not None and step >= steps:
        raise StructLoRAError(
            found,
            "a step before the end of the run",
            "lower `select_at`, or train for more steps",
        )
    if step < 1:
        raise StructLoRAError(
            found, "a step of training before it", "train for more steps, or raise `select_at`"
        )


def _warn_of_moved_base(adapter_name: str, adapter: PeftConfig, start: Start) -> None:
    """Say what the saved adapter goes with, where its start was taken out of the base weights.

    PEFT does not, and loads it onto the original base (0.21; `upstream/peft-lora-ga-on-load.md`).
    """
    if not start.moves_base:
        return
    convert = (
        f"before training, set `model.peft_config[{adapter_name!r}].init_lora_weights = True` and save the adapter to START; "
        "afterwards `model.save_pretrained(..., path_initial_model_for_weight_conversion=START)` writes a LoRA adapter for the "
        "original base"
    )
    save_base = "save the base too, as `model.unload()` leaves it"
    logger.warning(
        "init_lora_weights=%r moved part of the base weights into the adapter: what is saved belongs on the base as it is now, "
        "not on the original one (%s). To use it elsewhere: %s.",
        adapter.init_lora_weights,
        "PEFT repeats the move when it loads the adapter, vLLM does not"
        if start.is_repeated
        else "PEFT does not repeat the move",
        convert if start.is_converted else save_base,
    )


def find_peft_model(model: nn.Module, config: StructLoRAConfig) -> tuple[str, PeftModel | PeftMixedModel]:
    """The PEFT model that is trained, with its name in the model inside the wrappers of Accelerate, Fabric,
    DDP, DeepSpeed and `torch.compile`: "" where it is that model itself.

    Raises:
        StructLoRAError: there is none, or several and `peft_module` names none of them.
    """
    if not isinstance(model, nn.Module):
        raise StructLoRAError(
            f"an object of type {type(model).__name__} where the model is expected",
            "a model, and after it the optimizer that steps it",
            "call `attach(model, optimizer)`, in this order",
        )
    model = _unwrapped_model(model)
    found = {name: m for name, m in model.named_modules() if isinstance(m, (PeftModel, PeftMixedModel))}
    if config.peft_module in found:
        return config.peft_module, found[config.peft_module]
    if config.peft_module is not None:
        raise StructLoRAError(
            f"peft_module={config.peft_module!r} and a model without a PEFT model of that name",
            f"one of {', '.join(map(repr, found))}" if found else "a PEFT model inside the model",
            "correct `peft_module`",
        )
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        raise StructLoRAError(
            f"a {type(model).__name__} with {len(found)} PEFT models inside ({', '.join(map(repr, found))})",
            "one to train",
            f"name it with `peft_module`, as in peft_module={next(iter(found))!r}",
        )
    raise StructLoRAError(
        f"a model of type {type(model).__name__}",
        "a PEFT model with a LoRA adapter, or a module that holds one",
        "pass `peft_config=LoraConfig(...)` to the TRL trainer, or wrap the model with `peft.get_peft_model`",
    )


def _unwrapped_model(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of Accelerate, Fabric, DDP, DeepSpeed and `torch.compile`."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return _unwrapped_model(inner.module) if _is_of_lightning(inner) else inner


def _unwrapped_optimizer(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, GradScaler | None]:
    """Return the optimizer inside wrappers of Accelerate and Lightning, and the scaler that these step it with."""
    scaler = None
    while isinstance(optimizer, AcceleratedOptimizer) or _is_of_lightning(optimizer):
        strategy = getattr(optimizer, "_strategy", None)  # Lightning's
        precision = getattr(strategy, "precision", None) or getattr(strategy, "precision_plugin", None)
        scaler = getattr(optimizer, "scaler", None) or getattr(precision, "scaler", None) or scaler
        optimizer = optimizer.optimizer
    return optimizer, scaler


def _is_of_lightning(wrapper) -> bool:
    """Whether Lightning or its Fabric wrapped a model or an optimizer, told by module: two packages have
    them, and neither need be installed. An optimizer's wrapper is of a class made for it, so that only its
    bases tell.
    """
    wrappers = {f"{package}.wrappers" for package in ("lightning.fabric", "lightning_fabric")}
    wrappers |= {f"{package}.core.optimizer" for package in ("lightning.pytorch", "pytorch_lightning")}
    return any(cls.__module__ in wrappers for cls in type(wrapper).__mro__)


def _frozen_factors(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    factor = re.compile(rf"\.{FACTOR}\.{re.escape(adapter_name)}(\.|$)")
    return [p for name, p in model.named_parameters() if not p.requires_grad and factor.search(name)]


def _adapter(model: nn.Module, config: StructLoRAConfig) -> str:
    """The name of the adapter to train."""
    if any(c.peft_type == PeftType.XLORA for c in model.peft_config.values()):
        raise StructLoRAError(
            "an X-LoRA model", "a LoRA adapter to train", "use `LoraConfig` alone, and mix later"
        )
    name = config.adapter_name
    if name is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise StructLoRAError(
                f"{len(active)} active adapters ({', '.join(active)})",
                "one to train",
                "name it with `adapter_name`",
            )
        name = active[0]
    if name not in model.peft_config:
        raise StructLoRAError(
            f"no adapter '{name}'",
            f"one of {', '.join(map(repr, model.peft_config))}",
            "correct `adapter_name`",
        )
    if name not in model.active_adapters:
        raise StructLoRAError(
            f"adapter '{name}', which is not active ({', '.join(model.active_adapters)} is)",
            "an adapter that the model computes with",
            f"call `model.set_adapter('{name}')` before the optimizer is built, or set `adapter_name` to an active one",
        )
    lora = model.peft_config[name]
    if lora.peft_type != PeftType.VERA and not is_lora(lora):
        kind = getattr(lora.peft_type, "value", lora.peft_type)
        raise StructLoRAError(
            f"adapter '{name}' of PEFT type {kind}", "LORA or VERA", "use a `LoraConfig` or a `VeraConfig`"
        )
    if getattr(lora, "use_bdlora", None):  # PEFT 0.19 and later
        raise StructLoRAError(
            f"adapter '{name}' with `use_bdlora`, whose factors are block-diagonal",
            "full factors, so that a direction is a row of lora_A and a column of lora_B",
            "remove `use_bdlora`",
        )
    return name


def _detach_earlier(kinds: list[Kind]) -> None:
    """A run that nobody ended may still hold the adapter."""
    for runtime in Runtime.attached_to({id(p) for kind in kinds for p in kind.parameters}):
        logger.warning("StructLoRA was still attached to this adapter: that run ends here.")
        runtime.detach()


def _facts(runtime: Runtime) -> dict:
    """Return what all ranks must have in common."""
    return {
        "configuration": runtime.config.options(),
        "examples and batch_size": repr(runtime.gating.bottleneck),
        "engine": runtime.engine.name,
        "modules": {kind.name: [kind.modules, kind.shape] for kind in runtime.kinds},
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "structlora-trl": __version__},
        "weights": {name: norms.tolist() for name, norms in runtime.weight_norms().items()},
    }
