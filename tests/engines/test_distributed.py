"""DDP, FSDP2 and DeepSpeed ZeRO 1 to 3 in real processes over gloo: the weights of the one-process run, and what is sent."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.support.launching import (
    ENGINES,
    FP16,
    STEADY,
    adapter,
    job_arguments,
    largest_difference,
    launch,
    one_at_a_time,
    run,
    state,
    torchrun,
    trained,
)
from tests.support.tiny import assert_same

pytestmark = one_at_a_time
slow = pytest.mark.slow

SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
SEMANTIC = {"method": {"edges": "similarity", "semantic_threshold": 0.17}}


def length(accumulation: int, micro_batch: int = 6) -> dict:
    """Ten micro-batches are an epoch where gradients accumulate: of three, so that its last window is short."""
    rows = (8 if accumulation == 1 else 10) * micro_batch
    return {"accumulation": accumulation, "rows": rows, "steps": 10, "micro_batch": micro_batch}


def rows(engines, world: int) -> list[tuple[str, int]]:
    return [(engine, world) for engine in engines]


OFFLOAD = [f"zero{stage}_offload" for stage in (1, 2, 3)]
VARIANTS = {
    "sharded": SHARDED,
    "hpz": {"zero_optimization": {**SHARDED["zero_optimization"], "zero_hpz_partition_size": 2}},
}
CLIPPED = {"trainer": {**STEADY, "max_grad_norm": 0.1, "logging_steps": 6}}
EVEN = {"trainer": {**STEADY, "pad_to_multiple_of": 8}}  # sequences that contexts deal out evenly
EQUAL = {
    # name: (what the job is told, engines with their processes in the quick suite, and beside them)
    "ten steps": (
        {**length(1), **SEMANTIC},
        [],
        [("zero3 sharded", 2), *rows([*ENGINES, "zero3 sharded"], 3), *rows(["hsdp", "zero3 hpz"], 6)],
    ),
    "accumulated": (
        {**length(3), **SEMANTIC},
        rows(["fsdp2", "zero2"], 2),
        [*rows(["ddp", "zero1", "zero3", "zero3 sharded", *OFFLOAD], 2), ("zero3 sharded", 3), ("hsdp", 6)],
    ),
    # On widths that 3 does not divide, and an adapter of fewer rows than ranks.
    "clipped": (
        {**length(3, 12), "steps": 6, "lora": {"r": 2}, **CLIPPED, **SEMANTIC},
        [("fsdp2", 3), ("zero3 sharded", 2), ("zero2_offload", 2)],
        [
            *rows(["ddp", "zero1", "zero2", "zero3 sharded"], 3),
            *rows(["hsdp", "zero3 hpz", *ENGINES, "zero3 sharded"], 4),
            *rows(["zero1_offload", "zero3_offload"], 2),
        ],
    ),
    "uneven adapter": (
        {"lora": {"rank_pattern": {r"layers\.1\..*v_proj": 3}, "layers_to_transform": [0, 1]}},
        [("fsdp2", 3)],
        rows(["ddp", "zero1", "zero2", "zero3"], 3),
    ),
    # λ_d of four directions, over three ranks.
    "VeRA": ({"vera": {"r": 4}}, [("zero3", 3)], rows(["ddp", "fsdp2", "zero1", "zero2"], 3)),
    "frozen lora_A": (
        {**length(1, 12), "steps": 6, "freeze": "lora_A", "method": {"side": "write"}},
        [],
        [("fsdp2", 2), *rows(["hsdp", "zero3 hpz"], 4)],
    ),
    "context parallelism": ({**EVEN, **SEMANTIC}, [("cp", 4)], []),
    # Clipped: ZeRO 1 and 2 scale the gradients of ranks that share rows otherwise than one process, with plain LoRA too.
    "sequence parallelism": (
        {"trainer": {**EVEN["trainer"], "max_grad_norm": 0.1}, "sequence_parallel": 2, **SEMANTIC},
        [],
        rows(["zero1", "zero2", "zero3"], 2),
    ),
}


@pytest.mark.parametrize(
    "name, engine, world",
    [
        *((name, *row) for name, (_, quick, _) in EQUAL.items() for row in quick),
        *(pytest.param(name, *row, marks=slow) for name, (_, _, others) in EQUAL.items() for row in others),
    ],
)
def test_weights_are_those_of_one_process(name, engine, world, tmp_path, one_process):
    ring = "torch.distributed.tensor.experimental._context_parallel"
    if engine == "cp" and importlib.util.find_spec(ring) is None:
        pytest.skip(f"torch {torch.__version__} has no place to give its ring attention the CPU's kernel")
    options = {"steps": 6, "trainer": STEADY, **EQUAL[name][0]}
    engine, *variants = engine.split()
    deepspeed = VARIANTS[variants[0]] if variants else {}
    facts = launch(tmp_path, engine, world, deepspeed=deepspeed, **options)
    alone = one_process(**{k: v for k, v in options.items() if k != "sequence_parallel"})
    assert facts["step"] == options["steps"] and facts["skipped"] == 0
    if name == "clipped":
        assert min(facts["norms"]) > 0.1  # it does clip
    if engine == "cp":
        assert facts["mesh"] == {"dp_shard_cp": 4}  # parameters are sharded over contexts too
    assert largest_difference(trained(alone), trained(tmp_path)) <= 1e-5


WITH_EXPERTS = {"family": "mixtral", "lora": {"target_modules": ["q_proj", "v_proj"]}}
LOADED = [
    # engine, more options of the job, the engine of the same run, placements of the base
    ("loaded_fsdp2", {}, "single", ["S(0)"]),
    ("loaded_fsdp2", {"freeze": "lora_A", "method": {"side": "write"}}, "single", ["S(0)"]),
    ("loaded_fsdp2", {"vera": {"r": 4}}, "single", ["S(0)"]),
    ("loaded_replicas", {}, "single", ["R", "S(0)"]),
    # Losses that balance experts are of a rank's own rows, so that DDP's run is the same one.
    ("loaded_experts", WITH_EXPERTS, "ddp", ["S(0)"]),
]


@pytest.mark.parametrize(
    "engine, more, other, placements",
    [row if i == 0 else pytest.param(*row, marks=slow) for i, row in enumerate(LOADED)],
)
def test_a_base_that_transformers_shards_as_it_loads(engine, more, other, placements, tmp_path, one_process):
    """The adapter is whole on each rank, and Trainer averages its gradients: clipped and accumulated here."""
    options = {**length(3, 12), "steps": 6, "trainer": {**STEADY, "max_grad_norm": 0.1}, **SEMANTIC, **more}
    facts = launch(tmp_path / "loaded", engine, **options)
    assert facts["step"] == 6 and facts["skipped"] == 0
    assert facts["base"] == placements and facts["adapter"] == ["Tensor"]
    assert min(facts["norms"]) > 0.1 or {"family", "vera"} & more.keys()  # it does clip
    expected = one_process(**options) if other == "single" else tmp_path / other
    if other != "single":
        launch(expected, other, **options)
    assert largest_difference(trained(expected), trained(tmp_path / "loaded")) <= 1e-5


@slow
def test_resume_beside_a_base_that_transformers_shards(tmp_path):
    """Trainer writes no optimizer's state there, and begins it anew, as the one process does here. Ours goes on."""
    told = {**SAVING, "trainer": {**SAVING["trainer"], "save_only_model": True, "adam_epsilon": 1e-4}}
    for engine in ("single", "loaded_fsdp2"):
        launch(tmp_path / engine, engine, stop_at=3, **told)
        facts = launch(tmp_path / engine, engine, resume=str(tmp_path / engine / "checkpoint-3"), **told)
        assert facts["step"] == 6
    assert largest_difference(trained(tmp_path / "single"), trained(tmp_path / "loaded_fsdp2")) <= 1e-5


