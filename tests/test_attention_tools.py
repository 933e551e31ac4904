"""tools/capture.py and tools/attention_bench.py, from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_models

TOOLS = Path(__file__).parents[1] / "tools"
TEXT = "The history of the lighthouse begins long before the first tower of stone was built. " * 5
DEPTH = 300
STEPS = 4


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def output(tool: str, *arguments: object) -> str:
    done = run(tool, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attention")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    (folder / "text.txt").write_text(TEXT)
    return tiny_models.llama(folder / "tiny.gguf", tokenizer=True)


@pytest.fixture(scope="module")
def capture(model: Path, folder: Path) -> Path:
    path = folder / "capture.npz"
    text = folder / "text.txt"
    output("capture.py", "-m", model, "-o", path, "-d", DEPTH, "-n", STEPS, "--text", text, "-t", 2)
    return path


def test_the_file_is_as_documented(capture: Path) -> None:
    n_cell = DEPTH + STEPS
    with np.load(capture) as file:
        meta = json.loads(str(file["meta"]))
        assert (meta["model"], meta["depth"], meta["type_k"]) == ("tiny.gguf", DEPTH, "f16")
        assert file["positions"].tolist() == list(range(DEPTH, n_cell))
        assert file["layers"].tolist() == [0, 1]
        assert file["reason"].tolist() == ["none", "none"]
        assert file["type_k"].tolist() == file["type_v"].tolist() == ["f16", "f16"]
        np.testing.assert_allclose(file["scale"], 64**-0.5)
        for number in range(2):
            arrays = {name: file[f"{name}.{number}"] for name in ("queries", "visible", "k", "v")}
            assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
                "queries": ((STEPS, 4, 64), np.float32),
                "visible": ((STEPS, n_cell), np.bool_),
                "k": ((n_cell, 2, 64), np.float16),
                "v": ((n_cell, 2, 64), np.float16),
            }
            assert all(np.isfinite(array).all() for array in arrays.values())
            assert arrays["visible"].sum(1).tolist() == [DEPTH + 1 + step for step in range(STEPS)]


def test_benchmark_as_json(capture: Path) -> None:
    found = json.loads(
        output("attention_bench.py", capture, "-t", "1,2", "-r", 3, "--epsilon", "0.1", "-o", "json")
    )
    assert [(result["n_threads"], result["epsilon"]) for result in found["results"]] == [
        (1, 0.0),
        (1, 0.1),
        (2, 0.0),
        (2, 0.1),
    ]
    row_bytes = 2 * 2 * 64 * 2
    for result in found["results"]:
        assert len(result["samples"]) == len(result["times_dense"]) == 3
        for sample in result["samples"]:
            assert sample["dense_bytes"] == 2 * (DEPTH + 1) * row_bytes
            assert sum(sample["phases_us"].values()) <= sample["step_us"] * 1.05 + 50
            if result["epsilon"] == 0:
                assert sample["attend_bytes"] == sample["dense_bytes"]
                assert sample["scan_bytes"] == sample["phases_us"]["scan"] == sample["delta_max"] == 0
            else:
                assert 0 < sample["attend_bytes"] < sample["dense_bytes"]
                assert sample["scan_bytes"] > 0 < sample["phases_us"]["scan"]
                assert 0 < sample["delta_max"] <= 0.1
    assert found["append"]["block_us"] > 0
    assert [len(values) for values in found["bandwidth"].values()] == [3, 3]


@pytest.mark.parametrize(
    "arguments",
    [["--depth", 100, "--cache", "q8_0"], ["--cache", "bf16", "--repeat-layers", 2], ["--depth", 10]],
    ids=["q8_0", "bf16", "no block"],
)
def test_benchmark_of_variants(capture: Path, arguments: list[object]) -> None:
    text = output("attention_bench.py", capture, "-t", 1, "-r", 2, *arguments)
    for part in ("| attend ", "| total ", "memory, 1 threads", "of the keys attended"):
        assert part in text


def test_benchmark_of_random_data() -> None:
    text = output("attention_bench.py", "--random", "2,6,2,80,200", "-t", 2, "-r", 2)
    assert "n_head_kv 2" in text
    assert "| scan " in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--random"),
        (["--random", "2,3,2,64,100"], "multiple of n_head_kv"),
        (["--random", "1,1,1,64,100", "--depth", 101], "accepted are 1 to 100"),
        (["--random", "1,1,1,64,100", "--epsilon", "1"], "epsilon is in [0, 1)"),
        (["missing.npz"], "missing.npz"),
    ],
)
def test_benchmark_says_what_is_wrong(arguments: list[object], part: str) -> None:
    done = run("attention_bench.py", *arguments)
    assert done.returncode != 0
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_capture_of_too_short_a_text(model: Path, folder: Path) -> None:
    done = run("capture.py", "-m", model, "-o", folder / "x.npz", "-d", 9999, "--text", folder / "text.txt")
    assert done.returncode == 1
    assert "tokens, and depth and steps need 10015" in done.stderr
