"""Axolotl's real command line, in the environment of `make test-axolotl`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("axolotl", reason="run `make test-axolotl`")

from axolotl.integrations.base import PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from safetensors.torch import load_file

from structlora_trl import StructLoRAConfig, StructLoRAError
from tests.support.data import BLOCKS_OF_64, chat, save_base
from tests.support.doors import (
    ROOT,
    check,
    instruction,
    run,
    save_pictures,
    save_rows,
    state_of,
)
from tests.support.launching import free_port
from tests.support.readme import readme_block
from tests.support.tiny import sentence

PLUGIN = "structlora_trl.integrations.axolotl.StructLoRAPlugin"
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KERNELS = [f"lora_{part}_kernel" for part in ("qkv", "o", "mlp")]
NO_KERNELS = dict.fromkeys(KERNELS, False)  # they need triton
ON_CPU_SCRIPT = Path(__file__).with_name("axolotl_on_cpu.py")
# Axolotl's command with its plugins' entry points out of sight: what 0.20 sees, or an environment without this package.
NO_ENTRY_POINTS = (
    "import sys, axolotl.integrations.base as base; base.PLUGIN_ENTRY_POINT_GROUP = 'none'; "
    "from axolotl.cli.main import main; sys.exit(main())"
)
# Triton's interpreter runs kernels on a CPU; Axolotl's activation kernels allocate their output on "cuda" by name.
KERNELS_ON_CPU = (
    "import sys, torch; empty = torch.empty; "
    "torch.empty = lambda *a, device=None, **k: empty(*a, device=None if device == 'cuda' else device, **k); "
    "from axolotl.cli.main import main; sys.exit(main())"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    save_base(folder / "model")
    save_base(folder / "wide", **BLOCKS_OF_64)
    save_rows(folder / "instructions.json", instruction)
    save_rows(
        folder / "preferences.json",
        lambda i: {"prompt": sentence(i, 4), "chosen": sentence(i + 1, 4), "rejected": sentence(i + 2, 4)},
    )
    return folder


def settings(place, name: str, **changes) -> dict:
    """The keys of a run; None takes one out."""
    keys = {
        "base_model": str(place / "model"),
        "adapter": "structlora",
        "seed": 42,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "datasets": [{"path": str(place / "instructions.json"), "type": "alpaca"}],
        "dataset_prepared_path": str(place / "prepared"),
        "val_set_size": 0,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "output_dir": str(place / name),
        **changes,
    }
    return {key: value for key, value in keys.items() if value is not None}


def config(place, name: str, **changes) -> str:
    """Write the YAML of a run; its path."""
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings(place, name, **changes)))
    return str(file)


def train(place, name: str, *launcher, succeeds=True, start=("axolotl",), environment=None, **changes) -> str:
    launcher = ("--launcher", *(launcher or ("python",)))
    file = config(place, name, **changes)
    return run(*start, "train", file, *launcher, succeeds=succeeds, **(environment or {}))


@pytest.fixture(scope="module")
def sft(place):
    log = train(place, "sft")
    return place / "sft", log


def test_one_flag_and_no_plugins_line(place, sft):
    output, log = sft
    assert "plugins:" not in (place / "sft.yaml").read_text()
    options = check(output, place / "model")
    assert {name: options[name] for name in StructLoRAConfig().options()} == StructLoRAConfig().options()
    assert log.count("StructLoRA on torch, 1 process: 2 kinds") == 1
    # Axolotl would switch its fused kernels on, in which no gate acts.
    assert "gates on 6 modules" in log and "leaves Axolotl's fused LoRA kernels off" in log


def test_merge_lora(place, sft):
    run("axolotl", "merge-lora", place / "sft.yaml", "--lora-model-dir", sft[0])
    check(sft[0], place / "model", merged=sft[0] / "merged")


def test_inference(place, sft):
    command = ["axolotl", "inference", place / "sft.yaml", "--lora-model-dir", sft[0], "--launcher", "python"]
    output = run(*command, input="w1 w2 w3\n")
    assert "w1 w2 w3" in output


def test_resume_goes_on_where_the_checkpoint_ended(place, sft):
    """Three steps and three more end where six do."""
    train(place, "whole", max_steps=6)
    train(place, "resumed", max_steps=6, resume_from_checkpoint=str(sft[0] / "checkpoint-3"))
    (_, whole), (_, resumed) = state_of(place / "whole", 6), state_of(place / "resumed", 6)
    assert whole.keys() == resumed.keys() and all(whole[name].equal(resumed[name]) for name in whole)
    check(place / "resumed", place / "model", 6)


def test_dpo(place):
    preferences = {"path": str(place / "preferences.json"), "ds_type": "json", "split": "train"}
    preferences["type"] = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
    train(place, "dpo", rl="dpo", datasets=[preferences])
    check(place / "dpo", place / "model")


QUANTISED = {
    "structlora 4 bit": {"adapter": "structlora", "load_in_4bit": True},
    "qlora with a block": {"adapter": "qlora", "load_in_4bit": True, "structlora": {"beta": 0.5}},
    "structlora 8 bit": {"adapter": "structlora", "load_in_8bit": True},
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised(place, name):
    pytest.importorskip("bitsandbytes")
    log = train(place, name, base_model=str(place / "wide"), **QUANTISED[name])
    assert "converting PEFT model w/ prepare_model_for_kbit_training" in log
    check(place / name, place / "wide")


def test_block_on_lora(place):
    """With the plugin named too, it still is there once; options as YAML writes them."""
    block = {
        "beta": 0.5,
        "coordinator": "gcn",
        "edges": "adjacency",
        "coordinator_lr": "5e-2",  # YAML 1.1 reads it as text
    }
    log = train(place, "block", adapter="lora", structlora=block, plugins=[PLUGIN])
    options = check(place / "block", place / "model")
    assert (options["beta"], options["edges"], options["coordinator_lr"]) == (0.5, "adjacency", 0.05)
    assert log.count("StructLoRA on torch") == 1


def test_without_entry_points(place):
    """Axolotl refuses the adapter; the `plugins:` line of earlier versions brings it back."""
    start = ("python", "-c", NO_ENTRY_POINTS)
    output = train(place, "missing", start=start, succeeds=False)
    assert "Adapter 'structlora' is not built in" in output
    train(place, "named", start=start, plugins=[PLUGIN])
    check(place / "named", place / "model")


def test_inert_where_not_asked_for(place):
    """The same plain LoRA, bit for bit, with the plugin loaded and without it."""
    log = train(place, "plain", adapter="lora", **NO_KERNELS)
    assert f"Plugin loaded successfully: {PLUGIN}" in log and "StructLoRA on" not in log
    log = train(place, "alone", adapter="lora", start=("python", "-c", NO_ENTRY_POINTS), **NO_KERNELS)
    assert PLUGIN not in log
    with_plugin, without = (
        load_file(place / name / "adapter_model.safetensors") for name in ("plain", "alone")
    )
    assert with_plugin.keys() == without.keys()
    assert all(with_plugin[name].equal(without[name]) for name in without)
    assert not list(place.glob("plain/**/structlora*"))


def test_relora(place):
    """At a restart the weights go into the base model, and StructLoRA starts on the fresh adapter."""
    train(place, "relora", relora=True, jagged_restart_steps=3, jagged_restart_warmup_steps=1, max_steps=6)
    state_of(place / "relora", 6)
    base, final = (load_file(place / name / "model.safetensors") for name in ("model", "relora"))
    updates = [load_file(place / "relora" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (3, 6)]
    modules = [name.removesuffix(".weight") for name in base if "q_proj" in name or "v_proj" in name]
    for module in modules:
        key = f"base_model.model.{module}.lora_{{}}.weight"
        deltas = [8 / 4 * update[key.format("B")] @ update[key.format("A")] for update in updates]
        assert all(delta.abs().max() > 1e-4 for delta in deltas)
        expected = base[f"{module}.weight"] + sum(deltas)
        torch.testing.assert_close(final[f"{module}.weight"], expected, atol=1e-5, rtol=0)


ENGINES = {"DDP": None, "DeepSpeed ZeRO-2": str(ROOT / "configs" / "deepspeed" / "zero2.json")}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes(place, sft, engine):
    """On data prepared before: without GPUs, Axolotl's ranks wait for each other while they prepare it."""
    file = config(place, engine, deepspeed=ENGINES[engine])
    # ACCELERATE_USE_CPU would turn DeepSpeed off.
    environment = {} if ENGINES[engine] else {"ACCELERATE_USE_CPU": "true"}
    processes = ("--nproc_per_node", 2, "--master_port", free_port())
    log = run("torchrun", *processes, ON_CPU_SCRIPT, file, **environment)
    assert log.count(f"StructLoRA on {engine}, 2 processes: ") == 1
    check(place / engine, place / "model")


