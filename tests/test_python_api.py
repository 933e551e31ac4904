"""Llama is a llama_cpp.Llama in all else, and tells clearly what it cannot do."""

from __future__ import annotations

import ctypes
import gc
import pickle
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from louver_llama import Llama, LouverConfig, ModelFileError, ModelNotFoundError, PromptTooLongError
from louver_llama._libraries import core, llama_cpp

CONFIG = LouverConfig(min_context=32, sinks=2, recent=8, check=True)
# Longer than a block of 64 cells, so that there is an index.
PROMPT = "The history of the lighthouse begins long before the first tower of stone was built. " * 12
GREEDY = {"max_tokens": 24, "temperature": 0.0}


@pytest.fixture(scope="module")
def shared(model_path: str) -> Iterator[Llama]:
    llm = Llama(model_path, n_ctx=1024, louver=CONFIG, verbose=False)
    yield llm
    llm.close()


@pytest.fixture
def llm(shared: Llama) -> Llama:
    shared.louver = CONFIG
    shared.reset()
    shared.reset_louver_stats()
    return shared


def text(completion: object) -> str:
    return completion["choices"][0]["text"]  # type: ignore[index, no-any-return]


def assert_louver_ran_and_missed_nothing(llm: Llama) -> None:
    stats = llm.louver_stats()
    assert stats["attention"]["louver"] > 0
    assert stats["check"]["pairs"] > 0
    assert [stats["check"][name] for name in ("misses", "bound_violations", "mass_violations")] == [0, 0, 0]


def test_is_a_llama_cpp_llama(llm: Llama) -> None:
    assert isinstance(llm, llama_cpp.Llama)


def test_stream_is_the_completion(llm: Llama) -> None:
    whole = text(llm(PROMPT, **GREEDY))
    llm.reset()
    pieces = [text(piece) for piece in llm(PROMPT, stream=True, **GREEDY)]
    assert len(pieces) > 5
    assert "".join(pieces) == whole
    assert_louver_ran_and_missed_nothing(llm)


def test_stats_count_every_layer_and_token(llm: Llama) -> None:
    n_prompt = len(llm.tokenize(PROMPT.encode()))
    completion = llm(PROMPT, **GREEDY)
    n_layer = llama_cpp.llama_model_n_layer(llm.model)
    # The first token comes from the prefill's logits, the last is not decoded.
    n_decoded = completion["usage"]["completion_tokens"] - 1
    stats = llm.louver_stats()
    assert stats["attention"] == {"louver": n_decoded * n_layer, "dense": 0, "stock": n_prompt * n_layer}
    assert stats["reasons"]["stock"] == {"prefill": n_prompt * n_layer}
    assert {certificates["layer"] for certificates in stats["last_step"]} == set(range(n_layer))
    deltas = [head["delta"] for layer in stats["last_step"] for head in layer["heads"]]
    assert 0 < max(deltas) <= stats["delta_max"] <= CONFIG.epsilon
    assert stats["keys_attended"] < stats["keys_visible"]
    llm.reset_louver_stats()
    assert llm.louver_stats()["n_queries"] == 0


def test_chat(llm: Llama) -> None:
    messages = [{"role": "user", "content": PROMPT + "What is this text about?"}]
    whole = llm.create_chat_completion(messages, max_tokens=24, temperature=0.0)
    llm.reset()
    stream = llm.create_chat_completion(messages, max_tokens=24, temperature=0.0, stream=True)
    pieces = [piece["choices"][0]["delta"].get("content", "") for piece in stream]
    assert whole["choices"][0]["message"]["content"] == "".join(pieces) != ""
    assert_louver_ran_and_missed_nothing(llm)


def test_grammar(llm: Llama) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "maybe, " ("yes" | "no")')
    assert text(llm(PROMPT, grammar=grammar, **GREEDY)) in ("maybe, yes", "maybe, no")


