"""The command: text on stdout, all else on stderr, one line and status 2 for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from louver_llama import Llama, LouverConfig, cli, cli_options, demo
from louver_llama._libraries import LIBRARY_FOLDER, core, llama_cpp
from louver_llama.cli import main

PROMPT = "The history of the lighthouse begins long before the first tower of stone was built. " * 12
COMMAND = [sys.executable, "-m", "louver_llama.cli"]
SMALL = ["-c", "1024", "-n", "16", "--temp", "0", "--min-context", "32"]


def louver_llama(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more.pop("env", {})}  # type: ignore[dict-item]
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=300, **more
    )  # type: ignore[call-overload, no-any-return]


def test_help_is_quick_and_loads_nothing() -> None:
    code = (
        "import sys; from louver_llama.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "print(sorted({'llama_cpp', 'numpy', 'rich'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--epsilon" in process.stdout
    assert process.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def expected(model_path: str) -> str:
    llm = Llama(model_path, n_ctx=1024, louver=LouverConfig(min_context=32), verbose=False)
    completion = llm(PROMPT, max_tokens=16, temperature=0.0)
    llm.close()
    return completion["choices"][0]["text"]  # type: ignore[index, no-any-return]


def test_run(model_path: str, expected: str, tmp_path: Path) -> None:
    stats_file = tmp_path / "stats.json"
    process = louver_llama(
        "run", "-m", model_path, "-p", PROMPT, *SMALL, "--check", "--stats", str(stats_file)
    )
    assert process.returncode == 0
    assert process.stdout == PROMPT + expected + "\n"
    stats = json.loads(stats_file.read_text())
    assert stats["attention"]["louver"] > 0
    assert stats["check"]["pairs"] > 0 == stats["check"]["misses"]
    for part in (
        "prefill",
        "decode",
        "tokens/s",
        "louver",
        "certificate",
        "epsilon 0.05, certified",
        "0 missed",
    ):
        assert part in process.stderr


def test_run_reads_a_file_and_prints_the_answer_alone(model_path: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    process = louver_llama("run", "-m", model_path, "-f", str(file), "--no-display-prompt", *SMALL)
    assert process.stdout == expected + "\n"


def test_run_puts_the_prompt_behind_the_file(model_path: str, tmp_path: Path) -> None:
    file = tmp_path / "document.txt"
    file.write_text("A document.\n")
    process = louver_llama("run", "-m", model_path, "-f", str(file), "-p", "A question?", *SMALL)
    assert process.stdout.startswith("A document.\n\nA question?")


def test_run_without_louver(model_path: str) -> None:
    process = louver_llama("run", "-m", model_path, "-p", PROMPT, "--no-louver", *SMALL)
    assert process.returncode == 0
    assert "disabled" in process.stderr
    assert "certificate" not in process.stderr


def test_run_with_the_default_model_says_so(model_path: str) -> None:
    process = louver_llama("run", "-p", "Once upon a time", *SMALL)
    assert process.returncode == 0
    assert Path(model_path).name in process.stderr


def test_run_with_a_grammar_and_escapes(model_path: str) -> None:
    arguments = (
        "run",
        "-m",
        model_path,
        "-p",
        r"Yes or no?\tAnswer:\n",
        "--grammar",
        'root ::= "no"',
        *SMALL,
    )
    assert louver_llama(*arguments).stdout == "Yes or no?\tAnswer:\nno\n"
    assert louver_llama(*arguments, "--no-escape").stdout == "Yes or no?\\tAnswer:\\nno\n"


@pytest.mark.parametrize("cache", ["f32", "bf16", "q8_0", "q4_0"])
def test_run_with_other_caches(model_path: str, cache: str) -> None:
    process = louver_llama(
        "run", "-m", model_path, "-p", PROMPT, "-ctk", cache, "-ctv", cache, *SMALL, "--check"
    )
    assert process.returncode == 0
    assert "louver" in process.stderr and "0 missed" in process.stderr


def test_conversation(model_path: str) -> None:
    llm = Llama(model_path, n_ctx=1024, louver=LouverConfig(min_context=32), verbose=False)
    messages = [{"role": "system", "content": "You answer briefly."}]
    answers = []
    for turn in ("Name a colour.", "Name another one."):
        messages.append({"role": "user", "content": turn})
        completion = llm.create_chat_completion(messages, temperature=0.0, max_tokens=16)
        messages.append(completion["choices"][0]["message"])
        answers.append(messages[-1]["content"])
    llm.close()
    process = louver_llama(
        "run",
        "-m",
        model_path,
        *SMALL,
        "-sys",
        "You answer briefly.",
        "-p",
        "Name a colour.",
        input="Name another one.\n",
    )
    assert process.returncode == 0
    assert process.stdout == "".join(f"{answer}\n" for answer in answers)


def test_conversation_of_one_turn(model_path: str) -> None:
    process = louver_llama(
        "run", "-m", model_path, *SMALL, "-cnv", "-st", input="Hello!\nNot read any more.\n"
    )
    assert process.returncode == 0
    assert "decode" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["run | bench | info | demo"]),
        (["fly"], ["fly"]),
        (["run"], ["prompt"]),
        (["run", "-p", ""], ["prompt"]),
        (["run", "-p", "x", "--no-such-option"], ["--no-such-option"]),
        (["run", "-p", "x", "--grammar", "y", "--grammar-file", "z"], ["--grammar-file", "--grammar"]),
        (["run", "-p", "x", "-c", "many"], ["--ctx-size", "many"]),
        (["run", "-p", "x", "-c", "-1"], ["--ctx-size", "-1"]),
        (["run", "-p", "x", "-ctk", "q5_0"], ["--cache-type-k", "q5_0"]),
        (["run", "-p", "x", "--temp", "nan"], ["--temp", "nan"]),
        (["run", "-p", "x", "--epsilon", "1.5"], ["epsilon", "[0, 1)", "1.5"]),
        (["run", "-p", "x", "--epsilon", "nan"], ["epsilon", "[0, 1)", "nan"]),
        (["run", "-p", "x", "--recent", "-3"], ["recent", "[0, 2147483647]", "-3"]),
        (["run", "-p", "x", "--min-context-gpu", "-3"], ["min_context_gpu", "[0, 2147483647]", "-3"]),
        (["run", "-p", "x", "-ngl", "auto"], ["-ngl", "all", "'auto'"]),
        (["run", "-p", "x", "-ngl", "-2"], ["-ngl", "-1", "'-2'"]),
        (["run", "-p", "x", "-sm", "tensor"], ["-sm", "'tensor'", "row"]),
        (["run", "-p", "x", "-ts", "1,x"], ["-ts", "'1,x'", "commas"]),
        (["run", "-p", "x", "-ts", "0,0"], ["-ts", "'0,0'", "above 0"]),
        (["run", "-p", "x", "-ts", "1,-1"], ["-ts", "-1"]),
        (["run", "-p", "x", "-mg", "-1"], ["-mg", "-1"]),
        (["run", "-p", "x", "-m", "missing.gguf"], ["missing.gguf", "no such model file"]),
        (["run", "-p", "x", "-m", "."], [".", "not a file"]),
        (["run", "-p", "x", "-m", "text.gguf"], ["text.gguf", "not a GGUF file"]),
        (["run", "-p", "x", "-m", "truncated.gguf"], ["truncated.gguf", "incomplete"]),
        (["run", "-f", "missing.txt"], ["missing.txt", "No such file"]),
        (["run", "-p", "word " * 600, "-c", "512"], ["601", "512"]),
        (["run", "-p", "x", "--stats", "no/such/folder.json"], ["no/such/folder.json"]),
        (["info", "-m", "missing.gguf"], ["missing.gguf"]),
        (["demo", "-m", "text.gguf"], ["text.gguf"]),
    ],
)
def test_bad_input(model_path: str, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    (tmp_path / "text.gguf").write_text("This is not a model.\n")
    (tmp_path / "truncated.gguf").write_bytes(Path(model_path).read_bytes()[:50_000_000])
    if arguments[:1] == ["run"] and "-m" not in arguments:
        arguments = [*arguments, "-m", model_path]
    process = louver_llama(*arguments, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("louver-llama: error: ")
    for part in parts:
        assert part in line


def test_grammar_that_cannot_be_parsed(model_path: str) -> None:
    process = louver_llama("run", "-m", model_path, "-p", "x", "--grammar", "root ::= undefined", *SMALL)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == "louver-llama: error: the grammar cannot be parsed"


def test_isa_that_the_machine_lacks() -> None:
    process = louver_llama("info", env={"LOUVER_ISA": "no-such-isa"})
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("louver-llama: error: ") and "no-such-isa" in line
    assert all(isa in line for isa in core.available_isas())


def test_another_llama_cpp(tmp_path: Path) -> None:
    process = louver_llama("info", env={"LLAMA_CPP_LIB_PATH": str(tmp_path)})
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("louver-llama: error: ") and core.PIN["ggml"] in line and str(tmp_path) in line


def test_ctrl_c(model_path: str) -> None:
    arguments = ["run", "-m", model_path, "-p", "Once upon a time", "-c", "4096", "--ignore-eos"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run in the background of a shell, children would inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == b"\n"


def test_reader_goes_away(model_path: str) -> None:
    arguments = ["run", "-m", model_path, "-p", "Once upon a time", "-c", "4096", "--ignore-eos"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(30)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_info(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for part in (
        core.PIN["ggml"],
        core.PIN["commit"],
        str(LIBRARY_FOLDER),
        core.isa(),
        "LOUVER_ISA",
        "alibi",
    ):
        assert part in printed


def test_info_of_a_model(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "-m", model_path]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model == {
        "file": model_path,
        "architecture": "llama",
        "n_layer": 30,
        "n_head": 9,
        "n_head_kv": 3,
        "n_gqa": 3,
        "head_dim_keys": 64,
        "head_dim_values": 64,
        "n_ctx_train": 8192,
        "sliding_window": None,
        "soft_cap": None,
        "alibi": None,
        "mla_rank": None,
        "n_gpu_layers": 0,
        "attention_layers": {"louver": 30, "stock": {}},
    }


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the build and the machine: no layer can go to a GPU."""
    monkeypatch.setattr(core, "has_cuda", lambda: False)
    monkeypatch.setattr(core, "devices", list)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("layers", ["99", "-1", "all", "0"])