def with_kernels(place, name: str, **changes) -> str:
    pytest.importorskip("triton")
    return train(
        *(place, name),
        start=("python", "-c", KERNELS_ON_CPU),
        environment={"TRITON_INTERPRET": "1"},
        lora_target_modules=ALL_LINEAR,
        **changes,
    )


WITHOUT_GATES = {"gates": "off"}


def test_fused_kernels_without_gates(place):
    """Axolotl turns its kernels on by itself, and StructLoRA trains what it trains without them."""
    log = with_kernels(place, "kernels", structlora=WITHOUT_GATES)
    assert (
        "Auto-enabling LoRA kernel optimizations" in log and "Patched attention class with LoRA optims" in log
    )
    train(place, "forwards", lora_target_modules=ALL_LINEAR, structlora=WITHOUT_GATES, **NO_KERNELS)
    _, kernels = state_of(place / "kernels")
    _, forwards = state_of(place / "forwards")
    assert kernels.keys() == forwards.keys()
    for name in forwards:
        assert (kernels[name].float() - forwards[name].float()).abs().max() < 1e-4, name
    check(place / "kernels", place / "model")


def test_fused_kernels_that_the_configuration_asks_for(place):
    """They stay, without gates, and the start line says so."""
    six_epochs = {"micro_batch_size": 16, "max_steps": 6, "save_steps": 6}
    log = with_kernels(place, "asked", **six_epochs, **dict.fromkeys(KERNELS, True))
    assert "no gates on 21 modules (fused LoRA kernels)" in log
    check(place / "asked", place / "model", 6)


