"""Files that survive whatever stops a write, and readers that detect every changed bit."""

import errno
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from stamina_fast.errors import FileError, InputError
from stamina_fast.io import files
from stamina_fast.io.files import (
    new_folder,
    read_json,
    read_tensors,
    read_yaml,
    write_bytes,
    write_json,
    write_tensors,
    yaml_bytes,
)

TENSORS = {
    "unet.down_blocks.0.to_k.a": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
}


def one_line(error) -> bool:
    return "\n" not in str(error.value)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, TENSORS)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same_tensors(read_tensors(path, digest), TENSORS)
    value = {"ä": [1, 2.5, None, {"b": True}]}
    assert read_json(path, write_json(path, value)) == value
    assert read_yaml(path, write_bytes(path, yaml_bytes(value))) == value
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_that_share_memory_or_are_views(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    shared = {"a": base, "b": base, "c": base.T, "d": base[1:, ::2].requires_grad_()}
    write_tensors(tmp_path / "x", shared)
    assert same_tensors(read_tensors(tmp_path / "x"), {k: v.detach() for k, v in shared.items()})


CALLS = ("open", "write", "fsync", "replace")


class Disk:
    """Counts calls of os.open, write, fsync, replace, and fails the one it is told to."""

    def __init__(self, monkeypatch, fail=None, code=errno.ENOSPC, kill=None):
        self.seen, self.fail, self.code = [], fail, code
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, real):
        def call(*args, **kwargs):
            number = len(self.seen)
            self.seen.append(name)
            if number == self.fail:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


def test_the_order_that_survives_a_power_loss(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    write_bytes(tmp_path / "x", b"data")
    assert disk.seen == ["open", "write", "fsync", "replace", "open", "fsync"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_order_seen_from_outside(tmp_path):
    code = f"from stamina_fast.io.files import write_bytes; write_bytes({str(tmp_path / 'x')!r}, b'data')"
    log = tmp_path / "log"
    watch = ["strace", "-f", "--seccomp-bpf", "-y", "-o", log, "-e", "trace=fsync,rename,renameat,renameat2"]
    subprocess.run([*watch, sys.executable, "-c", code], check=True)
    calls = [line.split("(")[0].split()[-1] for line in log.read_text().splitlines() if str(tmp_path) in line]
    assert [c.rstrip("at2") for c in calls] == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("fail", range(6))
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, code, fail):
    path = tmp_path / "x"
    write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        Disk(patch, fail, code)
        with pytest.raises(FileError, match=os.strerror(code)) as caught:
            write_bytes(path, b"new")
    assert one_line(caught)
    assert str(path) in str(caught.value)
    # once the new file has its name, only its durability is in doubt
    assert path.read_bytes() == (b"old" if fail < 4 else b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data)[:3]))
    write_bytes(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_really_full(tmp_path, monkeypatch):
    real = os.open

    def full(path, flags, mode=0o777):
        return real("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(FileError, match="No space left on device; free some space"):
        write_bytes(tmp_path / "x", b"data")
    assert not list(tmp_path.iterdir())


def test_a_link_planted_in_the_way_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".x.partial").symlink_to(victim)
    write_bytes(tmp_path / "x", b"data")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize(("path", "said"), [
    ("missing/x", "No such file"), ("file/x", "Not a directory"), ("x" * 300, "too long"), ("a\0b", "null"),
])
def test_paths_that_cannot_be(tmp_path, path, said):
    (tmp_path / "file").touch()
    for call in (lambda p: write_bytes(p, b""), lambda p: read_json(p)):
        with pytest.raises(FileError, match=said) as caught:
            call(tmp_path / path)
        assert one_line(caught)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": object()}, {1: {2}}, "\ud800"])
def test_values_that_are_no_json(tmp_path, value):
    with pytest.raises(InputError, match="as JSON"):
        write_json(tmp_path / "x", value)
    assert not list(tmp_path.iterdir())


def test_objects_are_no_yaml(tmp_path):
    with pytest.raises(InputError, match="not fit for YAML"):
        yaml_bytes({"a": object()})
    (tmp_path / "x").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(FileError, match="not valid YAML") as caught:
        read_yaml(tmp_path / "x")
    assert one_line(caught)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "{", "", "[" * 100_000, "\xff", '{"a": ' * 50_000])
