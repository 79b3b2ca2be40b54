"""From a PEFT model and an optimizer to a runtime: what StructLoRA can act on is checked here, once."""

from __future__ import annotations

import logging
import re
import weakref
from pathlib import Path

import peft
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from peft import PeftMixedModel, PeftModel, PeftType
from torch import nn

from . import __version__
from .config import StructLoRAConfig
from .core.heads import heads_of
from .core.kinds import FACTOR, Kind
from .core.mapping import DEFAULT_PARTS, Parts, refuse_unmappable
from .engines import select_engine
from .errors import StructLoRAError
from .model_card import describe_adapter
from .rank_check import refuse_disagreement, world_size
from .runtime import DEFAULT_SEED, Runtime
from .yaml_block import read_given

logger = logging.getLogger(__name__)

# LoRA initialisations that draw lora_A from one distribution at every depth. Others (EVA, say) put data into
# it.
_IDENTICALLY_DISTRIBUTED = (True, "gaussian")
# Those that start at ΔW = 0 because lora_B is zero.
_FROM_ZERO = (True, False, "gaussian", "eva")
# How the names begin of those that move base weights into the adapter. PEFT repeats some of them when it
# loads the adapter.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REPEATED = ("pissa", "olora", "loftq")

_attached: weakref.WeakSet[Runtime] = weakref.WeakSet()


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: StructLoRAConfig | dict | str | Path | None = None,
    *,
    parts: Parts = DEFAULT_PARTS,
    **overrides,
) -> Runtime:
    """Train StructLoRA in a custom PyTorch or Accelerate loop.

    Build the optimizer over the adapter first; then one call is all:

        runtime = attach(model, optimizer)

    From then on `optimizer.step()` steps latent factors, a forward under `model.train()` sees training
    weights, and a forward under `model.eval()` or any saving sees evaluation weights, a plain LoRA adapter.

    The call may change lora_A of a fresh adapter (B = 0): by default all depths of a kind of module get the
    same one. Code that keeps a copy of the weights, such as a moving average, has to copy them afterwards.

    Args:
        model (`PeftModel`): a model with a trainable LoRA adapter, or a module that holds one such model
            (`peft_module` names it where there are several).
        optimizer (`torch.optim.Optimizer`): owns all trainable LoRA parameters; Accelerate's wrapper is seen
            through.
        config (`StructLoRAConfig`, `dict`, `str` or `Path`, *optional*): options, or a YAML or JSON file that
            has them under the key `structlora`; defaults where omitted.
        parts (`Parts`, *optional*): filter, graph, coordinator, noise or kinds of your own, for research.
        **overrides: single options, as keywords.

    Returns:
        `Runtime`: for `metrics()`, `state_dict()`, `train()` / `eval()` and `detach()`.

    Raises:
        StructLoRAError: StructLoRA cannot act on this model and optimizer; the message says why and what to
            do.

    Example:
        >>> model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        >>> optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        >>> runtime = attach(model, optimizer, gate_init=0.8)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> runtime.step == len(batches)
        True
        >>> model.save_pretrained(folder)  # a plain LoRA adapter
    """
    config = read_given(config, "`attach`", "the call of `attach`")
    return build_runtime(model, optimizer, StructLoRAConfig.build(config, **overrides), DEFAULT_SEED, parts)


