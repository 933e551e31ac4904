"""The GPUs of this machine, as this build can use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._libraries import core


@dataclass(frozen=True)
class Gpu:
    """A CUDA device. ``in_the_way`` says why Louver has no kernels for it; None where it has."""

    id: int
    name: str
    capability: str
    in_the_way: str | None


def gpus() -> list[Gpu]:
    """The CUDA devices; none in a build without CUDA."""
    devices: list[dict[str, Any]] = core.devices()
    return [Gpu(**device) for device in devices]


def gpu_obstacle() -> str | None:
    """Why no layer can go to a GPU here; None where one can."""
    if not core.has_cuda():
        return "this build has no CUDA (it takes -DLOUVER_CUDA=ON)"
    return None if gpus() else "there is no CUDA device"