def test_layers_for_a_gpu_that_is_not_there(
    model_path: str, capsys: pytest.CaptureFixture[str], layers: str
) -> None:
    assert main(["run", "-m", model_path, "-p", "Once", "-n", "1", "-c", "256", "-ngl", layers]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    if layers == "0":
        assert warnings == []
        return
    (line,) = warnings
    asked = "99" if layers == "99" else "-1"
    assert line.startswith(f"louver-llama: warning: n_gpu_layers={asked}: this build has no CUDA")
    assert "-DLOUVER_CUDA=ON" in line and "CPU" in line


@pytest.mark.usefixtures("no_gpu")
def test_info_of_a_build_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "built_in: False" in printed and "devices: none" in printed
    assert "min_context_gpu" in printed and "device_memory" in printed


def test_info_of_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    served = {"id": 0, "name": "Hopper", "capability": "9.0", "in_the_way": None}
    old = {"id": 1, "name": "Turing", "capability": "7.5", "in_the_way": "compute capability 7.5"}
    monkeypatch.setattr(core, "has_cuda", lambda: True)
    monkeypatch.setattr(core, "devices", lambda: [served, old])
    assert main(["info", "--json"]) == 0
    cuda = json.loads(capsys.readouterr().out)["cuda"]
    assert cuda["built_in"] is True
    assert [(d["name"], d["louver_serves"]) for d in cuda["devices"]] == [("Hopper", True), ("Turing", False)]
    assert cuda["devices"][1]["in_the_way"] == "compute capability 7.5"
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for part in ("Hopper", "9.0", "Turing", "in_the_way: compute capability 7.5"):
        assert part in printed


def test_options_of_gpus() -> None:
    """They reach llama.cpp under its own names."""
    parser = cli._parser()
    for command in (["run"], ["bench"], ["demo"], ["info"]):
        options = parser.parse_args([*command, "-ngl", "all", "-sm", "row", "-ts", "1,1", "-mg", "2"])
        assert cli_options.offload(options).settings == {
            "n_gpu_layers": -1,
            "split_mode": llama_cpp.LLAMA_SPLIT_MODE_ROW,
            "main_gpu": 2,
            "tensor_split": [1.0, 1.0],
        }
        defaults = cli_options.offload(parser.parse_args(command)).settings
        assert defaults["n_gpu_layers"] == 0 and defaults["tensor_split"] is None
        assert defaults["split_mode"] == llama_cpp.LLAMA_SPLIT_MODE_LAYER
    options = parser.parse_args(["run", "--gpu-layers", "7", "-ts", "3/1", "-sm", "none"])
    assert (options.n_gpu_layers, options.tensor_split) == (7, [3.0, 1.0])
    assert cli_options.SPLIT_MODES["none"] == llama_cpp.LLAMA_SPLIT_MODE_NONE


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "_TEXT_TOKENS", 1300)
    monkeypatch.setattr(demo, "_ANSWER_TOKENS", 12)
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "tokens/s",
        "ratio",
        "stock llama.cpp",
        "Louver",
        "BLUE-HERON-42",
        "certificate",
        "0 missed",
    ):
        assert part in printed