def build_runtime(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: StructLoRAConfig,
    seed: int,
    parts: Parts = DEFAULT_PARTS,
    quiet: str | None = None,
    steps: int | None = None,
) -> Runtime:
    """Attach with a configuration that is built, and the trainer's seed; see `attach`.

    Args:
        quiet (`str`, *optional*): why `noise='auto'` is off; where omitted, it is on.
        steps (`int`, *optional*): optimizer steps of the run, where they are known.
    """
    _refuse_ambient_state()
    wrapped, (_, model), optimizer = model, find_peft_model(model, config), _unwrapped_optimizer(optimizer)
    adapter_name, start = _adapter(model, config)
    kinds = parts.discover(model, adapter_name)
    if config.head_gates:
        for kind in kinds:
            kind.heads = heads_of(model, kind)
    refuse_unmappable(kinds, config)
    _refuse_without_groups(kinds, config, start)
    select_step = _select_step(config, start, steps)
    if config.filter == "random" and config.noise == "auto" and quiet is not None:
        raise StructLoRAError(
            f"filter='random' where the noise is off ({quiet})",
            "noise, of which the random filter is made",
            "set `noise='on'`, or choose filter='ib' or 'none'",
        )
    engine = select_engine(wrapped, optimizer, kinds)
    _detach_earlier(kinds, optimizer)
    runtime = Runtime(
        model,
        kinds,
        config,
        engine,
        seed,
        align=config.align_init and config.compares_depths and start in _IDENTICALLY_DISTRIBUTED,
        absorbs_base=start not in _FROM_ZERO,
        parts=parts,
        noise_off=quiet,
        frozen=_frozen_factors(model, adapter_name),
        readers=(model, model.base_model, model.base_model.model),
        select_step=select_step,
    )
    if world_size() > 1:
        try:
            refuse_disagreement(_facts(runtime), kinds[0].device)
        except StructLoRAError:
            runtime.detach()
            raise
    _attached.add(runtime)
    if not config.is_off:
        description = describe_adapter(model, adapter_name, config, runtime.lora_parameters())
        runtime.on_detach.append(description.end)
    _warn_of_moved_base(adapter_name, start)
    aligned = (
        "; one lora_A for all depths of a kind from now on: copy weights (a moving average, say) after this"
    )
    logger.info("%r%s", runtime, aligned if runtime.has_aligned else "")
    if config.is_off:
        logger.warning(
            "StructLoRA: filter, coordinator and regularizer are all 'none'; this run trains as without StructLoRA."
        )
    return runtime


def _refuse_without_groups(kinds: list[Kind], config: StructLoRAConfig, start: bool | str) -> None:
    """Stop where gates of heads or experts are asked for, and there are none to gate."""
    names = ", ".join(kind.name for kind in kinds)
    if config.head_gates and not any(kind.heads for kind in kinds):
        raise StructLoRAError(
            f"head_gates=True and no attention projection whose heads are known ({names})",
            "q, k, v or o projections with LoRA, in attention modules that tell a head's width (`head_dim`)",
            "adapt attention projections, or remove `head_gates`",
        )
    if config.expert_gates and not any(kind.is_expert for kind in kinds):
        raise StructLoRAError(
            f"expert_gates=True and no experts among the adapted modules ({names})",
            "experts of a mixture, as modules of their own or in one parameter (`target_parameters`)",
            "adapt experts, or remove `expert_gates`",
        )
    if config.head_gates and start not in _FROM_ZERO and any(k.heads and k.heads.side == "A" for k in kinds):
        raise StructLoRAError(
            f"head_gates=True and init_lora_weights={start!r}, with which an output projection's lora_A holds "
            "part of the base weights",
            "an adapter that starts at zero",
            "choose another initialisation, or adapt no output projection",
        )


def _select_step(config: StructLoRAConfig, start: bool | str, steps: int | None) -> int | None:
    """Optimizer steps after which directions are selected; None where they are not."""
    if config.keep is None:
        return None
    if start not in _FROM_ZERO:
        raise StructLoRAError(
            f"keep={config.keep!r} and init_lora_weights={start!r}, with which directions hold part of the base "
            "weights",
            "directions that start at zero, so that one may be closed",
            "choose another initialisation, or remove `keep`",
        )
    if config.select_at >= 1 or config.select_at == 0:
        return int(config.select_at)
    if steps is None:
        raise StructLoRAError(
            f"select_at={config.select_at}, a share of a run whose length is not known",
            "in a loop of your own, a number of optimizer steps",
            "set `select_at=100`, say",
        )
    return max(1, round(config.select_at * steps))


def _refuse_ambient_state() -> None:
    """Stop where tensors that are made now could not be trained, or hold nothing."""
    if torch.is_inference_mode_enabled():
        raise StructLoRAError(
            "`attach` under `torch.inference_mode()`, whose tensors autograd cannot use",
            "latents and gates that can be trained",
            "attach outside of it",
        )
    device = torch.get_default_device()
    if device.type == "meta":
        raise StructLoRAError(
            "`attach` under `torch.device('meta')`, where tensors hold no values",
            "latents and gates that can be trained",
            "attach outside of it, to a model with its weights loaded",
        )


