"""What a run left behind: a LoRA adapter, and where StructLoRA's state lies beside it, the map that made it.

Wherever a file holds latent factors (the state itself, and the fp32 masters that DeepSpeed's `zero_to_fp32.py` collects), the
map is applied; `adapter_model.safetensors` holds effective factors already.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import StructLoRAConfig
from ..core.mapping import Factors, KindMap
from ..core.nodes import Kind, group
from ..errors import StructLoRAError
from ..runtime import of_kind
from ..state import STATE_NAME, read_state

# With or without the adapter's name, as it stands in a model or in a file; a bias of lora_B is none of ours.
LORA_NAME = re.compile(r"^(?P<module>.+)\.lora_(embedding_)?(?P<factor>[AB])(\.(?!bias$)[^.]+)?(\.weight)?$")
# As `zero_to_fp32.py` names them (FSDP's `pytorch_model_fsdp.bin` is another thing: effective factors).
_MASTERS = re.compile(r"(pytorch_model(-\d+-of-\d+)?\.bin|model(-\d+-of-\d+)?\.safetensors)")
# Relative difference that rounding to the file's dtype, or another machine's arithmetic, may leave.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass
class Saved:
    """An adapter as it was read.

    Args:
        folder (`Path`): where its configuration lies.
        lora (`LoraConfig`): PEFT's configuration.
        tensors (`dict[str, Tensor]`): what a plain adapter file of it holds: effective factors under PEFT's names.
        kinds (`list[Kind]`): its LoRA modules, grouped.
        effective (`list[Factors]`): fp32, one per kind.
        maps (`list[KindMap]`, *optional*): one per kind, or None where no state was found.
        latents (`list[Factors]`, *optional*): one per kind, or None.
        step (`int`, *optional*): optimizer steps trained, or None.
    """

    folder: Path
    lora: LoraConfig
    tensors: dict[str, Tensor]
    kinds: list[Kind]
    effective: list[Factors]
    maps: list[KindMap] | None = None
    latents: list[Factors] | None = None
    step: int | None = None

    def alpha(self, module: str) -> float:
        """PEFT's `lora_alpha` of a module."""
        name = module.removeprefix("base_model.model.")
        pattern = self.lora.alpha_pattern
        return pattern.get(get_pattern_key(pattern.keys(), name), self.lora.lora_alpha)

    def scale(self, module: str, rank: int) -> float:
        """s of ΔW = s·B·A, for a module of that rank."""
        return self.alpha(module) / rank_divisor(self.lora, rank)


def rank_divisor(lora: LoraConfig, rank: int) -> float:
    """What PEFT divides alpha by: r, or √r with rsLoRA."""
    return math.sqrt(rank) if lora.use_rslora else rank


def ranks_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Module -> rank, of an adapter file's tensors."""
    matches = ((LORA_NAME.match(name), value) for name, value in tensors.items())
    return {match["module"]: len(value) for match, value in matches if match and match["factor"] == "A"}


def read_saved(folder: str | Path) -> Saved:
    """Read a saved adapter, a checkpoint of any engine, or what `zero_to_fp32.py` made inside one.

    Raises:
        StructLoRAError: no LoRA adapter there, a damaged file, or an adapter and a state that do not belong together.
    """
    given = Path(folder)
    masters = _read_masters(given)
    home = given.parent if masters and not (given / "adapter_config.json").is_file() else given
    adapter_home = _named_adapter(home) or home
    lora = _read_config(adapter_home)
    tensors = _read_adapter(adapter_home)
    state_file = home / STATE_NAME
    if not state_file.is_file():
        if not tensors:
            raise StructLoRAError(
                f"no adapter weights in {home}, nor a {STATE_NAME}" + (" (only fp32 masters)" if masters else ""),
                "one of them: the fp32 masters of a StructLoRA run are its latent factors, not the adapter",
                "give a checkpoint that the callback wrote; in a custom loop, save with `save_state(runtime, folder)`",
            )
        kinds = group(_modules(tensors))
        return Saved(home, lora, tensors, kinds, [_stacked(kind) for kind in kinds])
    state, header = read_state(state_file)
    config = StructLoRAConfig.build(header["config"])
    maps, latents = zip(*(_map(name, kind, config, of_kind(state, name)) for name, kind in header["kinds"].items()))
    with torch.no_grad():
        effective = [m(latent, None) for m, latent in zip(maps, latents)]
    kinds = [m.kind for m in maps]
    _refuse_difference(kinds, latents, masters, "fp32 masters", home)
    if not _modules(tensors):
        tensors = _tensors_of(lora, kinds, effective, home)
    _refuse_difference(kinds, effective, tensors, "adapter", home)
    return Saved(home, lora, tensors, kinds, effective, list(maps), list(latents), int(state["step"]))


