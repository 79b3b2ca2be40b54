"""`structlora export --keep`: which directions of any adapter stay, against figures worked out in plain PEFT."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, ResNetConfig, ResNetForImageClassification

from structlora_trl.cli import main
from structlora_trl.errors import StructLoRAError
from structlora_trl.shrink.base_model import load_base
from structlora_trl.shrink.export import export
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.measuring import gate_information
from structlora_trl.shrink.peft_scaling import factor_names, rank_of, with_singular_directions
from structlora_trl.shrink.pruning import select
from structlora_trl.shrink.rows import read_rows
from tests.support.adapters import ADAPTER, CONFIG, EXPERTS, RANK, RUNS, as_it_is, on_base, peft_run
from tests.support.cli_runs import logits_of
from tests.support.data import chats, texts, write_rows
from tests.support.tiny import FAMILIES, base_model, sentence, tokenizer, warm_up

DEAD = slice(36, 48)  # neurons of each feed-forward layer that the base model does not read


def rows_of(family: str, count: int = 4) -> list[dict]:
    """Rows of a family's batches, one example each."""
    batch = FAMILIES[family].batch(7)
    return [
        {n: v[i : i + 1] for n, v in FAMILIES[family].batch(7 + s).items()}
        for s in range(count)
        for i in range(2)
    ][: max(count, len(batch))]


# What is adapted -> a family, LoRA's options, and how to build a model that is not the family's
ADAPTERS = {
    "plain": ("llama", {"target_modules": FAMILIES["llama"].linear}),
    "rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "two ranks": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "biases": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "biases of the model": (
        "bert",
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only"},
    ),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "orthogonal": ("llama", {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "orthogonal"}),
    "a rank above the width": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 24}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], **EXPERTS}),
    "encoder": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "pictures": ("vit", {"target_modules": FAMILIES["vit"].linear}),
    "left out before": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    ),
    "from an invocation on": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            "alora_invocation_tokens": FAMILIES["llama"].batch(7)["input_ids"][0, 2:4].tolist(),
        },
    ),
    "convolutions and counts of batches": (
        "vit",
        {"target_modules": ["convolution"], "modules_to_save": ["normalization"]},
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        ),
    ),
}


@pytest.fixture
def adapter(tmp_path):
    """Makes an adapter that PEFT alone has trained, and its base model beside it."""

    def make(name):
        family, lora, *build = ADAPTERS[name]
        model = as_it_is(*(build or [family]))(tmp_path / "base")
        return read_saved(peft_run(model, tmp_path / "out", FAMILIES[family].batch, **lora)), family

    return make


def answers(saved, folder, family):
    """Logits in plain PEFT; every factor of the model must be in the file."""
    base = load_base(saved.lora.base_model_name_or_path, saved.lora, saved.tensors)
    model = PeftModel.from_pretrained(base, folder)
    factors = {
        n.replace(".default", "")
        for n, _ in model.named_parameters()
        if re.search(r"\.lora_(embedding_)?[AB]\.", n)
    }
    assert factors <= load_file(folder / ADAPTER).keys()
    return logits_of(model, family)


@pytest.mark.parametrize("name", ADAPTERS)
def test_all_directions_are_the_same_adapter_and_fewer_a_smaller_one(name, adapter, tmp_path):
    """Shares of all directions, and one rank for all modules."""
    saved, family = adapter(name)
    rows = rows_of(family)
    largest = max(rank_of(saved.lora, module) for module in factor_names(saved.tensors))
    before, loss = answers(saved, tmp_path / "out", family), row_losses(saved, tmp_path / "out", rows)
    sizes = {}
    for what, value in (("keep", 1.0), ("keep", 0.3), ("rank", largest), ("rank", 2)):
        out = tmp_path / f"{what} {value}"
        done = export(saved, out, data=rows, **{what: value})
        after = answers(saved, out, family)
        if value in (1.0, largest):
            torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        # What is measured is what PEFT loads, on the same rows, one at a time.
        expected = [loss, row_losses(saved, out, rows)]
        assert done.losses[1:3] == pytest.approx(expected, abs=1e-5)
        if what == "rank":
            config = json.loads((out / CONFIG).read_text())
            assert config["r"] == value and not config["rank_pattern"] and not config["alpha_pattern"]
            factors = {n for n in saved.tensors if "lora_" in n and "sampler" not in n}
            assert factors <= load_file(out / ADAPTER).keys()
            continue
        if value == 1:
            assert done.pruned.share == pytest.approx(1)
        sizes[value] = done.after.directions
        assert sizes[value] == sum(int(mask.sum()) for mask in done.pruned.kept.values())
        # Modules that PEFT cannot leave out keep one.
        assert 0 <= sizes[value] - round(value * sizes[1.0]) <= len(done.pruned.kept) // 2


