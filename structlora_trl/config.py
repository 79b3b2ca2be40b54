"""Every option in one dataclass. A field's help is its manual, in Python, YAML and on the command line."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from .errors import StructLoRAError

ROLES = ("read", "write")


class Allowed(NamedTuple):
    """Which values an option takes, and the words for them."""

    accepts: Callable[[Any], bool]
    meaning: str


def _number(accepts: Callable[[float], bool], meaning: str) -> Allowed:
    # bool is an int in Python
    return Allowed(lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and accepts(v), meaning)


def _whole(low: int, high: float = math.inf) -> Allowed:
    meaning = (
        f"a whole number of {low} or more" if high == math.inf else f"a whole number from {low} to {high}"
    )
    return Allowed(lambda v: type(v) is int and low <= v <= high, meaning)


POSITIVE = _number(lambda v: 0 < v < math.inf, "a number above 0")
NOT_NEGATIVE = _number(lambda v: 0 <= v < math.inf, "a number of 0 or more")
RATE = Allowed(lambda v: v is None or NOT_NEGATIVE.accepts(v), f"{NOT_NEGATIVE.meaning}, or None")
OPENNESS = _number(lambda v: 0.02 <= v <= 0.999, "a number from 0.02 to 0.999")
COSINE = _number(lambda v: -1 <= v < 1, "a cosine of -1 or more and below 1")
KEEP = Allowed(
    lambda v: v is None or _share(v) is not None,
    "a share of the directions above 0 and at most 1, or a share of the nats as '99%', or None",
)
ADAPTER = Allowed(lambda v: v is None or isinstance(v, str), "the name of an adapter, or None")
MODULE = Allowed(lambda v: v is None or isinstance(v, str), "the name of a module, or None")
ROLE_OF_PATTERN = Allowed(
    lambda v: v is None or (isinstance(v, dict) and all(role in ROLES for role in v.values())),
    "a mapping from module pattern to 'read' or 'write'",
)
LARGEST_DEFAULT_RATE = 0.01  # of the coordinator
WITH_COORDINATOR = "acts on nothing without a coordinator"
WITH_SEMANTIC_EDGES = "acts on nothing without semantic edges"
WITH_SELECTION = "acts on nothing where nothing is selected"
WITH_GATES = "acts on nothing without gates"


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class StructLoRAConfig:
    """The options of StructLoRA (arXiv 2603.14228).

    Raises:
        StructLoRAError: a value is out of range or misspelt; the message names the field and what is allowed.

    Example:
        >>> config = StructLoRAConfig(beta=0.5, coordinator="gat")
        >>> StructLoRAConfig.build(config, keep=0.25).beta
        0.5

    Args:
    """

    gates: Literal["gaussian", "gumbel", "off"] = _option(
        "gaussian",
        "Gates of rank-one directions, learned under the information bottleneck: each example's activation of a direction is "
        "multiplied by noise of mean 1, whose size the gate learns. 'gaussian', or 'gumbel' (Gumbel-Softmax, as in the paper). "
        "They are off, and the start line says so, in trainers that switch dropout off or train on samples of their own policy "
        "(TRL's DPO, KTO, Reward, GRPO, RLOO, ...), in fused LoRA kernels, and on modules whose lora_A no hook reaches. 'off': "
        "no gates.",
    )
    beta: Annotated[float, NOT_NEGATIVE, WITH_GATES] = _option(
        1.0,
        "Price of a nat that a gate lets through, in units of the bound on the evidence of the training labels. More closes "
        "gates further: stronger regularisation, and fewer directions that carry the task.",
    )
    gate_openness: Annotated[float, OPENNESS, WITH_GATES] = _option(
        0.97,
        "Openness of each gate at the start, 1 / (1 + variance of its noise). Nearer to 1 is gentler in runs of few epochs.",
    )
    gate_lr: Annotated[float, NOT_NEGATIVE, WITH_GATES] = _option(
        1.0,
        "How far gates move in an epoch: the rate of gradient descent on N * loss + beta * nats, N the number of training "
        "labels. 0: gates keep the openness that they start with.",
    )
    keep: Annotated[float | str | None, KEEP, WITH_GATES] = _option(
        None,
        "Hard selection while training: how many rank-one directions of the whole model are kept, the most open ones: a share "
        "of them (0.25), or as many as carry a share of the nats ('99%'). The others are closed for good: exact zeros. None: "
        "nothing is selected.",
    )
    select_at: Annotated[float, POSITIVE, WITH_SELECTION] = _option(
        0.5, "When directions are selected: a share of the run's steps below 1, or a number of steps."
    )
    coordinator: Literal["none", "gcn", "gat"] = _option(
        "gcn",
        "Graph network that coordinates updates across depth: 'gcn', as in the paper, 'gat' (attention over the same edges) "
        "or 'none'. No difference in accuracy with and without it has been shown.",
    )
    coordinator_layers: Annotated[int, _whole(1, 3), WITH_COORDINATOR] = _option(
        1, "Message-passing layers, 1 to 3. The paper finds 1 best: more over-smooth."
    )
    coordinator_lr: Annotated[float | None, RATE, WITH_COORDINATOR] = _option(
        None,
        "Learning rate of the coordinator's weights at the peak of the trainer's schedule, which it follows. None: that of the "
        "LoRA parameters, at most 0.01.",
    )
    side: Annotated[Literal["auto", "read", "write", "both"], WITH_COORDINATOR] = _option(
        "auto",
        "Which factor is coordinated. 'auto': lora_A of modules that read the residual stream, lora_B of those that "
        "write it; 'read': lora_A everywhere; 'write': lora_B everywhere; 'both': both factors, the paper's literal reading. "
        "Of VeRA it is always λ_d, whose entries stand for the same directions in every module.",
    )
    edges: Annotated[Literal["hybrid", "adjacency", "similarity"], WITH_COORDINATOR] = _option(
        "hybrid",
        "Edges of the depth graph: 'adjacency' (neighbours in depth), 'similarity' (semantic edges alone) or 'hybrid' (both).",
    )
    semantic_top_k: Annotated[int, _whole(1), WITH_COORDINATOR, WITH_SEMANTIC_EDGES] = _option(
        2, "Semantic edges each node may ask for."
    )
    semantic_threshold: Annotated[float, COSINE, WITH_COORDINATOR, WITH_SEMANTIC_EDGES] = _option(
        0.5, "Cosine of running-mean gradients above which a semantic edge is drawn."
    )
    align_init: Annotated[bool, WITH_COORDINATOR] = _option(
        True,
        "Start a fresh adapter with the same lora_A at every depth of a kind. Outputs are unchanged; a warm or data-driven "
        "initialisation is never touched.",
    )
    roles: Annotated[dict | str | None, ROLE_OF_PATTERN] = _option(
        None,
        "Module pattern -> 'read' or 'write' (a mapping, or JSON of one), for modules the built-in table does not know. "
        "Patterns match the end of a module's name, as in PEFT's `rank_pattern`.",
    )
    adapter_name: Annotated[str | None, ADAPTER] = _option(None, "Adapter to train. None: the active one.")
    peft_module: Annotated[str | None, MODULE] = _option(
        None,
        "Name of the submodule that is the PEFT model to train, in a model that holds several (towers of a bi-encoder, say). "
        "None: the model itself, or the only PEFT model inside it.",
    )

    def __post_init__(self):
        for option in fields(StructLoRAConfig):
            value = getattr(self, option.name)
            if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
                setattr(self, option.name, value.item())
        if isinstance(self.gates, bool):  # YAML 1.1, which PyYAML follows, reads `on` and `off` as these
            self.gates = "gaussian" if self.gates else "off"
        if isinstance(self.roles, str):
            try:
                self.roles = json.loads(self.roles)
            except json.JSONDecodeError:
                self._refuse("roles", self.roles, Allowed(bool, "a mapping, or JSON of one"))
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if not allowed.accepts(value):
                near = difflib.get_close_matches(str(value), _CHOICES.get(name, ()), 1)
                self._refuse(name, value, allowed, f" (did you mean '{near[0]}'?)" if near else "")
        self._refuse_what_acts_on_nothing()

    def _refuse_what_acts_on_nothing(self):
        idle = {}  # mark -> what keeps such options from acting, what they need, and the remedy
        if self.coordinator == "none":
            idle[WITH_COORDINATOR] = "coordinator='none'", "a coordinator", "remove `coordinator='none'`"
        if self.edges == "adjacency":
            idle[WITH_SEMANTIC_EDGES] = "edges='adjacency'", "semantic edges", "remove `edges='adjacency'`"
        if self.keep is None:
            idle[WITH_SELECTION] = "keep=None", "a selection", "set `keep`"
        if self.gates == "off":
            idle[WITH_GATES] = "gates='off'", "gates", "remove `gates='off'`"
        for name, value in self.changed_options().items():
            for mark in idle.keys() & set(_marks(name)):
                cause, needed, remedy = idle[mark]
                raise StructLoRAError(
                    f"{name}={value!r} and {cause}",
                    f"{needed} for `{name}` to act on",
                    f"{remedy}, or remove `{name}`",
                )

    @staticmethod
    def _refuse(name: str, value, allowed: Allowed, hint: str = ""):
        raise StructLoRAError(
            f"{name}={value!r} in the configuration{hint}", allowed.meaning, f"correct `{name}`"
        )

    @classmethod
    def build(cls, config: StructLoRAConfig | dict | None = None, **overrides) -> StructLoRAConfig:
        """A configuration from another one (or a mapping) plus keyword overrides.

        Raises:
            StructLoRAError: an unknown option; the message names the nearest known one. Or `config` is neither
                a configuration nor a mapping.
        """
        if isinstance(config, StructLoRAConfig):
            config = config.options()
        if config is not None and not isinstance(config, Mapping):
            raise StructLoRAError(
                f"{config!r} where StructLoRA's options are expected",
                "a `StructLoRAConfig`, or a mapping of options to values",
                "pass `StructLoRAConfig(...)`, a dict such as {'beta': 0.5}, or the options as keywords",
            )
        options = {**(config or {}), **overrides}
        known = [f.name for f in fields(StructLoRAConfig)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1, 0.7)
                remedy = f"write `{near[0]}`" if near else "remove it"
                raise StructLoRAError(f"an unknown option `{name}`", f"one of {', '.join(known)}", remedy)
        return StructLoRAConfig(**options)

    def coordinator_rate(self, current: float, peak: float) -> float:
        """Return the learning rate of the coordinator's weights, where that of the LoRA parameters is `current`, and its
        schedule's peak is `peak`.
        """
        # The cap is for optimizers whose rates have another unit than AdamW's: SGD, Prodigy, Adafactor with relative steps.
        at_peak = min(peak, LARGEST_DEFAULT_RATE) if self.coordinator_lr is None else self.coordinator_lr
        return at_peak * current / peak if peak else 0.0

    def options(self) -> dict:
        """Name and value of each option."""
        return {f.name: getattr(self, f.name) for f in fields(StructLoRAConfig)}

    def changed_options(self) -> dict:
        """Name and value of each option that is not at its default."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(StructLoRAConfig)
            if getattr(self, f.name) != f.default
        }


