import shutil
from pathlib import Path

import pytest

from structlora_trl.gates_file import GATES_NAME
from structlora_trl.state import STATE_NAME
from tests.support.adapters import RUNS, train


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs by variant, each trained when first asked for."""
    made = {}

    def run(variant: str = "plain") -> Path:
        if variant not in made:
            made[variant] = train(tmp_path_factory.mktemp(variant), **RUNS[variant])
        return made[variant]

    return run


@pytest.fixture
def plain_adapter(runs, tmp_path):
    """The same adapter without StructLoRA's state and gates."""
    folder = tmp_path / "plain_adapter"
    shutil.copytree(
        runs(),
        folder,
        ignore=shutil.ignore_patterns("checkpoint-*", STATE_NAME, GATES_NAME, "trainer_state.json"),
    )
    return folder
