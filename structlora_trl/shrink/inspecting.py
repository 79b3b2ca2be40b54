"""What an adapter has learned, by kind of module and depth, and what the log beside it says."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import TrainerState

from ..core.diagnostics import effective_rank
from ..core.kinds import Factors, Kind, split_depth
from ..errors import refusing
from .load_adapter import Saved
from .peft_scaling import LORA_NAME, rank_of, scale_of, singular_directions

_LOG_NAME = "trainer_state.json"
# Among `stateful_callbacks` of `trainer_state.json`: what the command line was given, and no log says.
COMMAND_FACTS = "structlora_command"


@dataclass
class DepthReport:
    """One module.

    Args:
        module (`str`): its name in the model.
        layer (`str`): the layer's number in its name.
        depth (`int`): its place among the kind's depths, from 0.
        rank (`int`): of its adapter.
        kept (`int`): directions of these that add something: all but those that `keep` closed while training.
        effective_rank (`float`): exp of the entropy of the update's normalised singular values.
        norm (`float`): Frobenius norm of the update as it is added to the weight.
        similarity (`float`, *optional*): mean `stream_cosine` with the neighbouring depths.
        semantic (`list[int]`, *optional*): depths that a semantic edge joins it with.
        openness (`float`, *optional*): mean of its gates; None, as the next two, of a module without gates.
        closed (`int`, *optional*): directions of openness below 1/2.
        nats (`float`, *optional*): the most that its directions pass, together.
    """

    module: str
    layer: str
    depth: int
    rank: int
    kept: int
    effective_rank: float
    norm: float
    similarity: float | None
    semantic: list[int] | None
    openness: float | None = None
    closed: int | None = None
    nats: float | None = None


@dataclass
class KindReport:
    """One kind (modules that differ only in depth).

    Args:
        name (`str`): of the kind.
        role (`str`, *optional*): `"read"` or `"write"`: what its modules do with the residual stream; None
            where unknown.
        shape (`list[int]`): [L, r, k, d], of the largest rank.
        depths (`list[DepthReport]`): its modules, by depth.
        similarity (`list[list[float]]`, *optional*): (L, L), `stream_cosine` of every two depths; None with one
            that has learned nothing.
        singular_values (`list[list[float]]`): of each module as many as its rank, of the update as it is added
            to the weight, descending.
    """

    name: str
    role: str | None
    shape: list[int]
    depths: list[DepthReport]
    similarity: list[list[float | None]] | None
    singular_values: list[list[float]]


@dataclass
class Part:
    """Where an adapter file's bytes are: `what`, how many `numbers` of which `dtype`, and their `bytes`."""

    what: str
    dtype: str
    numbers: int
    bytes: int


def contents(tensors: dict[str, Tensor]) -> list[Part]:
    """The parts of an adapter's file, the largest first: LoRA's factors, and what is saved whole, by its name
    (`modules_to_save`, embeddings that were resized, biases).
    """
    parts: dict[tuple[str, str], Part] = {}
    for name, value in tensors.items():
        what = name.removeprefix("base_model.model.").rpartition(".")[0] + ", saved whole"
        what = "LoRA directions" if LORA_NAME.match(name) else "LoRA, other" if ".lora_" in name else what
        dtype = str(value.dtype).removeprefix("torch.")
        part = parts.setdefault((what, dtype), Part(what, dtype, 0, 0))
        part.numbers += value.numel()
        part.bytes += value.nbytes
    return sorted(parts.values(), key=lambda part: -part.bytes)


def report(saved: Saved) -> list[KindReport]:
    """The figures of each kind; of a mixture, of each expert."""
    return [
        _kind(saved, index, expert)
        for index, kind in enumerate(saved.kinds)
        for expert in range(kind.experts)
    ]


def module_table(kinds: list[KindReport]) -> pd.DataFrame:
    """The fields of each module's `DepthReport` and its `kind`, by its name; without columns that have no values.

    Semantic edges are the joined layers' names in one string.
    """
    rows = []
    for kind in kinds:
        for depth in kind.depths:
            joined = None
            if depth.semantic is not None:
                joined = ",".join(kind.depths[other].layer for other in depth.semantic) or "none"
            rows.append({**asdict(depth), "kind": kind.name, "semantic": joined})
    return pd.DataFrame(rows).set_index("module").dropna(axis="columns", how="all")


