"""LLaMA-Factory's real command line with `structlora-llamafactory`, in the environment of `make test-llamafactory`."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("llamafactory", reason="run `make test-llamafactory`")

from structlora_trl.integrations.llamafactory import read_arguments

from structlora_trl.errors import StructLoRAError
from tests.support.data import BLOCKS_OF_64, save_base
from tests.support.doors import ROOT, check, instruction, run, save_rows, state_of
from tests.support.launching import free_port
from tests.support.readme import readme_block
from tests.support.tiny import sentence

COMMAND = "structlora-llamafactory"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamafactory")
    save_base(folder / "model")
    save_base(folder / "wide", **BLOCKS_OF_64)
    save_rows(folder / "instructions.json", instruction)
    save_rows(
        folder / "preferences.json",
        lambda i: {**instruction(i), "chosen": sentence(i + 1, 4), "rejected": sentence(i + 2, 4)},
    )
    preference = {
        "file_name": "preferences.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    }
    info = {"instructions": {"file_name": "instructions.json"}, "preferences": preference}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def config(place, name: str, **changes) -> str:
    """Write the YAML of a run and return its path."""
    settings = {
        "model_name_or_path": str(place / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "q_proj,v_proj",
        "dataset": "instructions",
        "dataset_dir": str(place),
        "template": "default",
        "cutoff_len": 64,
        "output_dir": str(place / name),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return str(file)


@pytest.fixture(scope="module")
def sft(place):
    """SFT with an option in the file and one on the command line."""
    log = run(
        COMMAND,
        "train",
        config(place, "sft", structlora={"beta": 0.5}),
        "structlora.edges=adjacency",
    )
    return place / "sft", log


def test_sft(place, sft):
    output, log = sft
    options = check(output, place / "model")
    assert (options["beta"], options["edges"]) == (0.5, "adjacency")
    assert "StructLoRA on torch, 1 process: 2 kinds" in log
    assert (output / "all_results.json").is_file()


def test_export_with_llamafactory_cli(place, sft):
    file = place / "export.yaml"
    settings = {
        "model_name_or_path": str(place / "model"),
        "adapter_name_or_path": str(sft[0]),
        "template": "default",
        "export_dir": str(place / "merged"),
        "infer_dtype": "float32",
    }
    file.write_text(yaml.safe_dump(settings))
    run("llamafactory-cli", "export", file)
    check(sft[0], place / "model", merged=place / "merged")


def test_resume_goes_on_where_the_checkpoint_ended(place, sft):
    """Three steps and three more end where six do."""
    told = {"structlora": {"beta": 0.5, "edges": "adjacency"}, "max_steps": 6}
    run(COMMAND, "train", config(place, "whole", **told))
    checkpoint = {"resume_from_checkpoint": str(sft[0] / "checkpoint-3")}
    run(COMMAND, "train", config(place, "resumed", **told, **checkpoint))
    (_, whole), (_, resumed) = state_of(place / "whole", 6), state_of(place / "resumed", 6)
    assert whole.keys() == resumed.keys() and all(whole[name].equal(resumed[name]) for name in whole)
    check(place / "resumed", place / "model", 6)


def test_dpo(place):
    run(COMMAND, "train", config(place, "dpo", stage="dpo", dataset="preferences", pref_beta=0.1))
    check(place / "dpo", place / "model")


def test_4_bit(place):
    pytest.importorskip("bitsandbytes")
    quantised = {
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "model_name_or_path": str(place / "wide"),
    }
    log = run(COMMAND, "train", config(place, "bits", **quantised))
    assert "Quantizing model to 4 bit" in log
    check(place / "bits", place / "wide")


def test_two_processes(place):
    log = run(
        *(COMMAND, "train", config(place, "ddp")),
        **{"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())},
    )
    assert log.count("StructLoRA on DDP, 2 processes: ") == 1
    check(place / "ddp", place / "model")


def test_plain_lora_is_one_word_away(place):
    log = run(COMMAND, "train", config(place, "plain"), "structlora=false")
    assert "StructLoRA" not in log
    assert (place / "plain" / "adapter_model.safetensors").is_file()
    assert not list(place.glob("plain/**/structlora*"))


MISTAKES = {
    "misspelt option": ({"structlora": {"gaets": "off"}}, "write `gates`"),
    "nothing under the key": ({"structlora": None}, "write `structlora: true`"),
    "full fine-tuning": ({"finetuning_type": "full"}, "write `finetuning_type: lora`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_a_remedy(place, name):
    changes, remedy = MISTAKES[name]
    file = config(place, "mistake", **changes)
    if changes.get("structlora", 0) is None:
        with open(file, "a") as more:
            more.write("structlora:\n")
    output = run(COMMAND, "train", file, succeeds=False)
    assert remedy in output and "Traceback" not in output
    assert not (place / "mistake").exists()


@pytest.mark.parametrize(
    "arguments, remedy", [(("chat", "x"), "llamafactory-cli chat"), (("train",), "name the configuration")]
)
def test_command_line(arguments, remedy):
    assert remedy in run(COMMAND, *arguments, succeeds=False)
    assert "structlora: false" in run(COMMAND, "--help")


def test_options_of_the_command_line_are_over_those_of_the_file(tmp_path):
    others, file = tmp_path / "others.yaml", tmp_path / "run.yaml"
    others.write_text("structlora: {beta: 0.5, keep: 0.5}\n")
    file.write_text(f"structlora: {others}\n")
    found = read_arguments([str(file), "structlora.keep=0.25", "lora_rank=4"])
    assert found["structlora"].changed_options() == {"beta": 0.5, "keep": 0.25} and found["lora_rank"] == 4
    with pytest.raises(StructLoRAError, match="structlora=false and structlora.keep"):
        read_arguments([str(file), "structlora=false", "structlora.keep=0.25"])


CONFIGS = {path.stem: path for path in (ROOT / "configs" / "llamafactory").glob("*.yaml")}


TEMPLATES = ("llama3", "qwen3")  # names that LLaMA-Factory 0.9.5 knows


@pytest.mark.parametrize("name", [*CONFIGS, "README"])
def test_configs_train_as_they_stand(place, name):
    """The file itself, with a tiny model, data and three steps on a CPU given as overrides."""
    if name == "README":
        CONFIGS[name] = place / "README.yaml"
        CONFIGS[name].write_text(readme_block("LLaMA-Factory"))
    written = yaml.safe_load(CONFIGS[name].read_text())
    assert written["template"] in TEMPLATES
    quantised = "quantization_bit" in written
    model = place / ("wide" if quantised else "model")
    overrides = {
        "model_name_or_path": model,
        "template": "default",  # the others add tokens of their own models
        "dataset_dir": place,
        "dataset": "preferences" if written["stage"] == "dpo" else "instructions",
        "output_dir": place / name,
        "cutoff_len": 64,
        "max_steps": 3,
        "save_steps": 3,
        "learning_rate": 1e-3,
        "warmup_ratio": 0,
        "gradient_accumulation_steps": 1,
        "bf16": "false",
        "use_cpu": "true",
        "report_to": "none",
    }
    log = run(COMMAND, "train", CONFIGS[name], *(f"{key}={value}" for key, value in overrides.items()))
    assert ("Quantizing model to 4 bit" in log) == quantised
    check(place / name, model)
