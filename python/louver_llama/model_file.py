"""Says what is wrong with a model file that cannot be loaded."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

from ._libraries import llama_cpp
from .errors import ModelFileError, ModelNotFoundError

_GGML_LOG_LEVEL_ERROR = 4  # of ggml.h; llama_cpp takes 3 for it, which is a warning


def check_model_file(path: str) -> None:
    """Raise ModelFileError where ``path`` is not a GGUF file, before llama.cpp has to find out."""
    file = Path(path)
    if not file.exists():
        raise ModelNotFoundError(f"{path}: no such model file")
    if not file.is_file():
        raise ModelFileError(f"{path}: not a file, but a folder or a device; a GGUF file is needed")
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelFileError(f"{path}: not a GGUF file (it begins with {magic!r}, not with b'GGUF')")


@contextlib.contextmanager
def explained_load(path: str) -> Iterator[None]:
    """Add llama.cpp's own reason to the exception when it cannot load the model or make a context for it."""
    with _logged_errors() as errors:
        try:
            yield
        except ValueError as error:
            reason = re.sub(r"^\w+: (error loading model: )?", "", errors[0]) if errors else str(error)
            if str(error).startswith("Failed to load model"):
                raise ModelFileError(f"{path}: cannot be loaded: {reason}") from None
            if str(error).startswith("Failed to create llama_context"):
                raise ValueError(f"{path}: llama.cpp cannot make this context: {reason}") from None
            raise


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collects what llama.cpp logs as errors; all else goes where it went before."""
    callback = llama_cpp.llama_log_callback()
    data = ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    errors: list[str] = []

    def log(level: int, text: bytes, _: object) -> None:
        if level == _GGML_LOG_LEVEL_ERROR:
            errors.append(text.decode(errors="replace").strip())
        else:
            callback(level, text, data)

    replacement = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(replacement, None)
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(callback, data)
