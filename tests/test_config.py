"""LouverConfig accepts what it documents, and names what it refuses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from louver_llama import LouverConfig


def test_defaults() -> None:
    assert dataclasses.asdict(LouverConfig()) == {
        "epsilon": 0.05,
        "min_context": 1024,
        "min_context_gpu": 32768,
        "sinks": 4,
        "recent": 64,
        "guarantee": "certified",
        "compensate": True,
        "enabled": True,
        "check": False,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 0},
        {"epsilon": 0.999},
        {"epsilon": np.float32(0.5)},
        {"min_context": 0, "min_context_gpu": 0, "sinks": 0, "recent": 0},
        {"min_context_gpu": 2**31 - 1},
        {"recent": np.int64(7)},
        {"recent": 2**31 - 1},
        {"guarantee": "estimated"},
    ],
)
def test_accepts(settings: dict[str, object]) -> None:
    config = LouverConfig(**settings)  # type: ignore[arg-type]
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("epsilon", -0.1, "[0, 1)"),
        ("epsilon", 1, "[0, 1)"),
        ("epsilon", math.nan, "[0, 1)"),
        ("epsilon", math.inf, "[0, 1)"),
        ("recent", -1, "[0, 2147483647]"),
        ("sinks", -1, "[0, 2147483647]"),
        ("min_context", -1, "[0, 2147483647]"),
        ("min_context", 2**31, "[0, 2147483647]"),
        ("min_context_gpu", -1, "[0, 2147483647]"),
        ("min_context_gpu", 2**31, "[0, 2147483647]"),
        ("guarantee", "hoped for", '"certified" or "estimated"'),
    ],
)
def test_value_out_of_range(name: str, value: object, range_: str) -> None:
    with pytest.raises(ValueError) as caught:
        LouverConfig(**{name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert name in message and range_ in message and repr(value) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", "0.05"),
        ("epsilon", None),
        ("epsilon", True),
        ("recent", 1.5),
        ("sinks", True),
        ("min_context", "1024"),
        ("min_context_gpu", 16384.0),
        ("guarantee", None),
        ("compensate", 1),
        ("enabled", "yes"),
        ("check", None),
    ],
)
def test_wrong_type(name: str, value: object) -> None:
    with pytest.raises(TypeError) as caught:
        LouverConfig(**{name: value})  # type: ignore[arg-type]
    assert name in str(caught.value) and repr(value) in str(caught.value)


def test_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LouverConfig().epsilon = 0.1  # type: ignore[misc]
