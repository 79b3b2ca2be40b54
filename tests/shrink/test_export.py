"""`structlora export`: what it writes, against what plain PEFT makes of the adapter that was saved."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTForImageClassification,
)

from structlora_trl import attach
from structlora_trl.cli import main
from structlora_trl.errors import StructLoRAError
from structlora_trl.shrink.base_model import class_count, load_base, write_adapter
from structlora_trl.shrink.export import export, export_sizes
from structlora_trl.shrink.export_options import Options
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.peft_scaling import with_one_scale
from structlora_trl.shrink.trial import information_curves
from tests.support.adapters import (
    ADAPTER,
    ATTENTION,
    CONFIG,
    EXPERTS,
    HALF,
    RANK,
    RUNS,
    STEPS,
    as_it_is,
    bare_run,
    llama_run,
    on_base,
    take_steps,
)
from tests.support.cli_runs import logits_of
from tests.support.data import texts, write_rows
from tests.support.promises import skip_without
from tests.support.setups import NOT_REPEATED, REPEATED, SETUPS, OnCPU, t5
from tests.support.tiny import (
    FAMILIES,
    VOCABULARY,
    adamw,
    assert_same,
    base_model,
    differing,
    tokenizer,
    weights_of,
)


@pytest.mark.parametrize("variant", RUNS)
@pytest.mark.parametrize("source", ["output", "checkpoint"])
def test_export_is_the_adapter_that_was_saved(variant, source, runs, tmp_path):
    folder = runs(variant) if source == "output" else runs(variant) / f"checkpoint-{STEPS}"
    assert main(["export", str(folder), str(tmp_path / "adapter")]) == 0
    saved, exported = load_file(folder / ADAPTER), load_file(tmp_path / "adapter" / ADAPTER)
    assert saved.keys() == exported.keys() and all(torch.equal(saved[name], exported[name]) for name in saved)
    base = runs(variant).parent / "base"
    assert torch.equal(
        *(logits_of(on_base(where, base), "llama") for where in (folder, tmp_path / "adapter"))
    )


def open_directions(folder) -> dict[str, torch.Tensor]:
    """Module -> which of its directions add something."""
    weights = load_file(folder / ADAPTER)
    return {name: (weights[name] != 0).any(0) for name in weights if "lora_B" in name}


@pytest.mark.parametrize("variant", RUNS)
def test_prune_drops_closed_directions_and_nothing_else(variant, runs, tmp_path):
    """Modules that lose all of theirs are left out, but where PEFT cannot leave one out, as with DoRA."""
    out, base = runs(variant), runs(variant).parent / "base"
    adds = open_directions(out)
    count, empty = sum(int(x.sum()) for x in adds.values()), sum(not x.any() for x in adds.values())
    assert 0 < count < RANK * len(adds)
    assert main(["export", str(out), str(tmp_path / "small"), "--prune"]) == 0
    small = load_file(tmp_path / "small" / ADAPTER)
    spared = empty if variant == "dora" else 0
    assert sum(len(value) for name, value in small.items() if "lora_A" in name) == count + spared
    assert sum("lora_A" in name for name in small) == len(adds) - empty + spared
    before, after = (logits_of(on_base(folder, base), "llama") for folder in (out, tmp_path / "small"))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_a_pruned_adapter_is_trained_on(runs, tmp_path):
    """Ranks differ by module then, and some modules have none: what is left is as any adapter."""
    base = runs().parent / "base"
    export(read_saved(runs()), tmp_path / "small", prune=True)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "small", is_trainable=True
    )
    before = weights_of(model)
    optimizer = adamw(model)
    runtime = attach(model, optimizer, examples=24, batch_size=2)
    assert_same(before, weights_of(model))
    assert sorted(rank for kind in runtime.kinds for rank in [kind.rank] * kind.node_count) == sorted(
        len(p) for name, p in before.items() if "lora_A" in name
    )
    take_steps(model, optimizer, FAMILIES["llama"].batch)
    assert runtime.step == 3 and set(differing(before, weights_of(model))) == set(before)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits_of(on_base(tmp_path / "again", base), "llama"),
        logits_of(model.eval(), "llama"),
        atol=1e-6,
        rtol=0,
    )


def test_nothing_to_prune_is_told(runs, tmp_path, capsys):
    """A checkpoint of before the selection."""
    assert main(["export", str(runs() / f"checkpoint-{HALF}"), str(tmp_path / "same"), "--prune"]) == 0
    assert "every direction adds something" in capsys.readouterr().out
    assert (tmp_path / "same" / ADAPTER).is_file()


def test_merge(runs, plain_adapter, tmp_path):
    base = runs().parent / "base"
    for number, folder in enumerate((runs(), plain_adapter)):
        merged = tmp_path / f"merged{number}"
        assert main(["export", str(folder), str(merged), "--merge"]) == 0
        model = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(
            logits_of(model, "llama"), logits_of(on_base(folder, base), "llama"), atol=1e-5, rtol=0
        )
        assert (merged / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("given, expected", [(None, "v1"), ("base", None)])
def test_the_base_is_of_the_revision_that_was_trained_on(given, expected, tmp_path, monkeypatch):
    out = llama_run(tmp_path, revision="v1")
    asked = []
    for loader in (AutoConfig, LlamaForCausalLM, AutoTokenizer):

        def spy(name, *arguments, load=loader.from_pretrained, **options):
            if name == str(tmp_path / "base"):
                asked.append(options.get("revision"))
            return load(name, *arguments, **options)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    export(read_saved(out), tmp_path / "merged", merge=True, base=given and str(tmp_path / given))
    assert len(asked) >= 3 and {*asked} == {expected}


STARTS = {row.name: row for row in SETUPS["Adapters"]}
STARTS = {name: STARTS[name] for name in (*NOT_REPEATED, *REPEATED, "LoftQ", "orthogonal init", "EVA")}


@pytest.mark.parametrize("start", STARTS)
def test_merged_models_are_the_trained_ones_whatever_they_began_from(start, tmp_path, monkeypatch):
    skip_without(STARTS[start].needs)
    model = replace(STARTS[start], base=partial(as_it_is("llama"), tmp_path / "base")).model()
    config = model.peft_config["default"]
    inits = config.init_lora_weights
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    config.init_lora_weights = inits
    take_steps(model, adamw(model), FAMILIES["llama"].batch)
    trained = logits_of(model, "llama")
    model.save_pretrained(tmp_path / "out")
    torch.manual_seed(7)  # whatever is drawn on loading is another draw than in training

    def merged(name, folder, **options):
        with OnCPU() if start == "LoftQ" and not torch.cuda.is_available() else contextlib.nullcontext():
            export(read_saved(tmp_path / folder), tmp_path / name, merge=True, **options)
        return logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / name), "llama")

    if start not in NOT_REPEATED:
        torch.testing.assert_close(merged("merged", "out"), trained, atol=1e-5, rtol=0)
        return
    for more in ({"merge": True}, {}, {"base": str(tmp_path / "base")}, {"keep": 0.5}):
        with pytest.raises(StructLoRAError, match=f"'{inits}'.*path_initial_model_for_weight_conversion"):
            export(read_saved(tmp_path / "out"), tmp_path / "refused", **more)
    assert not (tmp_path / "refused").exists()
    # The ways that the error names: PEFT's own conversion, and the base model as it was trained on.
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion="./initial")
    torch.testing.assert_close(merged("merged", "converted"), trained, atol=1e-5, rtol=0)
    model.unload().save_pretrained(tmp_path / "moved")
    moved = str(tmp_path / "moved")
    torch.testing.assert_close(merged("of the moved base", "out", base=moved), trained, atol=1e-5, rtol=0)
    rows = [{"input_ids": ids[None], "labels": ids[None]} for ids in FAMILIES["llama"].batch(9)["input_ids"]]
    *_, losses = information_curves(read_saved(tmp_path / "out"), rows, base=moved)
    expected = sum(
        float(on_base(tmp_path / "converted", tmp_path / "base")(**row).loss) for row in rows
    ) / len(rows)
    assert losses.orders["most information"][-1] == (1, pytest.approx(expected, abs=1e-5))
    export(read_saved(tmp_path / "out"), tmp_path / "adapter", base=moved)
    torch.testing.assert_close(
        logits_of(on_base(tmp_path / "adapter", moved), "llama"), trained, atol=1e-5, rtol=0
    )


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_loftq_without_an_accelerator_is_refused_by_name(tmp_path):
    """And the way that the error names works: the base as training had it."""
    skip_without(STARTS["LoftQ"].needs)
    model = replace(STARTS["LoftQ"], base=partial(as_it_is("llama"), tmp_path / "base")).model()
    take_steps(model, adamw(model), FAMILIES["llama"].batch)
    trained = logits_of(model, "llama")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(
        StructLoRAError, match="what LoftQ takes out of the base.*an accelerator.*init_lora_weights"
    ):
        export(read_saved(tmp_path / "out"), tmp_path / "refused", merge=True)
    assert not (tmp_path / "refused").exists()

    model.unload().save_pretrained(tmp_path / "moved")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    (tmp_path / "out" / CONFIG).write_text(json.dumps({**config, "init_lora_weights": True}))
    export(read_saved(tmp_path / "out"), tmp_path / "done", base=str(tmp_path / "moved"), merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "done")
    torch.testing.assert_close(logits_of(merged, "llama"), trained, atol=1e-5, rtol=0)


def test_a_base_of_another_width_is_told_by_one_matrix_and_a_count(tmp_path):
    saved = read_saved(llama_run(tmp_path / "own"))
    llama_run(tmp_path / "wide", {"hidden_size": 64})
    base = str(tmp_path / "wide" / "base")
    with pytest.raises(StructLoRAError, match=r"\(and \d+ more\).*`--base MODEL`") as refused:
        export(saved, tmp_path / "merged", merge=True, base=base)
    assert str(refused.value).count("size mismatch") == 1


# What is wrong -> (arguments, words of the message)
MISTAKES = {
    "no base": (["--merge", "--base", "missing"], "loading the base model missing failed"),
    "a share of nothing": (["--keep", "0"], "`keep` 0"),
    "a share above all": (["--keep", "1.5"], "`keep` 1.5"),
    "a share that is no number": (["--keep", "most"], "`keep` most"),
    "no rank": (["--rank", "0"], "a rank of 0"),
    "a rank above the adapter's": (["--rank", "5"], "a rank of 5 for an adapter of rank 4"),
    "no such server": (["--for", "tgi"], "a server 'tgi'"),
    "no such dtype": (["--dtype", "int8"], "a dtype 'int8'"),
    "nothing to learn from": (["--rank", "2", "--distil"], "`distil` or `scale='auto'` without rows"),
    "no data": (["--keep", "0.5", "--data", "missing.jsonl"], "missing.jsonl"),
    "data with other columns": (["--keep", "0.5", "--data", "other.jsonl"], "question, answer"),
    "data without rows": (["--keep", "0.5", "--data", "empty.jsonl"], "empty.jsonl"),
    "distillation alone": (["--distil"], "`distil` without `rank` or `keep`"),
    "a largest rank of one rank": (["--rank", "2", "--max-rank", "3"], "`max_rank` without `keep`"),
    "a server of a merge": (["--merge", "--for", "vllm"], "`merge` beside `server` or `dtype`"),
    "two rules": (["--keep", "0.5", "--rank", "2"], "more than one of `rank`, `keep` and `prune`"),
    "half a scale": (["--scale", "half"], "reading `scale` failed"),
    "a scale of nothing": (["--scale", "0"], "`scale` 0"),
    "a scale that is no number": (["--scale", "nan"], "`scale` nan"),
    "a scale without rows": (["--scale", "auto"], "`scale='auto'` without rows"),
    "data alone": (["--data", "rows.txt"], "`data` without `rank`, `keep` or `scale='auto'`"),
    "data of a merge": (["--merge", "--data", "rows.txt"], "`data` without `rank`, `keep` or `scale='auto'`"),
    "a split alone": (["--keep", "0.5", "--split", "test"], "`split` without `data`"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_gets_a_message(mistake, runs, tmp_path, monkeypatch, capsys):
    arguments, words = MISTAKES[mistake]
    folder = runs()
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.txt", texts())
    write_rows(tmp_path / "other.jsonl", [{"question": "w1", "answer": "w2"}])
    (tmp_path / "empty.jsonl").touch()
    capsys.readouterr()
    assert main(["export", str(folder), str(tmp_path / "new"), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": [2, 1]}, "call `export_sizes`"),
        ({"keep": 0.5, "rank": 2}, "more than one of"),
        ({"dtype": "float16", "scale": 1e30}, "numbers of .*lora_B.* that float16 cannot hold"),
    ],
)
def test_python_refuses_what_contradicts(options, words, runs, tmp_path):
    with pytest.raises(StructLoRAError, match=words):
        export(read_saved(runs()), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_several_sizes_and_any_kind_of_number_are_taken_in_python(runs, tmp_path):
    saved = read_saved(runs())
    done = export_sizes(saved, tmp_path / "sizes", Options(keep=["50%", 0.2], data="none"))
    assert [size.folder for size in done] == [
        tmp_path / "sizes" / name for name in ("keep-50-percent", "keep-0.2")
    ]
    export(saved, tmp_path / "half", scale=np.float32(0.5))
    for name, value in load_file(tmp_path / "half" / ADAPTER).items():
        assert torch.equal(value, saved.tensors[name] * (0.5 if "lora_B" in name else 1))


@pytest.mark.parametrize("size", [{"rank": 0}, {"rank": 1000}, {"keep": "25"}, {"keep": 0.5, "max_rank": 0}])
def test_a_size_out_of_range_is_refused_before_the_rows_are_read(size, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("structlora_trl.shrink.export.read_rows", None)
    with pytest.raises(StructLoRAError, match="a rank of|`keep` 25"):
        export(read_saved(runs()), tmp_path / "new", data="rows.jsonl", **size)


def test_an_output_folder_that_cannot_be_one_is_refused_before_the_work(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("kept")
    monkeypatch.setattr("structlora_trl.shrink.export.write_adapter", None)
    for out, words in ((runs(), "not empty"), (tmp_path / "notes.txt" / "new", "a file ")):
        assert main(["export", str(runs()), str(out)]) == 1
        assert words in capsys.readouterr().err


def with_another_head(build, model_class, **options):
    """A model of one class on the weights of another."""

    def load(folder):
        build().save_pretrained(folder)
        model = model_class.from_pretrained(folder, **options)
        model.config.pad_token_id = 0  # known in training alone
        return model

    return load


# What is adapted -> (how to make and load it, a family with its batches, LoRA's options)
MODELS = {
    "bert": (as_it_is("bert"), "bert", {"target_modules": ["query", "value"]}),
    "bert with another head": (
        with_another_head(
            lambda: BertModel(base_model("bert").config), BertForSequenceClassification, num_labels=3
        ),
        "bert",
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "reward": (
        with_another_head(lambda: base_model("llama"), LlamaForSequenceClassification, num_labels=3),
        "bert",
        {**ATTENTION, "task_type": "SEQ_CLS"},
    ),
    "vit": (as_it_is("vit"), "vit", {"target_modules": FAMILIES["vit"].attention}),
    "vit with another number of classes": (
        with_another_head(
            lambda: base_model("vit"), ViTForImageClassification, num_labels=7, ignore_mismatched_sizes=True
        ),
        "vit",
        {"target_modules": FAMILIES["vit"].attention, "modules_to_save": ["classifier"]},
    ),
    "llava": (as_it_is("llava"), "llava", ATTENTION),
    "t5": (as_it_is(t5), "llama", {"target_modules": ["q", "o"], "task_type": "SEQ_2_SEQ_LM"}),
    "mixtral": (as_it_is("mixtral"), "llama", {**ATTENTION, **EXPERTS}),
    "mixtral, experts alone": (as_it_is("mixtral"), "llama", {"target_modules": [], "r": 8, **EXPERTS}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind_are_pruned_and_merged(name, tmp_path):
    load, family, lora = MODELS[name]
    model = load(tmp_path / "base")
    out = bare_run(model, tmp_path / "out", FAMILIES[family].batch, **lora)
    saved = read_saved(out)
    done = export(saved, tmp_path / "small", prune=True)
    assert 0.3 * done.before.directions < done.after.directions < 0.7 * done.before.directions
    before, after = (weights_in(folder) for folder in (out, tmp_path / "small"))
    assert sum(map(torch.numel, after.values())) < sum(map(torch.numel, before.values()))

    def answers(adapter, folder="base"):
        base = load_base(str(tmp_path / folder), saved.lora, saved.tensors)
        loaded = PeftModel.from_pretrained(base, adapter).base_model if adapter else base
        inputs = {
            n: v
            for n, v in FAMILIES[family].batch(99).items()
            if n != "labels" or base.config.is_encoder_decoder
        }
        with torch.no_grad():
            return torch.cat(
                [loaded.eval()(**{n: v[i : i + 1] for n, v in inputs.items()}).logits for i in range(2)]
            )

    expected = answers(out)
    torch.testing.assert_close(answers(tmp_path / "small"), expected, atol=1e-5, rtol=1e-5)
    export(saved, tmp_path / "merged", merge=True)
    torch.testing.assert_close(answers(None, "merged"), expected, atol=1e-4, rtol=1e-4)
    assert (expected - answers(None)).abs().max() > 1e-4


# Options with which an adapter changes more of its base model than it adds to -> what the base model needs for them
CHANGING = {
    "layer_replication": ({"layer_replication": [[0, 2], [1, 3]]}, {}),
    "bias": ({"bias": "lora_only"}, {"attention_bias": True}),
}


@pytest.mark.parametrize("option", CHANGING)
def test_pruning_leaves_the_output_as_it_was(option, tmp_path):
    lora, config = CHANGING[option]
    saved = read_saved(llama_run(tmp_path, config, **lora))
    export(saved, tmp_path / "small", prune=True)
    expected, found = (
        logits_of(on_base(tmp_path / name, tmp_path / "base"), "llama") for name in ("out", "small")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", ["embed_tokens", "lm_head"])
def test_tied_weights_that_are_adapted_are_two_once_merged(tied, tmp_path):
    out = llama_run(tmp_path, {"tie_word_embeddings": True}, target_modules=["q_proj", tied])
    expected = logits_of(on_base(out, tmp_path / "base"), "llama")
    export(read_saved(out), tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(merged, "llama"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("smaller", [{"merge": True}, {"keep": 0.3}])
def test_factors_that_two_modules_share_are_neither_merged_nor_cut_apart(smaller, tmp_path):
    if "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT ties no factors")
    config = LlamaConfig(**base_model("llama").config.to_dict() | {"tie_word_embeddings": True})
    model = as_it_is(lambda: LlamaForCausalLM(config))(tmp_path / "base")
    targets = ["q_proj", "embed_tokens", "lm_head"]
    lora = LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True, init_lora_weights=False)
    out = tmp_path / "out"
    get_peft_model(model, lora).save_pretrained(out)
    with pytest.raises(StructLoRAError, match="share weights or factors.*`ensure_weight_tying`"):
        export(read_saved(out), tmp_path / "small", **smaller)
    export(read_saved(out), tmp_path / "small", rank=2)
    on_base(tmp_path / "small", tmp_path / "base")


def test_a_tokenizer_that_cannot_be_read_is_left_out(runs, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(runs(), folder)
    tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "of tomorrow"}}')
    export(read_saved(folder), tmp_path / "small", rank=2, data="none")
    assert "tokenizer" in caplog.text and not (tmp_path / "small" / "tokenizer.json").exists()
    with pytest.raises(StructLoRAError, match="a tokenizer that cannot be read"):
        export(read_saved(folder), tmp_path / "smaller", rank=2, data=texts()[:4])


@pytest.mark.parametrize("head", ["classifier", "score", "classification_head.out_proj", "logits_proj"])
def test_the_adapters_own_head_tells_the_number_of_classes(head):
    tensors = {f"base_model.model.{head}.weight": torch.zeros(5, 8)}
    if "." in head:
        tensors["base_model.model.classification_head.dense.weight"] = torch.zeros(8, 8)
    assert class_count(tensors) == 5


def test_a_merged_model_stays_tied_where_tied_weights_are_not_adapted(tmp_path):
    export(read_saved(llama_run(tmp_path, {"tie_word_embeddings": True})), tmp_path / "merged", merge=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings


def test_tied_weights_of_an_encoder_and_decoder_are_not_merged(tmp_path):
    model = as_it_is(t5)(tmp_path / "base")
    lora = {"target_modules": ["q", "o", "lm_head"], "task_type": "SEQ_2_SEQ_LM"}
    out = bare_run(model, tmp_path / "out", FAMILIES["llama"].batch, **lora)
    with pytest.raises(StructLoRAError, match="shares with its head"):
        export(read_saved(out), tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


def resized(model):
    model.resize_token_embeddings(VOCABULARY + 3)
    return model


# What cannot be merged -> (LoRA's options, what is done to the model before training, words of the message)
UNMERGEABLE = {
    "layer_replication": (
        {"layer_replication": [[0, 2], [1, 3]]},
        None,
        "share weights or factors .`layer_replication`",
    ),
    "lora_bias without a bias": (
        {"lora_bias": True},
        None,
        "merging the adapter failed.*base layer has no bias",
    ),
    "a vocabulary resized": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        resized,
        "loading the adapter onto the base model failed.*size mismatch.*resize_token_embeddings",
    ),
}


@pytest.mark.parametrize("what", UNMERGEABLE)
def test_a_merge_that_fails_leaves_nothing(what, tmp_path):
    lora, change, words = UNMERGEABLE[what]
    out = llama_run(tmp_path, change=change, **lora)
    with pytest.raises(StructLoRAError, match=words):
        export(read_saved(out), tmp_path / "a" / "merged", merge=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_save_that_fails_halfway_leaves_an_empty_folder_empty(tmp_path, monkeypatch):
    out = llama_run(tmp_path)
    (tmp_path / "merged").mkdir()

    def fail(self, folder, **_):
        self.config.save_pretrained(folder)
        raise RuntimeError("shared tensors")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(StructLoRAError, match="merging the adapter failed.*shared tensors"):
        export(read_saved(out), tmp_path / "merged", merge=True)
    assert not any((tmp_path / "merged").iterdir())


def weights_in(folder) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(folder / ADAPTER).items() if "lora_" in name}


# How loaders other than PEFT find a module's scale, from the configuration and the rows of its lora_A.
LOADERS = {
    "vLLM, SGLang": lambda config, rows: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, rows: config["lora_alpha"] / rows,
}
SCALES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "o_proj": 5},
    },
}


@pytest.mark.parametrize(
    "options, loaders", [({"prune": True}, list(LOADERS)[:1]), ({"server": "llamacpp"}, LOADERS)]
)
@pytest.mark.parametrize("scales", SCALES)
def test_every_loader_finds_the_scale(scales, options, loaders, tmp_path):
    out = llama_run(tmp_path, target_modules=["q_proj", "v_proj", "o_proj"], **SCALES[scales])
    export(read_saved(out), tmp_path / "exported", **options)
    expected, config = (
        updates(out, tmp_path / "base"),
        json.loads((tmp_path / "exported" / CONFIG).read_text()),
    )
    assert "server" not in options or not (config["rank_pattern"] or config["alpha_pattern"])
    for module, update in updates(tmp_path / "exported", tmp_path / "base").items():
        torch.testing.assert_close(update, expected[module], atol=1e-6, rtol=1e-5)
    tensors = load_file(tmp_path / "exported" / ADAPTER)
    for module, update in expected.items():
        if f"base_model.model.{module}.lora_A.weight" not in tensors:  # it lost all of its directions
            assert not update.any()
            continue
        A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        for loader in loaders:
            torch.testing.assert_close(LOADERS[loader](config, len(A)) * B @ A, update, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_base_weights_in_the_directions_keep_their_ranks(init, tmp_path):
    """PEFT takes their part out of the base model by rank: a smaller adapter would be another model."""
    saved = read_saved(llama_run(tmp_path, init_lora_weights=init))
    with pytest.raises(StructLoRAError, match=f"'{init}'"):
        export(saved, tmp_path / "small", keep=0.5)
    with pytest.raises(StructLoRAError, match=f"'{init}'"):
        with_one_scale(saved.lora, saved.tensors, {})


def test_orthogonal_factors_of_two_ranks_are_the_same_model_at_one(tmp_path):
    """PEFT draws them for even ranks alone."""
    lora = {"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 2}}
    saved = read_saved(llama_run(tmp_path, **lora))
    write_adapter(tmp_path / "exported", *with_one_scale(saved.lora, saved.tensors, {}, one_rank=True))
    before, after = (
        logits_of(on_base(tmp_path / name, tmp_path / "base"), "llama") for name in ("out", "exported")
    )
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def updates(adapter, base) -> dict[str, torch.Tensor]:
    """Module -> ΔW, as plain PEFT has it."""
    model = on_base(adapter, base).get_base_model()
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
