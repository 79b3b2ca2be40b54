"""The grids: what is compared with what, where, at which rates and with which seeds. Written down before the runs."""

from __future__ import annotations

from dataclasses import dataclass

LORA, OURS = "lora", "structlora"


@dataclass(frozen=True)
class Place:
    """One task at one size.

    Args:
        task (`str`): its name, and the epochs of a run: 'digits-all@50'.
        examples (`int`): training examples.
        seeds (`tuple[int, ...]`): of the figures that are shown.
        rates (`tuple[float, ...]`): learning rates; of several, validation chooses one for each method.
        choosing (`tuple[int, ...]`): seeds that run at all rates, and choose; no figure is of them.
        rank (`int`): of the adapter.
    """

    task: str
    examples: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    choosing: tuple[int, ...] = ()
    rank: int = 8

    def __str__(self) -> str:
        return f"{self.task}, {self.examples} examples"


@dataclass(frozen=True)
class Grid:
    """Methods at places.

    Args:
        groups (`dict[str, tuple[Place, ...]]`): name -> places whose mean is shown.
        methods (`tuple[str, ...]`): names of `methods.find`.
    """

    groups: dict[str, tuple[Place, ...]]
    methods: tuple[str, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        return sum(self.groups.values(), ())


DROPOUTS = tuple(f"lora-dropout-{p}" for p in (0.1, 0.3, 0.5, 0.7))
# What people do against overfitting; the primary endpoint is held against the best of them.
RIVALS = (*DROPOUTS, "lora-decay-0.1", "lora-early")
HALVES = "halves"  # of the examples, each with gates of its own
WITHOUT_COORDINATOR, GUMBEL = "structlora:coordinator=none", "structlora:gates=gumbel"
ONE_SIZE = "structlora:gate_lr=0,gate_openness=0.5"  # noise of variance 1 that nothing learns
METHODS = (LORA, *RIVALS, OURS, WITHOUT_COORDINATOR, "structlora:gates=off", GUMBEL, ONE_SIZE)

# --- gates: does the whole method do good, at LoRA's own rate, and no harm where there is nothing to gain? ---

_LORAS_RATE = {"digits-all": 5e-3, "fashion-all": 2e-3, "movie-all": 2e-3, "words-all": 1e-3}
_LONG = {"movie-all": 15}  # epochs, where 50 are too many for any method
_FOUR = tuple(range(410, 414))


def _at_loras_rate(task: str, epochs: int, examples: int = 100) -> Place:
    return Place(f"{task}@{epochs}", examples, _FOUR, (_LORAS_RATE[task],))


_GATES = Grid(
    {
        "many epochs": tuple(_at_loras_rate(task, _LONG.get(task, 50)) for task in _LORAS_RATE),
        "2 and 5 epochs": tuple(_at_loras_rate(task, n) for task in _LORAS_RATE for n in (2, 5)),
        "many examples": (_at_loras_rate("fashion-all", 5, 2000), _at_loras_rate("movie-all", 3, 1000)),
        "SmolLM2": tuple(Place(f"smollm-reviews@{n}", 64, _FOUR[:3], (1e-3,)) for n in (5, 15)),
    },
    (LORA, "lora-dropout-0.5", OURS, HALVES),
)

# --- main, language, harm: each method at its own rate ---

# Primary endpoint: test NLL, mean over tasks at 15 and 50 epochs, of StructLoRA less the best of `RIVALS`.
PRIMARY = (15, 50)
_TWELVE, _CHOOSING, _CHOOSING_SMOLLM = tuple(range(420, 432)), tuple(range(320, 325)), tuple(range(60, 65))
CHOOSING = {*_CHOOSING, *_CHOOSING_SMOLLM}  # whose adapters are not cut after training
_RATES = {  # in 2 and 5 epochs, in 15 and 50; around the best of LoRA and of dropout
    "digits-all": ((2.5e-3, 5e-3, 1e-2), (1.25e-3, 2.5e-3, 5e-3, 1e-2)),
    "fashion-all": ((2e-3, 5e-3, 1e-2), (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3)),
    "movie-all": ((5e-4, 1e-3, 2e-3, 4e-3), (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)),
    "words-all": ((5e-4, 1e-3, 2e-3, 4e-3), (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)),
}
_MAIN = {
    f"{epochs} epochs": tuple(
        Place(f"{task}@{epochs}", 100, _TWELVE, rates[epochs in PRIMARY], _CHOOSING)
        for task, rates in _RATES.items()
    )
    for epochs in (2, 5, *PRIMARY)
}
_SMOLLM_RATES = {"smollm-reviews": (2.5e-4, 5e-4, 1e-3, 2e-3), "smollm-phonemes": (5e-4, 1e-3, 2e-3, 4e-3)}
_LANGUAGE = {
    f"SmolLM2, {epochs} epochs": tuple(
        Place(f"{task}@{epochs}", 64, _TWELVE[:6], rates, _CHOOSING_SMOLLM)
        for task, rates in _SMOLLM_RATES.items()
    )
    for epochs in (5, 15)
}
_HARM = {
    "many examples": (
        Place("fashion-all@3", 4000, _TWELVE, (1e-3, 2e-3, 5e-3), _CHOOSING),
        Place("smollm-reviews@1", 1000, _TWELVE[:6], (2.5e-4, 5e-4, 1e-3), _CHOOSING_SMOLLM),
    )
}

GRIDS = {
    # A few minutes: `make bench-quick`.
    "quick": Grid({"digits": (Place("digits-all@50", 100, (0, 1, 2), (5e-3,)),)}, (LORA, OURS)),
    "gates": _GATES,
    "main": Grid(_MAIN, METHODS),
    "language": Grid(_LANGUAGE, METHODS),
    "harm": Grid(_HARM, METHODS),
}
