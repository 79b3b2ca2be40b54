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
PROBABILITY = _number(lambda v: 0 < v < 1, "a probability above 0 and below 1")
COSINE = _number(lambda v: -1 <= v < 1, "a cosine of -1 or more and below 1")
DECAY = _number(lambda v: 0 <= v < 1, "a number of 0 or more and below 1")
KEEP = Allowed(
    lambda v: v is None or _share(v) is not None,
    "a share of the directions above 0 and at most 1, or a share of the information as '99%', or None",
)
SEED = Allowed(lambda v: v is None or (type(v) is int and v >= 0), "a whole number of 0 or more, or None")
ADAPTER = Allowed(lambda v: v is None or isinstance(v, str), "the name of an adapter, or None")
MODULE = Allowed(lambda v: v is None or isinstance(v, str), "the name of a module, or None")
ROLE_OF_PATTERN = Allowed(
    lambda v: v is None or (isinstance(v, dict) and all(role in ROLES for role in v.values())),
    "a mapping from module pattern to 'read' or 'write'",
)
WITH_COORDINATOR = "acts on nothing without a coordinator"
WITH_SELECTION = "acts on nothing where nothing is selected"
WITH_COMPARISON = "acts on nothing where no depths are compared"


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class StructLoRAConfig:
    """The options of StructLoRA (arXiv 2603.14228).

    Raises:
        StructLoRAError: a value is out of range or misspelt; the message names the field and what is allowed.

    Example:
        >>> config = StructLoRAConfig(gate_init=0.8, coordinator="gat")
        >>> StructLoRAConfig.build(config, prior=0.3).gate_init
        0.8

    Args:
    """

    filter: Literal["ib", "random", "topk_norm", "none"] = _option(
        "ib",
        "How rank-one directions are filtered. 'ib': learned information-bottleneck gates with binary-concrete noise; "
        "'random': each direction kept with probability `gate_init`, drawn again in each step; 'topk_norm': the "
        "int(gate_init * r) directions of largest norm are kept, at least one; 'none': no gates.",
    )
    temperature: Annotated[float, POSITIVE] = _option(
        0.3, "Temperature of the binary-concrete gates. Lower is closer to 0/1 gates."
    )
    noise: Literal["auto", "on", "off"] = _option(
        "auto",
        "Whether training weights have noisy gates. 'off': expected gates in training too, which still learn; training "
        "weights are then the evaluation weights. 'auto': 'off' in trainers that switch dropout off or train on samples of "
        "their own policy (TRL's DPO, KTO, Reward, GRPO, RLOO, ...), else 'on'.",
    )
    hard_gates: bool = _option(False, "Round training gates to 0 or 1, with a straight-through gradient.")
    gate_init: Annotated[float, PROBABILITY] = _option(
        0.9,
        "Probability that a direction is open at the start. For 'random' and 'topk_norm', the share kept.",
    )
    prior: Annotated[float, PROBABILITY] = _option(
        0.5, "Prior probability that a direction is open, in the KL term."
    )
    kl_weight: Annotated[float, NOT_NEGATIVE] = _option(
        0.1,
        "Weight of the mean KL between gates and prior (the paper's lambda_IB * beta). Gradient clipping does not scale it.",
    )
    label_weight: Annotated[float, NOT_NEGATIVE] = _option(
        1.0, "Weight of the task gradient that reaches the gate logits (the paper's gamma)."
    )
    gate_lr: Annotated[float, NOT_NEGATIVE] = _option(
        0.03, "Learning rate of the gate logits at the peak of the trainer's schedule, which it follows."
    )
    keep: Annotated[float | str | None, KEEP] = _option(
        None,
        "Hard selection while training: how many rank-one directions of the whole model are kept, as a share of them (0.25), "
        "or as the share of information that those kept carry ('99%'). The others are closed for good: exact zeros. None: "
        "nothing is selected.",
    )
    select_at: Annotated[float, NOT_NEGATIVE, WITH_SELECTION] = _option(
        0.5,
        "When directions are selected: a share of the run's steps below 1, or a number of steps. Information is gathered over "
        "the second half of the steps before.",
    )
    select_by: Annotated[Literal["information", "random"], WITH_SELECTION] = _option(
        "information",
        "What is kept: 'information', the directions whose gates the labels hold most information about (the Fisher "
        "information of the gate); 'random', the control that the paper compares with, drawn once from `seed`.",
    )
    share_gates: bool = _option(False, "Learn one gate vector per kind of module instead of one per module.")
    head_gates: bool = _option(
        False,
        "One more learned gate for each attention head of q, k, v and o projections (the paper's future work).",
    )
    expert_gates: bool = _option(
        False,
        "One more learned gate for each expert of a mixture, in each of its modules (the paper's future work).",
    )
    coordinator: Literal["none", "gcn", "gat"] = _option(
        "gcn",
        "Graph network that coordinates updates across depth: 'gcn', as in the paper, 'gat' (attention over the same edges) "
        "or 'none'. In our benchmarks accuracy with and without it does not differ beyond noise.",
    )
    coordinator_layers: Annotated[int, _whole(1, 3), WITH_COORDINATOR] = _option(
        1, "Message-passing layers, 1 to 3. The paper finds 1 best: more over-smooth."
    )
    side: Annotated[Literal["auto", "read", "write", "both"], WITH_COMPARISON] = _option(
        "auto",
        "Which factor is coordinated. 'auto': lora_A of modules that read the residual stream, lora_B of those that "
        "write it; 'read': lora_A everywhere; 'write': lora_B everywhere; 'both': both factors, the paper's literal reading. "
        "Of VeRA it is always λ_d, whose entries stand for the same directions in every module.",
    )
    activation: Annotated[Literal["tanh", "gelu", "silu", "identity"], WITH_COORDINATOR] = _option(
        "tanh",
        "Nonlinearity of message passing. Each passes through 0 with a slope, so that weights that start at 0 can learn "
        "(ReLU would not).",
    )
    coordinator_lr: Annotated[float, NOT_NEGATIVE, WITH_COORDINATOR] = _option(
        0.01,
        "Learning rate of the coordinator's weights at the peak of the trainer's schedule, which it follows.",
    )
    edges: Annotated[Literal["hybrid", "adjacency", "similarity"], WITH_COORDINATOR] = _option(
        "hybrid",
        "Edges of the depth graph: 'adjacency' (neighbours in depth), 'similarity' (semantic edges alone) or 'hybrid' (both).",
    )
    semantic_top_k: Annotated[int, _whole(1), WITH_COORDINATOR] = _option(
        2, "Semantic edges each node may ask for."
    )
    semantic_threshold: Annotated[float, COSINE, WITH_COORDINATOR] = _option(
        0.5, "Cosine of running-mean gradients above which a semantic edge is drawn."
    )
    semantic_every: Annotated[int, _whole(1), WITH_COORDINATOR] = _option(
        10, "Optimizer steps between rebuilds of the semantic edges."
    )
    semantic_decay: Annotated[float, DECAY, WITH_COORDINATOR] = _option(
        0.9, "Decay of the running mean of gradients that semantic edges compare."
    )
    align_init: bool = _option(
        True,
        "Where depths are compared (a coordinator or a regularizer acts), start a fresh adapter with the same lora_A at every "
        "depth of a kind. Outputs are unchanged; a warm or data-driven initialisation is never touched.",
    )
    regularizer: Literal["none", "cosine", "laplacian"] = _option(
        "none",
        "Static regulariser the paper compares with, on the latent updates of neighbouring depths: 'cosine' (LoRA+Cos), "
        "'laplacian' (LoRA+Laplacian) or 'none'.",
    )
    regularizer_weight: Annotated[float, POSITIVE] = _option(0.1, "Weight of the static regulariser.")
    roles: Annotated[dict | str | None, ROLE_OF_PATTERN] = _option(
        None,
        "Module pattern -> 'read' or 'write' (a mapping, or JSON of one), for modules the built-in table does not know. "
        "Patterns match the end of a module's name, as in PEFT's `rank_pattern`.",
    )
    seed: Annotated[int | None, SEED] = _option(
        None, "Seed of the gate noise. None: the trainer's seed, or 42 in a custom loop."
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
        if isinstance(self.noise, bool):  # YAML 1.1, which PyYAML follows, reads `on` and `off` as these
            self.noise = "on" if self.noise else "off"
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
        if self.filter == "random" and self.noise == "off":
            raise StructLoRAError(
                "filter='random' and noise='off'",
                "noise, of which the random filter is made",
                "remove `noise`, or choose filter='ib' or 'none'",
            )
        for name in ("head_gates", "expert_gates"):
            if getattr(self, name) and self.filter != "ib":
                raise StructLoRAError(
                    f"{name}=True and filter={self.filter!r}",
                    "learned gates, of which these are more",
                    f"set `filter='ib'`, or remove `{name}`",
                )
        if self.keep is not None and self.select_by == "information" and self.select_at == 0:
            raise StructLoRAError(
                "select_at=0 and select_by='information'",
                "steps before the selection, in which information is gathered",
                "raise `select_at`, or set `select_by='random'`",
            )
        without = "coordinator='none'", "a coordinator", "remove `coordinator='none'`"
        idle = {}  # mark -> what keeps such options from acting, what they need, and the remedy
        if self.coordinator == "none":
            idle[WITH_COORDINATOR] = without
        if not self.compares_depths:
            idle[WITH_COMPARISON] = without
        if self.keep is None:
            idle[WITH_SELECTION] = "keep=None", "a selection", "set `keep`"
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
                "pass `StructLoRAConfig(...)`, a dict such as {'gate_init': 0.8}, or the options as keywords",
            )
        options = {**(config or {}), **overrides}
        known = [f.name for f in fields(StructLoRAConfig)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                remedy = f"write `{near[0]}`" if near else "remove it"
                raise StructLoRAError(f"an unknown option `{name}`", f"one of {', '.join(known)}", remedy)
        return StructLoRAConfig(**options)

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

    @property
    def is_off(self) -> bool:
        """Whether nothing acts: this is plain LoRA."""
        return not self.filters_directions and self.coordinator == "none" and self.regularizer == "none"

    @property
    def filters_directions(self) -> bool:
        """Whether a filter or a selection acts on lora_B."""
        return self.filter != "none" or self.keep is not None

    @property
    def compares_depths(self) -> bool:
        """Whether some part relates one depth to another, and so needs to know which factor is comparable."""
        return self.coordinator != "none" or self.regularizer != "none"


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
