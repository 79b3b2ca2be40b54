"""What is compared with what: tasks and sizes, learning rates, seeds, ablations, and the rounds of the search."""

from __future__ import annotations

RATE_SEEDS = range(3)  # at every learning rate; validation chooses the rate with these
FURTHER_SEEDS = (3, 4, 5)  # at the chosen rate alone
MAIN_SEEDS = (*FURTHER_SEEDS, *range(20, 26))  # the same, for the methods and settings of the main table
# Seeds of these grids; tables of test figures have every stored seed at the chosen rates.
SEEDS = (*RATE_SEEDS, *MAIN_SEEDS)

# Learning rates by task.
RATES = {
    "digits": (5e-3, 1e-2, 2e-2),
    "digits-all": (2.5e-3, 5e-3, 1e-2),
    "fashion": (2e-3, 5e-3, 1e-2),
    "fashion-all": (1e-3, 2e-3, 5e-3),
    "fashion-long": (2e-3, 5e-3, 1e-2),
    "noisy-fashion": (2e-3, 5e-3, 1e-2),
    "digits-early": (5e-3, 1e-2, 2e-2, 4e-2),
    "fashion-early": (2e-3, 5e-3, 1e-2),
    "noisy-fashion-early": (2e-3, 5e-3, 1e-2),
    "movie": (2e-3, 4e-3, 8e-3),
    "movie-all": (1e-3, 2e-3, 4e-3),
    "tweet": (2e-3, 4e-3, 8e-3),
    "product": (2e-3, 4e-3, 8e-3),
    "product-all": (1e-3, 2e-3, 4e-3),
    "smollm-movie": (1e-3, 2e-3, 4e-3),
    "smollm-numbers": (2e-3, 4e-3, 8e-3),
}
# Where LoRA's or StructLoRA's best rate was at an end of the task's range: more rates for the methods of the main table.
MORE_RATES = {
    ("movie", 4, 200): (1.6e-2,),
    ("tweet", 4, 200): (1.6e-2,),
    ("product", 4, 200): (1.6e-2,),
    ("digits", 1, 100): (4e-2, 8e-2),
    ("digits", 2, 100): (4e-2,),
    ("digits", 16, 100): (2.5e-3,),
    ("fashion", 4, 100): (1e-3, 2e-2),
    ("fashion", 4, 200): (2e-2,),
    ("fashion", 4, 1000): (2e-2,),
    ("smollm-movie", 4, 320): (8e-3,),
    ("smollm-numbers", 4, 320): (1.6e-2,),
    ("digits", 8, 100): (2.5e-3,),
    ("fashion-long", 4, 1000): (2e-2,),
}
# Methods whose best rates lie elsewhere: what to multiply the lowest (0) or highest (-1) rate of a task with, for more.
FURTHER_RATES = {
    "rslora": (0, (1 / 2,)),
    "pissa": (0, (1 / 2,)),
    "lora-plus": (0, (1 / 8, 1 / 4, 1 / 2)),
    "dora": (-1, (2,)),
    "lora-fa": (-1, (2,)),
    "adalora": (-1, (2, 4)),
    "vera": (-1, (2, 4, 8)),
    "lora-dropout-0.1": (-1, (2,)),
    "lora-dropout-0.05": (-1, (2,)),
}

# Task, rank, examples.
SETTINGS = (
    ("digits", 4, 100),
    ("noisy-fashion", 4, 400),
    ("fashion", 4, 400),
    ("movie", 4, 200),
    ("digits", 2, 100),
    ("fashion", 4, 100),
    ("tweet", 4, 200),
    ("product", 4, 200),
    ("fashion-long", 4, 1000),
)
FIRST = SETTINGS[:3]
# The same with a backbone that was trained for a third as long.
EARLY = tuple((f"{task}-early", *rest) for task, *rest in (*FIRST, *SETTINGS[4:6]))
MAIN = ("lora", "structlora", "gates")
LANGUAGE = (("smollm-movie", 4, 320), ("smollm-numbers", 4, 320))

