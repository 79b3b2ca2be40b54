"""The reward functions of `structlora grpo` and `structlora rloo`, by the names that TRL's scripts take."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from importlib import import_module

from trl import rewards

from ..errors import StructLoRAError
from ..refusing import refusing

# As in TRL's scripts, which hold them inside their `main`.
_OVERLONG = {"max_completion_len": 1280, "soft_punish_cache": 256}
_NAMES = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def reward_functions(script) -> list[str | Callable]:
    """What judges completions: the reward model's name, then functions.

    Args:
        script (`GRPOScriptArguments` or `RLOOScriptArguments`): `reward_model_name_or_path` and `reward_funcs`.

    Raises:
        StructLoRAError: none, or one that cannot be found.
    """
    found = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    found += [_function(name) for name in script.reward_funcs or []]
    if not found:
        raise StructLoRAError(
            "neither `reward_funcs` nor `reward_model_name_or_path`",
            "something that judges completions",
            "set `reward_funcs` to names or import paths of functions, or `reward_model_name_or_path` to a reward model",
        )
    return found


def _function(name: str) -> Callable:
    if "." in name:
        module, _, attribute = name.rpartition(".")
        if os.getcwd() not in sys.path:  # a console script has its own folder there
            sys.path.insert(0, os.getcwd())
        with refusing(f"importing the reward function {name}", "an import path", "correct `reward_funcs`"):
            module = import_module(module)
        if not hasattr(module, attribute):
            raise StructLoRAError(
                f"no `{attribute}` in {module.__name__}", "a reward function", "correct `reward_funcs`"
            )
        return getattr(module, attribute)
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, 1)
        raise StructLoRAError(
            f"reward_funcs={name!r}" + (f" (did you mean `{near[0]}`?)" if near else ""),
            f"one of {', '.join(_NAMES)}, or an import path as in `my_rewards.length`",
            "correct `reward_funcs`",
        )
    function = getattr(rewards, name, None)
    if function is None:
        raise StructLoRAError(f"no {name} in this TRL", "a TRL that has it", "upgrade TRL: `pip install --upgrade trl`")
    return function(**_OVERLONG) if name == "get_soft_overlong_punishment" else function
