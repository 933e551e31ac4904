"""Another llama.cpp in place of ours is refused, with both versions named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from louver_llama._libraries import LIBRARY_FOLDER, core

THEIRS = "9.9.9"
LOAD = "import louver_llama; louver_llama.Llama"


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libggml-base.so of another version, as any llama.cpp installation has one."""
    folder = tmp_path_factory.mktemp("other")
    source = folder / "ggml.c"
    source.write_text(
        f'const char * ggml_version(void) {{ return "{THEIRS}"; }}\n'
        'const char * ggml_commit(void) { return "abc1234"; }\n'
    )
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    assert compiler, "the build of this package needs a compiler, so there is one"
    library = folder / "libggml-base.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libggml-base.so", "-o", library, source], check=True
    )
    return folder


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def assert_refused(process: subprocess.CompletedProcess[str], *parts: str) -> None:
    last_line = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1
    assert last_line.startswith("louver_llama.errors.LibraryMismatchError: ")
    for part in (core.PIN["ggml"], core.PIN["commit"], str(LIBRARY_FOLDER), *parts):
        assert part in last_line


@pytest.mark.parametrize("variable", ["LLAMA_CPP_LIB_PATH", "LD_LIBRARY_PATH"])
def test_variable_names_another_folder(other_folder: Path, variable: str) -> None:
    process = python(LOAD, **{variable: str(other_folder)})
    assert_refused(process, variable, THEIRS, "abc1234", str(other_folder))


@pytest.mark.parametrize(("name", "refused"), [("libggml-cuda.so", True), ("libggml-vulkan.so", False)])
def test_a_backend_of_another_llama_cpp(tmp_path: Path, name: str, refused: bool) -> None:
    (tmp_path / name).touch()
    process = python(LOAD, LD_LIBRARY_PATH=str(tmp_path))
    if refused:
        assert_refused(process, "LD_LIBRARY_PATH", "no version to be read", str(tmp_path))
    else:  # of no name that ours has
        assert (process.returncode, process.stderr) == (0, "")


def test_library_is_loaded_already(other_folder: Path) -> None:
    process = python(f"import ctypes; ctypes.CDLL('{other_folder}/libggml-base.so'); {LOAD}")
    assert_refused(process, "loaded already", THEIRS, str(other_folder))


def test_llama_cpp_is_imported_already(tmp_path: Path) -> None:
    copy = tmp_path / "lib"
    shutil.copytree(LIBRARY_FOLDER, copy)
    process = python(f"import llama_cpp; {LOAD}", LLAMA_CPP_LIB_PATH=str(copy))
    assert_refused(process, "llama_cpp was imported before", str(copy))


def test_folder_without_a_version_to_be_read(tmp_path: Path) -> None:
    process = python(LOAD, LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert_refused(process, "no version to be read", str(tmp_path))


@pytest.mark.parametrize("variable", ["LLAMA_CPP_LIB_PATH", "LD_LIBRARY_PATH"])
def test_variable_may_name_our_folder(variable: str) -> None:
    process = python(
        f"import os; {LOAD}; assert os.environ['{variable}'] == '{LIBRARY_FOLDER}'",
        **{variable: str(LIBRARY_FOLDER)},
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_llama_cpp_imported_already_from_our_folder() -> None:
    process = python(f"import llama_cpp; {LOAD}", LLAMA_CPP_LIB_PATH=str(LIBRARY_FOLDER))
    assert (process.returncode, process.stderr) == (0, "")


def test_child_processes_are_left_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_LIB_PATH"}
    code = f"import os; {LOAD}; assert 'LLAMA_CPP_LIB_PATH' not in os.environ"
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_import_loads_nothing() -> None:
    process = python(
        "import louver_llama, sys; print(sorted({'llama_cpp', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert process.stdout == "[]\n"


@pytest.mark.parametrize("isa", ["no-such-isa", ""])
def test_unknown_isa(isa: str) -> None:
    process = python(LOAD, LOUVER_ISA=isa)
    if not isa:  # as good as unset
        assert (process.returncode, process.stderr) == (0, "")
        return
    last_line = process.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ValueError") and isa in last_line
    assert all(available in last_line for available in core.available_isas())
