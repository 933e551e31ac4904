"""The benchmark: contenders in turn on one cache, every sample told, nothing lost when it is cut short."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from louver_llama import Llama, LouverConfig, bench, bench_cache, bench_record, bench_run, bench_states
from louver_llama._libraries import core
from louver_llama.cli import main

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "bench.md"
QUICK = ["-d", "0,96,160", "-n", "4", "-r", "2", "--min-context", "64", "--recent", "8", "-ub", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    tiny_models.llama(folder / "tiny.gguf", tokenizer=True)
    tiny_models.llama(folder / "other.gguf", tokenizer=True, seed=1)
    (folder / "text.txt").write_text("The lighthouse stood on a rock; its keeper wrote letters.\n" * 8)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command with a tiny model and text; returns status, stdout and stderr."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(["bench", "-m", "tiny.gguf", "--text", "text.txt", *QUICK, *arguments])
        except SystemExit as exit:
            status = int(exit.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def rows(run: Any) -> Any:
    """Run the command; returns its JSON."""

    def rows(*arguments: str) -> list[dict[str, Any]]:
        status, output, errors = run("-o", "json", *arguments)
        assert status == 0, errors
        return json.loads(output)  # type: ignore[no-any-return]

    return rows


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LouverConfig, int, int]]:
    """With which settings, behind how many tokens and how many tokens each call of eval() evaluated."""
    calls = []
    evaluate = Llama.eval

    def listen(self: Llama, tokens: list[int]) -> None:
        calls.append((self.louver, self.n_tokens, len(tokens)))
        evaluate(self, tokens)

    monkeypatch.setattr(Llama, "eval", listen)
    return calls


def test_a_row_has_everything(rows: Any) -> None:
    found = rows("--quality", "4")
    assert [(row["contender"], row["test"]) for row in found] == [
        (contender, test)
        for test in ("tg4", "tg4 @ d96", "tg4 @ d160")
        for contender in ("stock", "dense", "louver")
    ]
    for row in found:
        assert row["model_filename"] == "tiny.gguf" and row["model_n_params"] > 0
        assert row["cpu_info"] and row["n_cpus"] > 0 and row["isa"] and row["build_commit"]
        assert row["louver"]["min_context"] == 64 and row["louver"]["recent"] == 8
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["test_time"])
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == len(row["samples_ms"]) == 2
        assert row["avg_ms"] == pytest.approx(row["avg_ns"] / 4 / 1e6, rel=1e-6)
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["quality_steps"] == 4
        assert row["backends"] in ("CPU", "CUDA") and isinstance(row["gpu_info"], str)
        assert (row["n_gpu_layers"], row["split_mode"], row["tensor_split"]) == (0, "layer", None)


def test_every_field_is_documented(rows: Any) -> None:
    documented = set(re.findall(r"`(\w+)`", DOCUMENTATION.read_text()))
    assert set(rows("-d", "0")[0]) <= documented


def test_paths_are_told(rows: Any) -> None:
    paths = {(row["contender"], row["n_depth"]): (set(row["attention"]), row["reasons"]) for row in rows()}
    assert set(paths["stock", 160][1]["stock"]) == {"disabled"}
    assert paths["dense", 160][0] == {"dense"}
    assert paths["louver", 160] == ({"louver"}, {})
    assert [set(reasons) for reasons in paths["louver", 0][1].values()] == [{"below_min_context"}]


def test_contenders_take_turns_on_one_cache(
    rows: Any, evaluated: list[tuple[LouverConfig, int, int]]
) -> None:
    rows("--epsilon", "0.05,0.1", "-t", "1,2", "-d", "160,96")
    fills = [(depth, n) for _, depth, n in evaluated if n > 1]
    assert fills == [(0, 32), (32, 32), (64, 32), (96, 32), (128, 32)]
    samples = [(config, depth) for config, depth, n in evaluated if n == 1]

    def labels(depth: int) -> list[str]:
        steps = [config for config, start in samples if start == depth]
        return [f"{config.epsilon:g}" if config.enabled else "stock" for config in steps]

    # A warm-up step of each, then two repetitions; once per number of threads.
    assert labels(96) == labels(160) == ["stock", "0", "0.05", "0.1"] * 3 * 2
    assert labels(97) == labels(161) == ["stock", "0", "0.05", "0.1"] * 2 * 2


def test_the_cache_is_filled_by_stock(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    fill = bench_cache.FilledCache.fill

    def listen(self: bench_cache.FilledCache, depth: int) -> None:
        self.llm.reset_louver_stats()
        fill(self, depth)
        filled.append(self.llm.louver_stats())

    monkeypatch.setattr(bench_cache.FilledCache, "fill", listen)
    rows("-d", "128,136")  # the second one is a step as short as Louver would serve
    assert [stats["attention"]["louver"] for stats in filled] == [0, 0]
    assert [sum(stats["reasons"]["stock"].values()) for stats in filled] == [2 * 128, 2 * 8]
    assert filled[0]["index"]["cells_encoded"] > 0


def test_comma_lists(rows: Any) -> None:
    lists = ["-m", "tiny.gguf,other.gguf", "-d", "96,160", "-n", "2,3", "-p", "20,24", "-t", "1,2"]
    found = rows(
        *lists, "-ctk", "f16,q8_0", "-r", "1", "--contenders", "louver,stock", "--epsilon", "0.1,0.2"
    )
    counts = Counter(row["model_filename"] for row in found)
    assert counts == {"tiny.gguf": 2 * 4 * 2 * 2 * 3, "other.gguf": 2 * 4 * 2 * 2 * 3}
    for name, values in {
        "n_depth": {96, 160},
        "n_gen": {0, 2, 3},
        "n_prompt": {0, 20, 24},
        "n_threads": {1, 2},
        "epsilon": {None, 0.1, 0.2},
    }.items():
        assert {row[name] for row in found} == values
    assert {(row["type_k"], row["type_v"]) for row in found} == {("f16", "f16"), ("q8_0", "q8_0")}
    assert [row["epsilon"] for row in found[:3]] == [0.1, 0.2, None]


def test_types_of_keys_and_values_combine(rows: Any) -> None:
    found = rows("-d", "0", "-ctk", "f16", "-ctv", "f16,q8_0")
    assert {(row["type_k"], row["type_v"]) for row in found} == {("f16", "f16"), ("f16", "q8_0")}


def test_quality_is_measured_against_stock_on_f16(rows: Any) -> None:
    found = rows(
        "--quality", "8", "-d", "160", "--epsilon", "0.05,0.5", "-ctk", "q8_0,f16", "--no-compensate"
    )
    kl = {(row["contender"], row["epsilon"], row["type_k"]): row["kl_mean"] for row in found}
    assert kl["stock", None, "f16"] == 0
    assert kl["louver", 0.5, "f16"] > 10 * abs(kl["louver", 0.05, "f16"])
    assert kl["louver", 0.5, "f16"] > 1e-3
    assert kl["stock", None, "q8_0"] > 1e-7
    top1 = {(row["contender"], row["type_k"]): row["top1_agreement"] for row in found}
    assert top1["stock", "f16"] == 1


def test_quality_fills_an_f16_cache_where_none_was_asked_for(run: Any, rows: Any) -> None:
    asked = rows("--quality", "4", "-d", "96", "-ctk", "f16,q8_0")
    _, output, errors = run("-o", "json", "--quality", "4", "-d", "96", "-ctk", "q8_0")
    alone = json.loads(output)
    assert "F16" in errors
    assert {row["type_k"] for row in alone} == {"q8_0"}
    assert [row["kl_mean"] for row in alone] == [row["kl_mean"] for row in asked if row["type_k"] == "q8_0"]


def test_formats(run: Any) -> None:
    _, lines, _ = run("-o", "jsonl", "--quality", "4", "-p", "20")
    names = list(json.loads(lines.splitlines()[0]))
    _, output, _ = run("-o", "csv", "--quality", "4", "-p", "20")
    table = list(csv.DictReader(io.StringIO(output)))
    assert list(table[0]) == names
    assert len(table) == len(lines.splitlines()) == 3 * 2 * 3
    assert len(json.loads(table[0]["samples_ns"])) == 2

    _, output, _ = run("-o", "md", "--quality", "4", "-p", "20")
    assert "louver-llama bench -m tiny.gguf" in output
    body = [line for line in output.splitlines() if line.startswith("|")]
    assert len(body) == 2 + 18
    assert len({line.count("|") for line in body}) == 1
    assert "tg4 @ d160" in output and "louver 0.05" in output
    (note,) = re.findall(r"\((\d)\) \w+ computed 100.0% of the attention \(below_min_context\)", output)
    assert any(f"louver 0.05 ({note})" in line for line in body)


def test_what_is_complete_survives_ctrl_c(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = bench_run._Bench._sample
    n_samples = 0

    def interrupted(self: Any, *arguments: Any) -> int:
        nonlocal n_samples
        n_samples += 1
        if n_samples == 15:  # of the nine at each depth
            raise KeyboardInterrupt
        return sample(self, *arguments)

    monkeypatch.setattr(bench_run._Bench, "_sample", interrupted)
    status, output, _ = run("-o", "json")
    assert status == 130
    assert [row["n_depth"] for row in json.loads(output)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-d", "1,x"], ["-d", "'1,x'", "commas"]),
        (["-d", "-1"], ["-d", "-1"]),
        (["-t", "0"], ["-t", "0"]),
        (["-ctk", "f16,q9_9"], ["-ctk", "q9_9", "q8_0"]),
        (["--contenders", "stock,fast"], ["--contenders", "fast", "dense"]),
        (["--epsilon", "0.05,2"], ["epsilon", "[0, 1)", "2"]),
        (["-n", "0"], ["-n", "-p"]),
        (["-n", "0", "-p", "20", "--quality"], ["--quality", "-n"]),
        (["-d", "460,470"], ["text.txt", "tokens", "470", "--text"]),
        (["-d", "460", "--quality", "20"], ["text.txt", "460", "20"]),
        (["-m", "tiny.gguf,missing.gguf"], ["missing.gguf"]),
        (["--text", "missing.txt"], ["missing.txt"]),
        (["--plot", "picture.jpg"], ["--plot", ".png", "picture.jpg"]),
        (["--plot", "no/such/folder.png"], ["--plot", "no/such"]),
        (["--state-dir", "text.txt"], ["text.txt"]),
        (["-o", "sql"], ["-o", "sql", "jsonl"]),
    ],
)
def test_bad_input(
    run: Any, evaluated: list[tuple[LouverConfig, int, int]], arguments: list[str], parts: list[str]
) -> None:
    status, output, errors = run(*arguments)
    assert (status, output, evaluated) == (2, "", [])
    (line,) = errors.splitlines()
    assert line.startswith("louver-llama: error: ")
    for part in parts:
        assert part in line


def test_plot(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    assert run("-ctk", "f16,q8_0", "--plot", str(file))[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG\r\n")


def test_plot_without_matplotlib(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, errors = run("--plot", "picture.png")
    assert status == 2
    assert "louver-llama[plot]" in errors
    assert run()[0] == 0


def test_depth_behind_the_training_context(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized = bench._tokenized
    monkeypatch.setattr(bench, "_tokenized", lambda *given: replace(tokenized(*given), n_ctx_train=128))
    assert "trained on 128 tokens" in run()[2]
    assert run("-d", "96")[2] == ""
    assert run("--rope-scaling", "yarn", "--rope-scale", "2")[2] == ""


def test_state_dir(rows: Any, tmp_path: Path, evaluated: list[tuple[LouverConfig, int, int]]) -> None:
    arguments = ["--state-dir", str(tmp_path / "states"), "--quality", "8", "-ctk", "f16,q8_0"]
    before = rows(*arguments)
    files = sorted((tmp_path / "states").iterdir())
    assert len(files) == 2 * 2
    assert sum(n > 1 for _, _, n in evaluated) == 2 * 5

    evaluated.clear()
    after = rows(*arguments)
    assert all(n == 1 for _, _, n in evaluated)
    assert [row["kl_mean"] for row in after] == [row["kl_mean"] for row in before]
    assert [row["keys_attended_share"] for row in after] == [row["keys_attended_share"] for row in before]

    evaluated.clear()
    rows(*arguments, "--rope-freq-base", "20000")
    assert sum(n > 1 for _, _, n in evaluated) == 2 * 5
    assert len(list((tmp_path / "states").iterdir())) == 2 * 4


def test_state_of_another_device_is_filled_anew(
    run: Any, tmp_path: Path, evaluated: list[tuple[LouverConfig, int, int]]
) -> None:
    for options in ([], ["-ngl", "99"], ["-ngl", "99", "-sm", "none"]):
        assert run("-d", "160", "--state-dir", str(tmp_path), *options)[0] == 0
    assert len(list(tmp_path.iterdir())) == 3
    assert sum(n > 1 for _, _, n in evaluated) == 3 * 5
    _, output, errors = run("-d", "160", "--state-dir", str(tmp_path), "-ngl", "99")
    assert len(list(tmp_path.iterdir())) == 3
    assert "; n_gpu_layers 99\n" in output
    assert core.has_cuda() or "n_gpu_layers=99" in errors


def test_filling_keeps_in_mind_from_where_on_a_gpu_has_an_index(
    rows: Any, evaluated: list[tuple[LouverConfig, int, int]]
) -> None:
    rows("-d", "96", "--min-context-gpu", "77")
    assert {config.min_context_gpu for config, _, _ in evaluated} == {77}


@pytest.mark.parametrize("n_bytes", [0, 5000, -1])
def test_damaged_state_is_filled_anew(
    rows: Any, tmp_path: Path, evaluated: list[tuple[LouverConfig, int, int]], n_bytes: int
) -> None:
    arguments = ["--state-dir", str(tmp_path), "--quality", "8", "-d", "96,160"]
    before = rows(*arguments)
    contents = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(contents) == 2
    for file, content in contents.items():
        file.write_bytes(content[:n_bytes])
    evaluated.clear()
    after = rows(*arguments)
    assert sum(n > 1 for _, _, n in evaluated) == 5
    assert [row["kl_mean"] for row in after] == [row["kl_mean"] for row in before]
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == contents


def test_state_of_other_tokens_is_filled_anew(tmp_path: Path, folder: Path) -> None:
    with closing(Llama(str(folder / "tiny.gguf"), n_ctx=256, verbose=False)) as llm:
        states = bench_states.StateFolder(tmp_path, {})
        asked, other = [5] * 40, [6] * 40
        llm.eval(asked)
        states.save(llm, other)
        (file,) = tmp_path.iterdir()
        name = states._file(llm, asked, states._identity(llm, asked))
        file.rename(name)
        assert not states.load(llm, asked)
        name.write_bytes(name.read_bytes()[:-32] + states._identity(llm, asked))
        assert not states.load(llm, asked)
        assert llm.n_tokens == 0


@pytest.mark.parametrize("swa_full", [[], ["--swa-full"]])
def test_sliding_window(
    rows: Any,
    folder: Path,
    tmp_path: Path,
    evaluated: list[tuple[LouverConfig, int, int]],
    swa_full: list[str],
) -> None:
    tiny_models.gemma(folder / "gemma.gguf", soft_cap=False, window=16, tokenizer=True)
    # The prompts fill a cache of 256 cells beyond what it can forget again.
    arguments = ["-m", "gemma.gguf", "-d", "160", "-p", "300", "--quality", "8", "-ctk", "q8_0,f16"]
    found = rows(*arguments, "--contenders", "stock", *swa_full)
    assert kl_of_stock(found) == 0
    n_fills = sum(depth == 0 and n > 1 for _, depth, n in evaluated)
    assert n_fills == (2 if swa_full else 2 * 3)

    states = ["--contenders", "stock", "--state-dir", str(tmp_path), *swa_full]
    rows(*arguments, *states)
    assert kl_of_stock(rows(*arguments, *states)) == 0


def kl_of_stock(found: list[dict[str, Any]]) -> float:
    (kl,) = (row["kl_mean"] for row in found if row["n_gen"] and row["type_k"] == "f16")
    return kl  # type: ignore[no-any-return]


def test_statistics() -> None:
    timing = bench_record.timing([10_000_000, 20_000_000], 10)
    assert (timing.avg_ms, timing.min_ms, timing.max_ms) == (1.5, 1.0, 2.0)
    assert timing.stddev_ms == pytest.approx(0.5**0.5)
    assert timing.avg_ts == pytest.approx((1000 + 500) / 2)
    assert bench_record.timing([10_000_000], 10).stddev_ns == 0
    ratios = bench_record.speedup([10, 40, 30], [10, 20, 10])
    assert (ratios.x_stock, ratios.x_stock_min, ratios.x_stock_max) == (2, 1, 3)