ON_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
UNTRAINABLE = [
    ("loaded_fsdp2", 2, {"never_average": True}, "LoRA gradients that differ between ranks"),
    ("loaded_hsdp", 4, {}, "a lora_B of 16 rows on a module of 32 outputs"),
    (
        "loaded_experts",
        2,
        {**WITH_EXPERTS, "lora": ON_EXPERTS},
        "expert parallelism, with LoRA on the experts",
    ),
]


@pytest.mark.parametrize(
    "engine, world, more, found",
    [row if i == 0 else pytest.param(*row, marks=slow) for i, row in enumerate(UNTRAINABLE)],
)
def test_what_cannot_be_trained_beside_a_sharded_base(engine, world, more, found, tmp_path):
    output = launch(tmp_path, engine, world, check=False, micro_batch=12, steps=2, **more)
    for rank in range(world):
        assert f"[rank{rank}]: structlora_trl.errors.StructLoRAError: StructLoRA found {found}" in output


BF16 = [
    *((engine, *world, {}) for engine in ENGINES for world in ((2, 3), (3, 1))),
    *((f"zero{stage}", 2, 3, FP32_GRADIENTS) for stage in (1, 2, 3)),
    ("hsdp", 6, 1, {}),
    ("zero3", 2, 3, SHARDED),
    ("zero2_offload", 2, 3, {}),
    ("zero3_offload", 2, 3, {}),
    ("loaded_fsdp2", 2, 3, {}),
]


