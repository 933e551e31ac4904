"""The CUDA kernels against float64: as C++ on the CPU everywhere, and on a GPU where there is one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build() -> Path:
    """The folder in which the installed package was built; LOUVER_BUILD names another."""
    if named := os.environ.get("LOUVER_BUILD"):
        return Path(named)
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-*"
    found = [cache.parent for cache in ROOT.glob(f"build/{tag}/CMakeCache.txt")]
    if not found:
        pytest.skip(
            "the package was not built in this checkout (pip install -e .), and LOUVER_BUILD names no other"
        )
    return found[0]


def make(build: Path, target: str) -> None:
    made = subprocess.run(
        ["cmake", "--build", build, "--target", target], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]


def run(program: Path, *arguments: str) -> tuple[int, int, str]:
    """How many checks were made and how many failed, and what was said."""
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    summary = re.search(r"^(\d+) checks, (\d+) failed$", ran.stdout, re.MULTILINE)
    assert summary, ran.stdout[-4000:] + ran.stderr
    checks, failed = int(summary[1]), int(summary[2])
    assert ran.returncode == (1 if failed else 0)
    return checks, failed, ran.stdout


def test_on_the_cpu(build: Path) -> None:
    make(build, "louver_cuda_on_cpu")
    checks, failed, said = run(build / "tests/cuda/host/louver_cuda_on_cpu", "--quick")
    assert checks > 900_000
    assert failed == 0, said


def test_without_slack_the_checks_fail(build: Path) -> None:
    make(build, "louver_cuda_on_cpu_zero_slack")
    _, failed, said = run(build / "tests/cuda/host/louver_cuda_on_cpu_zero_slack", "--quick")
    assert failed > 0
    assert "bounds" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile with")
def test_they_compile(build: Path) -> None:
    cache = (build / "CMakeCache.txt").read_text()
    if not re.search(r"^CMAKE_CUDA_COMPILER:.*nvcc", cache, re.MULTILINE):
        pytest.skip("CMake found no CUDA compiler that works, of CUDA 12 or later")
    make(build, "louver_cuda")


@pytest.mark.gpu
def test_on_the_gpu(build: Path) -> None:
    make(build, "louver_cuda_check")
    checks, failed, said = run(build / "louver_cuda_check")
    assert checks > 10_000_000
    assert failed == 0, said
