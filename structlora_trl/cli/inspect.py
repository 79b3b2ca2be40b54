"""`structlora inspect`: what an adapter has learned, by kind of module and depth."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..adapters.saved import Saved, read_saved
from ..core.diagnostics import effective_rank
from ..core.mapping import KindMap
from ..core.nodes import Kind, residual_role, split_depth
from .parser import parser_of

_DESCRIPTION = """Look into a saved adapter: a run's output, a checkpoint of any engine, or any LoRA adapter of PEFT.

For each kind of module and each depth, named by its layer's number:
  open       directions whose gate is open with probability above one half, of all
  openness   mean probability that a direction is open
  eff. rank  exp of the entropy of the normalised singular values of the update BA
  norm       Frobenius norm of the update as it is added to the weight
  coherence  mean cosine with the neighbouring depths' updates, on the side that is comparable across depth
  semantic   layers joined to this one by semantic edges
What a plain adapter does not tell, without structlora.safetensors beside it, shows as '-'.
"""
_EXAMPLES = """examples:
  structlora inspect out
  structlora inspect out/checkpoint-500 --plot figures     # needs matplotlib: pip install "structlora-trl[plot]"
  structlora inspect out --json | jq '.kinds[0].depths[0]'
"""


@dataclass
class DepthReport:
    """One module."""

    module: str
    layer: str  # the layer's number in its name
    depth: int  # place among the kind's depths, from 0
    rank: int
    gates: list[float] | None  # probability that each direction is open
    effective_rank: float
    norm: float
    coherence: float | None
    semantic: list[int] | None  # depths


@dataclass
class KindReport:
    """One kind: its modules, and the matrices that the figures show."""

    name: str
    role: str | None
    shape: list[int]  # [L, r, k, d]
    depths: list[DepthReport]
    similarity: list[list[float]] | None  # (L, L) cosines
    coverage: list[list[float]]  # (L, r) cumulative share of the squared singular values


def run(command: str, arguments: list[str]) -> None:
    """Print a table, or JSON; with `--plot`, write figures.

    Raises:
        StructLoRAError: nothing there to read; or figures are asked for and matplotlib is missing.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("adapter", type=Path, help="folder of the adapter or checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write figures (PNG and PDF) to this folder")
    given = parser.parse_args(arguments)
    if given.plot:
        from ..adapters import plots  # before the work, so that a missing matplotlib is told at once
    saved = read_saved(given.adapter)
    kinds = report(saved)
    if given.json:
        facts = {"adapter": str(given.adapter), "step": saved.step}
        facts["options"] = saved.maps[0].config.options() if saved.maps else None
        print(json.dumps({**facts, "kinds": [asdict(kind) for kind in kinds]}, indent=2))
    else:
        print(table(saved, kinds))
    if given.plot:
        written, lacking = plots.write(given.plot, kinds, log_history(saved.folder))
        if not given.json:
            print(f"\nWrote {', '.join(written)} to {given.plot}.")
            for reason in lacking:
                print(f"No {reason}.")


def report(saved: Saved) -> list[KindReport]:
    """The figures of each kind."""
    reports = []
    for index, (kind, factors) in enumerate(zip(saved.kinds, saved.effective)):
        m = saved.maps[index] if saved.maps else None
        gates = m.openness(saved.latents[index]) if m else None
        features = _features(saved, index)  # (L, n), or None where unknown
        similarity = None if features is None else normalize(features, dim=1) @ normalize(features, dim=1).mT
        ranks = effective_rank(*factors)
        squares = _singular_values(*factors).square()  # (L, r)
        norms = squares.sum(1).sqrt() * torch.tensor([saved.scale(module, kind.rank) for module in kind.modules])
        total = squares.sum(1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)
        depths = [
            DepthReport(
                module=module.removeprefix("base_model.model."),
                layer=".".join(map(str, split_depth(module)[1])),
                depth=depth,
                rank=kind.rank,
                gates=None if gates is None else gates[depth].tolist(),
                effective_rank=float(ranks[depth]),
                norm=float(norms[depth]),
                coherence=_coherence(similarity, depth),
                semantic=m.graph.semantic[depth].nonzero().flatten().tolist() if m and m.coordinators else None,
            )
            for depth, module in enumerate(kind.modules)
        ]
        reports.append(
            KindReport(
                kind.name,
                _role(kind, m),
                kind.shape,
                depths,
                None if similarity is None else similarity.tolist(),
                (squares.cumsum(1) / total).tolist(),
            )
        )
    return reports


def table(saved: Saved, kinds: list[KindReport]) -> str:
    """Text for a terminal."""
    if saved.maps:
        config = saved.maps[0].config
        lines = [
            f"{saved.folder}: StructLoRA after {saved.step} steps, filter {config.filter}, coordinator {config.coordinator} "
            f"({config.edges})"
        ]
    else:
        lines = [f"{saved.folder}: a LoRA adapter without StructLoRA's state"]
    for kind in kinds:
        depth_count, rank, k, d = kind.shape
        role = {"read": "reads", "write": "writes"}.get(kind.role)
        about = f"{role} the residual stream" if role else "unknown role"
        lines += [f"\n{kind.name}  ({depth_count} depths, r {rank}, {k} -> {d}, {about})"]
        lines += [
            f"{'layer':>5}  {'open':>7}  {'openness':>8}  {'eff. rank':>9}  {'norm':>9}  {'coherence':>9}  semantic"
        ]
        for row in kind.depths:
            open_ = "-" if row.gates is None else f"{sum(gate > 0.5 for gate in row.gates)}/{row.rank}"
            openness_ = "-" if row.gates is None else f"{sum(row.gates) / row.rank:.3f}"
            coherence = "-" if row.coherence is None else f"{row.coherence:.3f}"
            semantic = (
                "-" if row.semantic is None else " ".join(kind.depths[other].layer for other in row.semantic) or "none"
            )
            figures = f"{row.effective_rank:>9.2f}  {row.norm:>9.3g}  {coherence:>9}"
            lines.append(f"{row.layer:>5}  {open_:>7}  {openness_:>8}  {figures}  {semantic}")
    return "\n".join(lines)


def log_history(folder: Path) -> list[dict]:
    """The Trainer's log, where `trainer_state.json` lies beside the adapter."""
    path = folder / "trainer_state.json"
    return json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.is_file() else []


def _role(kind: Kind, m: KindMap | None) -> str | None:
    return residual_role(kind, m.config.roles if m else None)


def _features(saved: Saved, index: int) -> Tensor | None:
    """Updates on the sides that are comparable across depth, flattened. A plain adapter does not tell where A began."""
    kind, factors = saved.kinds[index], saved.effective[index]
    if saved.maps:
        return torch.cat([u.flatten(1) for u in saved.maps[index].features(factors)], dim=1)
    return factors.B.flatten(1) if _role(kind, None) == "write" else None


def _coherence(similarity: Tensor | None, depth: int) -> float | None:
    if similarity is None or len(similarity) == 1:
        return None
    neighbours = [other for other in (depth - 1, depth + 1) if 0 <= other < len(similarity)]
    return float(similarity[depth, neighbours].mean())


def _singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Of each BA, (L, r), without forming it."""
    left, right = torch.linalg.qr(B).R, torch.linalg.qr(A.mT).R  # (L, r, r)
    return torch.linalg.svdvals(left @ right.mT)
