"""`structlora export --distil`, several sizes at once, and what a smaller adapter is chosen by; `test_pruning.py` has the sizes."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from structlora_trl.cli import main
from structlora_trl.errors import StructLoRAError
from structlora_trl.shrink import distilling
from structlora_trl.shrink.base_model import load_base, put
from structlora_trl.shrink.distilling import distil
from structlora_trl.shrink.export import export
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.measuring import Losses
from structlora_trl.shrink.peft_scaling import with_singular_directions
from structlora_trl.shrink.pruning import shrink
from tests.shrink.test_pruning import adapter, row_losses, rows_of  # noqa: F401
from tests.support.adapters import ADAPTER, as_it_is, on_base, peft_run
from tests.support.cli_runs import logits_of
from tests.support.data import write_rows
from tests.support.promises import skip_without
from tests.support.setups import llama, t5
from tests.support.tiny import FAMILIES, base_model, tokenizer


@pytest.fixture
def loaded(adapter):  # noqa: F811
    """An adapter on its base, in its singular directions, and rows of uneven length."""
    saved, _ = adapter("plain")
    base = load_base(saved.lora.base_model_name_or_path, saved.lora, saved.tensors)
    model = PeftModel.from_pretrained(base, saved.folder).eval()
    whole, _ = with_singular_directions(saved.lora, saved.tensors)
    put(model, whole)
    rows = [
        {"input_ids": ids[None, :n], "labels": ids[None, :n].clone()}
        for ids, n in zip(_tokens(), range(4, 36), strict=True)
    ]
    return saved, model, whole, rows


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(4, 40, (32, 40), generator=generator)


def test_distillation_brings_the_outputs_nearer_and_keeps_the_size(loaded):
    saved, model, whole, rows = loaded
    small = shrink(saved, 1)
    done = distil(model, whole, small.masked(), rows, steps=40, learning_rate=3e-3)
    assert done.held_out == 4 and 0 < done.steps <= 40 and done.end < 0.8 * done.start
    for name, value in small.masked().items():
        assert torch.equal(value == 0, done.tensors[name] == 0) or "lora_" not in name
    assert all(len(x) == 1 for n, x in small.written(done.tensors)[1].items() if "lora_A" in n)


class Bare(torch.nn.Module):
    """A module of PyTorch, which has no configuration."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x, labels=None):
        return SequenceClassifierOutput(logits=self.inner(x))


def test_a_base_model_needs_no_configuration():
    torch.manual_seed(0)
    model = get_peft_model(Bare(), LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False))
    whole = get_peft_model_state_dict(model)
    small = {name: x.clone() for name, x in whole.items()}
    for name, x in small.items():
        (x[1] if "lora_A" in name else x[:, 1]).zero_()
    rows = [{"x": torch.randn(1, 8), "labels": torch.tensor([i % 2])} for i in range(32)]
    done = distil(model, whole, small, rows, steps=20, learning_rate=1e-2)
    assert done.end < done.start


def test_padded_rows_are_learned_as_single_ones(loaded, monkeypatch):
    _, model, _, rows = loaded
    (together,) = distilling._together(rows[:4])
    found, is_choice = distilling._outputs(model, distilling._stacked(together))
    alone = torch.cat([distilling._outputs(model, row)[0] for row in rows[:4]])
    assert (
        is_choice and len(found) == sum(range(4, 8)) - 4
    )  # of each row all but the first token are predicted
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(distilling, "_ROOM", 10)
    assert [len(part) for part in distilling._together(rows[:4])] == [2, 1, 1]


@pytest.mark.parametrize("problem, labels", [(None, 1), ("multi_label_classification", 3)])
def test_scores_are_learned_as_what_they_are(problem, labels, tmp_path):
    """A softmax would find no difference between any two scores, or where all labels move alike."""

    torch.manual_seed(0)
    config = BertConfig.from_dict(base_model("bert").config.to_dict() | {"num_labels": labels})
    config.problem_type = problem
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "out")
    rows = [{"input_ids": ids[None], "labels": torch.rand(1, labels).squeeze(-1)} for ids in _tokens()[:, :8]]
    found = export(read_saved(tmp_path / "out"), tmp_path / "small", rank=1, data=rows, distil=20)
    assert found.distilled.end < found.distilled.start


