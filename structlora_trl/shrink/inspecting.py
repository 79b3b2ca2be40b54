"""What an adapter has learned, by kind of module and depth: singular values, similarity over depth."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import metadata_load
from torch import Tensor
from yaml import YAMLError

from ..core.diagnostics import effective_rank
from ..core.kinds import Kind, split_depth
from ..errors import refusing
from .load_adapter import LOG_NAME, Saved
from .peft_scaling import LORA_NAME, rank_of, singular_directions

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
    """One kind (modules that differ only in depth): its modules, and the matrices that figures show.

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
        coverage (`list[list[float]]`): their cumulative share of the squared singular values.
    """

    name: str
    role: str | None
    shape: list[int]
    depths: list[DepthReport]
    similarity: list[list[float | None]] | None
    singular_values: list[list[float]]
    coverage: list[list[float]]


@dataclass
class Part:
    """Where an adapter file's bytes are: `what`, how many `numbers` of which `dtype`, and their `bytes`."""

    what: str
    dtype: str
    numbers: int
    bytes: int


def contents(tensors: dict[str, Tensor]) -> list[Part]:
    """The parts of an adapter's file, the largest first: LoRA's factors, those of embeddings, and what is saved
    whole, by its name (`modules_to_save`, embeddings that were resized, biases).
    """
    parts: dict[tuple[str, str], Part] = {}
    for name, value in tensors.items():
        if match := LORA_NAME.match(name):
            what = "LoRA on embeddings" if match["embedding"] else "LoRA directions"
        elif ".lora_" in name:
            what = "of LoRA, beside its directions"
        else:
            what = name.removeprefix("base_model.model.").rpartition(".")[0] + ", saved whole"
        dtype = str(value.dtype).removeprefix("torch.")
        part = parts.setdefault((what, dtype), Part(what, dtype, 0, 0))
        part.numbers += value.numel()
        part.bytes += value.numel() * value.element_size()
    return sorted(parts.values(), key=lambda part: -part.bytes)


def held_out_rows(history: list[dict]) -> int | None:
    """How many rows the last evaluation of a Trainer's log was of; None where it does not tell."""
    speeds = ("eval_runtime", "eval_samples_per_second")
    told = [e for e in history if all(isinstance(e.get(name), (int, float)) for name in speeds)]
    return round(told[-1][speeds[0]] * told[-1][speeds[1]]) if told else None


def report(saved: Saved) -> list[KindReport]:
    """The figures of each kind; of a mixture, of each expert."""
    return [
        _kind(saved, index, expert)
        for index, kind in enumerate(saved.kinds)
        for expert in range(kind.experts)
    ]


def gates_in_words(depths: list[DepthReport]) -> str | None:
    """Return nats, mean openness and what is closed, of all modules with gates; None without any."""
    gated = [depth for depth in depths if depth.nats is not None]
    if not gated:
        return None
    directions = sum(depth.rank for depth in gated)
    openness = sum(depth.openness * depth.rank for depth in gated) / directions
    closed, nats = sum(depth.closed for depth in gated), sum(depth.nats for depth in gated)
    return (
        f"gates on {len(gated):,} modules let {nats:,.4g} nats through; mean openness {openness:.2f}, "
        f"{closed:,} of {directions:,} directions closed (openness below 1/2)"
    )


def mean_effective_rank(depths: list[DepthReport]) -> float:
    """Of the modules that add something; 0 where none does."""
    ranks = [depth.effective_rank for depth in depths if depth.kept]
    return sum(ranks) / max(len(ranks), 1)


def log_history(folder: Path) -> list[dict]:
    """The Trainer's log, where `trainer_state.json` lies in a folder; else nothing.

    Args:
        folder (`Path`): of an adapter that was read, `Saved.run_folder`.

    Raises:
        StructLoRAError: the file is damaged.
    """
    return _trainer_state(folder)["log_history"]


def _trainer_state(folder: Path) -> dict:
    """What `trainer_state.json` of a folder holds; an empty log where there is none."""
    path = folder / LOG_NAME
    if not path.is_file():
        return {"log_history": []}
    with refusing(f"reading {path}", "the Trainer's log", "remove the file, or use another checkpoint"):
        state = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["step"], int) for entry in state["log_history"]):
            raise TypeError("a step that is no number")
    return state


def final_losses(history: list[dict]) -> tuple[float | None, float | None]:
    """The last training loss and the last held-out loss of a Trainer's log; None where it has none."""
    last = [
        [e[name] for e in history if isinstance(e.get(name), (int, float))][-1:]
        for name in ("loss", "eval_loss")
    ]
    return tuple(values[0] if values else None for values in last)