def _warn_of_moved_base(adapter_name: str, init_lora_weights: bool | str) -> None:
    """Say what the saved adapter goes with, where its start was taken out of the base weights.

    PEFT does not, and loads it onto the original base (0.21; `upstream/peft-lora-ga-on-load.md`).
    """
    start = str(init_lora_weights).lower()
    if not start.startswith(_MOVES_BASE):
        return
    # PiSSA by random projections draws anew.
    repeated = start.startswith(_REPEATED) and not start.startswith("pissa_niter")
    convert = (
        f"before training, set `model.peft_config[{adapter_name!r}].init_lora_weights = True` and save the adapter to START; "
        "afterwards `model.save_pretrained(..., path_initial_model_for_weight_conversion=START)` writes a LoRA adapter for the "
        "original base"
    )
    save_base = "save the base too, as `model.unload()` leaves it"
    logger.warning(
        "init_lora_weights=%r moved part of the base weights into the adapter: what is saved belongs on the base as it is now, "
        "not on the original one (%s). To use it elsewhere: %s.",
        init_lora_weights,
        "PEFT repeats the move when it loads the adapter, vLLM does not"
        if repeated
        else "PEFT does not repeat the move",
        save_base if start == "loftq" else convert,
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
    if config.peft_module is not None:
        found = {name: m for name, m in found.items() if name == config.peft_module}
    if len(found) == 1:
        return next(iter(found.items()))
    if config.peft_module is not None:
        inside = [name for name, m in model.named_modules() if isinstance(m, (PeftModel, PeftMixedModel))]
        raise StructLoRAError(
            f"peft_module={config.peft_module!r} and a model without a PEFT model of that name",
            f"one of {', '.join(map(repr, inside))}" if inside else "a PEFT model inside the model",
            "correct `peft_module`",
        )
    if found:
        raise StructLoRAError(
            f"a {type(model).__name__} with {len(found)} PEFT models inside ({', '.join(found)})",
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


def _unwrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer) or _is_of_lightning(optimizer):
        optimizer = optimizer.optimizer
    return optimizer


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


def _adapter(model: nn.Module, config: StructLoRAConfig) -> tuple[str, bool | str]:
    """The name of the adapter to train, and how it was started: LoRA's `init_lora_weights`."""
    if any(c.peft_type == PeftType.XLORA for c in model.peft_config.values()):
        raise StructLoRAError(
            "an X-LoRA model, which trains the mixture of finished LoRA adapters and not their factors",
            "a LoRA adapter to train",
            "train each adapter with StructLoRA first, on a model with `LoraConfig` alone, then mix them",
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
    if lora.peft_type == PeftType.VERA:
        return name, True  # its scales start alike, and ΔW at zero
    if lora.peft_type != PeftType.LORA:  # AdaLoRA's configuration is a subclass of LoraConfig
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
    return name, lora.init_lora_weights


def _detach_earlier(kinds: list[Kind], optimizer: torch.optim.Optimizer) -> None:
    """A run that broke off may still hold the adapter, with training weights in place."""
    ours = {id(p) for kind in kinds for p in kind.B}
    for runtime in list(_attached):
        if not runtime.is_attached or ours.isdisjoint(id(p) for kind in runtime.kinds for p in kind.B):
            continue
        if runtime.engine.optimizer is optimizer:
            raise StructLoRAError(
                "StructLoRA already attached to this adapter and optimizer",
                "one attachment",
                "attach once, or `detach()` the first",
            )
        logger.warning(
            "StructLoRA was still attached to this adapter from an earlier run; its evaluation weights are taken over."
        )
        runtime.detach()


def _facts(runtime: Runtime) -> dict:
    """What all ranks must have in common."""
    latents = runtime.engine.read_latents(everything=True)
    sums = [part.sum() for factors in latents for part in factors]
    return {
        "configuration": runtime.config.options(),
        "seed": runtime.seed,
        "engine": runtime.engine.name,
        "modules": {kind.name: [kind.modules, kind.shape] for kind in runtime.kinds},
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "structlora-trl": __version__},
        "latent weights": [float(total) for total in runtime.engine.slices[0].sums(sums)],
    }
