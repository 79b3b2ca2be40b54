"""What a run left behind: a LoRA adapter, and where StructLoRA's state lies beside it, the map that made it."""

from __future__ import annotations

import filecmp
import pickle
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from ..config import StructLoRAConfig
from ..core.diagnostics import stream_cosine, stream_products
from ..core.expert_storage import to_nodes
from ..core.gates import nats
from ..core.kinds import SIDES, Factors, Kind, group, residual_role, split_depth
from ..core.mapping import KindMap
from ..errors import StructLoRAError, refusing
from ..gates_file import GATES_NAME, read_openness
from ..map_context import map_context
from ..state import STATE_NAME, read_state
from .peft_scaling import LORA_NAME, adapted_by, factor_names, parameters_of, rank_of, scale_of

LOG_NAME = "trainer_state.json"
_USE_ANOTHER = "use another checkpoint"
# What files that are cut, or hold no tensors, raise.
_DAMAGE = (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, AttributeError)
_SAVE_AGAIN = "set `stage3_gather_16bit_weights_on_model_save` in the DeepSpeed configuration, and save again"
# Variants of LoRA whose update is not lora_B times lora_A alone, by their options; newer than the oldest PEFT that is served.
_OTHER_UPDATES = ("use_bdlora", "kasa_config", "monteclora_config")
# Relative difference that rounding to the file's dtype, or another machine's arithmetic, may leave.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass
class Saved:
    """An adapter as it was read.

    Args:
        folder (`Path`): where its configuration lies.
        lora (`LoraConfig`): PEFT's configuration.
        tensors (`dict[str, Tensor]`): what a plain adapter file of it holds: effective factors under PEFT's
            names.
        kinds (`list[Kind]`): its LoRA modules, grouped; those of smaller ranks are filled with zeros.
        effective (`list[Factors]`): fp32, one per kind, stacked as PEFT stores them.
        run_folder (`Path`): where the Trainer's log and StructLoRA's state lie, if any: `folder`, or the
            newest checkpoint near it that holds the same adapter.
        maps (`list[KindMap]`, *optional*): one per kind, or None where no state was found.
        step (`int`, *optional*): optimizer steps trained, or None.
        openness (`dict[str, Tensor]`, *optional*): module -> (r,), of the directions that have gates; None where no
            `structlora_gates.safetensors` was found.
    """

    folder: Path
    lora: LoraConfig
    tensors: dict[str, Tensor]
    kinds: list[Kind]
    effective: list[Factors]
    run_folder: Path
    maps: list[KindMap] | None = None
    step: int | None = None
    openness: dict[str, Tensor] | None = None

    @cached_property
    def modules(self) -> dict[str, dict[str, nn.Parameter]]:
        """Module -> its factors, fp32, as (r, ...) and (d, r, ...)."""
        return _modules(self.tensors)

    @cached_property
    def nats(self) -> dict[str, Tensor]:
        """Module -> (1, r) in fp64, the most that each direction passes; of modules with gates."""
        return {module: nats(p.double().logit())[None] for module, p in (self.openness or {}).items()}

    def scale(self, module: str) -> float:
        """s of a module's ΔW = s·B·A."""
        return scale_of(self.lora, module)

    @property
    def config(self) -> StructLoRAConfig | None:
        """StructLoRA's options in the run; None where no state was found."""
        return self.maps[0].config if self.maps else None

    def factors(self, index: int) -> Factors:
        """Effective factors of a kind in fp64: A (L, r, k), B (L, d, r), with experts (E, L, ...)."""
        return Factors(*(self._by_expert(index, nodes) for nodes in self._nodes(index)))

    def by_module(self, index: int, values: Tensor) -> dict[str, Tensor]:
        """Module -> (E or 1, ...) of values that are (L, ...), or with experts (E, L, ...)."""
        kind = self.kinds[index]
        nodes = values if kind.experts == 1 else values.transpose(0, 1).flatten(0, 1)
        return dict(zip(kind.modules, nodes.unflatten(0, (len(kind.modules), -1)), strict=True))

    def _nodes(self, index: int) -> Factors:
        """Effective factors of a kind's nodes in fp64: squares of what is finite in fp32 stay finite."""
        kind, stored = self.kinds[index], self.effective[index]
        return Factors(*(to_nodes(x.double(), side, kind) for side, x in zip(SIDES, stored, strict=True)))

    def _by_expert(self, index: int, nodes: Tensor | None) -> Tensor | None:
        """Anything of nodes, (N, ...), as (L, ...), with experts (E, L, ...)."""
        experts = self.kinds[index].experts
        return nodes if nodes is None or experts == 1 else nodes.unflatten(0, (-1, experts)).transpose(0, 1)

    def role(self, index: int) -> str | None:
        """`"read"` or `"write"`: what a kind does with the residual stream; None where unknown."""
        return residual_role(self.kinds[index], self.config.roles if self.maps else None)

    def similarity(self, index: int) -> Tensor | None:
        """`stream_cosine` of every two depths, (L, L), with experts (E, L, L).

        None where unknown: a plain adapter does not tell where lora_A began, nor which side of experts that
        are one parameter meets the input.
        """
        A, B = self._nodes(index)
        if self.maps:
            pair = self.maps[index].stream_factors(Factors(A, B))
        else:
            pair = (B.mT, A) if self._is_plain_writer(index) else None
        if pair is None:
            return None
        side, other = (self._by_expert(index, x) for x in pair)
        gram, own, _ = stream_products(side, other)
        depths = side.shape[-3]
        found = side.new_empty(*side.shape[:-3], depths, depths)
        for apart in range(depths):
            cross = side[..., apart:, :, :] @ side[..., : depths - apart, :, :].mT
            cosines = stream_cosine(gram, own, cross)
            for offset in (apart, -apart):
                found.diagonal(offset, -2, -1).copy_(cosines)
        return found

    def semantic_edges(self, index: int) -> Tensor | None:
        """Which depths a semantic edge joins, (L, L), with experts (E, L, L); None without a coordinator."""
        if not self.maps or not self.maps[index].coordinators:
            return None
        semantic = self.maps[index].graph.semantic
        return semantic if self.kinds[index].experts > 1 else semantic[0]

    def _is_plain_writer(self, index: int) -> bool:
        return self.role(index) == "write" and self.kinds[index].adapted.experts == 1


