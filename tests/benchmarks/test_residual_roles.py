"""What was measured of the residual stream is what is measured."""

from __future__ import annotations

import pytest

from benchmarks.residual_roles import roles
from tests.core.test_residual_roles import MEASURED

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "mixtral", "bert", "t5", "wav2vec2"])
def test_roles_are_measured_as_before(name):
    (expected,) = (MEASURED[names] for names in MEASURED if name in names.split())
    assert roles(name) == expected