# The search, on validation data alone, each round at fixed settings and learning rates. Rounds after the first have seeds
# that choose no learning rate.
EARLY_PLACES = (
    (("digits-early", 4, 100), 1e-2),
    (("digits-early", 4, 100), 2e-2),
    (("noisy-fashion-early", 4, 400), 5e-3),
    (("movie", 4, 200), 4e-3),
)
PLACES = (
    (("digits", 4, 100), 1e-2),
    (("digits", 2, 100), 1e-2),
    (("noisy-fashion", 4, 400), 5e-3),
    (("movie", 4, 200), 4e-3),
)
FIRST_IDEAS = (
    "structlora",
    "structlora:gate_init=0.73",
    "gates:gate_init=0.73",
    "gates",
    "structlora:gate_init=0.8",
    "structlora:gate_lr=0,gate_init=0.73",
    "structlora:gate_lr=0",
    "structlora:prior=0.9",
    "structlora:gate_lr=0.1",
    "structlora:temperature=0.67",
    "structlora:hard_gates=true",
    "structlora:side=both",
    "structlora:x_normalise=true",
    "structlora:x_normalise=true,x_theta=1.0",
    "structlora:gate_init=0.73,x_warm_noise=0.5",
    "structlora:x_fade_noise=0.5",
    "structlora:share_gates=true",
    "structlora:coordinator_lr=0.002",
    "structlora:coordinator_lr=0,x_theta=0.5",
    "structlora:x_share_noise=true",
    "structlora:x_share_kinds=true",
    "structlora:edges=similarity",
    "no-gates",
    "structlora:share_gates=true,coordinator_lr=0,x_theta=0.5",
    "structlora:gate_lr=0,gate_init=0.73,coordinator_lr=0,x_theta=0.5",
    "structlora:gate_init=0.73,coordinator_lr=0,x_theta=0.5",
    "structlora:gate_init=0.73,share_gates=true,x_theta=0.5",
    "structlora:x_theta=0.5",
    "structlora:coordinator_lr=0.002,x_theta=0.5",
    "structlora:x_theta=1.0",
    "structlora:coordinator_lr=0,x_theta=-0.3",
    "structlora:x_diagonal=true",
    "structlora:x_diagonal=true,x_theta=0.5",
    "structlora:x_join_kinds=true",
    "structlora:x_join_kinds=true,x_theta=0.5",
    "structlora:x_smooth_gates=true",
    "structlora:side=both,x_sign=true",
    "structlora:kl_weight=0",
    "structlora:kl_weight=1.0",
    "structlora:gate_init=0.73,kl_weight=0",
    "structlora:gate_init=0.73,gate_lr=0.003",
    "structlora:temperature=0.1",
    "structlora:activation=identity",
    "structlora:semantic_threshold=0.2",
    "structlora:kl_weight=3.0",
    "structlora:kl_weight=1.0,side=both,x_sign=true",
    "structlora:kl_weight=1.0,side=both",
    "structlora:kl_weight=1.0,gate_lr=0.1",
    "gates:kl_weight=1.0",
    "structlora:kl_weight=1.0,share_gates=true",
    "structlora:kl_weight=1.0,x_diagonal=true",
    "structlora:kl_weight=10.0",
)
NEXT_IDEAS = (
    "structlora",
    "structlora:kl_weight=1.0",
    "structlora:kl_weight=1.0,side=both",
    "lora-dropout-0.1",
    "structlora:side=both,x_sign=true",
    "structlora:kl_weight=1.0,share_gates=true",
    "gates:kl_weight=1.0",
    "structlora:coordinator_lr=0.002,x_theta=0.5",
    "structlora:gate_lr=0,gate_init=0.73",
)
LAST_IDEAS = (
    "structlora",
    "structlora:kl_weight=1.0",
    "structlora:gate_init=0.73",
    "lora-dropout-0.1",
    "gates",
    "structlora:kl_weight=1.0,side=both",
    "structlora:gate_lr=0,gate_init=0.73",
    "structlora:gate_init=0.73,kl_weight=0",
    "structlora:share_gates=true",
    "structlora:x_theta=1.0",
    "structlora:gate_lr=0",
    "no-gates",
    "structlora:coordinator_lr=0.002,x_theta=0.5",
    "structlora:x_join_kinds=true",
    "structlora:side=both,x_sign=true",
)
# The same at twice the learning rate: does an idea help, or does it act as a larger rate?
DOUBLE_PLACES = tuple((setting, 2 * lr) for setting, lr in PLACES)
DOUBLE_IDEAS = (
    "structlora",
    "structlora:coordinator_lr=0.002,x_theta=0.5",
    "structlora:gate_init=0.73,kl_weight=0",
    "structlora:gate_init=0.73,kl_weight=0,coordinator_lr=0.002,x_theta=0.5",
)
# Where StructLoRA loses most: what is it that loses, and what would not?
LANGUAGE_PLACES = ((LANGUAGE[1], 8e-3),)
LANGUAGE_IDEAS = (
    "structlora",
    "no-gates",
    "gates",
    "structlora:gate_init=0.97",
    "structlora:x_warm_noise=0.5",
    "structlora:x_fade_noise=0.5",
    "structlora:gate_lr=0",
    "no-align",
    "structlora:kl_weight=0",
    "structlora:gate_init=0.8",
)
# With or without the coordinator, and how much noise, in runs that are short for their data too; six seeds more.
FINAL_PLACES = (
    (("digits", 4, 100), 1e-2),
    (("digits", 2, 100), 2e-2),
    (("fashion", 4, 400), 5e-3),
    (("fashion", 4, 1000), 1e-2),
    (("movie", 4, 200), 4e-3),
)
FINAL_IDEAS = (
    "structlora",
    "gates",
    "gates:gate_init=0.97",
    "gates:gate_init=0.8",
    "gates:x_warm_noise=0.5",
    "gates:gate_init=0.8,x_warm_noise=0.5",
    "gates:x_fade_noise=0.3",
    "no-align",
)
# The best of these once more.
CONFIRMED_IDEAS = (
    "gates",
    "gates:gate_init=0.8",
    "no-align",
    "no-align:gate_init=0.8",
)
# name -> methods beside LoRA, places, seeds
ROUNDS = {
    "search-first": (FIRST_IDEAS, EARLY_PLACES, range(2)),
    "search-again": (NEXT_IDEAS, EARLY_PLACES, range(6, 8)),
    "search-last": (LAST_IDEAS, PLACES, range(10, 14)),
    "search-double": (DOUBLE_IDEAS, DOUBLE_PLACES, range(10, 14)),
    "search-language": (LANGUAGE_IDEAS, LANGUAGE_PLACES, range(10, 13)),
    "search-final": (FINAL_IDEAS, FINAL_PLACES, range(14, 20)),
    "search-confirm": (CONFIRMED_IDEAS, FINAL_PLACES, range(30, 36)),
}