def test_damaged_json(tmp_path, text):
    (tmp_path / "x").write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match="not valid JSON") as caught:
        read_json(tmp_path / "x")
    assert one_line(caught)


def safetensors_bytes(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "twice": safetensors_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2)),
    "climbs": safetensors_bytes({"../x": ENTRY}),
    "climbs within": safetensors_bytes({"a/../../x": ENTRY}),
    "climbs elsewhere": safetensors_bytes({"a\\..\\x": ENTRY}),
    "absolute": safetensors_bytes({"/etc/x": ENTRY}),
    "control": safetensors_bytes({"a\nb": ENTRY}),
    "nameless": safetensors_bytes({"": ENTRY}),
    "empty": b"",
    "short": b"\x05\0\0",
    "too long": struct.pack("<Q", 1 << 60) + b"{}",
    "negative": safetensors_bytes({"a": {**ENTRY, "shape": [-2]}}),
    "beyond": safetensors_bytes({"a": {**ENTRY, "shape": [4], "data_offsets": [0, 16]}}),
    "overlap": safetensors_bytes({"a": ENTRY, "b": ENTRY}),
    "gap": safetensors_bytes({"a": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}}),
    "type": safetensors_bytes({"a": {**ENTRY, "dtype": "F33"}}),
    "packed type": safetensors_bytes({"a": {**ENTRY, "dtype": "F4", "shape": [16]}}),
    "list": safetensors_bytes([1, 2]),
    "deep": safetensors_bytes(b"[" * 100_000),
    "no utf-8": safetensors_bytes(b'{"\xff": 1}'),
    "huge": safetensors_bytes({"a": {**ENTRY, "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}),
    "digits": safetensors_bytes(b'{"a": ' + b"9" * 10_000 + b"}"),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_bad_safetensors(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FileError, match="not a sound safetensors file") as caught:
        read_tensors(tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/x", "", "a\nb"])
def test_bad_tensor_names_are_not_written(tmp_path, name):
    with pytest.raises(InputError, match="tensor name"):
        write_tensors(tmp_path / "x", {name: torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_mutants_are_read_or_refused(tmp_path, monkeypatch):
    """2,000 files with one to eight bytes changed, cut or repeated: typed errors only."""
    path = tmp_path / "x"
    write_tensors(path, TENSORS)
    good, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 400))] = rng.choice(b'\0\xff{}[]":,0919aF')
        cut = rng.randrange(len(data))
        bad = bytes(rng.choice([data, data[:cut], data + data[cut:]]))
        monkeypatch.setattr(files, "read_bytes", lambda path, expected=None, bad=bad: bad)
        try:
            files.read_tensors(path)
        except FileError:
            refused += 1
    assert refused > 1500


def test_every_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "x"
    digest = write_tensors(path, TENSORS)
    good = np.frombuffer(path.read_bytes(), np.uint8)
    flips = [(i, bit) for i in range(len(good)) for bit in range(i % 2, 8, 2)]
    assert len(flips) > 1000
    for i, bit in flips:
        bad = good.copy()
        bad[i] ^= 1 << bit
        path.write_bytes(bad.tobytes())
        with pytest.raises(FileError, match="damaged"):
            read_tensors(path, digest)


def fill(path, text="new", stop=None, **options):
    """A new folder with one file in it; `stop` is raised while it is filled."""
    with new_folder(path, **options) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text(text)
        assert partial != path
        if stop is not None:
            raise stop


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    fill(out)
    assert (out / "sub" / "x").read_text() == "new"
    with pytest.raises(FileError, match="is there already"):
        fill(out)
    with pytest.raises(KeyError):
        fill(other, stop=KeyError())
    with pytest.raises(FileError, match="No space left"):
        fill(other, stop=OSError(errno.ENOSPC, "No space left on device"))
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out, "1", replace=True)
    fill(out, "old", replace=True)
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        fill(out, "old", replace=True)
    last = len(disk.seen) - 1 - disk.seen[::-1].index("replace")
    for fail in range(last + 1):
        with monkeypatch.context() as patch:
            Disk(patch, fail)
            with pytest.raises(FileError, match="No space left"):
                fill(out, replace=True)
        assert (out / "sub" / "x").read_text() == "old"
        assert list(tmp_path.iterdir()) == [out]