@slow
@pytest.mark.parametrize("engine, world, accumulation, deepspeed", BF16)
def test_bf16_is_as_near_to_one_process_as_plain_lora(
    engine, world, accumulation, deepspeed, tmp_path, one_process
):
    def distance(method) -> float:
        options = {**length(accumulation), "trainer": STEADY, "dtype": "bfloat16", "method": method}
        run = tmp_path / ("plain" if method is None else "ours")
        facts = launch(run, engine, world, deepspeed=deepspeed, **options)
        if engine == "zero1" and deepspeed == FP32_GRADIENTS:
            assert facts["optimizer"] == "BF16_Optimizer"
        one, many = adapter(one_process(**options)), adapter(run)
        return sum((one[n] - many[n]).float().square().sum().item() for n in one) ** 0.5

    assert distance({}) <= 2 * distance(None)


@pytest.mark.parametrize("engine", [e if e == "ddp" else pytest.param(e, marks=slow) for e in ENGINES])
def test_off_is_plain_lora_bit_for_bit(engine, tmp_path):
    launch(tmp_path / "plain", engine, method=None, steps=4)
    launch(tmp_path / "off", engine, method={"coordinator": "none"}, steps=4)
    assert_same(adapter(tmp_path / "plain"), adapter(tmp_path / "off"))


AGAIN = {"steps": 3, "again": "same", "trainer": {**STEADY, "lr_scheduler_type": "constant"}}


@pytest.mark.parametrize(
    "engine", [pytest.param("ddp", marks=slow), "fsdp2", pytest.param("loaded_fsdp2", marks=slow)]
)
def test_a_second_train_goes_on(engine, tmp_path, one_process):
    """From the weights that stand, with the first one's offsets and Θ."""
    launch(tmp_path, engine, **AGAIN)
    assert largest_difference(trained(one_process(**AGAIN)), trained(tmp_path)) <= 1e-5


@slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_a_second_train_under_deepspeed_needs_a_new_engine(engine, tmp_path, one_process):
    """Of the same engine, Trainer leaves nothing to train with. A new one has new optimizer state, as here the one process."""
    assert "a second `train()` under DeepSpeed" in launch(tmp_path / "same", engine, check=False, **AGAIN)
    # Of AdamW's first steps from a new state, an element whose gradient is near epsilon makes much of a rounding.
    trainer = {**AGAIN["trainer"], "gradient_checkpointing": False, "adam_epsilon": 1e-4}
    anew = {**AGAIN, "again": "anew", "trainer": trainer}
    launch(tmp_path / "new", engine, **anew)
    assert largest_difference(trained(one_process(**anew)), trained(tmp_path / "new")) <= 1e-5


SAVING = {"steps": 6, "trainer": {**STEADY, "save_strategy": "steps", "save_steps": 3}}