FINAL_ROUNDS = ("search-final", "search-confirm")
NOISE = ("lora", "gates:gate_init=0.97", "gates:gate_init=0.8")  # for a table of those rounds by place

# What else regularises LoRA for nothing: does one of these do what gates do? Decay and averages have LoRA's own rate.
DROPOUT = "lora-dropout-0.1"
FAIR = (DROPOUT, "lora-decay-0.1", "lora-average")
OURS_FAIR = ("structlora-dropout-0.1", "structlora-average")  # and with StructLoRA, at its own rate
NOISE_CONTROLS = ("lora-dropout-0.05", "frozen-logits")
CONTROLS = (*FAIR, *OURS_FAIR, *NOISE_CONTROLS)
ON_TEXT = (SETTINGS[3], *SETTINGS[6:8])  # of the main table
# For other methods and ablations: one setting of each kind of task.
COMPARED = (SETTINGS[1], SETTINGS[0], SETTINGS[3])
OTHERS = ("rslora", "dora", "adalora", "pissa", "lora-plus", "lora-fa", "vera")
ABLATIONS = (
    *(
        "structlora:gate_lr=0",
        "no-gates",
        "gates",
        "no-align",
        "adjacency",
        "similarity",
        "2-layers",
        "3-layers",
    ),
    *("gat", "random-filter", "top-k-filter", "lora-cos", "lora-laplacian"),
)
# The parts that matter most once more with further seeds, where StructLoRA gains most.
PARTS = ("gates", "no-gates", "structlora:gate_lr=0")
WHERE_IT_GAINS = (SETTINGS[0], *SETTINGS[4:6])
# Sweeps: the (task, examples) of the one over ranks, the (task, rank) of the one over numbers of examples.
RANKS = {("digits", 100): (1, 2, 4, 8, 16)}
EXAMPLES = {("fashion", 4): (50, 100, 200, 400, 1000)}

