"""`structlora export --scale`: the update times a number, against losses worked out in plain PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from structlora_trl.cli import main
from structlora_trl.errors import StructLoRAError
from structlora_trl.shrink import measuring
from structlora_trl.shrink.base_model import load_base
from structlora_trl.shrink.export import export
from tests.shrink.test_pruning import adapter, row_losses, rows_of  # noqa: F401
from tests.support.adapters import ADAPTER
from tests.support.data import write_rows

# What rows say -> (loss at a scale, of row i; how many rows; the scale to choose)
CHOICES = {
    "all want less": (lambda scale, i: (scale - 0.5) ** 2, 6, 0.5),
    "all want more, as rows of the training do": (lambda scale, i: -scale, 6, 1.0),
    "one outweighs the others, who want none of it": (
        lambda scale, i: (1 - scale) * (1 if i else -9),
        6,
        1.0,
    ),
    "one row, whom no other confirms": (lambda scale, i: scale, 1, 1.0),
}


@pytest.mark.parametrize("case", CHOICES)
def test_a_scale_is_chosen_where_it_helps_rows_that_did_not_choose(case, monkeypatch):
    loss, count, expected = CHOICES[case]
    monkeypatch.setattr(measuring, "put", lambda model, tensors: model.update(tensors))
    monkeypatch.setattr(
        measuring, "_loss_of", lambda model, row: loss(float(model["m.lora_B.weight"]), row["number"])
    )
    tensors = {"m.lora_A.weight": torch.ones(1), "m.lora_B.weight": torch.ones((), dtype=torch.float64)}
    found = measuring.choose_scale({}, tensors, [{"number": i} for i in range(count)], "some rows")
    assert found.scale == expected
    assert found.before == pytest.approx(sum(loss(1.0, i) for i in range(count)) / count)
    assert (found.after < found.before) == (expected < 1)


def against(saved, rows: list[dict]) -> list[dict]:
    """Rows with the labels that the adapter has made least likely, beside its base model: less of it is better."""
    model = PeftModel.from_pretrained(
        load_base(saved.lora.base_model_name_or_path, saved.lora, saved.tensors), saved.folder
    ).eval()
    found = []
    for row in rows:
        with torch.no_grad():
            ours = model(**row).logits.log_softmax(-1)
            with model.disable_adapter():
                least = (ours - model(**row).logits.log_softmax(-1)).argmin(-1)  # (1, n)
        found.append({**row, "labels": least.roll(1, -1)})  # of the position before
    return found


# What is exported -> (adapter, options beside the scale)
CASES = {
    "as it is": ("two ranks", {}),
    "distilled": ("plain", {"rank": 2, "distil": 3}),
    "over the model, for a server": ("rslora", {"keep": 0.5, "server": "lorax"}),
    "biases of the model, which are no part of the update": ("biases of the model", {"dtype": "float32"}),
    "experts": ("experts", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_scale_is_in_the_file_and_lowers_the_loss_in_plain_peft(case, adapter, tmp_path):  # noqa: F811
    name, options = CASES[case]
    saved, family = adapter(name)
    rows = against(saved, rows_of(family))
    done = export(saved, tmp_path / "scaled", scale="auto", data=rows, **options)
    data = {"data": rows} if options.keys() & {"rank", "keep"} else {}
    export(saved, tmp_path / "whole", **data, **options)
    before, after = (row_losses(saved, tmp_path / folder, rows) for folder in ("whole", "scaled"))
    assert done.scaled.scale < 1 and after < before
    assert done.scaled.before == pytest.approx(before, rel=1e-4)
    if done.losses:
        assert done.losses.after == pytest.approx(after, rel=1e-4)
    whole, less = (load_file(tmp_path / folder / ADAPTER) for folder in ("whole", "scaled"))
    assert whole.keys() == less.keys()
    for tensor, value in whole.items():
        is_update = ("lora_B" in tensor or "embedding_B" in tensor) and not tensor.endswith("bias")
        torch.testing.assert_close(less[tensor], value * done.scaled.scale if is_update else value)


def test_the_command_tells_what_it_did(adapter, tmp_path, capsys):  # noqa: F811
    saved, family = adapter("plain")
    rows = against(saved, rows_of(family))
    write_rows(tmp_path / "rows.jsonl", [{name: x[0].tolist() for name, x in row.items()} for row in rows])
    told = {
        ("auto", "--data", str(tmp_path / "rows.jsonl")): "the update is multiplied by 0.3.",
        ("0.5",): "the update is multiplied by 0.5.",
    }
    for number, (given, words) in enumerate(told.items()):
        assert main(["export", str(saved.folder), str(tmp_path / f"{number}"), "--scale", *given]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("name, words", [("biases", "`lora_bias`"), ("dora", "DoRA's magnitudes")])
def test_updates_that_lora_B_does_not_scale_are_refused(name, words, adapter, tmp_path):  # noqa: F811
    with pytest.raises(StructLoRAError, match=words):
        export(adapter(name)[0], tmp_path / "new", scale=0.5)
    assert not (tmp_path / "new").exists()
