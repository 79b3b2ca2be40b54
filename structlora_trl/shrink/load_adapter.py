"""Reading a finished LoRA adapter, with StructLoRA's state and gates where they lie in the same folder."""

from __future__ import annotations

import pickle
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import pad

from ..config import StructLoRAConfig
from ..core.expert_storage import stack_nodes
from ..core.gates import nats
from ..core.kinds import SIDES, Factors, Kind, group, residual_role, split_depth
from ..core.mapping import KindMap
from ..errors import StructLoRAError, refusing
from ..gates_file import GATES_NAME, read_openness
from ..map_context import map_context
from ..state import STATE_NAME, State, read_state
from .peft_scaling import adapted_by, factor_names, parameters_of, rank_of

_CONFIG_NAME = "adapter_config.json"
_USE_ANOTHER = "use another checkpoint"
# What files that are cut, or hold no tensors, raise.
_DAMAGE = (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, AttributeError)
# Variants of LoRA whose update is not lora_B times lora_A alone, by their options; newer than the oldest PEFT that is served.
_OTHER_UPDATES = ("use_bdlora", "kasa_config", "monteclora_config")
# Relative difference that rounding to the file's dtype, or another machine's arithmetic, may leave.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass
class Saved:
    """An adapter as it was read.

    Args:
        folder (`Path`): of the adapter and of what a run left beside it.
        lora (`LoraConfig`): PEFT's configuration.
        tensors (`dict[str, Tensor]`): what a plain adapter file of it holds: effective factors under PEFT's
            names.
        kinds (`list[Kind]`): its LoRA modules in fp32, grouped; those of smaller ranks are filled with zeros.
        maps (`list[KindMap]`, *optional*): one per kind; None without `structlora.safetensors`.
        step (`int`, *optional*): optimizer steps trained; None without `structlora.safetensors`.
        openness (`dict[str, Tensor]`, *optional*): module -> (r,), of the directions that have gates; None without
            `structlora_gates.safetensors`.
    """

    folder: Path
    lora: LoraConfig
    tensors: dict[str, Tensor]
    kinds: list[Kind]
    maps: list[KindMap] | None = None
    step: int | None = None
    openness: dict[str, Tensor] | None = None

    @cached_property
    def nats(self) -> dict[str, Tensor]:
        """Module -> (1, r) in fp64, the most that each direction passes; of modules with gates."""
        return {module: nats(p.double().logit())[None] for module, p in (self.openness or {}).items()}

    @property
    def config(self) -> StructLoRAConfig | None:
        """StructLoRA's options in the run; None without its state."""
        return self.maps[0].config if self.maps else None

    def factors(self, index: int) -> Factors:
        """Effective factors of a kind in fp64: A (L, r, k), B (L, d, r), with experts (E, L, ...)."""
        return Factors(*(self._by_expert(index, nodes) for nodes in self._nodes(index)))

    def by_module(self, index: int, values: Tensor) -> dict[str, Tensor]:
        """Module -> (E or 1, ...) of values that are (L, ...), or with experts (E, L, ...)."""
        kind = self.kinds[index]
        nodes = values if kind.experts == 1 else values.transpose(0, 1).flatten(0, 1)
        return dict(zip(kind.modules, nodes.unflatten(0, (len(kind.modules), -1)), strict=True))

    def role(self, index: int) -> str | None:
        """`"read"` or `"write"`: what a kind does with the residual stream; None where unknown."""
        return residual_role(self.kinds[index], self.config.roles if self.config else None)

    def similarity(self, index: int) -> Tensor | None:
        """`stream_cosine` of every two depths, (L, L), with experts (E, L, L).

        None where unknown: a plain adapter does not tell where lora_A began, nor which side of experts that
        are one parameter meets the input.
        """
        A, B = self._nodes(index)
        if self.maps:
            pair = self.maps[index].stream_factors(Factors(A, B))
        else:
            is_writer = self.role(index) == "write" and self.kinds[index].adapted.experts == 1
            pair = (B.mT, A) if is_writer else None
        if pair is None:
            return None
        side, other = (self._by_expert(index, x) for x in pair)
        # ⟨M, M'⟩ = ‖F F'ᵀ‖² where M = FᵀF, and so M = sideᵀ (other otherᵀ) side for other = RᵀQᵀ and F = R side.
        F = torch.linalg.qr(other.mT, mode="r").R @ side
        F = F / F.abs().amax((-2, -1), keepdim=True)  # fourth powers follow
        rows = [(of_depth[..., None, :, :] @ F.mT).square().sum((-2, -1)) for of_depth in F.unbind(-3)]
        products = torch.stack(rows, -2)
        norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
        return products / (norms[..., :, None] * norms[..., None, :])

    def semantic_edges(self, index: int) -> Tensor | None:
        """True where a semantic edge joins two depths, (L, L), with experts (E, L, L); None without a coordinator."""
        if not self.maps or not self.maps[index].coordinators:
            return None
        semantic = self.maps[index].graph.semantic
        return semantic if self.kinds[index].experts > 1 else semantic[0]

    def _nodes(self, index: int) -> Factors:
        """Effective factors of a kind's nodes in fp64: squares of what is finite in fp32 stay finite."""
        kind = self.kinds[index]
        return Factors(
            *(stack_nodes([x.double() for x in getattr(kind, side)], side, kind) for side in SIDES)
        )

    def _by_expert(self, index: int, nodes: Tensor) -> Tensor:
        """Anything of nodes, (N, ...), as (L, ...), with experts (E, L, ...)."""
        experts = self.kinds[index].experts
        return nodes if experts == 1 else nodes.unflatten(0, (-1, experts)).transpose(0, 1)