def test_grammar_that_cannot_be_parsed(llm: Llama) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "a" | undefined')
    with pytest.raises(ValueError, match="grammar"):
        llm(PROMPT, grammar=grammar, **GREEDY)


@pytest.mark.parametrize("pooling", ["MEAN", "NONE"])
def test_embedding(model_path: str, pooling: str) -> None:
    found = []
    for config in (CONFIG, LouverConfig(enabled=False)):
        llm = Llama(
            model_path,
            n_ctx=512,
            embedding=True,
            pooling_type=getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{pooling}"),
            louver=config,
            verbose=False,
        )
        found.append(np.array(llm.embed(["A lighthouse.", PROMPT])[0]))
        assert found[-1].shape[-1] == llm.n_embd()
        llm.close()
    assert np.abs(found[0] - found[1]).max() < 0.02 * np.abs(found[1]).max()


def test_save_and_load_state(llm: Llama) -> None:
    llm.eval(llm.tokenize(PROMPT.encode()))
    state = llm.save_state()
    tokens = llm.input_ids[: llm.n_tokens].tolist()
    first = text(llm(tokens, **GREEDY))
    llm("Something else, long enough to overwrite cells that the index knows. " * 15, **GREEDY)
    llm.load_state(state)
    assert text(llm(tokens, **GREEDY)) == first
    assert_louver_ran_and_missed_nothing(llm)


def test_settings_change_between_calls(llm: Llama) -> None:
    def paths(config: LouverConfig) -> set[str]:
        llm.louver = config
        llm.reset_louver_stats()
        llm(PROMPT, **GREEDY)
        assert llm.louver == config
        stats = llm.louver_stats()
        reasons = [reason for counts in stats["reasons"].values() for reason in counts]
        return {path for path, n in stats["attention"].items() if n}.union(reasons)

    llm.eval(llm.tokenize(PROMPT.encode()))
    assert paths(CONFIG) == {"louver"}
    # From the second call on the prompt is there already; its last token alone is decoded anew.
    assert paths(replace(CONFIG, enabled=False)) == {"stock", "disabled"}
    assert paths(replace(CONFIG, epsilon=0.0)) == {"dense", "epsilon_zero"}
    assert paths(replace(CONFIG, min_context=2000)) == {"dense", "below_min_context"}
    assert paths(replace(CONFIG, guarantee="estimated")) == {"louver"}
    assert paths(CONFIG) == {"louver"}


def test_settings_change_within_a_stream(llm: Llama) -> None:
    for n, _ in enumerate(llm(PROMPT, stream=True, **GREEDY)):
        if n == 8:
            llm.reset_louver_stats()
            llm.louver = replace(CONFIG, enabled=False)
    assert llm.louver_stats()["attention"]["louver"] == 0
    assert llm.louver_stats()["reasons"]["stock"].keys() == {"disabled"}


def test_refused_settings_leave_the_old_ones(llm: Llama) -> None:
    with pytest.raises(TypeError, match="LouverConfig"):
        llm.louver = {"epsilon": 0.1}  # type: ignore[assignment]
    assert llm.louver == CONFIG


def test_flash_attention_off(model_path: str) -> None:
    with pytest.raises(ValueError, match="flash_attn"):
        Llama(model_path, flash_attn=False, verbose=False)
    llm = Llama(model_path, flash_attn=False, louver=LouverConfig(enabled=False), verbose=False)
    assert text(llm("Once upon a time", **GREEDY))
    with pytest.raises(ValueError, match="flash_attn"):
        llm.louver = CONFIG
    assert not llm.louver.enabled
    llm.close()


