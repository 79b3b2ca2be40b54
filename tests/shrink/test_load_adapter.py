"""What `read_saved` finds in a folder: adapters and checkpoints of every engine, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from structlora_trl import save_state
from structlora_trl.cli import main
from structlora_trl.errors import StructLoRAError
from structlora_trl.gates_file import GATES_NAME
from structlora_trl.shrink.export import export
from structlora_trl.shrink.inspecting import log_history
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.state import STATE_NAME
from tests.support.adapters import ADAPTER, CONFIG, HALF, STEPS, llama_run
from tests.support.launching import launch, one_at_a_time
from tests.support.tiny import assert_same, attached, base_model, peft_model, train


def test_an_adapter_of_another_name_lies_in_a_folder_of_its_own(runs, tmp_path):
    shutil.copytree(runs(), tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "out" / "mine").mkdir()
    for name in (ADAPTER, "adapter_config.json"):
        (tmp_path / "out" / name).rename(tmp_path / "out" / "mine" / name)
    saved = read_saved(tmp_path / "out")
    assert saved.maps is not None
    assert all(torch.equal(value, saved.tensors[name]) for name, value in load_file(runs() / ADAPTER).items())


def test_an_adapter_is_read_with_what_lies_in_its_own_folder(runs, tmp_path):
    """Checkpoints near it are not searched, nor are their state, gates and log used."""
    shutil.copytree(runs(), tmp_path / "out")
    for name in (STATE_NAME, GATES_NAME, "trainer_state.json"):
        (tmp_path / "out" / name).unlink()
    saved = read_saved(tmp_path / "out")
    assert saved.maps is saved.step is saved.openness is None and log_history(saved.folder) == []
    checkpoint = read_saved(tmp_path / "out" / f"checkpoint-{STEPS}")
    assert checkpoint.step == STEPS == log_history(checkpoint.folder)[-1]["step"]
    assert checkpoint.maps is not None and checkpoint.openness is not None


def test_a_checkpoint_without_weights_is_refused_with_the_remedy(runs, tmp_path, capsys):
    """As ZeRO-3 leaves it where it does not gather weights on saving."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(runs() / f"checkpoint-{STEPS}", checkpoint)
    (checkpoint / ADAPTER).unlink()
    assert main(["export", str(checkpoint), str(tmp_path / "adapter")]) == 1
    assert "stage3_gather_16bit_weights_on_model_save" in capsys.readouterr().err


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_pickled_adapter_is_read_whole(is_tied, tmp_path):
    """`save_pretrained(safe_serialization=False)`, with biases that the state does not hold; tied factors are two then."""
    out = llama_run(tmp_path, lora_bias=True)
    tensors = load_file(out / ADAPTER)
    if is_tied:
        (out / STATE_NAME).unlink()
        first, second, *_ = (name for name in tensors if name.endswith("q_proj.lora_A.weight"))
        tensors[second] = tensors[first]
    (out / ADAPTER).unlink()
    torch.save(tensors, out / "adapter_model.bin")
    export(read_saved(out), tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / ADAPTER)
    assert exported.keys() == tensors.keys() and all(
        torch.equal(exported[name], tensors[name]) for name in tensors
    )


@pytest.mark.parametrize("has_state", [True, False])
def test_vera_is_refused_with_what_reads_it(has_state, tmp_path, capsys):
    model, optimizer, runtime = attached(peft_model(init="vera"))
    train(model, "llama", optimizer, 2)
    model.save_pretrained(tmp_path)
    if has_state:
        save_state(runtime, tmp_path)
    assert main(["inspect", str(tmp_path)]) != 0
    told = capsys.readouterr().err
    assert "VERA" in told and "merge_and_unload" in told and "Traceback" not in told


def test_folders_of_adapters_with_names_are_told(tmp_path):
    for name in ("mine", "other"):
        get_peft_model(base_model("llama"), LoraConfig(target_modules=["q_proj"]), name).save_pretrained(
            tmp_path
        )
    with pytest.raises(StructLoRAError, match=f"give {tmp_path / 'mine'} or {tmp_path / 'other'}"):
        read_saved(tmp_path)
    assert len(read_saved(tmp_path / "mine").kinds) == 1


@pytest.mark.parametrize("frozen", ["reference", "default"])
def test_of_two_adapters_the_one_that_the_options_name_is_read(frozen, tmp_path):
    out, targets = tmp_path / "out", {"target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(
        base_model("llama"), LoraConfig(r=4, lora_alpha=12, **targets), adapter_name="policy"
    )
    model.add_adapter(frozen, LoraConfig(r=4, init_lora_weights=False, **targets))
    model.set_adapter("policy")
    model, optimizer, runtime = attached(model, adapter_name="policy")
    train(model, "llama", optimizer, 1)
    model.save_pretrained(out)
    save_state(runtime, out)
    saved, expected = read_saved(out), load_file(out / "policy" / ADAPTER)
    assert saved.lora.lora_alpha == 12
    assert_same(saved.tensors, expected)


ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
FAST = "zero3"


