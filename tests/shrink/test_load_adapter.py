"""What `read_saved` finds in a folder: adapters and checkpoints of every engine, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from structlora_trl import save_state
from structlora_trl.cli import main
from structlora_trl.errors import StructLoRAError
from structlora_trl.shrink.export import export
from structlora_trl.shrink.inspecting import log_history
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.state import STATE_NAME
from tests.support.adapters import ADAPTER, CONFIG, HALF, KINDS, STEPS, llama_run, only_adapter
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


# Where an adapter lies alone -> its folder; the run's output, with its checkpoints, is "out".
ALONE = {"in the output folder": "out/final", "as the output folder": "out", "beside it": "adapter"}


@pytest.mark.parametrize("place", ALONE)
@pytest.mark.parametrize("is_pruned", [False, True])
def test_an_adapter_alone_has_the_state_of_the_newest_equal_checkpoint(
    place, is_pruned, runs, tmp_path, capsys
):
    out, folder = tmp_path / "out", tmp_path / ALONE[place]
    shutil.copytree(
        runs(), out, ignore=shutil.ignore_patterns(*([STATE_NAME, ADAPTER] if folder == out else []))
    )
    if folder == out:  # the patterns left the checkpoints' files out too
        for step in (HALF, STEPS):
            shutil.copytree(runs() / f"checkpoint-{step}", out / f"checkpoint-{step}", dirs_exist_ok=True)
        shutil.copy(runs() / ADAPTER, out)
        (out / "trainer_state.json").unlink()
    else:
        only_adapter(runs(), folder)
    os.utime(out / f"checkpoint-{HALF}")  # the newest one holds another adapter
    if is_pruned:
        (out / f"checkpoint-{STEPS}" / ADAPTER).unlink()  # as ZeRO-3 leaves it; the state still fits
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert str(out / f"checkpoint-{STEPS}") in printed
    adds = [int(line.split()[1]) for line in printed.splitlines() if line[:5].strip().isdigit()]
    state = load_file(runs() / STATE_NAME)
    assert adds == [int(row.sum()) for kind in KINDS for row in state[f"{kind}/selection.kept"]]
    saved = read_saved(folder)
    assert (
        saved.step == STEPS
        and saved.folder == folder
        and [e["step"] for e in log_history(saved.run_folder)][-1] == STEPS
    )


def test_an_adapter_alone_has_no_state_of_another_one(runs, tmp_path):
    """Neither of a run with other weights beside it, nor of a damaged checkpoint."""
    only_adapter(runs(), tmp_path / "adapter")
    shutil.copytree(runs() / f"checkpoint-{HALF}", tmp_path / "out" / f"checkpoint-{HALF}")
    shutil.copytree(runs() / f"checkpoint-{STEPS}", tmp_path / "out" / f"checkpoint-{STEPS}")
    (tmp_path / "out" / f"checkpoint-{STEPS}" / STATE_NAME).write_bytes(b"damaged")
    saved = read_saved(tmp_path / "adapter")
    assert saved.maps is None and saved.run_folder == saved.folder


def test_a_plain_run_has_the_log_of_its_checkpoint(runs, tmp_path):
    only_adapter(runs(), tmp_path / "adapter")
    shutil.copytree(runs() / f"checkpoint-{STEPS}", tmp_path / "out" / f"checkpoint-{STEPS}")
    (tmp_path / "out" / f"checkpoint-{STEPS}" / STATE_NAME).unlink()
    saved = read_saved(tmp_path / "adapter")
    assert saved.maps is None and log_history(saved.run_folder)[-1]["step"] == STEPS


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


@pytest.mark.parametrize("frozen", ["frozen_ref", "reference", "default"])
def test_of_two_adapters_the_trained_one_is_read(frozen, tmp_path):
    out, targets = tmp_path / "out", {"target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(
        base_model("llama"), LoraConfig(r=4, lora_alpha=12, **targets), adapter_name="policy"
    )
    model.add_adapter(frozen, LoraConfig(r=4, init_lora_weights=False, **targets))
    model.set_adapter("policy")
    model, optimizer, runtime = attached(model)
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


def _folder_instead(name):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def _without_state(spoil):
    def both(folder):
        (folder / STATE_NAME).unlink()
        spoil(folder)

    return both


def _other_step(folder):
    shutil.copy(folder.parent / "out" / f"checkpoint-{HALF}" / ADAPTER, folder / ADAPTER)


def _without_adapter(folder):
    (folder / ADAPTER).unlink()
    (folder / STATE_NAME).unlink()


def _spoilt_state(change):
    def spoil(folder):
        with safe_open(folder / STATE_NAME, "pt") as file:
            tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        change(tensors, header)
        save_file(tensors, folder / STATE_NAME, header)

    return spoil


def _last(tensors, end):
    return max(name for name in tensors if name.endswith(end))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
# What is wrong with a folder -> (how to make it so, words of the message)
DAMAGED = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json"),
    "a truncated configuration": (bytes_of(CONFIG, lambda b: b[:200]), "adapter_config.json failed"),
    "an empty configuration": (bytes_of(CONFIG, lambda b: b""), "adapter_config.json failed"),
    "a configuration that is no text": (
        bytes_of(CONFIG, lambda b: b"\xff\xfe" + b),
        "adapter_config.json failed",
    ),
    "a configuration that is a list": (bytes_of(CONFIG, lambda b: b"[]"), "adapter_config.json failed"),
    "a configuration that is a folder": (_folder_instead(CONFIG), "no adapter_config.json"),
    "no PEFT type": (configuration(peft_type=None), "adapter_config.json failed"),
    "an unknown PEFT type": (configuration(peft_type="LORE"), "adapter_config.json failed"),
    "another PEFT type": (configuration(peft_type="LOHA"), "PEFT type"),
    "AdaLoRA": (configuration(peft_type="ADALORA", total_step=10), "PEFT type ADALORA"),
    "block-diagonal factors": (configuration(use_bdlora={"target_modules_bd_a": ["q_proj"]}), "use_bdlora"),
    "KaSA": (configuration(kasa_config={}), "kasa_config"),
    "another rank": (configuration(r=8), "rank 8"),
    "no weights": (_without_adapter, "no adapter weights"),
    "truncated weights": (bytes_of(ADAPTER, lambda b: b[:500]), "adapter_model.safetensors failed"),
    "weights cut by a byte": (bytes_of(ADAPTER, lambda b: b[:-1]), "adapter_model.safetensors failed"),
    "empty weights": (bytes_of(ADAPTER, lambda b: b""), "adapter_model.safetensors failed"),
    "a page in the place of weights": (
        bytes_of(ADAPTER, lambda b: b"<html>not found</html>"),
        "adapter_model.safetensors failed",
    ),
    "weights that are a folder": (_folder_instead(ADAPTER), "adapter_model.safetensors failed"),
    "names of no LoRA": (
        weights(lambda t: [t.update({f"x.{i}": t.pop(n)}) for i, n in enumerate([*t])]),
        "no LoRA",
    ),
    "a lacking factor": (weights(lambda t: t.pop(f"{Q}.lora_B.weight")), "do not fit"),
    "a transposed factor": (
        weights(lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].T})),
        "not fit",
    ),
    "a flat factor": (
        weights(lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].flatten()})),
        "not fit",
    ),
    "whole numbers": (
        weights(lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].int()})),
        "int32",
    ),
    "one NaN": (weights(lambda t: t[f"{Q}.lora_B.weight"].view(-1)[7:8].fill_(torch.nan)), "NaN"),
    "one infinite weight": (
        weights(lambda t: t[f"{Q}.lora_B.weight"].view(-1)[7:8].fill_(torch.inf)),
        "infinite",
    ),
    "a lacking module": (
        weights(lambda t: [t.pop(f"{Q}.lora_{s}.weight") for s in "AB"]),
        "different weights",
    ),
    "a module of another name": (
        weights(lambda t: [t.update({n.replace(Q, Q + "2"): t.pop(n)}) for n in [*t] if Q in n]),
        "different weights",
    ),
    "another step's adapter": (_other_step, "different weights"),
    "a truncated state": (bytes_of(STATE_NAME, lambda b: b[:500]), "damaged"),
    "an empty state": (bytes_of(STATE_NAME, lambda b: b""), "damaged"),
    "no norms in the state": (_spoilt_state(lambda t, h: t.pop(_last(t, "norms"))), f"{STATE_NAME} failed"),
    "a start of another shape in the state": (
        _spoilt_state(lambda t, h: t.update({_last(t, "origin_A"): torch.zeros(3)})),
        "damaged",
    ),
    "no module in the state": (_spoilt_state(lambda t, h: h.update(kinds="{}")), "damaged"),
    "an adapter in the place of the state": (lambda f: shutil.copy(f / ADAPTER, f / STATE_NAME), "damaged"),
}
# What a plain adapter has, is seen without the state too.
DAMAGED |= {
    f"{name}, no state": (_without_state(spoil), words)
    for name, (spoil, words) in DAMAGED.items()
    if words != "different weights" and not name.endswith((" state", "the state", "no weights"))
}


@pytest.fixture
def folder(runs, tmp_path):
    """A copy of a run to spoil, with the run itself beside it."""
    shutil.copytree(runs(), tmp_path / "out")
    shutil.copytree(runs(), tmp_path / "folder", ignore=shutil.ignore_patterns("checkpoint-*"))
    return tmp_path / "folder"


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_refused_by_name(damage, folder, capsys):
    spoil, words = DAMAGED[damage]
    if words in ("use_bdlora", "kasa_config") and words not in LoraConfig.__dataclass_fields__:
        pytest.skip(f"this version of PEFT has no `{words}`")
    spoil(folder)
    for command in (["inspect", str(folder)], ["export", str(folder), str(folder.parent / "new")]):
        capsys.readouterr()
        assert main(command) == 1
        assert words in capsys.readouterr().err
    assert not (folder.parent / "new").exists()