# Evidence at fixed rates with seeds of its own. Nothing of StructLoRA's is chosen with these runs, so that figures are of all
# held-out examples, validation and test together.
EVIDENCE_SEEDS = range(40, 52)
STREAM, STREAM_ALL = (f"structlora:{idea}=true,align_init=false" for idea in ("x_stream", "x_stream_all"))
# All linear modules adapted, as most people do; at the rate that a look at LoRA's validation accuracy with one seed favours.
LINEAR_PLACES = (
    (("digits-all", 4, 100), 1e-2),
    (("fashion-all", 4, 200), 2e-3),
    (("movie-all", 4, 200), 4e-3),
)
LINEAR_METHODS = ("structlora", "no-align", "structlora:align_init=false")
LINEAR_IDEAS = (
    STREAM_ALL,
    STREAM,
    "no-align:x_total_noise=true",
    "no-align:x_snr=true",
    "structlora:x_bounded_noise=true",
    "no-align",
    "no-align:gate_lr=0",
    "structlora:gate_lr=0",
    "structlora:x_snr=true",
    "structlora:head_gates=true",
    "structlora:x_gated_messages=true",
)
# Text in runs that are short: 2.4 passes over 200 examples, and a single pass over 480.
SHORT_PLACES = tuple(((task, 4, examples), 4e-3) for examples in (200, 480) for task in ("tweet", "product"))
SHORT_METHODS = (
    "structlora",
    "no-align",
    "structlora:align_init=false",
    "structlora:x_second_pass=true",
    "no-align:x_second_pass=true",
    "structlora:gate_lr=0.1",  # gates that go as far in 60 steps as the default does in 200
)
# The language model in a single pass, where StructLoRA lost most.
ONE_PASS_PLACES = ((LANGUAGE[1], 8e-3),)
ONE_PASS_METHODS = (
    "structlora",
    "no-align",
    "structlora:x_second_pass=true",
    "structlora:x_bounded_noise=true",
)
# The language model on few examples, at the rate that a look at LoRA's validation figures favours and, with other seeds, at
# half of it, and in a longer run.
_FEW_RUNS = [
    (task, 4, examples) for task in ("smollm-movie-few", "smollm-movie-few-all") for examples in (64, 128)
]
FEW_PLACES, FEW_LOW_PLACES = (tuple((setting, lr) for setting in _FEW_RUNS) for lr in (4e-3, 2e-3))
LONG_PLACES = ((("smollm-movie-long", 4, 1000), 2e-3),)
# Less noise, where StructLoRA does worst on few examples.
FEW_IDEAS = ("structlora", "structlora:x_bounded_noise=true")
# What the table of a grid compares with, where that is not LoRA.
OBJECTIVE_BASE = "structlora:keep=0.25"
AGAINST = {"linear-ideas": "structlora", "vera": "vera", "objective": OBJECTIVE_BASE}
# What StructLoRA is for, and where it must do no harm: name -> settings, each method at its own rate, and places.
_FEW, _MORE = [s for s in SETTINGS if s[2] <= 200], [s for s in SETTINGS if s[2] > 200]
AIMS = {
    "at most 200 examples": (_FEW, (*LINEAR_PLACES, *FEW_PLACES, *FEW_LOW_PLACES)),
    "of these, q and v": (_FEW, (*FEW_PLACES[:2], *FEW_LOW_PLACES[:2])),
    "of these, all linear modules": ((), (*LINEAR_PLACES, *FEW_PLACES[2:], *FEW_LOW_PLACES[2:])),
    "of these, small models": (_FEW, LINEAR_PLACES),
    "of these, SmolLM2": ((), (*FEW_PLACES, *FEW_LOW_PLACES)),
    "short runs, one pass, or more examples": ((*_MORE, *LANGUAGE), (*SHORT_PLACES, *LONG_PLACES)),
}
# The images of the main table, with a ViT that another processor has trained by the same recipe; at LoRA's rate there. First
# those where the main table has a gain.
AGAIN_SEEDS = range(80, 92)
AGAIN_PLACES = (
    (SETTINGS[0], 1e-2),
    (SETTINGS[4], 2e-2),
    (SETTINGS[5], 2e-3),
    (SETTINGS[1], 5e-3),
    (SETTINGS[2], 5e-3),
    (SETTINGS[8], 5e-3),
)
# Where LoRA's other regularisers are compared with StructLoRA: name -> settings, each method at its own rate; places at fixed
# rates, and their seeds.
FAIR_GROUPS = {
    "q and v": (ON_TEXT, AGAIN_PLACES, AGAIN_SEEDS),
    "of these, images": ((), AGAIN_PLACES, AGAIN_SEEDS),
    "of these, text": (ON_TEXT, (), ()),
    "all linear modules": ((), LINEAR_PLACES, EVIDENCE_SEEDS),
}
# StructLoRA on VeRA, at VeRA's own rates.
VERA_SEEDS = range(120, 132)
VERA_PLACES = ((SETTINGS[0], 0.16), (SETTINGS[1], 0.02), (SETTINGS[3], 0.016))
VERA_METHODS = ("structlora-vera", "structlora-vera:coordinator=none")
# What the KL term and the gates' rate do to selection: a lower prior, a weight near a variational bound's own (the number of
# gates over that of examples, here 1.4 to 5.8), both, and gates that go further in as many steps.
OBJECTIVE_METHODS = tuple(
    f"{OBJECTIVE_BASE},{options}"
    for options in ("prior=0.1", "kl_weight=3", "prior=0.1,kl_weight=3", "gate_lr=0.1")
)
OBJECTIVE_PLACES = (
    (("digits-all", 8, 100), 5e-3),
    (("fashion-all", 8, 200), 2e-3),
    (("movie-all", 8, 200), 2e-3),
)
# name -> methods beside LoRA, places, seeds
EVIDENCE = {
    "another-vit": ((*MAIN[1:2], *FAIR, *OURS_FAIR), AGAIN_PLACES, AGAIN_SEEDS),
    "vera": (VERA_METHODS, VERA_PLACES, VERA_SEEDS),
    "objective": (OBJECTIVE_METHODS, OBJECTIVE_PLACES, EVIDENCE_SEEDS[:6]),
    "linear": (LINEAR_METHODS, LINEAR_PLACES, EVIDENCE_SEEDS),
    "linear-fair": ((*FAIR, *OURS_FAIR), LINEAR_PLACES, EVIDENCE_SEEDS),
    "linear-ideas": (LINEAR_IDEAS, LINEAR_PLACES, EVIDENCE_SEEDS[:6]),
    "short-runs": (SHORT_METHODS, SHORT_PLACES, EVIDENCE_SEEDS),
    "one-pass": (ONE_PASS_METHODS, ONE_PASS_PLACES, EVIDENCE_SEEDS[:8]),
    "few": (MAIN[1:2], FEW_PLACES, EVIDENCE_SEEDS[:4]),
    "few-ideas": (FEW_IDEAS, FEW_PLACES[3:], EVIDENCE_SEEDS[:4]),
    "few-low": (MAIN[1:2], FEW_LOW_PLACES, EVIDENCE_SEEDS[4:8]),
    "long": (MAIN[1:2], LONG_PLACES, EVIDENCE_SEEDS[:4]),
}