@map_context(torch.device("cpu"))
def read_saved(folder: str | Path) -> Saved:
    """Read a saved adapter, or a checkpoint of any engine, with `structlora.safetensors` and
    `structlora_gates.safetensors` where they lie in the same folder.

    Raises:
        StructLoRAError: no LoRA adapter there, a damaged file, or an adapter and a state or openness that do not
            belong together.
    """
    home = Path(folder)
    state = read_state(home / STATE_NAME) if (home / STATE_NAME).is_file() else None
    place = _adapter_folder(home, state.config.adapter_name if state else None)
    lora = _read_config(place)
    tensors = _read_weights(place, lora)
    modules = {
        module: {side: tensors[name].float() for side, name in names.items()}
        for module, names in factor_names(tensors).items()
    }
    maps = _maps_of(state, modules, tensors, home) if state else None
    openness = read_openness(home)
    for module, p in (openness or {}).items():
        if module not in modules or len(p) != rank_of(lora, module):
            raise StructLoRAError(
                f"{len(p)} gates of '{module}' in {home / GATES_NAME}, which the adapter does not have",
                "one gate for each direction of a module",
                f"copy the run's own {GATES_NAME} beside its adapter, or remove this one",
            )
    if maps:
        return Saved(home, lora, tensors, [m.kind for m in maps], maps, state.step, openness)
    adapted = {module: adapted_by(lora, module, len(factors["A"])) for module, factors in modules.items()}
    return Saved(home, lora, tensors, group(_filled(modules, lora), adapted), openness=openness)


def _adapter_folder(home: Path, name: str | None) -> Path:
    """Return the folder with PEFT's files: one within a run's folder if the adapter is not called 'default'."""
    if name and (home / name / _CONFIG_NAME).is_file():
        return home / name
    if (home / _CONFIG_NAME).is_file():
        return home
    below = sorted(
        (path.parent for path in home.glob(f"*/{_CONFIG_NAME}")), key=lambda path: path.stat().st_mtime
    )
    named = [path for path in below if not path.name.startswith("checkpoint-")]
    if len(named) == 1 and any((home / file).is_file() for file in (STATE_NAME, GATES_NAME)):
        return named[0]
    raise StructLoRAError(
        f"no {_CONFIG_NAME} in {home}",
        "a folder with a saved LoRA adapter: a run's output, one of its checkpoints, or an exported adapter",
        f"give {' or '.join(map(str, sorted(named) or below[-1:]))}" if below else "correct the path",
    )


def _read_config(folder: Path) -> LoraConfig:
    with refusing(
        f"reading {folder / _CONFIG_NAME}", "PEFT's configuration", _USE_ANOTHER, (AttributeError,)
    ):
        config = PeftConfig.from_pretrained(str(folder))
    # AdaLoRA's configuration is a subclass of LoraConfig.
    other = config.peft_type.value if config.peft_type != PeftType.LORA else None
    other = other or next((name for name in _OTHER_UPDATES if getattr(config, name, None)), None)
    if other:
        raise StructLoRAError(
            f"an adapter of {other} in {folder}",
            "LoRA, whose update is lora_B times lora_A",
            "load it with PEFT, and merge it by `merge_and_unload()`",
        )
    return config


