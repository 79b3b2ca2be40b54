"""ms-swift's real command line with the callback as an external plugin, in the environment of `make test-ms-swift`."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("swift.callbacks", reason="run `make test-ms-swift`")

from tests.support.data import chat, save_base
from tests.support.doors import ROWS, check, run
from tests.support.launching import free_port

PLUGIN = "import structlora_trl.integrations.ms_swift"  # the README's line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ms_swift")
    save_base(folder / "model")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat(i)) + "\n" for i in range(ROWS)))
    (folder / "structlora_plugin.py").write_text(PLUGIN)
    return folder


def sft(place, name: str, *more, options=None, succeeds: bool = True, **environment) -> str:
    """Train three steps with a YAML file of swift's, whose `ENV` sets variables."""
    settings = {
        "ENV": {} if options is None else {"STRUCTLORA": options},
        "model": str(place / "model"),
        "model_type": "llama",
        "template": "dummy",
        "dataset": str(place / "chats.jsonl"),
        "split_dataset_ratio": 0,
        "torch_dtype": "float32",
        "use_cpu": True,
        "tuner_type": "lora",
        "lora_rank": 4,
        "target_modules": ["q_proj", "v_proj"],
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "tensorboard",
        "output_dir": str(place / name),
        "add_version": False,
    }
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    plugin = ("--external_plugins", place / "structlora_plugin.py", "--callbacks", "structlora")
    return run("swift", "sft", file, *plugin, *more, succeeds=succeeds, **environment)


def adapter(place, name: str):
    """ms-swift saves adapters in checkpoints alone."""
    folder = place / name / "checkpoint-3"
    (folder / folder.name).symlink_to(folder)
    return folder


def test_sft(place):
    log = sft(place, "sft", options={"beta": 0.5})
    assert log.count("StructLoRA on torch, 1 process: 2 kinds") == 1
    assert check(adapter(place, "sft"), place / "model")["beta"] == 0.5


def test_two_processes(place):
    log = sft(place, "ddp", NPROC_PER_NODE="2", MASTER_PORT=str(free_port()))
    assert log.count("StructLoRA on DDP, 2 processes: ") == 1
    check(adapter(place, "ddp"), place / "model")


@pytest.mark.parametrize(
    "options, remedy", [({"gaets": "off"}, "write `gates`"), (False, "without the callback it is plain LoRA")]
)
def test_mistakes(place, options, remedy):
    assert remedy in sft(place, "mistake", options=options, succeeds=False)