def _named_adapter(folder: Path) -> Path | None:
    """PEFT saves an adapter that is not named 'default' to a folder of its name; the state lies above it."""
    if (folder / "adapter_config.json").is_file() or not (folder / STATE_NAME).is_file():
        return None
    return next(iter(sorted(path.parent for path in folder.glob("*/adapter_config.json"))), None)


def _read_config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").is_file():
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        raise StructLoRAError(
            f"no adapter_config.json in {folder}",
            "a folder with a saved LoRA adapter: a run's output, one of its checkpoints, or an exported adapter",
            f"give {checkpoints[-1]}" if checkpoints else "correct the path",
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise StructLoRAError(
            f"{folder}/adapter_config.json unreadable ({error})", "PEFT's configuration", "use another checkpoint"
        ) from error
    if not isinstance(config, LoraConfig):
        raise StructLoRAError(f"an adapter of PEFT type {config.peft_type} in {folder}", "LORA", "give a LoRA adapter")
    return config


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise StructLoRAError(f"{path} damaged ({error})", "a whole file", "use the checkpoint before") from error


def _read_masters(folder: Path) -> dict[str, Tensor]:
    """LoRA factors among whole-model fp32 weights; without a copy of the rest."""
    found = {}
    for path in sorted(path for path in folder.glob("*model*") if _MASTERS.fullmatch(path.name) and path.is_file()):
        if path.suffix == ".bin":
            weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        else:
            weights = load_file(path)
        found |= {name: value for name, value in weights.items() if LORA_NAME.match(name)}
    return found


def _modules(tensors: dict[str, Tensor]) -> dict[str, dict[str, nn.Parameter]]:
    """Module -> its factors, fp32, as (r, ...) and (d, r, ...)."""
    modules: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, value in tensors.items():
        match = LORA_NAME.match(name)
        if match:
            modules[match["module"]][match["factor"]] = nn.Parameter(value.float(), requires_grad=False)
    return dict(modules)


def _stacked(kind: Kind) -> Factors:
    return Factors(*(torch.stack([p.detach().flatten(1) for p in side]) for side in (kind.A, kind.B)))


def _map(name: str, kind: dict, config: StructLoRAConfig, state: dict[str, Tensor]) -> tuple[KindMap, Factors]:
    latent = [[nn.Parameter(part) for part in state[side]] for side in ("latent_A", "latent_B")]
    modules = [module.replace("_orig_mod.", "") for module in kind["modules"]]
    m = KindMap(Kind(name, modules, *latent), config, state.get("origin_A"), state.get("origin_B"))
    return m, m.restore(state)


def _tensors_of(lora: LoraConfig, kinds: list[Kind], effective: list[Factors], folder: Path) -> dict[str, Tensor]:
    """An adapter file's tensors, from the map alone (ZeRO-3 that does not gather weights on saving writes no adapter)."""
    others = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if getattr(lora, name)]
    others += ["bias"] if lora.bias != "none" else []
    if others:
        raise StructLoRAError(
            f"no adapter weights in {folder}, and an adapter with more than LoRA factors ({', '.join(others)})",
            f"{SAFETENSORS_WEIGHTS_NAME}, where these lie",
            "set `stage3_gather_16bit_weights_on_model_save` in the DeepSpeed configuration, and save again",
        )
    return {
        f"{module}.lora_{side}.weight": value.clone()
        for kind, factors in zip(kinds, effective)
        for side, stack in zip("AB", factors)
        for module, value in zip(kind.modules, stack)
    }


def _refuse_difference(
    kinds: list[Kind], factors: list[Factors], tensors: dict[str, Tensor], what: str, folder: Path
) -> None:
    """Stop where a file's factors are not those of the state."""
    modules = _modules(tensors)
    tolerance = max((_ROUNDING.get(value.dtype, 0.0) for value in tensors.values()), default=0.0)
    for kind, stacks in zip(kinds, factors) if modules else ():
        for index, module in enumerate(kind.modules):
            for side, stack in zip("AB", stacks):
                ours, theirs = stack[index], modules.get(module, {}).get(side)
                difference = torch.inf
                if theirs is not None and theirs.numel() == ours.numel():
                    scale = ours.norm().clamp(min=torch.finfo(ours.dtype).tiny)
                    difference = float((theirs.flatten(1) - ours).norm() / scale)
                if difference > tolerance:
                    raise StructLoRAError(
                        f"{what} and {STATE_NAME} of different weights in {folder} (lora_{side} of '{module}' differs by "
                        f"{difference:.1e} of its norm)",
                        "both of one moment of one run",
                        f"give a checkpoint as the run wrote it, or remove {STATE_NAME} to read the adapter alone",
                    )
