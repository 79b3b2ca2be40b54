"""StructLoRA (arXiv 2603.14228) for TRL, Transformers, PyTorch: LoRA with gates, coordinated over depth."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attachment import attach
    from .config import StructLoRAConfig
    from .errors import StructLoRAError
    from .runtime import Runtime, save_gates
    from .state import load_state, save_state
    from .trainers.callback import StructLoRACallback
    from .trainers.mixin import StructLoRAMixin, StructLoRASFTConfig, StructLoRASFTTrainer

__version__ = "0.1.0"

_HOME = {
    "StructLoRAConfig": "config",
    "StructLoRAError": "errors",
    "attach": "attachment",
    "Runtime": "runtime",
    "load_state": "state",
    "save_gates": "runtime",
    "save_state": "state",
    "StructLoRACallback": "trainers.callback",
    "StructLoRAMixin": "trainers.mixin",
    "StructLoRASFTConfig": "trainers.mixin",
    "StructLoRASFTTrainer": "trainers.mixin",
}
__all__ = [
    "Runtime",
    "StructLoRACallback",
    "StructLoRAConfig",
    "StructLoRAError",
    "StructLoRAMixin",
    "StructLoRASFTConfig",
    "StructLoRASFTTrainer",
    "__version__",
    "attach",
    "load_state",
    "save_gates",
    "save_state",
]


def __getattr__(name: str) -> object:
    # Imported on first use: the core works where TRL is not installed, and `import structlora_trl` stays
    # quick.
    if name not in _HOME:
        raise AttributeError(f"module 'structlora_trl' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
