"""Index files: what comes back is what was saved; whatever is wrong with a file is told, and nothing crashes."""

from __future__ import annotations

import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from exact import DTYPES, KINDS, OPTIONS, check, name_of, normal, search_and_check, state_of, stored
from louver_llama import (
    CorruptIndexError,
    Index,
    IndexFileError,
    IndexSystemError,
    IndexVersionError,
    NotAnIndexError,
    TruncatedIndexError,
)

HEADER = 256


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(15)


def make(rng: np.random.Generator, n: int = 70, **options: object) -> tuple[Index, NDArray, NDArray]:
    """An index of two heads, its keys, and which are live."""
    keys = normal(rng, 2, n, 5)
    index = Index.build(keys, **options)
    live = np.arange(n) % 9 != 4
    index.remove(np.flatnonzero(~live))
    return index, keys, live


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trips


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim"), [(0, 3), (1, 1), (64, 20), (65, 16), (700, 33)])
def test_round_trip(
    tmp_path: Path, rng: np.random.Generator, n: int, dim: int, dtype: str, options: dict
) -> None:
    keys, queries = stored(normal(rng, 2, n, dim), dtype), normal(rng, 4, dim)
    index = Index.build(keys[:, : n // 2], group_size=3, seed=5, n_subspaces=min(dim, 4), **options)
    index.append(keys[:, n // 2 :])
    live = np.ones(n, bool)
    live[rng.permutation(n)[: n // 3]] = False
    index.remove(np.flatnonzero(~live))
    index.save(tmp_path / "index")
    assert names(tmp_path) == ["index"]
    loaded = Index.load(tmp_path / "index", n_threads=3)
    assert state_of(loaded) == state_of(index)
    search_and_check(loaded, keys, queries, live=live)
    saved, found = index.to_dict(), loaded.to_dict()
    assert found["options"].pop("n_threads") == 3
    saved["options"].pop("n_threads")
    for key in ("kind", "dtype", "n_head_kv", "dim", "n_positions", "n_live", "options"):
        assert found[key] == saved[key]

    # It can be changed as the one that was saved.
    more = stored(normal(rng, 2, 100, dim), dtype)
    assert loaded.append(more) == range(n, n + 100)
    keys, live = np.concatenate([keys, more], axis=1), np.append(live, np.ones(100, bool))
    keys[:, 5 : n + 50 : 7] = stored(np.float32(2) * keys[:, 5 : n + 50 : 7].astype(np.float32), dtype)
    loaded.update(range(5, n + 50, 7), keys[:, 5 : n + 50 : 7])
    live[5 : n + 50 : 7] = True
    loaded.remove([n + 99])
    live[n + 99] = False
    search_and_check(loaded, keys, queries, live=live)
    loaded.rebuild()
    search_and_check(loaded, keys, queries, live=live)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_not_finite(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    keys = normal(rng, 100, 8)
    keys[[3, 64]], keys[99, 0] = math.nan, -math.inf
    Index.build(keys, kind).save(tmp_path / "index")
    check(Index.load(tmp_path / "index").search(keys[:2], 1.0), keys, keys[:2], 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_borrowed_keys(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    keys = normal(rng, 130, 2, 8).swapaxes(0, 1)[:, ::-2]
    Index.build(keys, kind, copy=False).save(tmp_path / "index")
    search_and_check(Index.load(tmp_path / "index"), keys, normal(rng, 2, 8))


def test_save_over_files(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"something else " * 1000)
    path.chmod(0o640)
    for n in (100, 3, 50):
        index, _, _ = make(rng, n)
        index.save(path)
        assert state_of(Index.load(path)) == state_of(index)
        assert path.stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to(path)
    index.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["index", "link"]


def test_paths(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index, _, _ = make(rng)
    for path in ("plain", "spaced name ü", Path("path"), os.fsencode(tmp_path) + b"/\xff\xfe"):
        index.save(path)
        assert state_of(Index.load(path)) == state_of(index)
    with pytest.raises(ValueError, match="path has a null byte"):
        index.save("a\0b")
    assert len(names(tmp_path)) == 4


# Wrong files


def saved(tmp_path: Path, rng: np.random.Generator, kind: str) -> tuple[Path, bytes]:
    path = tmp_path / "index"
    make(rng, 18, kind=kind, merge_at=8, n_subspaces=2)[0].save(path)
    return path, path.read_bytes()


def error_of(path: Path, content: bytes) -> type[Exception]:
    path.write_bytes(content)
    with pytest.raises(IndexFileError) as caught:
        Index.load(path)
    assert str(path) in str(caught.value)
    return caught.type


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_byte_is_found(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    path, good = saved(tmp_path, rng, kind)
    for i in range(len(good)):
        flip = 1 << i % 8 if i % 3 else 0xFF
        error = error_of(path, good[:i] + bytes([good[i] ^ flip]) + good[i + 1 :])
        if i < 8:
            assert error is NotAnIndexError
        elif i < 12:
            assert error is (IndexVersionError if good[i] ^ flip > good[i] else CorruptIndexError)
        else:
            assert error is CorruptIndexError, i
    # The negative control: as it was, it loads.
    path.write_bytes(good)
    assert len(Index.load(path)) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_every_length_is_found(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    path, good = saved(tmp_path, rng, kind)
    assert error_of(path, b"") is NotAnIndexError
    for length in range(1, len(good)):
        assert error_of(path, good[:length]) is TruncatedIndexError, length
    for more in (b"\0", b"x" * 64, good):
        assert error_of(path, good + more) is CorruptIndexError


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "index"
    assert error_of(path, b"GGUF" + bytes(1000)) is NotAnIndexError
    assert error_of(path, bytes(300)) is NotAnIndexError
    assert error_of(path, b"LOUVERIY" + bytes(300)) is NotAnIndexError
    assert error_of(path, b"LOUVERI") is TruncatedIndexError
    assert error_of(path, Path(sys.executable).read_bytes()[:5000]) is NotAnIndexError


def test_later_version(tmp_path: Path, rng: np.random.Generator) -> None:
    path, good = saved(tmp_path, rng, "grid")
    for version in (2, 3, 2**32 - 1):
        content = good[:8] + struct.pack("<I", version) + good[12:]
        assert error_of(path, content) is IndexVersionError
        with pytest.raises(IndexVersionError, match=f"version {version}, this library reads version 1"):
            Index.load(path)


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (16, "<Q", 2**63),
        (24, "<Q", 2**31 - 1),
        (24, "<Q", 2**64 - 1),
        (32, "<I", 2**32 - 1),
        (36, "<I", 2**31),
    ]
    + [(field, "<Q", value) for field in (64, 72, 88, 96, 112, 120) for value in (0, 2**40, 2**64 - 1)],
)
def test_huge_sizes_take_no_memory(
    tmp_path: Path, rng: np.random.Generator, offset: int, form: str, value: int
) -> None:
    """A header that claims terabytes, first with the old checksum, then with its own."""
    path, good = saved(tmp_path, rng, "ball")
    content = bytearray(good)
    struct.pack_into(form, content, offset, value)
    start = time.perf_counter()
    assert error_of(path, bytes(content)) is CorruptIndexError
    assert error_of(path, sealed(content)) is CorruptIndexError
    assert time.perf_counter() - start < 1


def sealed(content: bytes | bytearray) -> bytes:
    """With the checksums that its sections and its header have."""
    content = bytearray(content)
    for entry in range(64, 136, 24):
        offset, size = struct.unpack_from("<QQ", content, entry)
        if offset + size <= len(content):
            checksum = xxhash.xxh3_64_intdigest(bytes(content[offset : offset + size]))
            struct.pack_into("<Q", content, entry + 16, checksum)
    struct.pack_into("<Q", content, HEADER - 8, xxhash.xxh3_64_intdigest(bytes(content[: HEADER - 8])))
    return bytes(content)


@pytest.mark.parametrize(
    ("offset", "value", "what"),
    [
        (8, 0, "version 0"),
        (12, 1, "header_bytes"),
        (32, 0, "n_head_kv"),
        (36, 0, "dim"),
        (40, 3, "type"),
        (41, 2, "kind"),
        (42, 2, "grouping"),
        (43, 2, "enclosure"),
        (44, 0, "n_subspaces"),
        (44, 6, "n_subspaces"),
        (48, 0, "group_size"),
        (52, 0, "merge_at"),
        (200, 1, "reserved"),
        (256 + 3, 1, "behind the last"),  # a live key that there is not
    ],
)
def test_fields_out_of_range_with_right_checksums(
    tmp_path: Path, rng: np.random.Generator, offset: int, value: int, what: str
) -> None:
    path, good = saved(tmp_path, rng, "ball")
    assert sealed(good) == good  # the negative control: these are the checksums of the format
    content = bytearray(good)
    content[offset] = value
    assert error_of(path, sealed(content)) is CorruptIndexError
    with pytest.raises(CorruptIndexError, match=what):
        Index.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_makes_a_search_miss_a_key(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    """Random changes to all sections under right checksums: refused, or searched as exactly as any other index."""
    path, good = saved(tmp_path, rng, kind)
    loaded = 0
    for _ in range(300):
        content = bytearray(good)
        for at in rng.integers(HEADER, len(good), rng.integers(1, 6)):
            content[at] = rng.integers(0, 256) if at % 2 else int(rng.integers(0, 18))
        path.write_bytes(sealed(content))
        try:
            index = Index.load(path)
        except CorruptIndexError:
            continue
        loaded += 1
        keys = np.stack([index.key(i) for i in range(18)], axis=1)
        live = np.array([i in index for i in range(18)])
        queries = normal(rng, 2, 5)
        check(index.search(queries, 0.5), keys, queries, 0.5, live)
    assert loaded > 20


def test_no_file(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Index.load(tmp_path / "nowhere")
    index, _, _ = make(rng)
    before = state_of(index)
    attempts: list[Callable[[], object]] = [
        lambda: Index.load(tmp_path),
        lambda: Index.load("/dev/null"),
        lambda: index.save(tmp_path),
        lambda: index.save(tmp_path / "no folder" / "index"),
        lambda: index.save("/dev/full"),
        lambda: index.save("/proc/louver"),
    ]
    for attempt in attempts:
        with pytest.raises(IndexSystemError) as caught:
            attempt()
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, ValueError)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IndexSystemError):
        Index.load(tmp_path / "pipe")  # and does not wait for a writer
    assert names(tmp_path) == ["pipe"]
    assert state_of(index) == before
    for wrong in (3, None, ["x"]):
        with pytest.raises(TypeError):
            Index.load(wrong)
        with pytest.raises(TypeError):
            index.save(wrong)


def test_disk_full(tmp_path: Path, rng: np.random.Generator) -> None:
    """A limit on the size of files: the old file stays, no temporary is left."""
    path = tmp_path / "index"
    make(rng)[0].save(path)
    good = path.read_bytes()
    program = (
        "import resource, signal, sys, numpy as np\n"
        "from louver_llama import Index, IndexSystemError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try:\n    Index.build(np.ones((1000, 16), np.float32)).save(sys.argv[1])\n"
        "except IndexSystemError as error:\n    sys.exit(0 if 'cannot be written' in str(error) else 2)\n"
        "sys.exit(3)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60)
    assert path.read_bytes() == good
    assert names(tmp_path) == ["index"]


WRITER = """
import sys
import numpy as np
from louver_llama import Index

indexes = [Index.build(np.full((20000, 64), i, np.float32), sys.argv[2]) for i in (1, 2)]
print("ready", flush=True)
while True:
    for index in indexes:
        index.save(sys.argv[1])
"""


@pytest.mark.parametrize("kind", KINDS)
def test_killed_writer_leaves_the_old_file_or_the_new(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    path = tmp_path / "index"
    seen = set()
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), kind], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout.readline() == "ready\n"
            for _ in range(500):
                if path.exists():
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
        index = Index.load(path)
        keys = {float(index.key(i)[0]) for i in (0, 12345, 19999)}
        assert len(index) == 20000
        assert len(keys) == 1
        seen |= keys
    assert seen <= {1.0, 2.0}
    left = [name for name in names(tmp_path) if name != "index"]
    assert all(name.startswith("index.") and name.endswith(".tmp") for name in left)