def row_losses(saved, folder, rows) -> float:
    base = load_base(saved.lora.base_model_name_or_path, saved.lora, saved.tensors)
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        return sum(float(model(**row).loss) for row in rows) / len(rows)


@pytest.mark.parametrize("name", ["plain", "dora", "experts"])
def test_information_is_the_mean_square_of_the_gates_gradient(name, adapter):
    """Against gates put into the model: lora_B times m, and the gradient of each row's loss with respect to m at 1."""
    saved, family = adapter(name)
    rows = rows_of(family)
    base = load_base(saved.lora.base_model_name_or_path, saved.lora, saved.tensors)
    model = PeftModel.from_pretrained(base, saved.folder)
    found = gate_information(model, rows)
    factors = {n: p.detach() for n, p in model.named_parameters() if ".lora_B" in n}
    assert [*found] == [n.rpartition(".lora_B")[0] for n in factors]
    expected = [torch.zeros_like(x) for x in found.values()]
    for row in rows:
        # (E, r); lora_B is in the order (r, expert)
        gates = [torch.ones_like(x, requires_grad=True) for x in expected]
        gated = {n: B * m.T.flatten() for (n, B), m in zip(factors.items(), gates, strict=True)}
        loss = torch.func.functional_call(model, gated, kwargs=row).loss
        for total, gradient in zip(expected, torch.autograd.grad(loss, gates), strict=True):
            total += gradient.square() / len(rows)
    torch.testing.assert_close([*found.values()], expected, atol=1e-12, rtol=1e-3)
    assert all((x > 0).all() for x in expected)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """An adapter of PEFT whose directions of largest norm, three of four, write where the model does not look."""
    folder = tmp_path_factory.mktemp("planted")
    model = base_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, DEAD] = 0
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            B = torch.zeros(parameter.shape)
            B[: DEAD.start, :1] = torch.randn(DEAD.start, 1, generator=generator)
            B[DEAD, 1:] = 20 * torch.randn(48 - DEAD.start, RANK - 1, generator=generator)
            mixed = torch.linalg.qr(
                torch.randn(RANK, RANK, generator=generator)
            ).Q  # no direction is what it was
            parameter.data.copy_(B @ mixed)
            A = model.get_parameter(name.replace("lora_B", "lora_A"))
            A.data.copy_(mixed.T @ torch.linalg.qr(A.data.T).Q.T)
    model.save_pretrained(folder / "out")
    write_rows(folder / "rows.jsonl", texts())
    return folder


@pytest.mark.parametrize("keep", ["0.25", "99.9%"])
def test_data_keeps_what_matters_and_singular_values_what_is_large(keep, planted, tmp_path, capsys):
    data = ["--data", str(planted / "rows.jsonl")]
    assert main(["export", str(planted / "out"), str(tmp_path / "task"), "--keep", keep, *data]) == 0
    printed = capsys.readouterr().out
    assert main(["export", str(planted / "out"), str(tmp_path / "norm"), "--keep", "0.25"]) == 0
    assert "the updates' squared norm" in capsys.readouterr().out
    before, task, norm = (
        logits_of(on_base(f, planted / "base"), "llama") for f in (planted / "out", *tmp_path.glob("*"))
    )
    if (tmp_path / "task") != next(tmp_path.glob("*")):
        task, norm = norm, task
    torch.testing.assert_close(task, before, atol=1e-5, rtol=0)
    bare = logits_of(AutoModelForCausalLM.from_pretrained(planted / "base"), "llama")
    assert (before - bare).abs().max() > 1e-3
    torch.testing.assert_close(norm, bare, atol=1e-5, rtol=0)
    # One direction of four in each of three modules, on 24 rows that tell and are measured.
    small = load_file(tmp_path / "task" / ADAPTER)
    assert [len(x) for name, x in small.items() if "lora_A" in name] == [1, 1, 1]
    lines = [line.split() for line in printed.splitlines()]
    alone, before, after = (
        next(line for line in lines if line[:1] == [name]) for name in ("base", "the", "task")
    )
    before, after, alone = (float(line[i]) for line, i in ((before, -3), (after, -3), (alone, -3)))
    assert before == pytest.approx(after, abs=2e-3)
    assert "carries 100.0% of the information of the rows" in printed and "24 rows of" in printed


