"""The measurements of ``louver-llama bench``: contenders in turn, on one cache per model and cache type."""

from __future__ import annotations

import ctypes
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ._libraries import llama_cpp
from .bench_cache import FilledCache
from .bench_plan import REFERENCE_CACHE, Contender, Plan, Test, Text, cache_name
from .bench_progress import Watch
from .bench_record import Distance, Paths, Record, Setting, speedup, timing
from .bench_states import StateFolder
from .cli_options import CACHE_TYPES
from .config import LouverConfig
from .llama import Llama
from .quality import Logits, quality
from .stats import LouverStats


def measure(plan: Plan, watch: Watch) -> Generator[Record, None, None]:
    """Run ``plan``; the records of a test come as soon as it is done."""
    for text in plan.texts:
        references: dict[tuple[int, int], Logits] = {}
        for types in plan.filled:
            with closing(_load(plan, text, types)) as llm:
                yield from _Bench(plan, text, types, llm, watch, references).run()


def _load(plan: Plan, text: Text, types: tuple[str, str]) -> Llama:
    return Llama(
        text.model_path,
        n_ctx=plan.n_ctx,
        n_batch=plan.n_batch,
        n_ubatch=plan.n_ubatch,
        n_threads=max(plan.n_threads),
        n_threads_batch=max(plan.n_threads),
        type_k=CACHE_TYPES[types[0]],
        type_v=CACHE_TYPES[types[1]],
        swa_full=plan.swa_full,
        verbose=False,
        **plan.offload.settings,
        **plan.rope,
    )


@dataclass
class _Counts:
    """The sum of the stats of several samples."""

    attention: Counter[str] = field(default_factory=Counter)
    reasons: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    sums: Counter[str] = field(default_factory=Counter)
    delta: float = 0.0
    delta_max: float = 0.0

    def add(self, stats: LouverStats) -> None:
        self.attention.update(stats["attention"])
        for path, reasons in stats["reasons"].items():
            self.reasons[path].update(reasons)
        self.sums.update(
            {
                "n_queries": stats["n_queries"],
                "visible": stats["keys_visible"],
                "attended": stats["keys_attended"],
                "read": stats["bytes_read"],
                "dense": stats["bytes_dense"],
            }
        )
        self.delta += stats["delta_mean"] * stats["n_queries"] if stats["n_queries"] else 0.0
        self.delta_max = max(self.delta_max, stats["delta_max"])

    def paths(self) -> Paths:
        found = {path: n for path, n in self.attention.items() if n}
        reasons = {path: dict(counts) for path, counts in self.reasons.items() if counts}
        sums = self.sums
        if not sums["n_queries"]:
            return Paths(found, reasons, None, None, None, None)
        return Paths(
            attention=found,
            reasons=reasons,
            keys_attended_share=sums["attended"] / sums["visible"],
            bytes_read_share=sums["read"] / sums["dense"],
            delta_mean=self.delta / sums["n_queries"],
            delta_max=self.delta_max,
        )


