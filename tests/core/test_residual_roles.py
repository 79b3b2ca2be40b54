"""The table of residual roles, held to what modules of many families do, as measured on tiny models with transformers 5.24.

With every norm the identity and every other module's output held, a module reads the stream if a change of the stream reaches
its input in the same channels, and writes it if a change of its output reaches its block's output in the same channels.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from structlora_trl.core.residual_roles import RESIDUAL_ROLES

# Families -> what their modules do ('read', 'write', or 'between' for neither) -> the modules, with `*` for a layer's number
MEASURED = json.loads(Path(__file__).with_name("residual_roles.json").read_text(encoding="utf-8"))["families"]


def role_of(name: str) -> str:
    name = name.replace("*", "0")
    roles = (role for p, role in RESIDUAL_ROLES.items() if re.fullmatch(rf"(.*\.)?({p})", name))
    return next(roles, "between")


@pytest.mark.parametrize("families", MEASURED)
def test_the_table_says_what_modules_do(families):
    done = {module: role for role, modules in MEASURED[families].items() for module in modules}
    assert {"read", "write"} <= {*done.values()}
    assert {module: role_of(module) for module in done} == done
