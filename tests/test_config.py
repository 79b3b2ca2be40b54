"""The configuration: names, ranges, messages, and that every front door sees the same fields."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from structlora_trl import StructLoRACallback, StructLoRAConfig, StructLoRAError, StructLoRASFTConfig
from structlora_trl.yaml_block import read_switch

REFUSED = {
    "gates": [None, "of"],
    "beta": [-1, float("inf"), "0.3", True],
    "gate_openness": [0, 1],
    "gate_lr": [-1, None],
    "keep": [0, 1.5, "101%", "most"],
    "select_at": [0, "half"],
    "coordinator": ["gnn"],
    "coordinator_layers": [4, 1.0],
    "coordinator_lr": ["fast"],
    "side": ["left"],
    "edges": ["all"],
    "semantic_top_k": [0],
    "semantic_threshold": [1.0, -1.1],
    "align_init": [None],
    "roles": [{"q": "input"}, "{"],
    "adapter_name": [3],
    "peft_module": [3],
}


@pytest.mark.parametrize("name", [f.name for f in fields(StructLoRAConfig)])
def test_bad_values_are_refused_by_name(name):
    for value in REFUSED[name]:
        with pytest.raises(StructLoRAError, match=f"found {name}=.*Expected .*Fix: correct `{name}`"):
            StructLoRAConfig(**{name: value})


def test_misspelt_names_and_values_get_the_nearest():
    with pytest.raises(StructLoRAError, match=r"unknown option `gaets`.*write `gates`"):
        StructLoRACallback(gaets="off")
    with pytest.raises(StructLoRAError, match=r"did you mean 'adjacency'"):
        StructLoRACallback(edges="adjacancy")


@pytest.mark.parametrize(
    "options, found",
    [
        ({"coordinator": "none", "edges": "adjacency"}, "coordinator='none'.*or remove `edges`"),
        ({"coordinator": "none", "side": "write"}, "coordinator='none'.*or remove `side`"),
        ({"gates": "off", "beta": 0.3}, "gates='off'.*or remove `beta`"),
        ({"gates": "off", "keep": 0.5}, "gates='off'.*or remove `keep`"),
        ({"select_at": 100}, "keep=None.*set `keep`, or remove `select_at`"),
        ({"edges": "adjacency", "semantic_top_k": 3}, "edges='adjacency'.*or remove `semantic_top_k`"),
    ],
)
def test_options_that_act_on_nothing_are_refused(options, found):
    with pytest.raises(StructLoRAError, match=f"and {found}"):
        StructLoRAConfig(**options)


@pytest.mark.parametrize("word", ["null", "None", "none"])
def test_nothing_is_written_as_in_yaml_or_in_python(word):
    assert read_switch(f"{{keep: {word}, roles: {word}}}") == StructLoRAConfig()


def test_overrides_win_and_the_original_stays():
    config = StructLoRAConfig(keep=0.3)
    assert StructLoRACallback(config, select_at=0.7).config == StructLoRAConfig(keep=0.3, select_at=0.7)
    assert config.select_at == StructLoRAConfig().select_at
    assert StructLoRACallback({"keep": 0.3}).config == config


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("coordinator_layers", np.int64(2), 2),
        ("align_init", np.bool_(False), False),
        ("semantic_top_k", torch.tensor(3), 3),
    ],
)
def test_scalars_of_arrays_are_their_values(name, value, expected):
    """As a search over numpy arrays or rows of a data frame hands them over."""
    found = getattr(StructLoRAConfig(**{name: value}), name)
    assert found == expected and type(found) is type(expected)


ARGUMENTS = {"use_cpu": True, "bf16": False}


def _yaml_file(folder, block):
    path = folder / "run.yaml"
    path.write_text(f"output_dir: {folder}\nuse_cpu: true\nbf16: false\nstructlora: {block}\n")
    return TrlParser(StructLoRASFTConfig).parse_args_and_config(["--config", str(path)])[0]


def _json_file(folder, block):
    path = folder / "run.json"
    path.write_text(json.dumps({"output_dir": str(folder), **ARGUMENTS, "structlora": yaml.safe_load(block)}))
    return HfArgumentParser(StructLoRASFTConfig).parse_json_file(str(path))[0]


def _command_line(folder, block):
    arguments = ["--output_dir", str(folder), "--use_cpu", "true", "--bf16", "false", "--structlora", block]
    return HfArgumentParser(StructLoRASFTConfig).parse_args_into_dataclasses(arguments)[0]


def _named_file(folder, block):
    (folder / "run.yaml").write_text(f"structlora: {block}\n")
    return _command_line(folder, str(folder / "run.yaml"))


def _python(folder, block):
    return StructLoRASFTConfig(str(folder), **ARGUMENTS, structlora=yaml.safe_load(block))


@pytest.mark.parametrize(
    "block, expected",
    [
        ("true", {}),
        ("false", False),
        ('{"beta": 0.8, "keep": 0.5}', {"beta": 0.8, "keep": 0.5}),
        (
            "{roles: {my_proj: read}, coordinator_lr: 1e-3, gates: off}",
            {"roles": {"my_proj": "read"}, "coordinator_lr": 0.001, "gates": "off"},
        ),
    ],
)
@pytest.mark.parametrize("read", [_python, _yaml_file, _json_file, _command_line, _named_file])
def test_training_arguments_have_one_field(read, block, expected, tmp_path):
    arguments = read(tmp_path, block)
    assert arguments.structlora == expected
    assert json.loads(arguments.to_json_string())["structlora"] == expected  # what trackers are given


@pytest.mark.parametrize("read", [_python, _yaml_file, _json_file, _command_line, _named_file])
@pytest.mark.parametrize("block, name", [("{keep: 2}", "keep"), ("{gates: 2}", "gates"), ("gcn", "gcn")])
def test_training_arguments_refuse_other_options(read, block, name, tmp_path):
    with pytest.raises(StructLoRAError, match=name):
        read(tmp_path, block)


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_callback_reads_a_file(suffix, tmp_path):
    path = tmp_path / f"run.{suffix}"
    path.write_text('{"model_name_or_path": "x", "structlora": {"beta": 0.8}}')
    for given in (path, str(path), '{"beta": 0.8}'):
        assert StructLoRACallback(given, keep=0.3).config == StructLoRAConfig(beta=0.8, keep=0.3)


@pytest.mark.parametrize("nothing", [None, True, {}])
def test_no_options_are_the_defaults(nothing):
    assert StructLoRACallback(nothing).config == StructLoRAConfig()


@pytest.mark.parametrize(
    "given, named",
    [
        ("nowhere.yaml", "nowhere.yaml"),
        ("gate_lr", "gate_lr"),
        ("some words", "'some words' for `structlora`"),
        ("{", "JSON"),
        (3, "3 where StructLoRA's options are expected"),
        ([("keep", 0.8)], "a mapping of options to values"),
        ("plain.yaml", "no `structlora` key.*structlora: true"),
        ("off.yaml", "leave the callback out"),
    ],
)
def test_callback_says_what_it_takes(given, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.yaml").write_text("learning_rate: 1e-4\n")
    (tmp_path / "off.yaml").write_text("structlora: false\n")
    with pytest.raises(StructLoRAError, match=named):
        StructLoRACallback(given)


@pytest.mark.parametrize("word", ["on", "off"])
def test_on_and_off_may_come_as_booleans(word):
    """YAML 1.1 reads `off` and `on` as booleans."""
    expected = {"on": "gaussian", "off": "off"}[word]
    assert StructLoRACallback(gates=word == "on").config.gates == expected
    assert read_switch(yaml.safe_load(f"gates: {word}")).gates == expected
    assert read_switch(f"{{gates: {word}}}").gates == expected