@one_at_a_time
@pytest.mark.parametrize(
    "engine", [e if e == FAST else pytest.param(e, marks=pytest.mark.slow) for e in ENGINES]
)
def test_checkpoints_of_every_engine(engine, tmp_path):
    launch(
        tmp_path,
        engine,
        steps=2,
        trainer={"save_strategy": "steps", "save_steps": 2},
        method={"coordinator_lr": 0.3},
    )
    (checkpoint,) = tmp_path.glob("checkpoint-2")
    saved = load_file(checkpoint / ADAPTER)
    assert main(["inspect", str(checkpoint)]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / ADAPTER)
    assert saved.keys() == exported.keys() and all(torch.equal(saved[name], exported[name]) for name in saved)


def weights(change):
    """Damage to the adapter's weights: what becomes of the tensors."""

    def spoil(folder):
        tensors = load_file(folder / ADAPTER)
        change(tensors)
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, folder / ADAPTER, {"format": "pt"}
        )

    return spoil


def configuration(**changes):
    def spoil(folder):
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))

    return spoil


def bytes_of(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _other_step(folder):
    shutil.copy(folder.parent / "out" / f"checkpoint-{HALF}" / ADAPTER, folder / ADAPTER)


def _without_adapter(folder):
    (folder / ADAPTER).unlink()
    (folder / STATE_NAME).unlink()


def without_norms(folder):
    with safe_open(folder / STATE_NAME, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file({n: x for n, x in tensors.items() if not n.endswith("norms")}, folder / STATE_NAME, header)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
# What is wrong with a folder -> (how to make it so, words of the message)
DAMAGED = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json"),
    "a truncated configuration": (bytes_of(CONFIG, lambda b: b[:200]), "adapter_config.json failed"),
    "a configuration that is a list": (bytes_of(CONFIG, lambda b: b"[]"), "adapter_config.json failed"),
    "an unknown PEFT type": (configuration(peft_type="LORE"), "adapter_config.json failed"),
    "another PEFT type": (configuration(peft_type="LOHA"), "of LOHA"),
    "AdaLoRA": (configuration(peft_type="ADALORA", total_step=10), "of ADALORA"),
    "block-diagonal factors": (configuration(use_bdlora={"target_modules_bd_a": ["q_proj"]}), "use_bdlora"),
    "KaSA": (configuration(kasa_config={}), "kasa_config"),
    "another rank": (configuration(r=8), "rank 8"),
    "no weights": (_without_adapter, "no adapter weights"),
    "weights cut by a byte": (bytes_of(ADAPTER, lambda b: b[:-1]), "adapter_model.safetensors failed"),
    "a page in the place of weights": (
        bytes_of(ADAPTER, lambda b: b"<html>"),
        "adapter_model.safetensors failed",
    ),
    "names of no LoRA": (
        weights(lambda t: [t.update({f"x.{i}": t.pop(n)}) for i, n in enumerate([*t])]),
        "no LoRA",
    ),
    "a lacking factor": (weights(lambda t: t.pop(B)), "do not fit"),
    "a transposed factor": (weights(lambda t: t.update({A: t[A].T})), "do not fit"),
    "a flat factor": (weights(lambda t: t.update({A: t[A].flatten()})), "do not fit"),
    "whole numbers": (weights(lambda t: t.update({A: t[A].int()})), "int32"),
    "one NaN": (weights(lambda t: t[B].view(-1)[7:8].fill_(torch.nan)), "NaN"),
    "one infinite weight": (weights(lambda t: t[B].view(-1)[7:8].fill_(torch.inf)), "infinite"),
    "a lacking module": (weights(lambda t: [t.pop(A), t.pop(B)]), "different weights"),
    "another step's adapter": (_other_step, "different weights"),
    "a truncated state": (bytes_of(STATE_NAME, lambda b: b[:500]), "damaged"),
    "no norms in the state": (without_norms, f"{STATE_NAME} failed"),
    "an adapter in the place of the state": (lambda f: shutil.copy(f / ADAPTER, f / STATE_NAME), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_refused_by_name(damage, runs, tmp_path):
    spoil, words = DAMAGED[damage]
    if words in ("use_bdlora", "kasa_config") and words not in LoraConfig.__dataclass_fields__:
        pytest.skip(f"this version of PEFT has no `{words}`")
    shutil.copytree(runs(), tmp_path / "out")
    folder = shutil.copytree(runs(), tmp_path / "folder", ignore=shutil.ignore_patterns("checkpoint-*"))
    spoil(folder)
    with pytest.raises(StructLoRAError, match=words):
        read_saved(folder)