def test_a_share_of_the_information_is_carried_by_the_fewest(adapter):
    saved, _ = adapter("plain")
    _, sigma = with_singular_directions(saved.lora, saved.tensors)
    generator = torch.Generator().manual_seed(0)
    information = {
        module: torch.rand(values.shape, generator=generator) ** 8 for module, values in sigma.items()
    }
    values = torch.cat([x.flatten() for x in information.values()]).sort(descending=True).values
    for keep in ("50%", "99%"):
        pruned = select(saved, keep, information)
        share = float(keep[:-1]) / 100
        assert values[: pruned.count].sum() >= share * values.sum() * (1 - 1e-6)
        assert values[: pruned.count - 1].sum() < share * values.sum()
        assert pruned.share == pytest.approx(float(values[: pruned.count].sum() / values.sum()), rel=1e-5)
    assert {*pruned.kept} == {*sigma}
    # What is kept is a part of the update: its singular values, and no others.
    pruned = select(saved, 0.3, information)
    lora, tensors = pruned.written()
    for module, (kept,) in pruned.kept.items():
        names = [f"{module}.lora_{side}.weight" for side in "AB"]
        assert (module in pruned.empty) == (not kept.any()) == (names[0] not in tensors)
        if kept.any():
            A, B = (tensors[name].double() for name in names)
            found = torch.linalg.svdvals(B @ A)[: int(kept.sum())] * lora.lora_alpha / lora.r
            torch.testing.assert_close(found, sigma[module][0, kept], atol=1e-6, rtol=1e-5)


def test_without_rows_one_share_of_each_update_is_kept(adapter):
    """Of each module the fewest singular values that hold it, whatever the size of its update is."""
    saved, _ = adapter("plain")
    _, sigma = with_singular_directions(saved.lora, saved.tensors)
    name = f"{next(iter(sigma))}.lora_B.weight"
    larger = replace(saved, tensors=saved.tensors | {name: 100 * saved.tensors[name]})
    # module -> which share of its squared norm the first 0, 1, 2 ... hold
    held = {
        module: [0.0, *(x[0].square().cumsum(0) / x[0].square().sum()).tolist()]
        for module, x in sigma.items()
    }
    directions = sum(x.numel() for x in sigma.values())
    largest = {module: float(x[0, 0]) for module, x in sigma.items()}
    for keep in (0.25, 0.5, 0.75, 1.0, "60%", "95%"):
        found = select(saved, keep).kept
        counts = {module: int(mask.sum()) for module, mask in found.items()}
        assert all(mask[0, : counts[module]].all() for module, mask in found.items())
        without = max(held[module][count - 1] for module, count in counts.items())
        least = min(held[module][count] for module, count in counts.items())
        if isinstance(keep, str):
            assert without < float(keep[:-1]) / 100 <= least
        else:
            assert sum(counts.values()) == round(keep * directions) and without <= least
        assert all(torch.equal(mask, found[module]) for module, mask in select(larger, keep).kept.items())
    # Fewer than there are modules: those of the largest singular value.
    few = select(saved, 2 / directions).kept
    assert {m for m, mask in few.items() if mask.any()} == {*sorted(largest, key=largest.get)[-2:]}


def test_one_rank_of_a_selection_is_the_same_update(planted, tmp_path):
    saved = read_saved(planted / "out")
    for name, server in (("ranks", None), ("one", "llamacpp")):
        export(saved, tmp_path / name, keep=0.4, server=server)
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    found = [logits_of(on_base(tmp_path / name, planted / "base"), "llama") for name in ("ranks", "one")]
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", RUNS)
def test_a_run_of_structlora_is_selected_from_too(variant, runs, tmp_path):
    base = runs(variant).parent / "base"
    write_rows(tmp_path / "rows.jsonl", texts())
    done = export(read_saved(runs(variant)), tmp_path / "small", keep=0.5, data=tmp_path / "rows.jsonl")
    before, after = (
        logits_of(on_base(folder, base), "llama") for folder in (runs(variant), tmp_path / "small")
    )
    assert done.after.directions < 0.6 * done.before.directions
    assert done.losses.after < done.losses.before + 0.2
    assert 0 < (after - before).abs().max() < 1


TOOL = {"type": "function", "function": {"name": "w8", "description": "", "parameters": {}}}
TEMPLATE = (
    "{% if thinking %}w7 {% endif %}{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}"
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
)


def conversation(index: int) -> dict:
    user, assistant = chats(index + 1)[index]["messages"]
    return {"prompt": [user], "completion": [assistant]}


