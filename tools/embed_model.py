"""A small llama model in the shape of a large one: the same function, at the large one's cost.

    python tools/embed_model.py SmolLM2-135M-Instruct.gguf 3b.gguf

A benchmark at the shape of Llama-3.2-3B wants queries, keys and values of a real model, and answers that mean something. Random
weights give neither. Here every layer of the small model is put into one of the large model so that the residual stream's first
channels are the small model's and the rest stay zero:

* The norms' weights and epsilon make up for the mean over more channels.
* Each head is there several times; the output projection takes each copy's share.
* The rotary pair i of a head is pair 2 i of the wider head, which turns at the same speed. The odd pairs hold another head's
  keys, which the queries' zeros leave without effect on the scores: the index has to bound keys that fill all channels.
  The second half of the values is another head's too, and nobody reads it.
* The wider feed-forward has more rows that are computed, and nobody reads them.
* With fewer layers than the small model has, some from its middle are left out. That changes what it says, and how sharply it
  attends: SmolLM2-135M without two of its 30 keeps 19.8 % of 7,000 keys where it keeps 11.2 %, or embedded with all 11.9 %.
  So all of them are the default, although Llama-3.2-3B has 28.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from rich.console import Console
from rich.progress import Progress

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
KEPT_AT_THE_ENDS = 4  # layers that are never left out

Array = Any
Tensor = tuple[str, Array, gguf.GGMLQuantizationType]


@dataclass(frozen=True)
class Shape:
    """Of a llama model. Its defaults are Llama-3.2-3B's, but for the layers: 0 stands for as many as the source has."""

    n_layer: int = 0
    n_embd: int = 3072
    n_head: int = 24
    n_head_kv: int = 8
    head_dim: int = 128
    n_ff: int = 8192
    n_vocab: int = 128256


