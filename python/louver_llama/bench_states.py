"""Filled caches in files, kept from one benchmark to the next."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._libraries import core, llama_cpp
from .llama import Llama

_SEQUENCE = 0


class StateFolder:
    """llama.cpp's session files in ``folder``; each has a digest of what it depends on behind its end.

    settings: what of the context's settings that is.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        self._settings = settings

    def load(self, llm: Llama, tokens: Sequence[int]) -> bool:
        """Whether ``llm`` now holds ``tokens``; if not, a file that was damaged may have left it empty."""
        identity = self._identity(llm, tokens)
        file = self._file(llm, tokens, identity)
        # llama.cpp ends the process over a file that is incomplete. One with the digest at its end is not.
        if not file.exists() or _end_of(file, len(identity)) != identity:
            return False
        n_tokens = len(tokens)
        found = (llama_cpp.llama_token * n_tokens)()
        n_found = ctypes.c_size_t()
        n_bytes = llama_cpp.llama_state_seq_load_file(
            llm.ctx, os.fsencode(file), _SEQUENCE, found, n_tokens, ctypes.byref(n_found)
        )
        if n_bytes == 0 or found[: n_found.value] != list(tokens):
            llm.reset()  # type: ignore[no-untyped-call]
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), False)
            return False
        llm.input_ids[:n_tokens] = np.array(tokens)
        llm.n_tokens = n_tokens
        return True

    def save(self, llm: Llama, tokens: Sequence[int]) -> None:
        """Keep what ``llm`` holds, which is ``tokens``."""
        identity = self._identity(llm, tokens)
        file = self._file(llm, tokens, identity)
        # Under another name first, so that a run that is cut short leaves no half of a file.
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        try:
            if not llama_cpp.llama_state_seq_save_file(
                llm.ctx, os.fsencode(unfinished), _SEQUENCE, array, len(tokens)
            ):
                raise OSError(f"{unfinished}: llama.cpp cannot write the cache to this file")
            with unfinished.open("ab") as stream:
                stream.write(identity)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)

    def _file(self, llm: Llama, tokens: Sequence[int], identity: bytes) -> Path:
        return self._folder / f"{Path(llm.model_path).stem}-d{len(tokens)}-{identity.hex()[:16]}.bin"

    def _identity(self, llm: Llama, tokens: Sequence[int]) -> bytes:
        model = Path(llm.model_path)
        status = model.stat()
        file = [model.name, status.st_size, status.st_mtime_ns]
        parts = [core.PIN["commit"], file, self._settings, list(tokens)]
        return hashlib.sha256(json.dumps(parts).encode()).digest()


def _end_of(file: Path, n_bytes: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(-min(n_bytes, stream.tell()), os.SEEK_END)
        return stream.read()