@map_context(torch.device("cpu"))
def read_saved(folder: str | Path) -> Saved:
    """Read a saved adapter, or a checkpoint of any engine.

    Where an adapter lies alone, as `trainer.save_model` writes it, StructLoRA's state and the Trainer's log
    are those of the newest checkpoint that holds the same adapter: in the folder, beside it, or in a folder
    beside it. The gates' openness lies beside the adapter, or else in that checkpoint.

    Raises:
        StructLoRAError: no LoRA adapter there, a damaged file, or an adapter and a state or openness that do not
            belong together.
    """
    home = Path(folder)
    saved = _read(home)
    for place in (saved.folder, saved.run_folder):
        if openness := read_openness(place):
            _refuse_other_gates(openness, saved, place / GATES_NAME)
            return replace(saved, openness=openness)
    return saved


def _refuse_other_gates(openness: dict[str, Tensor], saved: Saved, path: Path) -> None:
    """Stop where gates are of modules that the adapter lacks, or of other ranks."""
    ranks = {module: rank_of(saved.lora, module) for module in factor_names(saved.tensors)}
    for module, values in openness.items():
        if len(values) != ranks.get(module):
            own = f"has rank {ranks[module]}" if module in ranks else "is not adapted"
            raise StructLoRAError(
                f"{len(values)} gates of '{module}' in {path}, which {own} in the adapter",
                "one gate for each direction of a module",
                f"copy the run's own {GATES_NAME} beside its adapter, or remove this one",
            )


def _read(home: Path) -> Saved:
    folders = _adapters_in(home)
    has_state = (home / STATE_NAME).is_file()
    read = [_read_alone(home, folder) for folder in folders]
    if has_state:
        found = [of_run for saved in read if (of_run := _with_state(home, saved)) is not None]
        if not found:
            raise StructLoRAError(
                f"adapter and {STATE_NAME} of different weights in {home}",
                "both of one moment of one run",
                f"give a checkpoint as the run wrote it, or remove {STATE_NAME} to read the adapter alone",
            )
        return found[0]
    saved = read[0]
    runs = (_with_run_of(checkpoint, saved) for checkpoint in _checkpoints_near(home))
    has_log = (home / LOG_NAME).is_file()
    return next((run for run in runs if run is not None and (run.maps or not has_log)), saved)


