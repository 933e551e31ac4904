"""What a measurement ran on, and with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from ._libraries import core
from .gpus import gpus


@dataclass(frozen=True)
class Machine:
    """The hardware as this process sees it; ``n_cpus`` is how many processors it may use."""

    cpu_info: str
    n_cpus: int
    memory_bytes: int
    system: str
    gpu_info: str  # the names of the GPUs that the process may use, "" for none

    def __str__(self) -> str:
        parts = (
            self.cpu_info,
            f"{self.n_cpus} CPUs",
            f"{self.memory_bytes / 2**30:.1f} GiB",
            self.gpu_info,
            self.system,
        )
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Software:
    """Versions, and the instruction set that our kernels run on."""

    build_commit: str
    louver_llama: str
    llama_cpp_python: str
    ggml: str
    python: str
    isa: str
    backends: str  # what llama.cpp was built with besides the CPU; "CPU" for nothing

    def __str__(self) -> str:
        kernels = self.isa if self.backends == "CPU" else f"{self.isa}, {self.backends}"
        return (
            f"kernels: {kernels}; louver-llama {self.louver_llama}, llama.cpp {self.build_commit} "
            f"(ggml {self.ggml}), llama-cpp-python {self.llama_cpp_python}, Python {self.python}"
        )


def this_software() -> Software:
    """What this process has loaded."""
    return Software(
        build_commit=core.PIN["commit"],
        louver_llama=__version__,
        llama_cpp_python=core.PIN["llama_cpp_python"],
        ggml=core.PIN["ggml"],
        python=platform.python_version(),
        isa=core.isa(),
        backends="CUDA" if core.has_cuda() else "CPU",
    )


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        cpu_info=_entry("/proc/cpuinfo", "model name") or platform.machine(),
        n_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"{platform.system()} {platform.release()}",
        gpu_info=", ".join(gpu.name for gpu in gpus()),
    )


def _entry(file: str, name: str) -> str | None:
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