def test_rows_of_an_encoder_and_decoder_teach(tmp_path):
    """Their labels are tokens of another number than the inputs, and outputs are of the same position."""
    model = as_it_is(t5)(tmp_path / "base")
    lora = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    saved = read_saved(peft_run(model, tmp_path / "out", FAMILIES["llama"].batch, **lora))
    rows = [
        {"input_ids": ids[None, :9], "labels": ids[None, 9 : 11 + n]} for n, ids in enumerate(_tokens()[:9])
    ]
    base = load_base(saved.lora.base_model_name_or_path, saved.lora, saved.tensors)
    logits, is_choice = distilling._outputs(PeftModel.from_pretrained(base, saved.folder).eval(), rows[3])
    assert is_choice and len(logits) == 5
    done = export(saved, tmp_path / "small", rank=1, data=rows, distil=20)
    assert done.distilled.end < done.distilled.start


IDS = torch.tensor([[1, 2, 3]])
# Rows that cannot teach -> words of the message
UNFIT = {
    "tokens that the model does not have": (
        {"input_ids": IDS + 9999, "labels": IDS},
        "a row of the data failed",
    ),
    "no label": (
        {"input_ids": IDS, "labels": torch.full_like(IDS, -100)},
        r"no row in the rows given with a token to predict \(9 without",
    ),
    "a label of the first token alone": (
        {"input_ids": IDS, "labels": torch.tensor([[1, -100, -100]])},
        "a distance of nan",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_rows_that_cannot_teach_are_refused(what, adapter, tmp_path):  # noqa: F811
    row, words = UNFIT[what]
    with pytest.raises(StructLoRAError, match=words):
        export(adapter("plain")[0], tmp_path / "small", rank=2, data=[row] * 9, distil=2)


def test_a_start_that_nothing_is_nearer_than_stays(loaded):
    _, model, whole, rows = loaded
    done = distil(model, whole, whole, rows, steps=5)
    assert done.steps == 0 and done.end == done.start == 0
    assert all(torch.equal(value, whole[name]) for name, value in done.tensors.items())


@pytest.mark.parametrize("name", ["plain", "dora", "biases of the model", "experts", "pictures", "encoder"])
def test_what_was_distilled_is_what_peft_loads(name, adapter, tmp_path):  # noqa: F811
    saved, family = adapter(name)
    rows = rows_of(family)
    done = export(saved, tmp_path / "small", rank=1, data=rows, distil=True)
    assert done.distilled.end <= done.distilled.start
    expected = row_losses(saved, tmp_path / "small", rows)
    assert done.losses.after == pytest.approx(expected, abs=1e-5)


def test_distillation_on_a_quantised_base(tmp_path):
    skip_without(("bitsandbytes",))
    from transformers import BitsAndBytesConfig

    # On CPUs with AVX-512, bitsandbytes cannot lay out rows shorter than a block of 64.
    wide = partial(llama, hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    model = as_it_is(wide)(tmp_path / "base")
    saved = read_saved(
        peft_run(model, tmp_path / "out", FAMILIES["llama"].batch, target_modules=["q_proj", "v_proj"])
    )
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised)
    base.save_pretrained(tmp_path / "quantised")
    done = export(
        saved,
        tmp_path / "small",
        rank=1,
        data=rows_of("llama", 16),
        distil=True,
        base=str(tmp_path / "quantised"),
    )
    assert done.distilled.end < done.distilled.start and done.losses.base is not None
    assert {len(x) for n, x in load_file(tmp_path / "small" / ADAPTER).items() if "lora_A" in n} == {1}
    with pytest.raises(StructLoRAError, match="a quantised base model to merge into.*`--base MODEL`"):
        export(saved, tmp_path / "merged", merge=True, base=str(tmp_path / "quantised"))
    # The way that the error names.
    export(saved, tmp_path / "merged", merge=True, base=str(tmp_path / "base"))
    found, expected = (
        logits_of(loaded, "llama")
        for loaded in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
            on_base(tmp_path / "out", tmp_path / "base"),
        )
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_several_sizes_in_one_call(adapter, tmp_path, capsys):  # noqa: F811
    adapter("plain")
    tokenizer().save_pretrained(tmp_path / "base")
    learned = [ids for step in range(3) for ids in FAMILIES["llama"].batch(step)["input_ids"]]
    write_rows(tmp_path / "rows.jsonl", [{"text": tokenizer().decode(ids)} for ids in learned])

    def printed(name, *given, data=tmp_path / "rows.jsonl"):
        assert main(["export", str(tmp_path / "out"), str(tmp_path / name), "--data", str(data), *given]) == 0
        return capsys.readouterr().out

    table = printed("sizes", "--rank", "4", "1", "--distil", "--dtype", "bfloat16")
    names = r"(?m)^(base model|the adapter|rank-\d[^ ]*( distilled)?)  .*"
    rows = {match[1]: match[0].split() for match in re.finditer(names, table)}
    assert [*rows] == ["base model", "the adapter", "rank-4, distilled", "rank-1, distilled"]
    base, whole = (float(rows[name][-3]) for name in ("base model", "the adapter"))
    for name, folder in (("rank-4, distilled", "rank-4"), ("rank-1, distilled", "rank-1")):
        loss, gain = float(rows[name][-3]), float(rows[name][-2])
        assert gain == pytest.approx(
            100 * (base - loss) / (base - whole), abs=max(1, 5e-2 / abs(base - whole))
        )
        weights = load_file(tmp_path / "sizes" / folder / ADAPTER)
        assert {x.dtype for x in weights.values()} == {torch.bfloat16}
        on_base(tmp_path / "sizes" / folder, tmp_path / "base")
    warning = "below 90 % much of what was learned is lost"
    assert warning in printed("shares", "--keep", "0.5", "25%")
    assert {path.name for path in (tmp_path / "shares").iterdir()} == {"keep-0.5", "keep-25-percent"}
    assert warning in printed("cap", "--keep", "99%", "--max-rank", "1")
    assert warning not in printed("99", "--keep", "99%")
    alone = printed("alone", "--keep", "25%", data="none")
    assert "% of the updates' squared norm" in alone and warning in alone


def test_an_adapter_that_is_worse_than_its_base_has_no_gain_to_keep():
    assert Losses(base=1.0, before=2.0, after=1.5).gain_kept is None
    assert Losses(base=None, before=2.0, after=1.5).gain_kept is None
    assert Losses(base=3.0, before=1.0, after=1.5).gain_kept == 0.75


def test_a_largest_rank_beside_a_share(adapter, tmp_path):  # noqa: F811
    saved, family = adapter("plain")
    free, limited = (
        export(saved, tmp_path / name, keep=0.3, max_rank=most, data=rows_of(family)).pruned
        for name, most in (("free", None), ("limited", 2))
    )
    ranks = [max(int(mask.sum()) for mask in pruned.kept.values()) for pruned in (free, limited)]
    assert ranks[1] == 2 < ranks[0] and limited.count == free.count and limited.share <= free.share
    with pytest.raises(StructLoRAError, match="a rank of 9"):
        export(saved, tmp_path / "refused", keep=0.5, max_rank=9)


@pytest.mark.parametrize("what", ["a full disk", "a long path"])
def test_a_disk_that_does_not_take_the_file_is_told(what, adapter, tmp_path, monkeypatch):  # noqa: F811
    saved, _ = adapter("plain")
    out = tmp_path / ("x" * 300 if what == "a long path" else "small")
    if what == "a full disk":
        error = OSError(28, "No space left on device")

        def fail(*given, **options):
            raise error

        monkeypatch.setattr("structlora_trl.shrink.base_model.save_file", fail)
    words = "File name too long" if what == "a long path" else "No space left on device"
    with pytest.raises(StructLoRAError, match=words):
        export(saved, out, rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


# Models that predict no classes, or not by one set of logits -> their class, the task's name, what rows have beside tokens
OTHERS = {
    "question answering": (BertForQuestionAnswering, "QUESTION_ANS", ("start_positions", "end_positions")),
    "hidden states": (BertModel, "FEATURE_EXTRACTION", ()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_without_logits_of_one_kind(name, tmp_path):
    """Question answering has a loss to choose by and nothing to distil; embedding models have the one without the other."""
    model_class, task, positions = OTHERS[name]
    torch.manual_seed(0)
    config = base_model("bert").config
    config.num_labels = 2  # the answer's first position and its last
    model = as_it_is(lambda: model_class(config))(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type=task, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "out")
    saved = read_saved(tmp_path / "out")
    ids = FAMILIES["bert"].batch(7)["input_ids"][:1]
    rows = [{"input_ids": ids, **{name: torch.tensor([i % 3]) for name in positions}} for i in range(8)]
    can, cannot, words = {"keep": 0.5}, {"rank": 1, "distil": 20}, "neither logits nor hidden states"
    if not positions:
        can, cannot, words = cannot, can, "a loss of None"
    done = export(saved, tmp_path / "small", data=rows, **can)
    assert (done.losses is not None) == bool(positions)
    assert positions or done.distilled.end < done.distilled.start
    with pytest.raises(StructLoRAError, match=words):
        export(saved, tmp_path / "refused", data=rows, **cannot)