# Directions of LoRA at rank 8 selected in training, at equal size: by every rule, against chance and against LoRA that is trained
# at that rank. Where it is, setting -> learning rate, share of directions that is kept.
EQUAL_SEEDS = range(60, 72)
EQUAL_PLACES = {
    ("digits-all", 8, 100): (5e-3, 0.25),
    ("movie-all", 8, 200): (4e-3, 0.25),
    ("smollm-reviews", 8, 64): (2e-3, 0.125),
    ("fashion-all", 8, 200): (5e-3, 0.25),
    ("digits", 8, 100): (1e-2, 0.25),
    ("movie", 8, 200): (4e-3, 0.25),
}
CHANCE = "random"
# First those that look at what a gate does to the loss, then those that look at the factors alone.
EQUAL_RULES = (
    CHANCE,
    "snr",
    "true-fisher",
    "fisher",
    "held-back",
    "gain",
    "relative",
    "singular",
    "uniform",
    "norm",
)


# The package's own selection, with noisy gates before and after it, by information and by chance, and the gates of a full adapter.
KEPT_PLACES = (("digits-all", 8, 100), ("movie-all", 8, 200), ("fashion-all", 8, 200))
KEPT_LANGUAGE = ("smollm-reviews", 8, 64)


def kept_methods(keep: float) -> tuple[str, ...]:
    """The package's selection of a share `keep` by information and by chance, all gates, and the whole method with selection."""
    return (
        f"gates:keep={keep:g}",
        f"gates:keep={keep:g},select_by=random",
        "gates",
        f"structlora:keep={keep:g}",
    )


