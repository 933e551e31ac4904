"""What all tests share."""

from __future__ import annotations

import os

import pytest

# A thread that waits in a barrier gives its core away: ten times faster for tiny graphs on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def model_path() -> str:
    from louver_llama.models import default_model_path

    return default_model_path()
