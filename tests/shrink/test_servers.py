"""What servers load: what `export --for` writes or refuses, the lines of `inspect`, and where a file's bytes are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from structlora_trl.cli import main
from structlora_trl.cli.export import table
from structlora_trl.errors import StructLoRAError
from structlora_trl.shrink import export_options
from structlora_trl.shrink.export import export
from structlora_trl.shrink.inspecting import contents, report
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.peft_scaling import rank_of
from structlora_trl.shrink.servers import SERVERS, told
from tests.support.adapters import ADAPTER, ATTENTION, CONFIG, EXPERTS, as_it_is, llama_run, on_base, peft_run
from tests.support.cli_runs import logits_of
from tests.support.setups import t5
from tests.support.tiny import FAMILIES

EVERY = {server.name for server in SERVERS.values()}
VLLM, LORAX, SGLANG = "vLLM", "LoRAX, TGI", "SGLang"
# LoRA's options -> servers that load it as PEFT saved it, those that cannot load it, and words of a line
ADAPTERS = {
    "plain": ({}, EVERY, set(), "`--max-lora-rank 8`"),
    "a high rank": ({"r": 24}, EVERY, set(), "`--max-lora-rank 32`"),
    "rank-stabilised": ({"use_rslora": True}, {VLLM, LORAX}, set(), "rank-stabilised scale"),
    "ranks": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {VLLM},
        set(),
        "ranks differ (2 to 4)",
    ),
    "scales": ({"alpha_pattern": {"q_proj": 2}}, set(), set(), "scales differ"),
    "DoRA": ({"use_dora": True}, set(), EVERY, "DoRA"),
    "a head": ({"modules_to_save": ["lm_head"]}, set(), EVERY, "`modules_to_save`"),
    "biases": ({"lora_bias": True}, set(), EVERY, "biases"),
    "PiSSA": ({"init_lora_weights": "pissa"}, set(), EVERY, "base weights"),
    "some layers": (
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        EVERY - {LORAX},
        {LORAX},
        "in some layers alone",
    ),
    "the first layers": ({"layers_to_transform": [0, 1]}, EVERY - {LORAX}, {LORAX}, "in some layers alone"),
    "the last layers": (
        {"exclude_modules": r".*layers\.0\..*"},
        EVERY - {LORAX},
        {LORAX},
        "in some layers alone",
    ),
    "a head and embeddings too": (
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        EVERY - {LORAX},
        {LORAX},
        "cannot load LoRA on embeddings:",
    ),
    "a head too": ({"target_modules": ["q_proj", "lm_head"]}, EVERY, set(), "`--max-lora-rank 8`"),
    "layer replication": (
        {"layer_replication": [[0, 2], [1, 3]]},
        set(),
        EVERY,
        "cannot load `layer_replication`: serve it with PEFT",
    ),
    "an invocation": (
        {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
        {"llama.cpp"},
        EVERY - {"llama.cpp"},
        "(`alora_invocation_tokens`): serve it with PEFT",
    ),
}


def adapter(folder, family="llama", **lora):
    model = as_it_is(family)(folder / "base")
    batch = FAMILIES[family if isinstance(family, str) else "llama"].batch
    return read_saved(peft_run(model, folder / "out", batch, **{**ATTENTION, **lora}))


def test_the_command_line_knows_every_server_before_torch_is_loaded():
    assert tuple(SERVERS) == export_options.SERVERS


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_server_is_told_of_and_written_for(name, tmp_path, capsys):
    lora, loading, refusing, words = ADAPTERS[name]
    saved = adapter(tmp_path, **lora)
    lines = told(saved.lora, saved.tensors)
    assert {server for server, line in lines.items() if line.startswith("loads it")} == loading
    assert {server for server, line in lines.items() if "cannot load" in line} == refusing
    assert any(words in line for line in lines.values())
    assert main(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(f"{server}: {line}." in printed for server, line in lines.items())
    for key, server in SERVERS.items():
        if server.name in refusing:
            with pytest.raises(StructLoRAError, match=f"what {server.name} loads"):
                export(saved, tmp_path / key, server=key)
            continue
        export(saved, tmp_path / key, server=key)
        written = read_saved(tmp_path / key)
        assert told(written.lora, written.tensors)[server.name].startswith("loads it")
        assert not server.one_rank or not written.lora.rank_pattern
        torch.testing.assert_close(
            logits_of(on_base(tmp_path / key, tmp_path / "base"), "llama"),
            logits_of(on_base(tmp_path / "out", tmp_path / "base"), "llama"),
            atol=1e-5,
            rtol=0,
        )


def test_lora_on_a_shared_head_is_for_servers_that_keep_two(tmp_path):
    """llama.cpp loads no adapter of a head that it does not have, and ends at one of embeddings that are the head."""
    out = llama_run(tmp_path, {"tie_word_embeddings": True}, target_modules=["q_proj", "lm_head"])
    lines = told(*(getattr(read_saved(out), name) for name in ("lora", "tensors")))
    cannot = {name for name, line in lines.items() if line.startswith("cannot load LoRA on embeddings that")}
    assert cannot == {"llama.cpp"}


def test_experts_in_one_parameter_are_told_of(tmp_path):
    saved = adapter(tmp_path, "mixtral", **EXPERTS)
    lines = told(saved.lora, saved.tensors)
    assert lines[VLLM].startswith("loads it") and "knows this model's experts" in lines[VLLM]
    assert "experts in one parameter" in lines[SGLANG]


def test_a_layer_of_t5_is_one_whatever_its_parts(tmp_path):
    """Names of its modules have two numbers: the layer's, and that of a part of it."""
    saved = adapter(tmp_path, t5, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    assert told(saved.lora, saved.tensors)[LORAX].startswith("loads it")


def test_a_small_adapter_is_filled_up_for_a_server_of_one_rank(tmp_path):
    """Modules that keep nothing too: LoRAX would leave their type out of all layers."""
    saved = adapter(tmp_path)
    done = export(saved, tmp_path / "small", keep=1 / 8, max_rank=2, server="lorax")
    tensors = load_file(tmp_path / "small" / ADAPTER)
    largest = max(int(mask.sum()) for mask in done.pruned.kept.values())
    assert {len(x) for n, x in tensors.items() if "lora_A" in n} == {largest} and largest <= 2
    assert done.pruned.empty and tensors.keys() == saved.tensors.keys()
    assert table([done]).splitlines()[-1].split()[:2] == ["small", str(largest)]


def test_modules_of_one_name_are_one_kind_whatever_their_ranks(tmp_path, capsys):
    saved = adapter(tmp_path)
    export(saved, tmp_path / "small", keep=0.4)
    small = read_saved(tmp_path / "small")
    kinds = {kind.name: kind for kind in report(small)}
    assert kinds.keys() <= {kind.name for kind in report(saved)}
    ranks = {}
    for kind in kinds.values():
        for depth in kind.depths:
            ranks[depth.module] = depth.rank
            assert depth.rank == rank_of(small.lora, f"base_model.model.{depth.module}")
            values = kind.singular_values[depth.depth]
            assert len(values) == depth.rank
            A, B = (small.tensors[f"base_model.model.{depth.module}.lora_{side}.weight"] for side in "AB")
            scale = small.lora.lora_alpha / small.lora.r
            assert values == pytest.approx(
                torch.linalg.svdvals(scale * B @ A)[: depth.rank].tolist(), abs=1e-5
            )
    assert len({*ranks.values()}) > 1


def test_where_the_bytes_are(tmp_path, capsys):
    saved = adapter(tmp_path, modules_to_save=["lm_head"])
    export(saved, tmp_path / "half", dtype="bfloat16")
    whole, half = (contents(read_saved(tmp_path / name).tensors) for name in ("out", "half"))
    assert {part.what for part in whole} == {"LoRA directions", "lm_head, saved whole"}
    for before, after in zip(whole, half, strict=True):
        assert (
            after.bytes == before.bytes / 2 and after.dtype == "bfloat16" and after.numbers == before.numbers
        )
    assert sum(part.numbers for part in whole) == sum(x.numel() for x in saved.tensors.values())
    assert main(["inspect", str(tmp_path / "half")]) == 0
    assert "lm_head, saved whole" in capsys.readouterr().out


def test_numbers_of_eight_bits_are_refused_by_name(tmp_path):
    adapter(tmp_path)
    path = tmp_path / "out" / ADAPTER
    save_file(
        {name: x.to(torch.float8_e4m3fn) for name, x in load_file(path).items()}, path, {"format": "pt"}
    )
    with pytest.raises(StructLoRAError, match="float8_e4m3fn.*16 or 32 bits"):
        read_saved(tmp_path / "out")


def test_names_in_patterns_stand_for_themselves(tmp_path):
    """`net.v.proj` as a pattern would be `net.v_proj` too."""
    saved = adapter(tmp_path)
    export(saved, tmp_path / "small", keep=0.4)
    patterns = json.loads((tmp_path / "small" / CONFIG).read_text())["rank_pattern"]
    assert patterns and all("\\." in key for key in patterns)