# A quarter of the directions, selected in training by the package's own option, beside the whole adapter and LoRA at both
# sizes, each method at its own rate: (method, rank), the one in question first.
QUARTER = tuple(
    (f"{task}{modules}", 8, examples)
    for task, examples in (("digits", 100), ("fashion", 200), ("movie", 200), ("product", 200))
    for modules in ("", "-all")
)
QUARTER_METHODS = (("structlora:keep=0.25", 8), ("structlora", 8), ("lora", 2), ("lora", 8))
QUARTER_SEEDS = range(100, 112)
QUARTER_RATE_SEEDS = QUARTER_SEEDS[:3]  # which choose the rates
CUT_SEEDS = QUARTER_SEEDS[3:]  # whose runs are cut after training too
# Of the same comparison, other sizes.
SIZE_SEEDS = CUT_SEEDS[:6]
_BY_CHANCE, _KEEPS = "structlora:keep={:g},select_by=random", "structlora:keep={:g}"
_SELECTED, _SELECTED_16 = (("structlora:keep=0.25", rank) for rank in (8, 16))
BY_INFORMATION = ("structlora:keep=99%", 8)
QUARTER_CHANCE = (_BY_CHANCE.format(0.25), 8)  # the control of selection at a quarter
# Methods whose rates are chosen too, and methods that have the rate of another (method, rank).
SIZE_METHODS = (*(("lora", rank) for rank in (1, 4, 16)), ("adalora", 2), ("structlora", 16), _SELECTED_16)
SAME_RATE = {
    **{
        (name.format(keep), rank): (method, rank)
        for method, rank in (_SELECTED, _SELECTED_16)
        for keep in (0.125, 0.25, 0.5)
        for name in (_KEEPS, _BY_CHANCE)
    },
    BY_INFORMATION: ("structlora", 8),
}

# The same on the language model, at the rate that validation chose for both methods at rank 4, and on few examples at the lower
# of the two rates of `few-low`.
LANGUAGE_SIZES = {("smollm-numbers", 8, 320): 8e-3, ("smollm-movie-few-all", 8, 128): 2e-3}
LANGUAGE_SIZE_SEEDS = range(130, 136)

# Noise by passes: how far does a run outrun its data? Five tasks with few examples, all linear modules adapted, each run for four
# numbers of passes, each method at its own rate. Said before the runs: the primary endpoint is the test NLL, mean over tasks at 15
# and 50 passes, of StructLoRA less the best of the dropouts; then accuracy and ECE there, and harm at 2 and 5 passes.
PASSES = (2, 5, 15, 50)
PASSES_TASKS = {  # rank, examples, rates
    "digits-all": (8, 100, RATES["digits-all"]),
    "fashion-all": (8, 100, RATES["fashion-all"]),
    "movie-all": (8, 100, RATES["movie-all"]),
    "smollm-reviews": (8, 64, (5e-4, 1e-3, 2e-3)),
    "smollm-numbers-few": (8, 64, (1e-3, 2e-3, 4e-3)),
}
PASSES_DROPOUTS = ("lora-dropout-0.1", "lora-dropout-0.3", "lora-dropout-0.5")
WITHOUT_COORDINATOR, WITHOUT_NOISE = "structlora:coordinator=none", "structlora:noise=off"
PASSES_METHODS = ("lora", *PASSES_DROPOUTS, "lora-average", "structlora", WITHOUT_COORDINATOR)
# What the rule of passes is chosen against, at StructLoRA's rate: no noise, and all of it, at any number of passes.
PASSES_CONTROLS = (WITHOUT_NOISE, "structlora:noise_variance=1")
PASSES_SEEDS = range(320, 332)
PASSES_RATE_SEEDS = PASSES_SEEDS[:3]  # which choose the rates
PASSES_LANGUAGE_SEEDS = PASSES_SEEDS[:6]
# The rates of the paper, in 1,000 steps.
PAPER_RATES = (1e-4, 2e-4, 5e-4)
PAPER_PLACES = (("digits-all@320", 8, 100), ("fashion-all@160", 8, 100), ("movie-all@80", 8, 100))

# Seeds of runs that the tables over settings do not have: of another ViT, or at equal size.
LATER_SEEDS = {*AGAIN_SEEDS, *QUARTER_SEEDS, *VERA_SEEDS, *LANGUAGE_SIZE_SEEDS, *PASSES_SEEDS}


def selected(rule: str, keep: float) -> str:
    """The method that selects a share `keep` of the directions in training by a rule."""
    return f"select:rule={rule},keep={keep:g}"