def validated(**keys) -> DictDefault:
    """A configuration through Axolotl's own steps, up to training."""
    cfg = DictDefault(
        {
            "base_model": "x",
            "datasets": [{"path": "x", "type": "alpaca"}],
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            **keys,
        }
    )
    prepare_plugins(cfg)
    return validate_config(cfg)


@pytest.mark.parametrize("keys, stay", [({}, False), ({"structlora": WITHOUT_GATES}, True)])
def test_kernels_stay_where_there_are_no_gates(keys, stay):
    cfg = validated(adapter="structlora", lora_r=4, lora_alpha=8, lora_target_linear=True, **keys)
    # What is left out Axolotl switches on, where the machine has a GPU.
    assert [cfg.get(key) is not False for key in KERNELS] == [stay] * len(KERNELS)


MISTAKES = {
    "misspelt option": ({"adapter": "structlora", "structlora": {"gaets": "off"}}, "write `gates`"),
    "misspelt on lora": ({"adapter": "lora", "structlora": {"kep": 0.4}}, "write `keep`"),
    "nothing under the key": ({"adapter": "lora", "structlora": None}, "write `structlora: true`"),
    "not an answer": ({"adapter": "lora", "structlora": "yes please"}, "write `structlora: true`"),
    "off and on": ({"adapter": "structlora", "structlora": False}, "write `adapter: lora`"),
    "no adapter": ({"structlora": True}, "write `adapter: structlora`"),
    "another adapter": ({"adapter": "llama-adapter", "structlora": True}, "write `adapter: structlora`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    keys, remedy = MISTAKES[name]
    with pytest.raises(StructLoRAError, match=remedy):
        validated(**keys)


def test_a_mistake_stops_the_command(place):
    output = train(place, "mistake", succeeds=False, structlora={"gaets": "off"})
    assert "write `gates`" in output
    assert not (place / "mistake" / "adapter_model.safetensors").exists()


def test_block_survives_a_second_validation():
    """Ray's workers validate what has been validated."""
    once = validated(adapter="structlora", structlora={"beta": 0.5, "roles": {"my_proj": "read"}})
    assert once.adapter == "lora" and once.structlora.beta == 0.5
    prepare_plugins(once)
    again = validate_config(once)
    assert again.structlora.to_dict() == once.structlora.to_dict()
    assert again.structlora.roles.to_dict() == {"my_proj": "read"}


def test_a_run_that_never_reached_the_callback_is_refused():
    plugin = PluginManager.get_instance().plugins[PLUGIN]
    cfg = validated(adapter="structlora")
    with pytest.raises(StructLoRAError, match="never reached"):
        plugin.post_train(cfg, None)
    plugin.post_train(validated(adapter="lora"), None)


FAMILIES = {"llama": "llama", "qwen3": "qwen3", "gemma": "gemma3", "llava": "llava"}
CONFIGS = {path.stem: path for path in (ROOT / "configs" / "axolotl").glob("*.yaml")}
ON_CPU = {
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "deepspeed": None,
    "special_tokens": None,
}
SHORT = {
    "num_epochs": None,
    "max_steps": 3,
    "save_steps": 3,
    "saves_per_epoch": None,
    "evals_per_epoch": None,
    "val_set_size": 0,
}


@pytest.mark.parametrize("name", [*CONFIGS, "README"])
def test_configs_train_as_they_stand(place, name):
    """Every key of the file, except for a tiny model, local data, three steps and what a CPU lacks."""
    written = yaml.safe_load(readme_block("Axolotl") if name == "README" else CONFIGS[name].read_text())
    family = FAMILIES[name.split("-")[0]] if name != "README" else "qwen3"
    sizes = BLOCKS_OF_64 if written.get("load_in_4bit") else {}
    model = place / f"{family}{len(sizes)}"
    save_base(model, family, **sizes)
    if family == "llava":
        data = save_pictures(place / "pictures.json")
    elif written["datasets"][0]["type"] == "alpaca":
        data = str(place / "instructions.json")
    else:
        data = save_rows(place / "chats.json", chat)
    dataset = {**written["datasets"][0], "path": data, "ds_type": "json", "split": "train"}
    changes = {
        **ON_CPU,
        **SHORT,
        "base_model": str(model),
        "datasets": [dataset],
        "output_dir": str(place / name),
    }
    changes |= {
        "dataset_prepared_path": str(place / f"prepared-{name}"),
        "sequence_len": 64,
        "learning_rate": 1e-3,
    }
    keys = {key: value for key, value in {**written, **changes}.items() if value is not None}
    file = place / f"config-{name}.yaml"
    file.write_text(yaml.safe_dump(keys))
    run("axolotl", "train", file, "--launcher", "python")
    check(place / name, model)
