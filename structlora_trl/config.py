"""Every option of StructLoRA, in one dataclass. Each field's help is its manual, in Python, YAML and on the command line."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from .errors import StructLoRAError

CHOICES = {
    "filter": ("ib", "random", "topk_norm", "none"),
    "noise": ("auto", "on", "off"),
    "coordinator": ("none", "gcn", "gat"),
    "side": ("auto", "read", "write", "both"),
    "activation": ("tanh", "gelu", "silu", "identity"),
    "edges": ("hybrid", "adjacency", "similarity"),
    "regularizer": ("none", "cosine", "laplacian"),
}
ROLES = ("read", "write")

# name -> (test, what the value must be); bool is an int in Python, so it is refused apart
_RANGES = {
    "temperature": (lambda v: 0 < v < math.inf, "a number above 0"),
    "gate_init": (lambda v: 0 < v < 1, "a probability above 0 and below 1"),
    "prior": (lambda v: 0 < v < 1, "a probability above 0 and below 1"),
    "kl_weight": (lambda v: 0 <= v < math.inf, "a number of 0 or more"),
    "label_weight": (lambda v: 0 <= v < math.inf, "a number of 0 or more"),
    "gate_lr": (lambda v: 0 <= v < math.inf, "a number of 0 or more"),
    "coordinator_lr": (lambda v: 0 <= v < math.inf, "a number of 0 or more"),
    "semantic_threshold": (lambda v: -1 <= v < 1, "a cosine of -1 or more and below 1"),
    "semantic_decay": (lambda v: 0 <= v < 1, "a number of 0 or more and below 1"),
    "regularizer_weight": (lambda v: 0 < v < math.inf, "a number above 0"),
}
_WHOLE_NUMBERS = {"coordinator_layers": (1, 3), "semantic_top_k": (1, None), "semantic_every": (1, None)}
# Act on nothing without a coordinator.
_OF_THE_COORDINATOR = (
    *("coordinator_layers", "activation", "coordinator_lr", "edges"),
    *("semantic_top_k", "semantic_threshold", "semantic_every", "semantic_decay"),
)
_FLAGS = ("hard_gates", "share_gates", "align_init")


def _option(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class StructLoRAConfig:
    """The options of StructLoRA (arXiv 2603.14228).

    Raises:
        StructLoRAError: a value is out of range or misspelt; the message names the field and what is allowed.

    Example:
        >>> config = StructLoRAConfig(gate_init=0.8, coordinator="gcn")
        >>> StructLoRAConfig.build(config, prior=0.3).gate_init
        0.8

    Args:
    """

    filter: str = _option(
        "ib",
        "How rank-one directions are filtered. 'ib': learned information-bottleneck gates with binary-concrete noise; "
        "'random': each direction kept with probability `gate_init`, drawn anew each step; 'topk_norm': the "
        "int(gate_init * r) directions of largest norm are kept, at least one; 'none': no gates.",
        choices=CHOICES["filter"],
    )
    temperature: float = _option(0.3, "Temperature of the binary-concrete gates. Lower is closer to 0/1 gates.")
    noise: str = _option(
        "auto",
        "Whether training weights have noisy gates. 'off': expected gates in training too, which still learn; training "
        "weights are then the evaluation weights. 'auto': 'off' in trainers that switch dropout off or train on samples of "
        "their own policy (TRL's DPO, KTO, Reward, GRPO, RLOO, ...), else 'on'.",
        choices=CHOICES["noise"],
    )
    hard_gates: bool = _option(False, "Round training gates to 0 or 1, with a straight-through gradient.")
    gate_init: float = _option(
        0.9, "Probability that a direction is open at the start. For 'random' and 'topk_norm', the share kept."
    )
    prior: float = _option(0.5, "Prior probability that a direction is open, in the KL term.")
    kl_weight: float = _option(
        0.1,
        "Weight of the mean KL between gates and prior (the paper's lambda_IB * beta). Gradient clipping does not scale it.",
    )
    label_weight: float = _option(1.0, "Weight of the task gradient that reaches the gate logits (the paper's gamma).")
    gate_lr: float = _option(
        0.03, "Learning rate of the gate logits at the peak of the trainer's schedule, which it follows."
    )
    share_gates: bool = _option(False, "Learn one gate vector per kind of module instead of one per module.")
    coordinator: str = _option(
        "none",
        "Graph network that coordinates updates across depth: 'gcn', as in the paper, 'gat' (attention over the same edges) "
        "or 'none'. It is off by default because in our benchmarks accuracy is the same with it, and a step costs more.",
        choices=CHOICES["coordinator"],
    )
    coordinator_layers: int = _option(1, "Message-passing layers, 1 to 3. The paper finds 1 best: more over-smooth.")
    side: str = _option(
        "auto",
        "Which factor is coordinated. 'auto': lora_A of modules that read the residual stream, lora_B of those that "
        "write it; 'read': lora_A everywhere; 'write': lora_B everywhere; 'both': both factors, the paper's literal reading.",
        choices=CHOICES["side"],
    )
    activation: str = _option(
        "tanh",
        "Nonlinearity of message passing. Each passes through 0 with a slope, so that weights that start at 0 can learn "
        "(ReLU would not).",
        choices=CHOICES["activation"],
    )
    coordinator_lr: float = _option(
        0.01, "Learning rate of the coordinator's weights at the peak of the trainer's schedule, which it follows."
    )
    edges: str = _option(
        "hybrid",
        "Edges of the depth graph: 'adjacency' (neighbours in depth), 'similarity' (semantic edges alone) or 'hybrid' (both).",
        choices=CHOICES["edges"],
    )
    semantic_top_k: int = _option(2, "Semantic edges each node may ask for.")
    semantic_threshold: float = _option(0.5, "Cosine of running-mean gradients above which a semantic edge is drawn.")
    semantic_every: int = _option(10, "Optimizer steps between rebuilds of the semantic edges.")
    semantic_decay: float = _option(0.9, "Decay of the running mean of gradients that semantic edges compare.")
    align_init: bool = _option(
        True,
        "Where depths are compared (a coordinator or a regularizer acts), start a fresh adapter with the same lora_A at every "
        "depth of a kind. Outputs are unchanged; a warm or data-driven initialisation is never touched.",
    )
    regularizer: str = _option(
        "none",
        "Static regulariser the paper compares with, on the latent updates of neighbouring depths: 'cosine' (LoRA+Cos), "
        "'laplacian' (LoRA+Laplacian) or 'none'.",
        choices=CHOICES["regularizer"],
    )
    regularizer_weight: float = _option(0.1, "Weight of the static regulariser.")
    roles: dict | str | None = _option(
        None,
        "Module pattern -> 'read' or 'write' (a mapping, or JSON of one), for modules the built-in table does not know. "
        "Patterns match the end of a module's name, as in PEFT's `rank_pattern`.",
    )
    seed: int | None = _option(None, "Seed of the gate noise. None: the trainer's seed, or 42 in a custom loop.")
    adapter_name: str | None = _option(None, "Adapter to train. None: the active one.")

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                near = difflib.get_close_matches(str(value), allowed, 1)
                hint = f" (did you mean '{near[0]}'?)" if near else ""
                self._refuse(name, value, f"one of {', '.join(repr(a) for a in allowed)}", hint)
        for name, (accepts, meaning) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not accepts(value):
                self._refuse(name, value, meaning)
        for name, (low, high) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if type(value) is not int or value < low or (high is not None and value > high):
                self._refuse(
                    name, value, f"a whole number from {low} to {high}" if high else f"a whole number of {low} or more"
                )
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                self._refuse(name, getattr(self, name), "True or False")
        self._refuse_what_acts_on_nothing()
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            self._refuse("seed", self.seed, "a whole number of 0 or more, or None")
        if self.adapter_name is not None and not isinstance(self.adapter_name, str):
            self._refuse("adapter_name", self.adapter_name, "the name of an adapter, or None")
        if isinstance(self.roles, str):
            try:
                self.roles = json.loads(self.roles)
            except json.JSONDecodeError:
                self._refuse("roles", self.roles, "a mapping, or JSON of one")
        if self.roles is not None:
            if not isinstance(self.roles, dict) or any(role not in ROLES for role in self.roles.values()):
                self._refuse("roles", self.roles, "a mapping from module pattern to 'read' or 'write'")

    def _refuse_what_acts_on_nothing(self):
        if self.filter == "random" and self.noise == "off":
            raise StructLoRAError(
                "filter='random' and noise='off'",
                "noise, of which the random filter is made",
                "remove `noise`, or choose filter='ib' or 'none'",
            )
        idle = _OF_THE_COORDINATOR if self.coordinator == "none" else ()
        idle += () if self.compares_depths else ("side",)
        for option in fields(StructLoRAConfig):
            name, value = option.name, getattr(self, option.name)
            if name in idle and value != option.default:
                raise StructLoRAError(
                    f"{name}={value!r} and coordinator='none'",
                    f"a coordinator for `{name}` to act on",
                    f"set `coordinator='gcn'` (the paper's), or remove `{name}`",
                )

    @staticmethod
    def _refuse(name: str, value, allowed: str, hint: str = ""):
        raise StructLoRAError(f"{name}={value!r} in the configuration{hint}", allowed, f"correct `{name}`")

    @classmethod
    def build(cls, config: StructLoRAConfig | dict | None = None, **overrides) -> StructLoRAConfig:
        """A configuration from another one (or a mapping) plus keyword overrides.

        Raises:
            StructLoRAError: an unknown option; the message names the nearest known one.
        """
        if isinstance(config, StructLoRAConfig):
            config = config.options()
        options = {**(config or {}), **overrides}
        cls.refuse_unknown(options)
        return StructLoRAConfig(**options)

    @staticmethod
    def refuse_unknown(names: Iterable[str]) -> None:
        """Stop at a name that is no option.

        Raises:
            StructLoRAError: the message names the nearest known one.
        """
        known = [f.name for f in fields(StructLoRAConfig)]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                remedy = f"write `{near[0]}`" if near else "remove it"
                raise StructLoRAError(f"an unknown option `{name}`", f"one of {', '.join(known)}", remedy)

    def options(self) -> dict:
        """Name and value of each option; of a subclass too, only these (`to_dict` is TrainingArguments' own name)."""
        return {f.name: getattr(self, f.name) for f in fields(StructLoRAConfig)}

    @property
    def is_off(self) -> bool:
        """Whether nothing acts: this is plain LoRA."""
        return self.filter == "none" and self.coordinator == "none" and self.regularizer == "none"

    @property
    def compares_depths(self) -> bool:
        """Whether some part relates one depth to another, and so needs to know which factor is comparable."""
        return self.coordinator != "none" or self.regularizer != "none"


StructLoRAConfig.__doc__ += "".join(
    f"    {f.name} (`{f.type}`, *optional*, defaults to `{f.default!r}`):\n            {f.metadata['help']}\n    "
    for f in fields(StructLoRAConfig)
)