@pytest.mark.parametrize(
    "engine",
    ["zero3", *(pytest.param(e, marks=slow) for e in ("ddp", "fsdp2", "zero1", "zero2", "zero2_offload"))],
)
def test_resume_is_bit_for_bit(engine, tmp_path):
    """With gates, whose generators Trainer restores on each rank."""
    noisy = {**SAVING, "method": {"gates": "gaussian"}}
    launch(tmp_path / "whole", engine, **noisy)
    launch(tmp_path / "parts", engine, stop_at=3, **noisy)
    launch(tmp_path / "parts", engine, resume=str(tmp_path / "parts" / "checkpoint-3"), **noisy)
    for left in (state, adapter):
        assert_same(left(tmp_path / "whole"), left(tmp_path / "parts"))


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(engine, marks=slow) for engine in ("ddp", "fsdp2", "zero3"))]
)
def test_a_job_whose_rank_is_killed_ends_and_goes_on(engine, tmp_path):
    """From its last checkpoint. A kill within a save: `trainers/test_trainers.py`."""
    launch(tmp_path / "whole", engine, **SAVING)
    parts = tmp_path / "parts"
    job = job_arguments(parts, engine, {**SAVING, "kill_at": 4, "group_timeout": 15})
    done = run(torchrun(2) + job, timeout=300)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-2000:]
    launch(parts, engine, resume=str(parts / "checkpoint-3"), **SAVING)
    assert_same(state(parts), state(tmp_path / "whole"))


@slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_what_zero_to_fp32_collects_is_the_adapter(engine, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    launch(tmp_path, engine, method={"coordinator_lr": 0.3}, **SAVING)
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "checkpoint-6"))
    for name, value in adapter(tmp_path).items():
        torch.testing.assert_close(
            found[name.replace(".weight", ".default.weight")], value, atol=1e-6, rtol=0
        )


@slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_resume_at_another_world_size(engine, tmp_path, one_process):
    """Where the engine's own checkpoint allows it, the run goes on as if nothing had changed; ZeRO's does not, and says so."""
    launch(tmp_path, engine, 2, stop_at=3, **SAVING)
    resumed = {"resume": str(tmp_path / "checkpoint-3"), **SAVING}
    if engine == "zero2":
        output = launch(tmp_path, engine, 3, check=False, **resumed)
        assert "DP world size of 2 but the current world size is 3" in output
        return
    launch(tmp_path, engine, 3, **resumed)
    assert largest_difference(trained(one_process(**SAVING)), trained(tmp_path)) <= 1e-5


@slow  # `test_attach` has those of fp32
@pytest.mark.parametrize("engine, world", [*rows([*ENGINES, "zero2_offload"], 2), ("hsdp", 4)])
def test_bad_gradients_skip_the_step_everywhere(engine, world, tmp_path):
    """The run with a poisoned last step ends where the run without that step does."""
    deepspeed = FP32_GRADIENTS if engine == "zero1" else {}
    options = {"dtype": "bfloat16", "steps": 4, "deepspeed": deepspeed, "micro_batch": 12}
    facts = launch(tmp_path / "poisoned", engine, world, poison_at=3, **options)
    assert facts["step"] == 3 and facts["skipped"] == 1
    launch(tmp_path / "clean", engine, world, stop_at=3, **options)
    assert largest_difference(trained(tmp_path / "poisoned"), trained(tmp_path / "clean")) == 0


@slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_fp16_overflow_skips_the_step_for_all(engine, tmp_path):
    """DeepSpeed halves its loss scale at each of the first steps, and training goes on."""
    facts = launch(tmp_path / "three", engine, dtype="float16", deepspeed=FP16, steps=3)
    assert facts["step"] == 0 and facts["skipped"] == 3
    launch(tmp_path / "one", engine, dtype="float16", deepspeed=FP16, steps=1)
    assert largest_difference(trained(tmp_path / "three"), trained(tmp_path / "one")) == 0
    facts = launch(tmp_path / "five", engine, dtype="float16", deepspeed=FP16, steps=5)
    assert facts["step"] == 2 and facts["skipped"] == 3
    assert largest_difference(trained(tmp_path / "five"), trained(tmp_path / "one")) > 1e-3


def test_ranks_that_differ_stop_with_what_differs(tmp_path):
    output = launch(tmp_path, "ddp", check=False, method_of_rank_1={"edges": "adjacency"}, steps=1)
    for rank in (0, 1):
        assert f"[rank{rank}]: structlora_trl.errors.StructLoRAError" in output
    assert "ranks that differ in configuration: edges" in output and "'adjacency'" in output
