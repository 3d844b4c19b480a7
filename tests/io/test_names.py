"""Names that people choose stay inside their folder, and stay apart."""

import random
import re
from pathlib import Path

import pytest

from stamina_fast.errors import InputError
from stamina_fast.io.names import LONGEST, check_distinct, check_name, inside, safe_name, token_for

PIECES = [
    "..", "/", "\\", "~", ".", "\0", "\n", "\r\n", "\t", " ", "C:", "//", "con", "NUL", "aux.txt", "$HOME", "`id`", "%2e%2e%2f",
    ";", "|", "&", "*", "?", "<", ">", '"', "'", "cat", "\u202e", "\u200b", "\ufeff", "\ud800", "é", "e\u0301", "猫", "🐈", "İ",
    "ﬁ", "．．", "／", "-rf", "--", "_", "a" * 300, "\x7f", "\x1b[2J", "..%c0%af", "....//", "proc/self", "etc/passwd",
]


def hostile(count):
    rng = random.Random(0)
    for _ in range(count):
        yield "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 6)))


def test_hostile_names_write_nothing_outside(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    written = refused = 0
    for name in hostile(10_000):
        try:
            folder = safe_name(name)
            path = inside(root, folder)
        except InputError:
            refused += 1
            continue
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", folder)
        assert len(folder) <= LONGEST + 9
        path.mkdir(exist_ok=True)
        (path / "x").touch()
        written += 1
    assert written > 1000
    assert refused > 1000
    assert list(tmp_path.iterdir()) == [root]
    assert all(path.parent.parent == root for path in root.rglob("x"))


def test_hostile_paths_stay_inside_or_are_refused(tmp_path):
    root = (tmp_path / "root").resolve()
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    refused = 0
    for name in [*hostile(2000), "..", "/etc", "link/x", "link", "a/../../b", "a\0b"]:
        try:
            assert inside(root, name).is_relative_to(root)
        except InputError:
            refused += 1
    assert refused > 100
    for name in ("..", "/etc/passwd", "link/x", "a/../../b", "a\0b"):
        with pytest.raises(InputError):
            inside(root, name)
    assert inside(root, "a", "b") == root / "a" / "b"


@pytest.mark.parametrize(("name", "folder", "token"), [
    ("cat", "cat", "<cat>"), ("My cat", "My-cat-", "<my-cat>"), ("a.b_c-1", "a.b_c-1", "<a.b_c-1>"), ("con", "con-", "<con>"),
    ("Café", "Caf-", "<caf-"), ("猫", "concept-", "<concept-"),
])
def test_derived_names(name, folder, token):
    made = safe_name(name)
    assert made == folder or (folder.endswith("-") and re.fullmatch(re.escape(folder) + r"-?[0-9a-f]{8}", made))
    assert token_for(name) == token or (token_for(name).startswith(token) and token_for(name).endswith(">"))


def test_different_names_have_different_folders():
    names = ["a b", "a-b", "a  b", "a/b", "a\\b", "猫", "犬", "x" * 60, "x" * 61]
    assert len({safe_name(name) for name in names}) == len(names)
    assert len({token_for(name) for name in ("猫", "犬", "x" * 60, "x" * 61)}) == 4


@pytest.mark.parametrize("pair", [
    ("cat", "cat"), ("cat", "Cat"), ("cat", " cat "), ("é", "e\u0301"), ("a b", "a  b"), ("ﬁ", "fi"),
])
def test_names_alike_are_refused(pair):
    with pytest.raises(InputError, match="must differ"):
        check_distinct("name", pair)


def test_names_that_differ_pass():
    check_distinct("name", ["cat", "cats", "a b", "a-b"])


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\0", None, 3, Path("x"), "\u202ecat"])
def test_names_that_are_none(name):
    with pytest.raises(InputError, match="printable text"):
        check_name(name)