def peak_learning_rate(saved: Saved) -> float | None:
    """The rate that the command line was given, else the largest one in the log; None without either."""
    given = command_facts(saved.run_folder).get("learning_rate")
    if given is not None:
        return given
    logged = log_history(saved.run_folder)
    return max((e["learning_rate"] for e in logged if "learning_rate" in e), default=None)


def command_facts(folder: Path) -> dict:
    """What the command line was given in the run of a folder; nothing where another script trained."""
    callbacks = _trainer_state(folder).get("stateful_callbacks") or {}
    return callbacks.get(COMMAND_FACTS, {}).get("args", {})


def training_data(saved: Saved) -> str | None:
    """What the data of a run is called: as the command line was given it, else as the model card beside the
    adapter, or beside its run, names it; None where neither says.
    """
    given = command_facts(saved.run_folder).get("data")
    if given:
        return ", ".join(given)
    for folder in (saved.folder, saved.run_folder):
        try:
            card = metadata_load(folder / "README.md") or {}
        except (OSError, ValueError, YAMLError):
            continue
        names = card.get("datasets") or []
        if names:
            return names if isinstance(names, str) else ", ".join(map(str, names))
    return None


def _kind(saved: Saved, index: int, expert: int) -> KindReport:
    kind = saved.kinds[index]

    def own(values: Tensor | None) -> Tensor | None:
        """The part of a kind's values that belongs to this expert."""
        return values[expert] if kind.experts > 1 and values is not None else values

    factors = saved.factors(index)
    factors = type(factors)(*map(own, factors))
    modules = kind.modules[expert :: kind.per_depth] if kind.per_depth > 1 else kind.modules
    adds = (factors.B != 0).any(-2) & (factors.A != 0).any(-1)  # (L, r)
    semantic = own(saved.semantic_edges(index))  # (L, L)
    similarity = own(saved.similarity(index))  # (L, L)
    scales = torch.tensor([saved.scale(module) for module in modules], dtype=torch.float64, device="cpu")
    singular = scales[:, None] * singular_directions(*factors).sigma  # (L, r)
    energy = singular.square()
    total = energy.sum(1, keepdim=True)
    ranks = effective_rank(factors.B.mT @ factors.B, factors.A @ factors.A.mT)
    depths = [
        DepthReport(
            module=module.removeprefix("base_model.model."),
            layer=".".join(map(str, split_depth(module)[1])),
            depth=depth,
            rank=rank_of(saved.lora, module),
            kept=int(adds[depth].sum()),
            effective_rank=float(ranks[depth]),
            norm=float(total[depth].sqrt()),
            similarity=_beside(None if similarity is None else similarity.diagonal(1), depth),
            semantic=None if semantic is None else semantic[depth].nonzero().flatten().tolist(),
            **_of_gates(saved, module),
        )
        for depth, module in enumerate(modules)
    ]
    return KindReport(
        name=_name(kind, expert),
        role=saved.role(index),
        shape=[kind.depth_count, kind.rank, *kind.shape[2:]],
        depths=depths,
        similarity=None if similarity is None else [[_known(x) for x in row] for row in similarity.tolist()],
        singular_values=[row[: d.rank].tolist() for row, d in zip(singular, depths, strict=True)],
        coverage=[
            (row.cumsum(0) / row.sum().clamp(min=torch.finfo(row.dtype).tiny))[: d.rank].tolist()
            for row, d in zip(energy, depths, strict=True)
        ],
    )


def _of_gates(saved: Saved, module: str) -> dict:
    if module not in saved.nats:
        return {}
    openness = saved.openness[module]
    return {
        "openness": float(openness.mean()),
        "closed": int((openness < 0.5).sum()),
        "nats": float(saved.nats[module].sum()),
    }


def _name(kind: Kind, expert: int) -> str:
    if kind.per_depth > 1:
        return split_depth(kind.modules[expert])[0].removeprefix("base_model.model.")
    return f"{kind.name}[{expert}]" if kind.experts > 1 else kind.name


def _beside(cosines: Tensor | None, depth: int) -> float | None:
    """Mean of a depth's cosines with its neighbours, of those of all neighbours, (L - 1,); None where unknown."""
    return None if cosines is None else _known(float(cosines[max(depth - 1, 0) : depth + 1].nanmean()))


def _known(value: float) -> float | None:
    """None in place of NaN, which JSON does not have."""
    return None if math.isnan(value) else value