@pytest.mark.parametrize("kind", ["text", "tokens", "stream", "chat", "eval"])
def test_prompt_too_long(llm: Llama, kind: str) -> None:
    tokens = llm.tokenize(PROMPT.encode()) * 8
    calls = {
        "text": lambda: llm(PROMPT * 8, **GREEDY),
        "tokens": lambda: llm(tokens, **GREEDY),
        "stream": lambda: next(llm(tokens, stream=True, **GREEDY)),
        "chat": lambda: llm.create_chat_completion([{"role": "user", "content": PROMPT * 8}]),
        "eval": lambda: llm.eval(tokens),
    }
    with pytest.raises(PromptTooLongError) as caught:
        calls[kind]()
    error = caught.value
    assert error.n_tokens > 1500 and error.n_ctx == 1024
    assert f"{error.n_tokens}" in str(error) and "1024" in str(error)
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_context_can_be_filled_to_its_end(model_path: str) -> None:
    # llama.cpp makes 512 cells of these 300; llama_cpp alone has arrays for 300 and fails behind them.
    llm = Llama(model_path, n_ctx=300, verbose=False)
    assert llm.n_ctx() == 512
    llm.eval([llm.token_bos()] * 512)
    with pytest.raises(PromptTooLongError, match="513 tokens.* 512"):
        llm.eval([llm.token_bos()])
    llm.close()


def damaged(model_path: str, folder: Path, kind: str) -> Path:
    if kind == "missing":
        return folder / "missing.gguf"
    if kind == "folder":
        return folder
    content = Path(model_path).read_bytes()
    damage = {
        "empty": b"",
        "text": b"This is not a model.\n",
        "magic only": content[:4],
        "header cut": content[:20000],
        "tensors cut": content[: len(content) // 2],
        "last byte cut": content[:-1],
        "absurd counts": content[:8] + b"\xff" * 16 + content[24:100_000],
    }
    path = folder / "damaged.gguf"
    path.write_bytes(damage[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such model file"),
        ("folder", "not a file"),
        ("empty", "not a GGUF file"),
        ("text", "not a GGUF file"),
        ("magic only", "failed to read header"),
        ("header cut", "failed to read"),
        ("tensors cut", "incomplete"),
        ("last byte cut", "incomplete"),
        ("absurd counts", "number of tensors"),
    ],
)
def test_model_file(
    model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    reason: str,
) -> None:
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    path = damaged(model_path, tmp_path, kind)
    with pytest.raises(ModelFileError) as caught:
        Llama(path, verbose=False)
    assert str(path) in str(caught.value) and reason in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError) == (kind == "missing")
    assert isinstance(caught.value, ModelNotFoundError) == (kind == "missing")
    del caught
    gc.collect()
    assert not ignored, "a half-made Llama must go quietly"
    assert capfd.readouterr() == ("", "")


def test_context_that_cannot_be_made(model_path: str) -> None:
    with pytest.raises(ValueError, match="quantized V cache requires"):
        Llama(model_path, type_v=8, flash_attn=False, louver=LouverConfig(enabled=False), verbose=False)


def test_other_arguments_are_llama_cpps(model_path: str) -> None:
    with pytest.raises(ValueError, match="is too long"):
        Llama(model_path, kv_overrides={"general.name": "x" * 200}, verbose=False)


def test_log_goes_where_it_went(model_path: str) -> None:
    lines: list[bytes] = []
    callback = llama_cpp.llama_log_callback(lambda level, line, _: lines.append(line))
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, None)
    try:
        Llama(model_path, verbose=False).close()
        n_lines = len(lines)
        Llama(model_path, verbose=False).close()
    finally:
        llama_cpp.llama_log_set(before, data)
    assert len(lines) > n_lines > 0


def test_failed_decode_leaves_no_trace(llm: Llama, model_path: str) -> None:
    expected = text(llm(PROMPT, **GREEDY))
    llm.reset()
    with pytest.raises(RuntimeError, match="llama_decode returned"):
        llm.eval([llm.n_vocab() + 1])
    # Were the runtime still in force on this thread, it would take this context's cache for its own.
    before = llm.louver_stats()["attention"]
    stock = llama_cpp.Llama(model_path, n_ctx=1024, flash_attn=True, verbose=False)
    stock(PROMPT, **GREEDY)
    stock.close()
    assert llm.louver_stats()["attention"] == before
    assert text(llm(PROMPT, **GREEDY)) == expected