# Rows of a file -> how many tokens of the first have a loss, and its text
FORMATS = {
    "text": ([{"text": "w1 w2 w3"}], 4, "w1 w2 w3 <eos>"),
    "prompt and completion": ([{"prompt": "w1 w2", "completion": " w3"}], 2, "w1 w2 w3 <eos>"),
    "messages": (chats(2), 8, f"{sentence(0, 4)} {sentence(1, 4)}"),
    "conversations": (
        [
            {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]}
            for row in chats(2)
        ],
        8,
        f"{sentence(0, 4)} {sentence(1, 4)}",
    ),
    "messages as prompt and completion": ([conversation(0)], 4, f"{sentence(0, 4)} {sentence(1, 4)}"),
    "messages beside their first prompt": (
        [{"prompt": "w9", **chats(1)[0]}],
        8,
        f"{sentence(0, 4)} {sentence(1, 4)}",
    ),
    "tools, as text, and options of the template": (
        [{**chats(1)[0], "tools": json.dumps([TOOL]), "chat_template_kwargs": {"thinking": True}}],
        10,
        f"w7 w8 {sentence(0, 4)} {sentence(1, 4)}",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_read_as_the_trainer_reads_them(name, planted, tmp_path):
    rows, predicted, text = FORMATS[name]
    write_rows(tmp_path / "rows.jsonl", rows)
    own = tokenizer()
    own.chat_template = TEMPLATE
    own.save_pretrained(tmp_path / "tokenizer")
    shutil.copy(planted / "base" / "config.json", tmp_path / "tokenizer")
    found, *others = read_rows(
        tmp_path / "rows.jsonl", read_saved(planted / "out"), str(tmp_path / "tokenizer"), None, 8
    ).rows
    assert tokenizer().decode(found["input_ids"][0]) == text and len(others) == len(rows) - 1
    assert int((found["labels"] != -100).sum()) == predicted
    assert torch.equal(found["labels"][0, -predicted:], found["input_ids"][0, -predicted:])


def test_texts_are_no_examples_of_a_classifier(adapter, planted, tmp_path):
    saved, _ = adapter("encoder")
    with pytest.raises(StructLoRAError, match="SEQ_CLS.*rows with `labels`"):
        read_rows(planted / "rows.jsonl", saved, str(planted / "base"), None, 8)
    ids = torch.ones(1, 4, dtype=torch.int64)
    for rows, words in (([], "no rows"), ([{"input_ids": ids, "labels": ids}], "a row of the data")):
        with pytest.raises(StructLoRAError, match=words):
            export(saved, tmp_path / "small", keep=0.5, data=rows)
    assert not (tmp_path / "small").exists()


def test_a_file_of_other_names_than_the_model_is_refused(adapter, tmp_path):
    """PEFT renames the modules of adapters that older versions of transformers wrote, when it loads them."""
    saved, _ = adapter("plain")
    saved.tensors = {name.replace("model.layers", "decoder.layers"): x for name, x in saved.tensors.items()}
    with pytest.raises(StructLoRAError, match="decoder.layers.*save the adapter again"):
        export(saved, tmp_path / "small", keep=0.5, data=rows_of("llama"))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def test_the_parts_of_torchs_attention_have_one_rank(tmp_path):
    """PEFT looks up the rank of both by the name of the whole."""
    torch.manual_seed(0)
    base = Attention()
    lora = LoraConfig(r=8, target_modules=["attn"], rank_pattern={"attn": RANK})
    model = peft.get_peft_model(copy.deepcopy(base), lora)
    warm_up(model)
    model.save_pretrained(tmp_path / "out")
    saved = read_saved(tmp_path / "out")
    x, found = torch.randn(2, 3, 16), {}
    for keep in (1.0, 0.5, 1 / (2 * RANK)):
        export(saved, tmp_path / f"{keep}", keep=keep)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"{keep}").eval()
        found[keep] = loaded(x)
    torch.testing.assert_close(found[1.0], model.eval()(x), atol=1e-5, rtol=1e-5)
    # What half of the directions do, worked out from the update's singular values.
    kept = select(saved, 0.5)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "0.5")
    for module, (directions,) in kept.kept.items():
        layer = merged.get_submodule(module)
        _, sigma = with_singular_directions(saved.lora, saved.tensors)
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        expected = sigma[module][0, directions].float()
        torch.testing.assert_close(
            torch.linalg.svdvals(update)[: len(expected)], expected, atol=1e-5, rtol=1e-5
        )


def test_modules_of_smaller_ranks_have_nothing_to_drop_either(tmp_path):
    model = as_it_is("llama")(tmp_path / "base")
    lora = {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}}
    saved = read_saved(peft_run(model, tmp_path / "out", FAMILIES["llama"].batch, **lora))
    assert export(saved, tmp_path / "same", prune=True).pruned is None


def test_an_adapter_that_adds_nothing_has_nothing_to_keep(tmp_path):
    model = as_it_is("llama")(tmp_path / "base")
    peft.get_peft_model(model, LoraConfig(r=RANK, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "out"
    )
    with pytest.raises(StructLoRAError, match="none of whose directions"):
        select(read_saved(tmp_path / "out"), 0.5)
