"""Index files: what was saved comes back, and whatever else a file holds is refused by the right name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from exact import DTYPES, OPTIONS, check, name_of, state_of, stored
from louver_llama import (
    CorruptIndexError,
    Index,
    IndexFileError,
    IndexSystemError,
    IndexVersionError,
    NotAnIndexError,
    TruncatedIndexError,
)

each_kind = pytest.mark.parametrize("options", OPTIONS, ids=name_of)
HEADER = 256


def some_index(options: dict[str, object], dtype: str = "float32", n: int = 150) -> Index:
    keys = stored(np.random.default_rng(n).normal(size=(2, n, 5)), dtype)
    index = Index.build(keys, **options)
    index.remove([3, 60])
    index.append(keys[:, :7])
    return index


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.louver"


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(path: Path, options: dict[str, object], dtype: str) -> None:
    index = some_index(options, dtype)
    before = state_of(index)
    index.save(path)
    loaded = Index.load(path)
    assert state_of(loaded) == before
    described = {
        key: value for key, value in loaded.to_dict().items() if key not in ("memory", "index_share")
    }
    assert described == {key: value for key, value in index.to_dict().items() if key in described}
    # And it goes on as before.
    for one in (index, loaded):
        one.append(stored(np.ones((2, 3, 5)), dtype))
        one.update([3], stored(np.full((2, 1, 5), 2.0), dtype))
        one.remove([0])
    assert state_of(loaded) == state_of(index)


@each_kind
def test_empty_and_all_removed(path: Path, options: dict[str, object]) -> None:
    keys = np.ones((3, 4), np.float32)
    empty = Index.build(keys[:0], **options)
    empty.save(path)
    assert len(Index.load(path)) == 0
    gone = Index.build(keys, **options)
    gone.remove(range(3))
    gone.save(path)
    loaded = Index.load(path)
    assert (loaded.n_positions, len(loaded)) == (3, 0)
    loaded.update([1], keys[:1])
    check(loaded.search(keys[0], 1.0), keys, keys[:1], 1.0, np.array([False, True, False]))


@each_kind
def test_keys_that_are_not_finite(path: Path, options: dict[str, object]) -> None:
    keys = np.random.default_rng(0).normal(size=(130, 3)).astype(np.float32)
    keys[5, 1], keys[100, 0] = np.nan, -np.inf
    index = Index.build(keys, **options)
    index.save(path)
    check(Index.load(path).search(keys[0], 1.0), keys, keys[:1], 1.0)


def test_borrowed_keys_are_saved(path: Path) -> None:
    wide = np.random.default_rng(0).normal(size=(100, 9)).astype(np.float32)
    keys = wide[::-2, 1:6]
    Index.build(keys, copy=False).save(path)
    check(Index.load(path).search(keys[1], 0.5), keys, keys[1:2], 0.5)


@each_kind
def test_every_flipped_bit_is_found(path: Path, options: dict[str, object]) -> None:
    some_index(options, n=66).save(path)
    whole = path.read_bytes()
    for byte in {*range(HEADER), *range(HEADER, len(whole), 11), len(whole) - 1}:
        for bit in (0, 3, 7) if byte >= HEADER else range(8):
            damaged = bytearray(whole)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            wanted = NotAnIndexError if byte < 8 else IndexVersionError if byte < 12 else CorruptIndexError
            with pytest.raises(CorruptIndexError if byte >= 12 else (wanted, CorruptIndexError)):
                Index.load(path)


@each_kind
def test_every_shorter_file_is_refused(path: Path, options: dict[str, object]) -> None:
    some_index(options, n=66).save(path)
    whole = path.read_bytes()
    for length in {*range(1, HEADER + 2), *range(HEADER, len(whole), 13), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(TruncatedIndexError, match=r"keys\.louver ends early"):
            Index.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptIndexError, match="bytes follow"):
        Index.load(path)


@pytest.mark.parametrize("content", [b"", b"x", b"LOUVERIY" + bytes(500), b"GGUF" + bytes(4096)])
def test_foreign_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(NotAnIndexError, match=r"keys\.louver is not an index file"):
        Index.load(path)


def test_a_later_version_is_named(path: Path) -> None:
    some_index({}).save(path)
    later = bytearray(path.read_bytes())
    later[8] = 9
    path.write_bytes(later)
    with pytest.raises(IndexVersionError, match="version 9, this library reads version 1"):
        Index.load(path)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (16, 8, 2**63),
        (24, 8, 2**40),
        (24, 8, 2**31 - 1),
        (32, 4, 2**32 - 1),
        (36, 4, 1024),
        (44, 4, 0),
        (64, 8, 2**64 - 64),
    ],
)
def test_huge_sizes_are_refused_before_memory_is_asked_for(
    path: Path, offset: int, size: int, value: int
) -> None:
    """The header's checksum is made good with the library's own: a hostile file has it right."""
    some_index({"kind": "ball"}).save(path)
    hostile = bytearray(path.read_bytes())
    hostile[offset : offset + size] = value.to_bytes(size, "little")
    hostile[248:256] = xxhash.xxh3_64_intdigest(bytes(hostile[:248])).to_bytes(8, "little")
    path.write_bytes(hostile)
    with pytest.raises((CorruptIndexError, TruncatedIndexError)):
        Index.load(path)


def test_paths(tmp_path: Path) -> None:
    index = some_index({})
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path / "none")
    with pytest.raises(IndexSystemError, match="no ordinary file"):
        Index.load(tmp_path)
    with pytest.raises(IndexSystemError, match="cannot be written"):
        index.save(tmp_path / "none" / "keys")
    with pytest.raises(IndexSystemError, match="no ordinary file"):
        index.save(tmp_path)
    with pytest.raises(ValueError, match="null byte"):
        index.save("a\0b")
    with pytest.raises(TypeError):
        Index.load(3)  # type: ignore[arg-type]
    odd = os.fsencode(tmp_path) + b"/\xff key.louver"
    index.save(odd)  # type: ignore[arg-type]
    assert state_of(Index.load(odd)) == state_of(index)  # type: ignore[arg-type]
    assert issubclass(IndexSystemError, OSError) and issubclass(IndexFileError, ValueError)


def test_links_and_permissions(tmp_path: Path, path: Path) -> None:
    index = some_index({})
    index.save(path)
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    index.remove([0])
    index.save(link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert len(Index.load(path)) == len(index)
    assert sorted(tmp_path.iterdir()) == [path, link]


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    some_index({}).save(path)
    before = path.read_bytes()
    script = (
        "import resource, signal, sys, numpy as np, louver_llama as ll\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "index = ll.Index.build(np.ones((5000, 64), np.float32))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: index.save(sys.argv[1])\n"
        "except ll.IndexSystemError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "keys.louver cannot be written: File too large" in done.stdout
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_writer_leaves_a_whole_file(path: Path) -> None:
    script = (
        "import sys, numpy as np, louver_llama as ll\n"
        "a, b = (ll.Index.build(np.full((n, 64), n, np.float32)) for n in (20_000, 30_000))\n"
        "a.save(sys.argv[1]); print('saved', flush=True)\n"
        "while True: b.save(sys.argv[1]); a.save(sys.argv[1])\n"
    )
    seen = set()
    for turn in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "saved\n"
            time.sleep(0.05 + 0.03 * turn)
            writer.send_signal(signal.SIGKILL)
        seen.add(len(Index.load(path)))
    assert seen <= {20_000, 30_000}