class Source:
    """The small model's file."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path}: {error}") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise SystemExit(f"{path} is a model of architecture {architecture}, accepted is llama")
        self.tokens: list[str] = self.field("tokenizer.ggml.tokens")
        n_embd, n_head = self.llama("embedding_length"), self.llama("attention.head_count")
        self.shape = Shape(
            n_layer=self.llama("block_count"),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=self.llama("attention.head_count_kv"),
            head_dim=n_embd // n_head,
            n_ff=self.llama("feed_forward_length"),
            n_vocab=len(self.tokens),
        )
        self.norm_epsilon: float = self.llama("attention.layer_norm_rms_epsilon")
        self.rope_base: float = self.llama("rope.freq_base")

    def field(self, name: str, default: Any = None) -> Any:
        """What the file says of ``name``."""
        field = self._reader.fields.get(name)
        return default if field is None else field.contents()

    def llama(self, name: str) -> Any:
        """The same, of what a llama model has to have."""
        value = self.field(f"llama.{name}")
        if value is None:
            raise SystemExit(f"the source has no llama.{name}")
        return value

    def tensor(self, name: str) -> Array:
        """In float32, [rows][columns]."""
        tensor = self._tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])


class Embedding:
    """Puts the tensors of ``source`` into those of ``shape``."""

    def __init__(self, source: Source, shape: Shape, kind: str) -> None:
        small = source.shape
        if shape.n_layer == 0:
            shape = replace(shape, n_layer=small.n_layer)
        self.source, self.shape = source, shape
        self.type, self.file_type = TYPES[kind]
        for name in ("n_embd", "n_head", "n_head_kv", "n_ff", "n_vocab"):
            if getattr(shape, name) < getattr(small, name):
                raise SystemExit(
                    f"{name} is {getattr(shape, name)}, accepted is {getattr(small, name)} and more"
                )
        if shape.n_head * small.n_head_kv != small.n_head * shape.n_head_kv:
            raise SystemExit(
                f"{shape.n_head} query heads to {shape.n_head_kv} KV heads, accepted are as many to one as the source has, "
                f"{small.n_head} to {small.n_head_kv}"
            )
        if shape.head_dim not in (small.head_dim, 2 * small.head_dim):
            raise SystemExit(f"head_dim is {shape.head_dim}, accepted is {small.head_dim} or twice that")
        least = 2 * KEPT_AT_THE_ENDS + 1
        if not least <= shape.n_layer <= small.n_layer:
            raise SystemExit(f"n_layer is {shape.n_layer}, accepted is {least} to {small.n_layer}")
        inner = np.linspace(
            KEPT_AT_THE_ENDS, small.n_layer - KEPT_AT_THE_ENDS, small.n_layer - shape.n_layer + 2
        )
        self.left_out = sorted({int(layer) for layer in inner[1:-1]})
        self.layers = [layer for layer in range(small.n_layer) if layer not in self.left_out]

    @property
    def norm_factor(self) -> float:
        """What a norm's weights are multiplied by, since the mean is over more channels."""
        return float(np.sqrt(self.source.shape.n_embd / self.shape.n_embd))

    def tensors(self) -> Iterator[list[Tensor]]:
        """All of them, a layer at a time."""
        table = self._wide(self.source.tensor("token_embd.weight"))
        table = np.vstack([table, np.zeros((self.shape.n_vocab - len(table), self.shape.n_embd), np.float32)])
        yield [self._stored("token_embd", table), self._norm("output_norm", "output_norm")]
        with ThreadPoolExecutor() as workers:
            yield from workers.map(self._layer, range(self.shape.n_layer), self.layers)

    def _layer(self, to: int, of: int) -> list[Tensor]:
        small, shape = self.source.shape, self.shape
        group = small.n_head // small.n_head_kv
        wider = shape.head_dim // small.head_dim
        half = small.head_dim // 2

        def heads(name: str, n: int) -> Array:
            return self.source.tensor(f"blk.{of}.{name}.weight").reshape(n, small.head_dim, small.n_embd)

        q, k, v = (
            heads("attn_q", small.n_head),
            heads("attn_k", small.n_head_kv),
            heads("attn_v", small.n_head_kv),
        )
        out = self.source.tensor(f"blk.{of}.attn_output.weight").reshape(
            small.n_embd, small.n_head, small.head_dim
        )
        # [head, rotary pair, interleaved with another head's, its two channels, from]
        queries = np.zeros((shape.n_head, half, wider, 2, small.n_embd), np.float32)
        keys = np.zeros((shape.n_head_kv, half, wider, 2, small.n_embd), np.float32)
        values = np.zeros((shape.n_head_kv, wider, small.head_dim, small.n_embd), np.float32)
        outputs = np.zeros((shape.n_embd, shape.n_head, wider, small.head_dim), np.float32)
        origin = [head % small.n_head_kv for head in range(shape.n_head_kv)]
        for head, source in enumerate(origin):
            for part in range(wider):
                other = (source + part) % small.n_head_kv
                keys[head, :, part] = k[other].reshape(half, 2, small.n_embd)
                values[head, part] = v[other]
            for i in range(group):
                asked, asks = source * group + i, head * group + i
                # The scores are divided by the root of head_dim.
                queries[asks, :, 0] = q[asked].reshape(half, 2, small.n_embd) * np.sqrt(wider)
                outputs[: small.n_embd, asks, 0] = out[:, asked] / origin.count(source)
        gate, up, down = (
            self.source.tensor(f"blk.{of}.ffn_{name}.weight") for name in ("gate", "up", "down")
        )
        more = np.arange(shape.n_ff) % small.n_ff
        reduced = np.zeros((shape.n_embd, shape.n_ff), np.float32)
        reduced[: small.n_embd, : small.n_ff] = down
        name = f"blk.{to}"
        return [
            self._norm(f"blk.{of}.attn_norm", f"{name}.attn_norm"),
            self._norm(f"blk.{of}.ffn_norm", f"{name}.ffn_norm"),
            self._stored(f"{name}.attn_q", self._wide(queries.reshape(-1, small.n_embd))),
            self._stored(f"{name}.attn_k", self._wide(keys.reshape(-1, small.n_embd))),
            self._stored(f"{name}.attn_v", self._wide(values.reshape(-1, small.n_embd))),
            self._stored(f"{name}.attn_output", outputs.reshape(shape.n_embd, -1)),
            self._stored(f"{name}.ffn_gate", self._wide(gate[more])),
            self._stored(f"{name}.ffn_up", self._wide(up[more])),
            self._stored(f"{name}.ffn_down", reduced),
        ]

    def _wide(self, matrix: Array) -> Array:
        wide = np.zeros((len(matrix), self.shape.n_embd), np.float32)
        wide[:, : matrix.shape[1]] = matrix
        return wide

    def _norm(self, of: str, to: str) -> Tensor:
        weight = np.ones(self.shape.n_embd, np.float32)
        weight[: self.source.shape.n_embd] = self.source.tensor(f"{of}.weight") * self.norm_factor
        return f"{to}.weight", weight, gguf.GGMLQuantizationType.F32

    def _stored(self, name: str, matrix: Array) -> Tensor:
        return f"{name}.weight", quantize(matrix, self.type), self.type