def gates_in_words(depths: list[DepthReport]) -> str | None:
    """Return nats, mean openness and what is closed, of all modules with gates; None without any."""
    gated = [depth for depth in depths if depth.nats is not None]
    if not gated:
        return None
    directions = sum(depth.rank for depth in gated)
    openness = sum(depth.openness * depth.rank for depth in gated) / directions
    closed, nats = sum(depth.closed for depth in gated), sum(depth.nats for depth in gated)
    return (
        f"Gates on {len(gated):,} modules let {nats:,.4g} nats through; mean openness {openness:.2f}, "
        f"{closed:,} of {directions:,} directions closed (openness below 1/2)."
    )


def mean_effective_rank(depths: list[DepthReport]) -> float:
    """Of the modules that add something; 0 where none does."""
    ranks = [depth.effective_rank for depth in depths if depth.kept]
    return sum(ranks) / max(len(ranks), 1)


def log_history(folder: Path) -> list[dict]:
    """The Trainer's log, where `trainer_state.json` lies in a folder; else nothing.

    Raises:
        StructLoRAError: the file is damaged.
    """
    return _trainer_state(folder).log_history


def command_facts(folder: Path) -> dict:
    """What the command line was given in the run of a folder; nothing where another script trained."""
    return _trainer_state(folder).stateful_callbacks.get(COMMAND_FACTS, {}).get("args", {})


def _trainer_state(folder: Path) -> TrainerState:
    path = folder / _LOG_NAME
    if not path.is_file():
        return TrainerState()
    with refusing(f"reading {path}", "the Trainer's log", "remove the file, or use another checkpoint"):
        return TrainerState.load_from_json(str(path))


def final_losses(history: list[dict]) -> tuple[float | None, float | None]:
    """The last training loss and the last held-out loss of a Trainer's log; None where it has none."""
    last = ([entry[name] for entry in history if name in entry][-1:] for name in ("loss", "eval_loss"))
    return tuple(values[0] if values else None for values in last)


def _kind(saved: Saved, index: int, expert: int) -> KindReport:
    kind = saved.kinds[index]

    def own(values: Tensor | None) -> Tensor | None:
        """The part of a kind's values that belongs to this expert."""
        return values[expert] if kind.experts > 1 and values is not None else values

    factors = Factors(*map(own, saved.factors(index)))
    modules = kind.modules[expert :: kind.per_depth] if kind.per_depth > 1 else kind.modules
    adds = (factors.B != 0).any(-2) & (factors.A != 0).any(-1)  # (L, r)
    semantic = own(saved.semantic_edges(index))  # (L, L)
    similarity = own(saved.similarity(index))  # (L, L)
    beside = None if similarity is None else similarity.diagonal(1)  # (L - 1,)
    scales = torch.tensor(
        [scale_of(saved.lora, module) for module in modules], dtype=torch.float64, device="cpu"
    )
    singular = scales[:, None] * singular_directions(*factors).sigma  # (L, r)
    ranks = effective_rank(factors.B.mT @ factors.B, factors.A @ factors.A.mT)
    depths = []
    for depth, module in enumerate(modules):
        gates = {}
        if module in saved.nats:
            p = saved.openness[module]
            gates = {"openness": p.mean().item(), "closed": (p < 0.5).sum().item()}
            gates["nats"] = saved.nats[module].sum().item()
        row = DepthReport(
            module=module.removeprefix("base_model.model."),
            layer=".".join(map(str, split_depth(module)[1])),
            depth=depth,
            rank=rank_of(saved.lora, module),
            kept=adds[depth].sum().item(),
            effective_rank=ranks[depth].item(),
            norm=singular[depth].norm().item(),
            similarity=None
            if beside is None
            else _known(beside[max(depth - 1, 0) : depth + 1].nanmean().item()),
            semantic=None if semantic is None else semantic[depth].nonzero().flatten().tolist(),
            **gates,
        )
        depths.append(row)
    return KindReport(
        name=_name(kind, expert),
        role=saved.role(index),
        shape=[kind.depth_count, kind.rank, *kind.shape[2:]],
        depths=depths,
        similarity=None if similarity is None else [[_known(x) for x in row] for row in similarity.tolist()],
        singular_values=[row[: d.rank].tolist() for row, d in zip(singular, depths, strict=True)],
    )


def _name(kind: Kind, expert: int) -> str:
    if kind.per_depth > 1:
        return split_depth(kind.modules[expert])[0].removeprefix("base_model.model.")
    return f"{kind.name}[{expert}]" if kind.experts > 1 else kind.name


def _known(value: float) -> float | None:
    """None in place of NaN, which JSON does not have."""
    return None if math.isnan(value) else value
