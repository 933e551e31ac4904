"""What a measurement ran on, and with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from ._libraries import core


@dataclass(frozen=True)
class Machine:
    """The hardware as this process sees it; ``n_cpus`` is how many processors it may use."""

    cpu_info: str
    n_cpus: int
    memory_bytes: int
    system: str

    def __str__(self) -> str:
        return f"{self.cpu_info}, {self.n_cpus} CPUs, {self.memory_bytes / 2**30:.1f} GiB, {self.system}"


@dataclass(frozen=True)
class Software:
    """Versions, and the instruction set that our kernels run on."""

    build_commit: str
    louver_llama: str
    llama_cpp_python: str
    ggml: str
    python: str
    isa: str

    def __str__(self) -> str:
        return (
            f"kernels: {self.isa}; louver-llama {self.louver_llama}, llama.cpp {self.build_commit} "
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
    )


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        cpu_info=_entry("/proc/cpuinfo", "model name") or platform.machine(),
        n_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"{platform.system()} {platform.release()}",
    )


def _entry(file: str, name: str) -> str | None:
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