class _Bench:
    """The tests on one context."""

    def __init__(
        self,
        plan: Plan,
        text: Text,
        types: tuple[str, str],
        llm: Llama,
        watch: Watch,
        references: dict[tuple[int, int], Logits],
    ) -> None:
        self.plan = plan
        self.types = types
        self.llm = llm
        self.watch = watch
        self.references = references
        self.asked = types in plan.caches
        self.setting = _setting(plan, text, types, llm)
        states = None
        if plan.state_folder is not None:
            # What a GPU puts into the cache is rounded in another way.
            settings = {
                "types": types,
                "rope": plan.rope,
                "swa_full": plan.swa_full,
                "offload": vars(plan.offload),
                "gpu_info": plan.machine.gpu_info if plan.offload.n_gpu_layers else "",
            }
            states = StateFolder(plan.state_folder, settings)
        min_context_gpu = plan.contenders[0].config.min_context_gpu
        self.cache = FilledCache(llm, text.tokens, max(plan.n_threads), min_context_gpu, states, watch)

    def run(self) -> Iterator[Record]:
        """All depths, from the shallowest on."""
        if not self.asked:
            self.watch.note("filling an F16 cache too: --quality compares with stock on it")
        for depth in self.plan.depths:
            self.cache.fill(depth)
            for n_threads in self.plan.n_threads:
                distances = self._distances(n_threads)
                if not self.asked:
                    continue
                for contender in self.plan.contenders:
                    self._sample(contender, Test(0, 1), n_threads)  # uncounted: touches what each one needs
                for test in self.plan.tests:
                    yield from self._test(test, n_threads, distances)

    def _test(self, test: Test, n_threads: int, distances: dict[Contender, Distance]) -> Iterator[Record]:
        contenders = self.plan.contenders
        test_time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        samples: dict[Contender, list[int]] = {contender: [] for contender in contenders}
        counts = {contender: _Counts() for contender in contenders}
        for repetition in range(self.plan.repetitions):
            for contender in contenders:
                part = f"{test.name}, sample {repetition + 1} of {self.plan.repetitions}"
                with self.watch.stage(self._name(contender, n_threads, part), test.n_tokens):
                    samples[contender].append(self._sample(contender, test, n_threads))
                counts[contender].add(self.llm.louver_stats())
        stock = next((samples[contender] for contender in contenders if contender.name == "stock"), None)
        for contender in contenders:
            yield Record(
                contender=contender,
                test=test,
                n_depth=self.cache.depth,
                n_threads=n_threads,
                test_time=test_time,
                timing=timing(samples[contender], test.n_tokens),
                speedup=speedup(stock, samples[contender]),
                paths=counts[contender].paths(),
                distance=distances.get(contender, Distance()) if test.n_gen else Distance(),
                setting=self.setting,
                software=self.plan.software,
                machine=self.plan.machine,
                command=self.plan.command,
            )

    def _sample(self, contender: Contender, test: Test, n_threads: int) -> int:
        """The nanoseconds that ``test`` takes at the depth."""
        self._prepare(contender, n_threads)
        tokens = self.cache.tokens[self.cache.depth : self.cache.depth + test.n_tokens]
        steps = [tokens] if test.n_prompt else [[token] for token in tokens]
        start = time.perf_counter_ns()
        for step in steps:
            self.llm.eval(step)
            llama_cpp.llama_get_logits(self.llm.ctx)  # waits until they are there
        return time.perf_counter_ns() - start

    def _distances(self, n_threads: int) -> dict[Contender, Distance]:
        """Each contender's distance from stock on an F16 cache; also keeps the latter's logits."""
        if not self.plan.quality_steps:
            return {}
        key = (self.cache.depth, n_threads)
        if self.types == REFERENCE_CACHE:
            self.references[key] = self._logits(Contender("stock", LouverConfig(enabled=False)), n_threads)
        reference = self.references[key]
        return {
            contender: Distance(
                self.plan.quality_steps, **vars(quality(reference, self._logits(contender, n_threads)))
            )
            for contender in (self.plan.contenders if self.asked else ())
        }

    def _logits(self, contender: Contender, n_threads: int) -> Logits:
        """What the model says after each token behind the depth, whatever it would have said itself."""
        n_steps = self.plan.quality_steps or 0
        self._prepare(contender, n_threads)
        tokens = self.cache.tokens[self.cache.depth : self.cache.depth + n_steps]
        logits = np.empty((n_steps, self.llm.n_vocab()), np.float32)
        with self.watch.stage(self._name(contender, n_threads, "quality"), n_steps) as advance:
            for row, token in zip(logits, tokens, strict=True):
                self.llm.eval([token])
                found = llama_cpp.llama_get_logits(self.llm.ctx)
                row[:] = np.ctypeslib.as_array(found, shape=row.shape)
                advance(1)
        return logits

    def _prepare(self, contender: Contender, n_threads: int) -> None:
        self.cache.rewind()
        self.cache.set_threads(n_threads)
        self.llm.louver = contender.config
        self.llm.reset_louver_stats()

    def _name(self, contender: Contender, n_threads: int, part: str) -> str:
        place = f"{cache_name(*self.types)} cache, {self.cache.depth:,} tokens, {n_threads} threads"
        return f"{place}: {contender.label}, {part}"


def _setting(plan: Plan, text: Text, types: tuple[str, str], llm: Llama) -> Setting:
    model: Any = llm.model
    description = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_desc(model, description, len(description))
    return Setting(
        model_filename=Path(text.model_path).name,
        model_type=description.value.decode(),
        model_size=llama_cpp.llama_model_size(model),
        model_n_params=llama_cpp.llama_model_n_params(model),
        model_n_ctx_train=text.n_ctx_train,
        text=text.name,
        n_ctx=llm.n_ctx(),
        n_batch=llm.n_batch,
        n_ubatch=llm.context_params.n_ubatch,
        type_k=types[0],
        type_v=types[1],
        swa_full=plan.swa_full,
        rope=plan.rope,
        **vars(plan.offload),
    )
