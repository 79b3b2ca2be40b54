"""The average of weights that the FAQ shows, beside the callback."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from structlora_trl import StructLoRACallback
from tests.support.jobs import sft
from tests.support.readme import code_blocks
from tests.support.tiny import weights_of


class Seen(TrainerCallback):
    """The trained weights after each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights_of(model))


def test_the_mean_over_the_last_half_of_the_steps_is_saved(tmp_path):
    (block,) = (block for block in code_blocks("docs/faq.md", "python") if "TailAverage" in block)
    variables = {"__name__": "faq"}
    exec(compile(block, "docs/faq.md", "exec"), variables)
    seen = Seen()
    trainer = sft(tmp_path, [StructLoRACallback(), seen, variables["TailAverage"]()], max_steps=5)
    trainer.train()
    assert len(seen.steps) == 5
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    expected = {name: sum(step[name] for step in seen.steps[2:]) / 3 for name in seen.steps[0]}
    assert len(saved) == len(expected)
    for name, value in expected.items():
        torch.testing.assert_close(saved[name.replace(".default", "")], value)
    assert any(not torch.equal(value, seen.steps[-1][name]) for name, value in expected.items())
