"""What is compared with what: places (task, size, rates, seeds) and the rows of each table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .shrinking import DISTILLED, RULES

LORA, OURS, GATES = "lora", "structlora", "gates"


@dataclass(frozen=True)
class Place:
    """One task at one size.

    Args:
        task (`str`), rank (`int`), examples (`int`): the setting.
        rates (`tuple[float, ...]`): learning rates; where there are several, each method has its own, which validation chooses.
        seeds (`tuple[int, ...]`): of all figures.
        choosing (`tuple[int, ...]`): the seeds that run at all rates, and choose.
        chosen_on (`str`, *optional*): the task whose runs choose the rates, which differs in its test examples alone.
        goes_beyond (`bool`): whether half of the lowest rate, or twice the highest, is tried where a method's best lies there.
    """

    task: str
    rank: int
    examples: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    choosing: tuple[int, ...] = ()
    chosen_on: str | None = None
    goes_beyond: bool = False

    @property
    def of_choice(self) -> Place:
        """The place whose runs choose the rates."""
        return replace(self, task=self.chosen_on or self.task)

    def __str__(self) -> str:
        return f"{self.task}, {self.rank}, {self.examples}"


@dataclass(frozen=True)
class Row:
    """One method of a table.

    Args:
        method (`str`): a name of `methods.find`.
        share (`float`): its rank, as a share of the place's.
        rate_of (`str`, *optional*): the method whose rate it has.
        column (`str`): which of a run's figures.
        label (`str`, *optional*): the method's summary where omitted.
    """

    method: str
    share: float = 1.0
    rate_of: str | None = None
    column: str = "test"
    label: str | None = None

    @property
    def of_choice(self) -> Row:
        """The row whose runs choose the rate; it need not be shown."""
        return replace(self, method=self.rate_of or self.method, rate_of=None)


@dataclass(frozen=True)
class Comparison:
    """One table.

    Args:
        places (`tuple[Place, ...]`): where.
        rows (`tuple[Row, ...]`): what.
        bases (`tuple[int, ...]`): the numbers of the rows that others are compared with.
        groups (`dict`): name -> the places that are averaged.
        by_place (`bool`): whether places are shown one by one, too.
        figures (`tuple[str, ...]`): which figures are shown, of 'accuracy', 'nll' and 'ece'.
    """

    places: tuple[Place, ...]
    rows: tuple[Row, ...]
    bases: tuple[int, ...] = (0,)
    groups: dict[str, tuple[Place, ...]] | None = None
    by_place: bool = True
    figures: tuple[str, ...] = ("accuracy", "nll", "ece")


def _rows(*methods: str) -> tuple[Row, ...]:
    return tuple(map(Row, methods))


_AVERAGE = Row("lora-average", rate_of=LORA)


# StructLoRA and LoRA at the rates that validation chose for LoRA, of three or more: what one line more in a tuned script does.
_IMAGES, _SENTENCES = tuple(range(400, 412)), tuple(range(100, 112))
_ALL_LINEAR = (
    Place("digits-all", 8, 100, (5e-3,), _IMAGES),
    Place("fashion-all", 8, 200, (1e-3,), _IMAGES),
    Place("movie-all", 8, 200, (1e-3,), _SENTENCES),
)
_Q_AND_V = (
    Place("digits", 8, 100, (5e-3,), _IMAGES),
    Place("fashion", 8, 200, (2e-3,), _IMAGES),
    Place("movie", 8, 200, (2e-3,), _SENTENCES),
)
_GROUPS = {
    "all linear": _ALL_LINEAR,
    "q and v": _Q_AND_V,
    "without digits": (*_ALL_LINEAR[1:], *_Q_AND_V[1:]),
    "all": (*_ALL_LINEAR, *_Q_AND_V),
}
# What else regularises LoRA for nothing, rank 4.
_TEXT_RATES, _TEXT_SEEDS = (2e-3, 4e-3, 8e-3), (*range(6), *range(20, 26))
_REGULARISED = {
    "images, q and v": tuple(
        Place(task, rank, examples, (lr,), tuple(range(80, 92)))
        for task, rank, examples, lr in (
            ("digits", 4, 100, 1e-2),
            ("digits", 2, 100, 2e-2),
            ("fashion", 4, 100, 2e-3),
            ("noisy-fashion", 4, 400, 5e-3),
            ("fashion", 4, 400, 5e-3),
            ("fashion-long", 4, 1000, 5e-3),
        )
    ),
    "text, q and v": tuple(
        Place(task, 4, 200, _TEXT_RATES, _TEXT_SEEDS, tuple(range(3)))
        for task in ("movie", "tweet", "product")
    ),
    "all linear": tuple(
        Place(task, 4, examples, (lr,), tuple(range(40, 52)))
        for task, examples, lr in (
            ("digits-all", 100, 1e-2),
            ("fashion-all", 200, 2e-3),
            ("movie-all", 200, 4e-3),
        )
    ),
}
_REGULARISERS = (
    *_rows(LORA, "lora-dropout-0.1"),
    Row("lora-decay-0.1", rate_of=LORA),
    _AVERAGE,
)

# PEFT's other methods; some have their best rates elsewhere.
_OTHERS = tuple(
    Place(task, 4, examples, rates, tuple(range(3)), tuple(range(3)))
    for task, examples, rates in (
        ("digits", 100, (5e-3, 1e-2, 2e-2)),
        ("noisy-fashion", 400, (2e-3, 5e-3, 1e-2)),
        ("movie", 200, _TEXT_RATES),
    )
)
_ON_VERA = tuple(replace(place, seeds=(332, 333, 334), choosing=(332, 333, 334)) for place in _OTHERS)
# What to multiply the lowest (0) or highest (-1) rate of a place with, for more.
FURTHER_RATES = {
    "rslora": (0, (1 / 2,)),
    "pissa": (0, (1 / 2,)),
    "lora-plus": (0, (1 / 8, 1 / 4, 1 / 2)),
    "dora": (-1, (2,)),
    "lora-fa": (-1, (2,)),
    "adalora": (-1, (2, 4)),
    "vera": (-1, (2, 4, 8)),
    "structlora-vera": (-1, (2, 4, 8)),
}

# Noise by passes: how far does a run outrun its data? All linear modules adapted, 100 examples, each method at its own rate. Said
# before the runs: the primary endpoint is the test NLL, mean over tasks at 15 and 50 passes, of StructLoRA less the best of the
# dropouts; then accuracy and ECE there, and harm at 2 and 5 passes.
MANY_PASSES, FEW_PASSES = (15, 50), (2, 5)
_PASSES_SEEDS = tuple(range(320, 332))
_PASSES_TASKS = (
    ("digits-all", (2.5e-3, 5e-3, 1e-2)),
    ("fashion-all", (1e-3, 2e-3, 5e-3)),
    ("movie-all", (1e-3, 2e-3, 4e-3)),
    ("words-all", (2.5e-4, 5e-4, 1e-3)),  # around LoRA's best of five with another seed
)


def _at_passes(*passes: int) -> tuple[Place, ...]:
    return tuple(
        Place(f"{task}@{n}", 8, 100, rates, _PASSES_SEEDS, _PASSES_SEEDS[:3], goes_beyond=True)
        for task, rates in _PASSES_TASKS
        for n in passes
    )


def _passes_groups(*passes: int) -> dict[str, tuple[Place, ...]]:
    together = " and ".join(map(str, passes))
    return {
        f"{name} passes": _at_passes(*of) for name, of in ((together, passes), *((n, (n,)) for n in passes))
    }


def _of_images(place: Place) -> bool:
    return place.task.startswith(("digits", "fashion"))


def _with_images(places: tuple[Place, ...], **changed) -> tuple[Place, ...]:
    """The places, those of images with other seeds, which are on another ViT than the first ones."""
    return tuple(replace(place, **changed) if _of_images(place) else place for place in places)


# The paper's ablations and controls of both parts, in 50 passes, where the noise is whole; half of the seeds.
_ABLATED = tuple(replace(place, seeds=place.seeds[:6]) for place in _at_passes(50) if _of_images(place))
_ABLATIONS = (
    *(GATES, "no-gates", "random-gates", "adjacency", "similarity", "2-layers", "3-layers", "gat"),
    *("structlora:keep=0.25", "random-selection:keep=0.25"),
)
_PENALTIES = ("lora-cos", "lora-laplacian")
_DROPOUTS = ("lora-dropout-0.1", "lora-dropout-0.3", "lora-dropout-0.5")
# A language model: SmolLM2 with 64 film reviews. Said before the runs, at one rate: the primary endpoint is the test NLL of
# StructLoRA less LoRA's at 15 passes, and harm is that at 5. Runs in 2 passes, those of other methods, and rates of each method's
# own came later; 50 passes last, at the rate that validation chose for all of them in 15.
_LANGUAGE_AT_ONE_RATE = tuple(
    Place(task, 8, 64, (2e-3,), tuple(range(60, 66)))
    for task in ("smollm-reviews@2", "smollm-reviews", "smollm-reviews@15")
)
_LANGUAGE = (
    *(replace(place, rates=(5e-4, 1e-3, 2e-3), choosing=place.seeds[:3]) for place in _LANGUAGE_AT_ONE_RATE),
    Place("smollm-reviews@50", 8, 64, (5e-4,), tuple(range(60, 66))),
)
# Averages in few passes, at LoRA's rates.
_AVERAGED_FEW = {
    name: _with_images(places, seeds=tuple(range(340, 352)))
    for name, places in _passes_groups(*FEW_PASSES).items()
}
# The rates of the paper, in 1,000 steps.
_PAPER = tuple(
    Place(task, 8, 100, (1e-4, 2e-4, 5e-4), _PASSES_SEEDS[:3], _PASSES_SEEDS[:3])
    for task in ("digits-all@320", "fashion-all@160", "movie-all@80")
)

# LoRA cut after training.
CUT_SEEDS = tuple(range(103, 112))  # whose runs are cut, at the rates that the three seeds before them choose
SHARES = {"half": 1 / 2, "quarter": 1 / 4, "eighth": 1 / 8}
_WHOLE = {"digits": 100, "fashion": 200, "movie": 200, "product": 200}
_WHOLE_RATES = {
    "digits": (5e-3, 1e-2, 2e-2),
    "digits-all": (2.5e-3, 5e-3, 1e-2),
    "fashion": (2e-3, 5e-3, 1e-2),
    "fashion-all": (1e-3, 2e-3, 5e-3),
    "movie": _TEXT_RATES,
    "movie-all": (1e-3, 2e-3, 4e-3),
    "product": _TEXT_RATES,
    "product-all": (1e-3, 2e-3, 4e-3),
}
_CUTS = {  # column of a cut -> what it keeps
    "cut.information.{}": "information of training examples, singular directions",
    "cut.held-out.{}": "information of validation examples, singular directions",
    "cut.singular.{}": "largest singular values",
    "truncated.{}": "uniform SVD",
    "cut.norm.{}": "top-k norm",
    "cut.random.{}": "random",
    "cut.random-singular.{}": "random, singular directions",
}


def _scaled(rank: int) -> tuple[Row, ...]:
    whole = f"LoRA, rank {rank}"
    return (
        Row(LORA, label=whole),
        Row(LORA, column="scaled", label=f"{whole}, update times a scalar"),
        Row(LORA, column="tempered", label=f"{whole}, logits over a temperature"),
    )


def _cut(rank: int, name: str) -> Comparison:
    share = SHARES[name]
    seeds = CUT_SEEDS if (rank, name) == (8, "quarter") else CUT_SEEDS[:6]
    places = tuple(
        Place(
            task,
            rank,
            _WHOLE[task.removesuffix("-all")],
            rates,
            seeds,
            tuple(range(100, 103)),
            goes_beyond=True,
        )
        for task, rates in _WHOLE_RATES.items()
    )
    rows = (
        Row(LORA, label=f"LoRA, rank {rank}"),
        Row(LORA, share, label=f"LoRA, rank {rank * share:g}"),
        *(
            Row(LORA, column=column.format(name), label=f"{rank} cut to {rank * share:g}: {rule}")
            for column, rule in _CUTS.items()
        ),
        *_scaled(rank)[1:],
    )
    return Comparison(places, rows, bases=(0, 1), groups={"all": places}, by_place=False)


# LoRA made smaller as `structlora export` does. The primary question stands in smaller.md, from before the first run.
SHRUNK_SEEDS = tuple(range(300, 312))
_SMOLLM = Place(
    "smollm-reviews-large",
    16,
    64,
    (5e-4, 1e-3, 2e-3),
    SHRUNK_SEEDS[:6],
    SHRUNK_SEEDS[:3],
    chosen_on="smollm-reviews",
)


def _shrunk(rank: int, name: str, places: tuple[Place, ...]) -> Comparison:
    share, seeds = SHARES[name], 12 if (rank, name) == (16, "quarter") else 3
    places = tuple(replace(place, rank=rank, seeds=place.seeds[:seeds]) for place in places)
    shrunk = f"shrink:keep={share:g}"  # plain LoRA, and made smaller after training
    rows = (
        Row(LORA, share, label=f"LoRA trained at rank {rank * share:g}"),
        Row(shrunk, rate_of=LORA, label=f"the whole adapter, rank {rank}"),
        *(
            Row(shrunk, rate_of=LORA, column=f"shrunk.{rule}.{how}", label=f"{rule}, {how}")
            for rule in RULES
            for how in ("cut", *(("distilled",) if rule in DISTILLED else ()))
        ),
        Row(f"squeeze:to={rank * share:g}", rate_of=LORA),
    )
    return Comparison(
        places, rows, bases=(0, 1), groups={"all": places}, by_place=False, figures=("accuracy", "nll")
    )


def _rules(comparison: Comparison, rules: tuple[str, ...], bases: tuple[int, ...]) -> Comparison:
    """Ways of making smaller against some of them."""
    rows = {row.column.removeprefix("shrunk."): row for row in comparison.rows}
    return replace(comparison, rows=tuple(rows[rule] for rule in rules), bases=bases)


_IN_MODULES = ("svd.cut", "activations.cut", "svd.distilled", "activations.distilled")
_OVER_MODEL = ("global-information.cut", "global-svd.cut", "sv-fro.cut", "sv-cumulative.cut")
_SHRUNK = tuple(
    Place(task, 16, _WHOLE[task.removesuffix("-all")], rates, SHRUNK_SEEDS, SHRUNK_SEEDS[:3])
    for task, rates in _WHOLE_RATES.items()
)
_LATER = tuple(range(312, 315))
_SHRUNK_LATER = _with_images(_SHRUNK, seeds=_LATER, choosing=_LATER)

# What one line more in a script that is tuned for LoRA does.
_AT_THE_RATE_OF_LORA = Row(OURS, rate_of=LORA, label="StructLoRA at LoRA's rate")

COMPARISONS = {
    "structlora": Comparison(_GROUPS["all"], _rows(LORA, OURS, GATES), groups=_GROUPS),
    "summary": Comparison(_GROUPS["all"], _rows(LORA, OURS, GATES), groups=_GROUPS, by_place=False),
    "coordinator": Comparison(_GROUPS["all"], _rows(GATES, OURS), groups=_GROUPS, by_place=False),
    "ablations": Comparison(
        _ABLATED,
        (
            *_rows(OURS, LORA),
            *(Row(name, rate_of=OURS) for name in _ABLATIONS),
            *(Row(name, rate_of=LORA) for name in _PENALTIES),
        ),
        groups={"all": _ABLATED},
        by_place=False,
    ),
    "regularisers": Comparison(
        sum(_REGULARISED.values(), ()),
        _REGULARISERS,
        groups=_REGULARISED | {"all": sum(_REGULARISED.values(), ())},
        by_place=False,
    ),
    "language": Comparison(
        _LANGUAGE[2:], (*_rows(LORA, *_DROPOUTS, OURS, GATES), _AVERAGE, _AT_THE_RATE_OF_LORA), bases=(0, 2)
    ),
    "language-few": Comparison(  # without coordinator StructLoRA is LoRA there
        _LANGUAGE[:2], (*_rows(LORA, *_DROPOUTS, OURS), _AVERAGE, _AT_THE_RATE_OF_LORA)
    ),
    "language-at-one-rate": Comparison(_LANGUAGE_AT_ONE_RATE, _rows(LORA, _DROPOUTS[1], OURS), bases=(0, 1)),
    "passes": Comparison(
        _at_passes(*MANY_PASSES),
        (
            *_rows(LORA, *_DROPOUTS, OURS, GATES),
            _AVERAGE,
            # What calibration alone gives.
            Row(LORA, column="scaled", label="LoRA, update times a scalar"),
            *(
                Row(name, rate_of=name, column="tempered", label=f"{label}, logits over a temperature")
                for name, label in ((LORA, "LoRA"), (OURS, "StructLoRA"))
            ),
        ),
        bases=(0, 2),  # LoRA and the best of the dropouts in this mean
        groups=_passes_groups(*MANY_PASSES),
        by_place=False,
    ),
    "passes-few": Comparison(  # without coordinator StructLoRA is LoRA there
        _at_passes(*FEW_PASSES),
        (*_rows(LORA, *_DROPOUTS, OURS), _AT_THE_RATE_OF_LORA),
        groups=_passes_groups(*FEW_PASSES),
        by_place=False,
    ),
    "average-few": Comparison(
        _AVERAGED_FEW["2 and 5 passes"], (Row(LORA), _AVERAGE), groups=_AVERAGED_FEW, by_place=False
    ),
    "paper-rates": Comparison(_PAPER, _rows(LORA, _DROPOUTS[0], OURS), groups={"all": _PAPER}),
    "others": Comparison(
        _OTHERS,
        _rows(LORA, "rslora", "dora", "adalora", "pissa", "lora-plus", "lora-fa", "vera"),
        groups={"all": _OTHERS},
        by_place=False,
    ),
    "vera": Comparison(_ON_VERA, _rows("vera", "structlora-vera"), groups={"all": _ON_VERA}, by_place=False),
    **{f"cut-{name}-of-{rank}": _cut(rank, name) for rank in (8, 16) for name in SHARES},
    **{f"shrunk-{name}-of-16": _shrunk(16, name, _SHRUNK) for name in ("quarter", "eighth")},
    "shrunk-half-of-16": _shrunk(16, "half", _SHRUNK_LATER),
    **{f"shrunk-{name}-of-8": _shrunk(8, name, _SHRUNK_LATER) for name in SHARES},
    "scaled-language": Comparison(_LANGUAGE, _scaled(8), bases=(0, 2)),
    "shrunk-language": _shrunk(16, "quarter", (_SMOLLM,)),
}
for _name in ("quarter", "eighth"):
    for _where, _ways, _bases in (("modules", _IN_MODULES, (0,)), ("model", _OVER_MODEL, (0, 1))):
        COMPARISONS[f"rules-{_where}-{_name}-of-16"] = _rules(
            COMPARISONS[f"shrunk-{_name}-of-16"], _ways, _bases
        )
for _name in ("regularisers", "ablations", "passes-few", "passes"):
    COMPARISONS[f"{_name}-by-task"] = replace(COMPARISONS[_name], bases=(0,), groups=None, by_place=True)
COMPARISONS["one-rate"] = Comparison(
    _at_passes(*MANY_PASSES), (Row(LORA), _AT_THE_RATE_OF_LORA), groups=_passes_groups(*MANY_PASSES)
)
# The coordinator's rate: that of LoRA, or one for all. Not where LoRA's rate is that one.
_RATE_PLACES = tuple(
    place
    for place in (*_at_passes(*FEW_PASSES), *_at_passes(15))
    if place.task not in ("digits-all@5", "digits-all@15", "fashion-all@2")
)
COMPARISONS["coordinator-rate"] = Comparison(
    _RATE_PLACES,
    (
        Row(LORA),
        Row("structlora:coordinator_lr=0.01", rate_of=LORA, label="StructLoRA, coordinator at 0.01"),
        replace(_AT_THE_RATE_OF_LORA, label="StructLoRA, coordinator at LoRA's rate"),
    ),
    bases=(0, 1),
    groups={"all": _RATE_PLACES},
)
# What the landing pages show of these.
COMPARISONS |= {
    "headline": replace(
        COMPARISONS["structlora"],
        rows=_rows(LORA, OURS),
        groups={"all": _GROUPS["all"]},
        by_place=False,
        figures=("accuracy", "nll"),
    ),
    "smaller": replace(
        COMPARISONS["shrunk-quarter-of-16"],
        rows=(
            Row(LORA, 1 / 4, label="trained at rank 4"),
            *(
                Row("shrink:keep=0.25", rate_of=LORA, column=column, label=label)
                for column, label in {
                    "test": "trained at rank 16",
                    "shrunk.svd.distilled": "`--rank 4 --distil --data`",
                    "shrunk.svd.cut": "`--rank 4`",
                    "shrunk.global-information.cut": "`--keep 0.25 --data`",
                }.items()
            ),
        ),
        figures=("accuracy",),
    ),
}