def _read_alone(home: Path, folder: Path) -> Saved:
    """Read the adapter in a folder, of a run whose other files lie in `home`."""
    lora = _read_config(folder)
    tensors = _read_adapter(folder, lora)
    if not tensors:
        raise StructLoRAError(
            f"no adapter weights in {folder}",
            "adapter_model.safetensors, as PEFT writes it",
            f"under ZeRO-3, {_SAVE_AGAIN}",
        )
    modules = _modules(tensors)
    adapted = {module: adapted_by(lora, module, len(f["A"])) for module, f in modules.items()}
    kinds = group(_filled(modules, lora), adapted)
    return Saved(home, lora, tensors, kinds, [_stacked(kind) for kind in kinds], home)


@torch.no_grad()
def _with_state(folder: Path, saved: Saved) -> Saved | None:
    """Return an adapter with the state in a folder; None where the state is of other weights."""
    path, modules = folder / STATE_NAME, saved.modules
    state = read_state(path)
    with refusing(
        f"reading {path}",
        "a state that StructLoRA wrote",
        "use another checkpoint",
        (RuntimeError, AttributeError, TypeError, KeyError),
    ):
        facts = state.header["kinds"]
        if sorted(module for of_kind in facts.values() for module in of_kind["modules"]) != sorted(modules):
            return None
        maps = [state.map_of(name, modules) for name in facts]
        effective = [_stacked(m.kind) for m in maps]
        tolerance = max(_ROUNDING.get(value.dtype, 0.0) for value in saved.tensors.values())
        for name, factors in zip(facts, effective, strict=True):
            norms = torch.stack([factor.double().norm() for factor in factors])
            if not torch.allclose(norms, state.tensors[f"{name}/norms"], rtol=tolerance, atol=0):
                return None
    kinds = [m.kind for m in maps]
    return replace(saved, kinds=kinds, effective=effective, run_folder=folder, maps=maps, step=state.step)


def _checkpoints_near(folder: Path) -> list[Path]:
    """Checkpoints in a folder, beside it, and in folders beside it; the newest first."""
    around = folder.absolute().parent
    found = {
        *folder.absolute().glob("checkpoint-*"),
        *around.glob("checkpoint-*"),
        *around.glob("*/checkpoint-*"),
    }
    found = [path for path in found if path.is_dir() and path != folder.absolute()]
    return sorted(found, key=lambda path: (path.stat().st_mtime, str(path)), reverse=True)


def _with_run_of(checkpoint: Path, saved: Saved) -> Saved | None:
    """Return an adapter with a checkpoint's state and log; None where that one is damaged or of another adapter."""
    try:
        if (checkpoint / STATE_NAME).is_file():
            return _with_state(checkpoint, saved)
    except StructLoRAError:
        return None
    path = _weights_file(checkpoint)
    is_same = path and filecmp.cmp(path, _weights_file(saved.folder), shallow=False)
    return replace(saved, run_folder=checkpoint) if is_same else None


def _adapters_in(home: Path) -> list[Path]:
    """Return the folders with an adapter of a run: PEFT saves one that is not named 'default' to a folder of its name, and
    the state lies above it. Of several, the run's options may name the trained one; else the state's norms tell it.
    """
    if not (home / STATE_NAME).is_file():
        return [home]
    named = sorted(path.parent for path in home.glob("*/adapter_config.json"))
    named = [folder for folder in named if not (folder / STATE_NAME).is_file()]  # else a checkpoint
    trained = read_state(home / STATE_NAME).config.adapter_name if named else None
    if home / str(trained) in named:
        return [home / trained]
    return [*([home] if (home / "adapter_config.json").is_file() or not named else []), *named]


def _weights_file(folder: Path) -> Path | None:
    return next((p for p in (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME) if p.exists()), None)


def _read_config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").is_file():
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        named = [str(path.parent) for path in sorted(folder.glob("*/adapter_config.json"))]
        below = [str(path) for path in checkpoints[-1:]] or named  # PEFT's folders of adapters with names
        raise StructLoRAError(
            f"no adapter_config.json in {folder}",
            "a folder with a saved LoRA adapter: a run's output, one of its checkpoints, or an exported adapter",
            f"give {' or '.join(below)}" if below else "correct the path",
        )
    path = folder / "adapter_config.json"
    with refusing(f"reading {path}", "PEFT's configuration", "use another checkpoint", (AttributeError,)):
        config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != PeftType.LORA:  # AdaLoRA's configuration is a subclass of LoraConfig
        raise StructLoRAError(
            f"an adapter of PEFT type {config.peft_type.value} in {folder}",
            "LORA, whose factors are the update",
            "load it with PEFT, and merge it by `merge_and_unload()`",
        )
    for name in _OTHER_UPDATES:
        if getattr(config, name, None):
            raise StructLoRAError(
                f"an adapter with `{name}` in {folder}",
                "an update that is lora_B times lora_A",
                "load or merge it with PEFT itself",
            )
    return config