def test_decode_through_the_c_api(llm: Llama) -> None:
    llm.eval(llm.tokenize(PROMPT.encode()))
    before = llm.louver_stats()["attention"]["louver"]
    batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(llm.token_bos()), 1)
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    assert llm.louver_stats()["attention"]["louver"] == before + llama_cpp.llama_model_n_layer(llm.model)
    assert_louver_ran_and_missed_nothing(llm)


def test_two_contexts_keep_their_own_counts(llm: Llama, model_path: str) -> None:
    other = Llama(model_path, n_ctx=1024, louver=replace(CONFIG, enabled=False), verbose=False)
    streams = [each(PROMPT, stream=True, **GREEDY) for each in (llm, other)]
    for _ in zip(*streams, strict=False):
        pass
    assert other.louver_stats()["attention"]["louver"] == 0
    other.close()
    assert_louver_ran_and_missed_nothing(llm)


def test_layers_for_a_gpu_that_is_not_there(
    model_path: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(core, "has_cuda", lambda: False)
    with pytest.warns(RuntimeWarning, match="n_gpu_layers=-1: this build has no CUDA.* on the CPU") as caught:
        Llama(model_path, n_gpu_layers=-1, vocab_only=True, verbose=False).close()
    assert caught[0].filename == __file__
    monkeypatch.setattr(core, "has_cuda", lambda: True)
    monkeypatch.setattr(core, "devices", list)
    with pytest.warns(RuntimeWarning, match="n_gpu_layers=7: there is no CUDA device"):
        Llama(model_path, n_gpu_layers=7, vocab_only=True, verbose=False).close()
    recwarn.clear()
    Llama(model_path, n_gpu_layers=0, vocab_only=True, verbose=False).close()
    assert not recwarn.list


def test_how_gpus_share_the_model_is_llama_cpps(model_path: str) -> None:
    split = {"split_mode": llama_cpp.LLAMA_SPLIT_MODE_ROW, "main_gpu": 0, "tensor_split": [3.0, 1.0]}
    llm = Llama(model_path, **split, louver=CONFIG, vocab_only=True, verbose=False)
    params = llm.model_params
    assert (params.n_gpu_layers, params.split_mode) == (0, llama_cpp.LLAMA_SPLIT_MODE_ROW)
    assert llm.tensor_split == [3.0, 1.0] and params.tensor_split[:2] == [3.0, 1.0]
    llm.close()


def test_close_twice(model_path: str) -> None:
    llm = Llama(model_path, louver=CONFIG, verbose=False)
    llm(PROMPT, **GREEDY)
    llm.close()
    llm.close()
    assert llm.louver_stats()["attention"]["louver"] > 0


def test_pickle(model_path: str) -> None:
    llm = Llama(Path(model_path), n_ctx=1024, louver=CONFIG, verbose=False)
    expected = text(llm(PROMPT, **GREEDY))
    copy = pickle.loads(pickle.dumps(llm))
    llm.close()
    assert type(copy) is Llama and copy.louver == CONFIG and copy.n_ctx() == 1024
    assert text(copy(PROMPT, **GREEDY)) == expected
    assert_louver_ran_and_missed_nothing(copy)
    copy.close()


def test_from_pretrained(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class FileSystem:
        def ls(self, repo_id: str, recursive: bool) -> list[str]:
            return [f"{repo_id}/model.gguf"]

    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = lambda **_: model_path  # type: ignore[attr-defined]
    hub.HfFileSystem = FileSystem  # type: ignore[attr-defined]
    utils = types.ModuleType("huggingface_hub.utils")
    utils.validate_repo_id = lambda repo_id: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    llm = Llama.from_pretrained("someone/something", "*.gguf", louver=CONFIG, verbose=False)
    assert type(llm) is Llama and llm.louver == CONFIG
    llm.close()