ENOUGH_INFORMATION = 0.9  # a share of the information below which an adapter loses much of what it learned


def share_to_keep(keep: float | str) -> tuple[float, bool]:
    """A share above 0 and at most 1, and whether it is of the information ('99%') and not of the directions (0.25).

    Raises:
        StructLoRAError: `keep` is neither.
    """
    share = _share(keep)
    if share is None:
        raise StructLoRAError(
            f"`keep` {keep}",
            "a share of the directions above 0 and at most 1, or of the information as 99%",
            "try 0.25",
        )
    return share


def _share(keep: float | str) -> tuple[float, bool] | None:
    number = re.fullmatch(r"(\d+\.?\d*(e-?\d+)?|\.\d+)(%?)", str(keep).strip())
    value = float(number[1]) / (100 if number[3] else 1) if number else 0.0
    return (value, bool(number[3])) if 0 < value <= 1 else None


_TYPES = get_type_hints(StructLoRAConfig)
_HINTS = get_type_hints(StructLoRAConfig, include_extras=True)
_CHOICES = {name: get_args(type_) for name, type_ in _TYPES.items() if get_origin(type_) is Literal}


def _marks(name: str) -> tuple:
    """What stands beside the type of an option."""
    return get_args(_HINTS[name])[1:] if get_origin(_HINTS[name]) is Annotated else ()


def _allowed(name: str) -> Allowed:
    if name in _CHOICES:
        return Allowed(lambda v: v in _CHOICES[name], f"one of {', '.join(map(repr, _CHOICES[name]))}")
    if _TYPES[name] is bool:
        return Allowed(lambda v: type(v) is bool, "True or False")
    return next(mark for mark in _marks(name) if isinstance(mark, Allowed))


_ALLOWED = {f.name: _allowed(f.name) for f in fields(StructLoRAConfig)}


def _type_name(name: str) -> str:
    type_ = str if name in _CHOICES else _TYPES[name]
    return getattr(type_, "__name__", str(type_)) if get_origin(type_) is None else str(type_)


# Dedented by hand, as Python 3.13 does it.
StructLoRAConfig.__doc__ = inspect.cleandoc(StructLoRAConfig.__doc__) + "".join(
    f"\n    {f.name} (`{_type_name(f.name)}`, *optional*, defaults to `{f.default!r}`):\n        {f.metadata['help']}"
    for f in fields(StructLoRAConfig)
)
