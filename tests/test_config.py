"""The configuration: names, ranges, messages, and that every front door sees the same fields."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
import yaml
from transformers import HfArgumentParser
from trl import SFTConfig, TrlParser

from structlora_trl import StructLoRACallback, StructLoRAConfig, StructLoRAError, StructLoRASFTConfig
from structlora_trl.yaml_block import read_switch

REFUSED = {
    "filter": ["ibb", None, ""],
    "temperature": [0, -1, float("inf"), "0.3", True],
    "noise": [None, 0, "of"],
    "hard_gates": [1, "yes"],
    "gate_init": [0, 1, 1.5],
    "prior": [0, 1],
    "kl_weight": [-0.1, float("nan")],
    "label_weight": [-1],
    "gate_lr": [-1e-3],
    "share_gates": ["true"],
    "head_gates": ["all"],
    "expert_gates": [1],
    "coordinator": ["gnn"],
    "coordinator_layers": [0, 4, 1.0, True],
    "side": ["left"],
    "activation": ["relu"],
    "coordinator_lr": ["fast"],
    "edges": ["all"],
    "semantic_top_k": [0],
    "semantic_threshold": [1.0, -1.1],
    "semantic_every": [0],
    "semantic_decay": [1.0],
    "align_init": [None],
    "regularizer": ["l2"],
    "regularizer_weight": [0],
    "roles": [{"q": "input"}, "{", ["q_proj"]],
    "seed": [-1, 1.5],
    "adapter_name": [3],
}


def test_the_table_covers_every_option():
    assert REFUSED.keys() == {f.name for f in fields(StructLoRAConfig)}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in REFUSED.items() for v in values])
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(StructLoRAError, match=f"found {name}=.*Expected .*Fix: correct `{name}`"):
        StructLoRAConfig(**{name: value})


def test_misspelt_names_and_values_get_the_nearest():
    with pytest.raises(StructLoRAError, match=r"unknown option `fliter`.*write `filter`"):
        StructLoRACallback(fliter="ib")
    with pytest.raises(StructLoRAError, match=r"did you mean 'adjacency'"):
        StructLoRACallback(edges="adjacancy")


@pytest.mark.parametrize(
    "options, remedy",
    [
        ({"coordinator": "none", "edges": "adjacency"}, "remove `coordinator='none'`, or remove `edges`"),
        ({"coordinator": "none", "semantic_every": 5}, "or remove `semantic_every`"),
        ({"coordinator": "none", "side": "write"}, "or remove `side`"),
        ({"coordinator": "none", "side": "both", "regularizer": "cosine"}, None),
        ({"edges": "adjacency", "side": "write"}, None),
    ],
)
def test_options_that_act_on_nothing_are_refused(options, remedy):
    if remedy is None:
        StructLoRAConfig(**options)
        return
    with pytest.raises(StructLoRAError, match=f"and coordinator='none'. Expected a coordinator.*{remedy}"):
        StructLoRAConfig(**options)


def test_overrides_win_and_the_original_stays():
    config = StructLoRAConfig(prior=0.3)
    assert StructLoRACallback(config, temperature=1.0).config == StructLoRAConfig(prior=0.3, temperature=1.0)
    assert config.temperature == StructLoRAConfig().temperature
    assert StructLoRACallback({"prior": 0.3}).config == config


def _flat_key(folder, word):
    path = folder / "run.yaml"
    path.write_text(f"output_dir: {folder}\nuse_cpu: true\nbf16: false\nnoise: {word}\n")
    return TrlParser(StructLoRASFTConfig).parse_args_and_config(["--config", str(path)])[0]


def _json_file(folder, word):
    path = folder / "run.json"
    path.write_text(json.dumps({"output_dir": str(folder), "use_cpu": True, "bf16": False, "noise": word == "on"}))
    return HfArgumentParser(StructLoRASFTConfig).parse_json_file(str(path))[0]


@pytest.mark.parametrize("word", ["on", "off"])
@pytest.mark.parametrize(
    "read",
    [
        lambda folder, word: StructLoRAConfig(noise=word == "on"),
        lambda folder, word: StructLoRACallback(noise=word == "on").config,
        lambda folder, word: read_switch(yaml.safe_load(f"noise: {word}")),
        _flat_key,
        _json_file,
    ],
    ids=["Python", "callback", "YAML block", "flat key", "JSON"],
)
def test_on_and_off_may_come_as_booleans(read, word, tmp_path):
    """YAML 1.1 reads the documented values of `noise` as booleans."""
    assert read(tmp_path, word).options()["noise"] == word


def test_every_field_has_help():
    for f in fields(StructLoRAConfig):
        assert len(f.metadata["help"]) > 20, f.name


def test_command_line_has_the_same_names(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--filter", "random", "--gate_lr", "0.5", "--share_gates", "true"]
    arguments += ["--roles", '{"my_proj": "read"}', "--seed", "7", "--use_cpu", "true", "--bf16", "false"]
    (args,) = HfArgumentParser(StructLoRASFTConfig).parse_args_into_dataclasses(arguments)
    assert isinstance(args, SFTConfig)
    config = StructLoRAConfig.build(args)
    assert config == StructLoRAConfig(filter="random", gate_lr=0.5, share_gates=True, roles={"my_proj": "read"}, seed=7)
    with pytest.raises(StructLoRAError, match="gate_lr"):
        StructLoRASFTConfig(str(tmp_path), gate_lr=-1.0, use_cpu=True, bf16=False)


def test_sft_config_keeps_its_own_fields(tmp_path):
    ours = StructLoRASFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    plain = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert ours.output_dir == str(tmp_path)
    known = {f.name for f in fields(StructLoRAConfig)} - {"seed"}
    assert known.isdisjoint(f.name for f in fields(SFTConfig))
    for f in fields(SFTConfig):
        if f.name not in ("logging_dir", "run_name"):
            assert getattr(ours, f.name) == getattr(plain, f.name), f.name


def test_docstring_lists_every_option_at_one_indentation():
    """On every Python: 3.13 takes the indentation out of docstrings, earlier versions do not."""
    listed = re.findall(r"(?m)^    (\w+) \(`", StructLoRAConfig.__doc__)
    assert listed == [field.name for field in fields(StructLoRAConfig)]
