"""Each configuration for TRL, word for word: where it names a public model or data set, a tiny one of that name is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
import yaml
from packaging.version import Version

from structlora_trl.yaml_block import read_switch
from tests.support.cli_runs import assert_plain_peft_agrees, trained
from tests.support.data import BLOCKS_OF_64, chats, preferences, save_base, save_pictures, write_rows
from tests.support.launching import ROOT
from tests.support.left import assert_acted, state_of

TRL = ROOT / "configs" / "trl"
# file -> (command, family of the tiny model, rows; None: pictures)
TABLE = {
    "llama3_8b_qlora": ("sft", "llama", chats),
    "qwen3_8b_sft": ("sft", "qwen3", chats),
    "gemma3_1b_sft": ("sft", "gemma3", chats),
    "llava_7b_sft": ("sft", "llava", None),
    "qwen3_4b_dpo": ("dpo", "qwen3", preferences),
}


def test_every_file_has_a_row():
    assert {path.stem for path in TRL.glob("*.yaml")} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_trl_config(name, place, monkeypatch):
    method, family, rows = TABLE[name]
    if method == "dpo" and Version(trl.__version__) < Version("1.0"):
        pytest.skip(f"TRL {trl.__version__} cannot import its DPOTrainer beside transformers 5")
    config = yaml.safe_load((TRL / f"{name}.yaml").read_text(encoding="utf-8"))
    if config.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    save_base(
        Path(config["model_name_or_path"]), family, **(BLOCKS_OF_64 if config.get("load_in_4bit") else {})
    )
    data = Path(config["dataset_name"])
    data.mkdir(parents=True)
    for split in ("train", "test"):
        save_pictures(data / split) if rows is None else write_rows(data / f"{split}.jsonl", rows())

    trainer = trained(monkeypatch, method, "--config", str(TRL / f"{name}.yaml"), "--max_steps", "5")
    output = config["output_dir"]
    assert_acted(output, steps=5)  # warm-up, lora_B, lora_A, and then Θ: each moves from the step before's
    assert_plain_peft_agrees(trainer.model, output, family)
    header, state = state_of(output)
    assert header["options"] == read_switch(config["structlora"]).options()
    adapted = {name.split("/")[0].split(".")[-1] for name in state if "/norms" in name}
    assert adapted == set(config["lora_target_modules"])
    if family == "llava":
        assert any("vision_tower" in name for name in state)
