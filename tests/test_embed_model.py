"""tools/embed_model.py: the larger model says what the small one says."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from engine import Engine, Model

ROOT = Path(__file__).parent.parent
LARGER = {
    "n_layer": 30,
    "n_embd": 1152,
    "n_head": 18,
    "n_head_kv": 6,
    "head_dim": 128,
    "n_ff": 2048,
    "n_vocab": 49408,
}
TEXT = "The library of Alexandria was one of the largest libraries of the ancient world. It was founded by"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    name = "embed_model"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools/embed_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def logits_of(path: Path | str, n_vocab: int) -> np.ndarray:
    with Model(path) as model, Engine(model, runtime=False) as engine:
        tokens = model.tokenize(TEXT)
        return np.array([engine.extend([token])[:n_vocab] for token in tokens])


@pytest.fixture(scope="module")
def small(
    tool: ModuleType, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray]:
    """SmolLM2 in its own shape with float16 weights, as the larger models have them, and what it says."""
    path = tmp_path_factory.mktemp("embed") / "small.gguf"
    shape = tool.Source(Path(model_path)).shape
    tool.embed(Path(model_path), path, shape, "f16", 1024)
    return path, logits_of(path, shape.n_vocab)


def test_says_the_same(
    tool: ModuleType, model_path: str, small: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    _, wanted = small
    tool.embed(Path(model_path), tmp_path / "larger.gguf", tool.Shape(**LARGER), "f16", 1024)
    found = logits_of(tmp_path / "larger.gguf", wanted.shape[1])
    assert np.abs(found - wanted).max() < 0.05 * wanted.std()
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).all()
    assert wanted.max(axis=1).min() > 5  # the unused tokens' logits are 0


def test_the_comparison_can_fail(
    tool: ModuleType,
    model_path: str,
    small: tuple[Path, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, wanted = small
    monkeypatch.setattr(tool.Embedding, "norm_factor", 1.0)
    tool.embed(Path(model_path), tmp_path / "larger.gguf", tool.Shape(**LARGER), "f16", 1024)
    found = logits_of(tmp_path / "larger.gguf", wanted.shape[1])
    assert np.abs(found - wanted).max() > wanted.std()


def test_layers_left_out(tool: ModuleType, model_path: str, tmp_path: Path, capsys: Any) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (LARGER | {"n_layer": 28}).items()]
    tool.main([model_path, str(tmp_path / "out.gguf"), "--type", "q8_0", *options])
    assert "layers left out: 11, 18" in capsys.readouterr().out
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["llama.block_count"].contents() == 28
    assert "left out: 11, 18" in reader.fields["general.description"].contents()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_embd": 64}, "n_embd is 64, accepted is 576 and more"),
        ({"n_head": 12}, "12 query heads to 6 KV heads"),
        ({"head_dim": 96}, "head_dim is 96, accepted is 64 or twice that"),
        ({"n_layer": 31}, "n_layer is 31, accepted is 9 to 30"),
        ({"n_layer": 8}, "n_layer is 8"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(
    tool: ModuleType, model_path: str, tmp_path: Path, changed: dict[str, int], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        tool.embed(Path(model_path), tmp_path / "out.gguf", tool.Shape(**LARGER | changed), "f16", 1024)
    assert not list(tmp_path.iterdir())


def test_files_that_are_none(tool: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no model")
    with pytest.raises(SystemExit):
        tool.embed(text, tmp_path / "out.gguf", tool.Shape(), "f16", 1024)
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "missing"), str(tmp_path / "out.gguf")])
    assert sorted(tmp_path.iterdir()) == [text]
