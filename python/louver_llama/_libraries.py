"""Puts llama_cpp and our extension on one set of libraries: those in this package's ``lib`` folder.

Importing this module loads them, or raises LibraryMismatchError where another llama.cpp is in the way. The
rest of the package takes ``llama_cpp`` and ``core`` from here, so that neither is loaded before the check.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from .errors import LibraryMismatchError

__all__ = ["LIBRARY_FOLDER", "core", "llama_cpp"]

_PATH_VARIABLE = "LLAMA_CPP_LIB_PATH"
_NAMES = ("libggml-base.so", "libggml-cpu.so", "libggml-cuda.so", "libggml.so", "libllama.so")


def _library_folder() -> Path:
    # Beside the extension, not beside this file: an editable install keeps the two apart.
    spec = find_spec("louver_llama._core")
    if spec is None or spec.origin is None:
        raise ImportError("louver_llama is not installed: its compiled extension _core is missing")
    return Path(spec.origin).resolve().parent / "lib"


def _other_folders() -> Iterator[tuple[str, Path]]:
    """Where another llama.cpp could come from or has come from, and how."""
    if imported := sys.modules.get("llama_cpp.llama_cpp"):
        yield "llama_cpp was imported before louver_llama", Path(imported._lib._name).parent
    if (named := os.environ.get(_PATH_VARIABLE)) is not None:
        yield f"{_PATH_VARIABLE} is set", Path(named)
    # The loader prefers this variable's folders to the one that our libraries name themselves.
    for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if entry and any((Path(entry) / name).exists() for name in _NAMES):
            yield "LD_LIBRARY_PATH is set", Path(entry)
    # A library that is loaded already would be taken for ours, because it has the same name.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = Path(line.partition("/")[2])
            if path.name in _NAMES:
                yield "it is loaded already", Path("/") / path.parent


def _version(folder: Path) -> str:
    """What the ggml in ``folder`` says of itself."""
    try:
        library = ctypes.CDLL(str(folder / "libggml-base.so"))
        library.ggml_version.restype = library.ggml_commit.restype = ctypes.c_char_p
        return f"ggml {library.ggml_version().decode()}, commit {library.ggml_commit().decode()}"
    except (OSError, AttributeError):
        return "no version to be read"


def _refuse_others(ours: Path) -> None:
    for how, folder in _other_folders():
        if folder.resolve() != ours:
            raise LibraryMismatchError(
                f"louver_llama needs its own llama.cpp ({_version(ours)}, in {ours}), "
                f"but would get another one ({_version(folder)}, in {folder.resolve()}): {how}"
            )


@contextlib.contextmanager
def _named_to_llama_cpp(folder: Path) -> Iterator[None]:
    # Only while llama_cpp is imported: a child process may want a llama_cpp of its own.
    before = os.environ.get(_PATH_VARIABLE)
    os.environ[_PATH_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PATH_VARIABLE]
        else:
            os.environ[_PATH_VARIABLE] = before


LIBRARY_FOLDER = _library_folder()
_refuse_others(LIBRARY_FOLDER)
with _named_to_llama_cpp(LIBRARY_FOLDER):
    import llama_cpp

import louver_llama._core as core  # noqa: E402  the libraries have to be settled first

try:
    core.attach()
except core.LibraryMismatch as mismatch:
    raise LibraryMismatchError(str(mismatch)) from None