def _read_adapter(folder: Path, lora: LoraConfig) -> dict[str, Tensor]:
    path = _weights_file(folder)
    if path is None:
        return {}
    tensors = _load(path)
    modules = _modules(tensors)
    if not modules:
        raise StructLoRAError(f"no LoRA factors in {path}", "lora_A and lora_B of each module", _USE_ANOTHER)
    _refuse_odd_numbers(tensors, path)
    _refuse_misfits(modules, lora, path)
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    """A weights file, as it is."""
    with refusing(f"reading {path}", "a whole file of weights", "use another checkpoint", _DAMAGE):
        if path.suffix == ".bin":
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            # Tied ones are one storage there, and two in a file of safetensors.
            return {name: value.clone() for name, value in tensors.items()}
        return load_file(path)


def _refuse_odd_numbers(tensors: dict[str, Tensor], path: Path) -> None:
    """Modules that are saved whole may hold integers, as batch normalisation counts its batches."""
    for name, value in tensors.items():
        is_odd = value.element_size() < 2 if value.is_floating_point() else LORA_NAME.match(name)
        if is_odd or not value.isfinite().all():
            found = f"numbers of type {value.dtype}" if is_odd else "NaN or infinite numbers"
            raise StructLoRAError(
                f"{found} in '{name}' of {path}",
                "finite weights of 16 or 32 bits, which PEFT computes with",
                f"{_USE_ANOTHER}; of fp8, convert the file and scale the tensors as its maker says",
            )


def _refuse_misfits(modules: dict[str, dict[str, nn.Parameter]], lora: LoraConfig, path: Path) -> None:
    """Stop where lora_A and lora_B of a module do not fit each other, or the configuration."""
    for module, factors in modules.items():
        shapes = {side: tuple(value.shape) for side, value in factors.items()}
        if len(shapes) < 2 or min(map(len, shapes.values())) < 2 or shapes["A"][0] != shapes["B"][1]:
            found = " and ".join(f"lora_{side} {shape}" for side, shape in sorted(shapes.items()))
            raise StructLoRAError(
                f"factors of '{module}' that do not fit each other in {path} ({found})",
                "lora_A of r rows and lora_B of r columns",
                f"{_USE_ANOTHER}; load grouped convolutions with PEFT itself",
            )
        rows, rank = shapes["A"][0], rank_of(lora, module)
        if rows % rank if parameters_of(lora, module) else rows != rank:
            raise StructLoRAError(
                f"lora_A of '{module}' with {rows} rows in {path}",
                f"rank {rank}, as adapter_config.json has it",
                "give an adapter and its own configuration",
            )


def _modules(tensors: dict[str, Tensor]) -> dict[str, dict[str, nn.Parameter]]:
    """Module -> its factors, fp32, as (r, ...) and (d, r, ...)."""
    modules: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, value in tensors.items():
        match = LORA_NAME.match(name)
        if match:
            modules[match["module"]][match["factor"]] = nn.Parameter(value.float(), requires_grad=False)
    return dict(modules)


def _filled(
    modules: dict[str, dict[str, nn.Parameter]], lora: LoraConfig
) -> dict[str, dict[str, nn.Parameter]]:
    """Factors of modules that differ in depth alone, filled with zeros to one rank, so that they are one kind."""
    ranks: dict[tuple, int] = defaultdict(int)
    likeness = {}
    for module, factors in modules.items():
        A, B = factors["A"], factors["B"]
        likeness[module] = split_depth(module)[0], A.shape[1:], B.shape[0], B.shape[2:]
        ranks[likeness[module]] = max(ranks[likeness[module]], len(A))
    filled = {}
    for module, factors in modules.items():
        lacking = ranks[likeness[module]] - len(factors["A"])
        if not lacking or parameters_of(lora, module):
            filled[module] = factors
            continue
        wider = {
            side: pad(factor, (0, 0) * (factor.ndim - 1 - axis) + (0, lacking))
            for axis, (side, factor) in enumerate(sorted(factors.items()))
        }
        filled[module] = {side: nn.Parameter(x, requires_grad=False) for side, x in wider.items()}
    return filled


def _stacked(kind: Kind) -> Factors:
    return Factors(*(torch.stack([p.detach().flatten(1) for p in side]) for side in (kind.A, kind.B)))