def describe(writer: gguf.GGUFWriter, embedding: Embedding, n_ctx: int) -> None:
    """Everything in the file but its tensors."""
    source, shape = embedding.source, embedding.shape
    writer.add_name(f"{source.field('general.name', 'a model')}, embedded")
    left_out = ", ".join(map(str, embedding.left_out)) or "none"
    writer.add_description(f"By louver_llama's tools/embed_model.py; layers left out: {left_out}")
    writer.add_file_type(embedding.file_type)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(source.rope_base)
    writer.add_layer_norm_rms_eps(source.norm_epsilon * embedding.norm_factor**2)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model(source.field("tokenizer.ggml.model"))
    writer.add_tokenizer_pre(source.field("tokenizer.ggml.pre"))
    n_more = shape.n_vocab - len(source.tokens)
    writer.add_token_list([*source.tokens, *(f"[PAD{i}]" for i in range(n_more))])
    types = list(source.field("tokenizer.ggml.token_type"))
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * n_more)
    writer.add_token_merges(source.field("tokenizer.ggml.merges"))
    writer.add_add_bos_token(bool(source.field("tokenizer.ggml.add_bos_token", False)))
    for name in ("bos", "eos", "unknown", "padding"):
        if (token := source.field(f"tokenizer.ggml.{name}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if (template := source.field("tokenizer.chat_template")) is not None:
        writer.add_chat_template(template)


def embed(source: Path, out: Path, shape: Shape, kind: str, n_ctx: int) -> Embedding:
    """Write ``out``, or nothing."""
    embedding = Embedding(Source(source), shape, kind)
    shape = embedding.shape
    unfinished = out.with_name(f"{out.name}.part")
    try:
        writer = gguf.GGUFWriter(unfinished, "llama")
        describe(writer, embedding, n_ctx)
        with Progress(
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as progress:
            bar = progress.add_task("embedding", total=shape.n_layer + 1)
            for tensors in embedding.tensors():
                for name, content, stored in tensors:
                    writer.add_tensor(name, content, raw_dtype=stored)
                progress.advance(bar)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return embedding


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="GGUF file of a llama model")
    parser.add_argument("out", type=Path, help="GGUF file to write")
    parser.add_argument("--type", choices=TYPES, default="q8_0", help="of the matrices (q8_0)")
    parser.add_argument("--n-ctx", type=int, default=131072, help="context length it claims (131072)")
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    given = vars(parser.parse_args(arguments))
    shape = Shape(**{name: given[name] for name in vars(Shape())})
    if not given["source"].is_file():
        parser.error(f"{given['source']} is not a file")
    embedding = embed(given["source"], given["out"], shape, given["type"], given["n_ctx"])
    left_out = ", ".join(map(str, embedding.left_out)) or "none"
    print(f"{given['out']}: {embedding.shape}; layers left out: {left_out}")


if __name__ == "__main__":
    main()