def _read_weights(folder: Path, lora: LoraConfig) -> dict[str, Tensor]:
    path = next((p for p in (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME) if p.exists()), None)
    if path is None:
        raise StructLoRAError(
            f"no adapter weights in {folder}",
            f"{SAFETENSORS_WEIGHTS_NAME}, as PEFT writes it",
            "under ZeRO-3, set `stage3_gather_16bit_weights_on_model_save` in the DeepSpeed configuration, and save again",
        )
    with refusing(f"reading {path}", "a whole file of weights", _USE_ANOTHER, _DAMAGE):
        # Tied factors are one storage in a `.bin` file; safetensors does not write those.
        tensors = {name: x.clone() for name, x in load_peft_weights(str(folder), device="cpu").items()}
    if not factor_names(tensors):
        raise StructLoRAError(f"no LoRA factors in {path}", "lora_A and lora_B of each module", _USE_ANOTHER)
    for module, names in factor_names(tensors).items():
        rank, none = rank_of(lora, module), torch.empty(0, 0, dtype=torch.float32, device="cpu")
        A, B = (tensors[names[side]] if side in names else none for side in SIDES)
        is_of_rank = len(A) % rank == 0 if parameters_of(lora, module) else len(A) == rank
        if not len(A) or min(A.ndim, B.ndim) < 2 or len(A) != B.shape[1] or not is_of_rank:
            raise StructLoRAError(
                f"factors of '{module}' in {path} that do not fit each other or rank {rank} of {_CONFIG_NAME} "
                f"(lora_A {list(A.shape)}, lora_B {list(B.shape)})",
                "lora_A of r rows and lora_B of r columns",
                "give an adapter and its own configuration; load grouped convolutions with PEFT itself",
            )
        for x in (A, B):
            if x.dtype not in _ROUNDING or not x.isfinite().all():
                raise StructLoRAError(
                    f"factors of '{module}' in {path} of type {x.dtype}, or with NaN or infinite numbers",
                    "finite weights of 16 or 32 bits",
                    f"{_USE_ANOTHER}; of fp8, convert the file and scale the tensors as its maker says",
                )
    return tensors


def _maps_of(
    state: State, modules: dict[str, dict[str, Tensor]], tensors: dict[str, Tensor], home: Path
) -> list[KindMap]:
    """Return the maps of a state over an adapter's factors, if it was saved beside these."""
    path, kinds = home / STATE_NAME, state.header["kinds"]
    rounding = max(_ROUNDING.get(x.dtype, 0.0) for x in tensors.values())
    with refusing(
        f"reading {path}", "a state that StructLoRA wrote", _USE_ANOTHER, (RuntimeError, AttributeError)
    ):
        if sorted(module for facts in kinds.values() for module in facts["modules"]) == sorted(modules):
            maps = [state.map_of(name, modules) for name in kinds]
            own = [_norms(m.kind) for m in maps]
            of_state = [state.tensors[f"{name}/norms"] for name in kinds]
            if torch.allclose(torch.stack(own), torch.stack(of_state), rtol=rounding, atol=0):
                return maps
    raise StructLoRAError(
        f"adapter and {STATE_NAME} of different weights in {home}",
        "both of one moment of one run",
        f"give a checkpoint as the run wrote it, or remove {STATE_NAME} to read the adapter alone",
    )


def _norms(kind: Kind) -> Tensor:
    """Norms of all lora_A and of all lora_B, as a state has them."""
    sides = ([x.double().norm() for x in factors] for factors in (kind.A, kind.B))
    return torch.stack([torch.stack(norms).norm() for norms in sides])


def _filled(modules: dict[str, dict[str, Tensor]], lora: LoraConfig) -> dict[str, dict[str, Tensor]]:
    """Fill modules that differ only in layer index and rank with zeros to one rank, so that they are one kind."""
    likeness, ranks = {}, defaultdict(int)
    for module, factors in modules.items():
        A, B = (factors[side].flatten(1) for side in SIDES)
        likeness[module] = split_depth(module)[0], A.shape[1], len(B)
        ranks[likeness[module]] = max(ranks[likeness[module]], len(A))
    filled = {}
    for module, factors in modules.items():
        A, B = (factors[side].flatten(1) for side in SIDES)
        lacking = 0 if parameters_of(lora, module) else ranks[likeness[module]] - len(A)
        filled[module] = {"A": pad(A, (0, 0, 0, lacking)), "B": pad(B, (0, lacking))}
    return filled
