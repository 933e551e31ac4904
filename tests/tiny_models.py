"""Tiny GGUF models with random weights: real llama.cpp graphs at a thousandth of a real model's cost.

Without ``tokenizer`` they have none, and only the low-level API can use them. Weights are scaled so that
attention is concentrated on few cells, as in a real model, and so that logits are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 100
N_LAYER = 2
N_EMBD = 64
N_FF = 64
# One token for each printable ASCII character, the line break and the space, as sentencepiece spells that.
CHARACTERS = [*map(chr, range(ord("!"), ord("~") + 1)), "\n", "\u2581"]
SHARPNESS = 8.0  # the standard deviation of scores q.k / sqrt(head_dim)


@dataclass(frozen=True)
class Heads:
    """The shape of attention."""

    head_dim: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    value_dim: int | None = None  # None: head_dim

    @property
    def n_rows_q(self) -> int:
        return self.head_dim * self.n_head

    @property
    def n_rows_kv(self) -> int:
        return self.head_dim * self.n_head_kv


class _Weights:
    """Collects tensors for one file. Shapes are given as numpy sees them: rows first."""

    def __init__(
        self,
        path: Path,
        arch: str,
        heads: Heads,
        dtype: type = np.float16,
        seed: int = 0,
        tokenizer: bool = False,
    ) -> None:
        self.path = path
        self.writer = gguf.GGUFWriter(path, arch)
        self.dtype = dtype
        self.random = np.random.default_rng(seed)
        self.edit: dict[str, Callable[[np.ndarray], None]] = {}
        writer = self.writer
        writer.add_context_length(65536)
        writer.add_embedding_length(N_EMBD)
        writer.add_block_count(N_LAYER)
        writer.add_feed_forward_length(N_FF)
        writer.add_head_count(heads.n_head)
        writer.add_head_count_kv(heads.n_head_kv)
        writer.add_key_length(heads.head_dim)
        writer.add_value_length(heads.value_dim or heads.head_dim)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_layer_norm_eps(1e-5)
        writer.add_vocab_size(N_VOCAB)
        if tokenizer:
            self.tokenizer()
        else:
            writer.add_tokenizer_model("no_vocab")

    def tokenizer(self) -> None:
        special = ["<unk>", "<s>", "</s>"]
        tokens = [*special, *CHARACTERS]
        tokens += [f"<unused{i}>" for i in range(N_VOCAB - len(tokens))]
        self.writer.add_tokenizer_model("llama")
        self.writer.add_token_list(tokens)
        self.writer.add_token_scores([0.0] * N_VOCAB)
        types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2]
        self.writer.add_token_types(types + [gguf.TokenType.NORMAL] * (N_VOCAB - len(types)))

    def draw(self, *shape: int, scale: float) -> np.ndarray:
        return self.random.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def matrix(self, name: str, rows: int, columns: int, *, gain: float = 1.0, experts: int = 0) -> None:
        """Maps a vector of elements near 1 to one of elements near ``gain``."""
        shape = (experts, rows, columns) if experts else (rows, columns)
        self.put(f"{name}.weight", self.draw(*shape, scale=gain / np.sqrt(columns)).astype(self.dtype))

    def put(self, name: str, data: np.ndarray) -> None:
        if name in self.edit:
            self.edit[name](data)
        self.writer.add_tensor(name, data)

    def ones(self, name: str, size: int) -> None:
        self.put(f"{name}.weight", np.ones(size, dtype=np.float32))

    def zeros(self, name: str, size: int) -> None:
        self.put(f"{name}.bias", np.zeros(size, dtype=np.float32))

    def embeddings(self) -> None:
        self.put("token_embd.weight", self.draw(N_VOCAB, N_EMBD, scale=1.0).astype(self.dtype))

    def output(self) -> None:
        self.ones("output_norm", N_EMBD)
        self.matrix("output", N_VOCAB, N_EMBD)

    def attention(self, block: str, heads: Heads, gain: float) -> None:
        self.matrix(f"{block}.attn_q", heads.n_rows_q, N_EMBD, gain=gain)
        self.matrix(f"{block}.attn_k", heads.n_rows_kv, N_EMBD, gain=gain)
        self.matrix(f"{block}.attn_v", heads.n_rows_kv, N_EMBD)
        self.matrix(f"{block}.attn_output", N_EMBD, heads.n_rows_q)

    def feed_forward(self, block: str) -> None:
        self.matrix(f"{block}.ffn_gate", N_FF, N_EMBD)
        self.matrix(f"{block}.ffn_up", N_FF, N_EMBD)
        self.matrix(f"{block}.ffn_down", N_EMBD, N_FF)

    def experts(self, block: str, n: int) -> None:
        self.matrix(f"{block}.ffn_gate_inp", n, N_EMBD)
        self.matrix(f"{block}.ffn_gate_exps", N_FF, N_EMBD, experts=n)
        self.matrix(f"{block}.ffn_up_exps", N_FF, N_EMBD, experts=n)
        self.matrix(f"{block}.ffn_down_exps", N_EMBD, N_FF, experts=n)

    def write(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


def llama(
    path: Path,
    heads: Heads = Heads(),
    *,
    sharpness: float = SHARPNESS,
    dtype: type = np.float16,
    seed: int = 0,
    edit: dict[str, Callable[[np.ndarray], None]] | None = None,
    tokenizer: bool = False,
) -> Path:
    """Write a model of the llama family, which Louver serves; ``edit`` changes tensors by name, in place."""
    weights = _Weights(path, "llama", heads, dtype, seed, tokenizer)
    weights.edit = edit or {}
    weights.writer.add_rope_dimension_count(heads.head_dim)
    weights.embeddings()
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        weights.ones(f"{block}.attn_norm", N_EMBD)
        weights.attention(block, heads, np.sqrt(sharpness))
        weights.ones(f"{block}.ffn_norm", N_EMBD)
        weights.feed_forward(block)
    weights.output()
    return weights.write()


def gemma(path: Path, *, soft_cap: bool, window: int, tokenizer: bool = False) -> Path:
    """Write a gemma2 (with soft-capping) or a gemma3 (without): first layer a sliding window, second full."""
    heads = Heads()
    weights = _Weights(path, "gemma2" if soft_cap else "gemma3", heads, tokenizer=tokenizer)
    weights.writer.add_rope_dimension_count(heads.head_dim)
    weights.writer.add_sliding_window(window)
    if soft_cap:
        weights.writer.add_attn_logit_softcapping(50.0)
    else:
        weights.writer.add_sliding_window_pattern(2)
    weights.embeddings()
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            weights.ones(f"{block}.{norm}", N_EMBD)
        if not soft_cap:
            weights.ones(f"{block}.attn_q_norm", heads.head_dim)
            weights.ones(f"{block}.attn_k_norm", heads.head_dim)
        weights.attention(block, heads, 2.0)
        weights.feed_forward(block)
    weights.ones("output_norm", N_EMBD)
    return weights.write()


def bloom(path: Path) -> Path:
    """Write a model with ALiBi."""
    heads = Heads(head_dim=32, n_head=2, n_head_kv=2)
    weights = _Weights(path, "bloom", heads)

    def norm(name: str) -> None:
        weights.ones(name, N_EMBD)
        weights.zeros(name, N_EMBD)

    def linear(name: str, rows: int, columns: int) -> None:
        weights.matrix(name, rows, columns)
        weights.zeros(name, rows)

    weights.embeddings()
    norm("token_embd_norm")
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        linear(f"{block}.attn_qkv", 3 * N_EMBD, N_EMBD)
        linear(f"{block}.attn_output", N_EMBD, N_EMBD)
        norm(f"{block}.ffn_norm")
        linear(f"{block}.ffn_up", N_FF, N_EMBD)
        linear(f"{block}.ffn_down", N_EMBD, N_FF)
    norm("output_norm")
    return weights.write()


def gpt_oss(path: Path) -> Path:
    """Write a mixture of experts with attention sinks; its first layer is a sliding window as well."""
    heads = Heads()
    n_expert = 2
    weights = _Weights(path, "gpt-oss", heads)
    weights.writer.add_rope_dimension_count(heads.head_dim)
    weights.writer.add_sliding_window(128)
    weights.writer.add_expert_count(n_expert)
    weights.writer.add_expert_used_count(1)
    weights.writer.add_expert_feed_forward_length(N_FF)
    weights.embeddings()
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        weights.ones(f"{block}.attn_norm", N_EMBD)
        weights.ones(f"{block}.post_attention_norm", N_EMBD)
        weights.attention(block, heads, 2.0)
        weights.zeros(f"{block}.attn_output", N_EMBD)
        weights.put(f"{block}.attn_sinks.weight", weights.draw(heads.n_head, scale=1.0))
        weights.experts(block, n_expert)
        weights.put(f"{block}.ffn_gate_inp.bias", np.zeros(n_expert, dtype=np.float32))
        for name, size in (("ffn_gate_exps", N_FF), ("ffn_up_exps", N_FF), ("ffn_down_exps", N_EMBD)):
            weights.put(f"{block}.{name}.bias", np.zeros((n_expert, size), dtype=np.float32))
    weights.output()
    return weights.write()


def deepseek2(path: Path, *, latent: bool = True) -> Path:
    """Write a model with multi-head latent attention, where V is a view of K.

    Or the older form that unpacks the latents: K and V of different sizes, 48 and 32.
    """
    rank, rope, nope, value, n_head = 64, 16, 32, 32, 4
    heads = Heads(rank + rope, n_head, 1, rank) if latent else Heads(rope + nope, n_head, n_head, value)
    weights = _Weights(path, "deepseek2", heads)
    writer = weights.writer
    if latent:
        writer.add_key_length_mla(rope + nope)
        writer.add_value_length_mla(value)
    writer.add_rope_dimension_count(rope)
    writer.add_q_lora_rank(rank)
    writer.add_kv_lora_rank(rank)
    writer.add_leading_dense_block_count(N_LAYER)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_expert_shared_count(1)
    weights.embeddings()
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        weights.ones(f"{block}.attn_norm", N_EMBD)
        weights.ones(f"{block}.attn_q_a_norm", rank)
        weights.ones(f"{block}.attn_kv_a_norm", rank)
        weights.matrix(f"{block}.attn_q_a", rank, N_EMBD)
        weights.matrix(f"{block}.attn_q_b", n_head * (rope + nope), rank, gain=2.0)
        weights.matrix(f"{block}.attn_kv_a_mqa", rank + rope, N_EMBD, gain=2.0)
        if latent:
            weights.matrix(f"{block}.attn_k_b", rank, nope, experts=n_head)
            weights.matrix(f"{block}.attn_v_b", value, rank, experts=n_head)
        else:
            weights.matrix(f"{block}.attn_kv_b", n_head * (nope + value), rank, gain=2.0)
        weights.matrix(f"{block}.attn_output", N_EMBD, n_head * value)
        weights.ones(f"{block}.ffn_norm", N_EMBD)
        weights.feed_forward(block)
    weights.output()
    return weights.write()
