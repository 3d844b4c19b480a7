"""Which thread owns which number, proven by counting in a small C++ program: csrc/cuda/layout.h has no CUDA in it."""

import subprocess

import pytest
from cudaemulation import COMPILER, EMULATION, SOURCES

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def verdict(layout, folder):
    """What the program says of a layout.h with this text."""
    for name in ("core", "cuda"):
        (folder / "csrc" / name).mkdir(parents=True)
    for header in (SOURCES.parent / "core").glob("*.h"):
        (folder / "csrc" / "core" / header.name).write_text(header.read_text())
    (folder / "csrc" / "cuda" / "layout.h").write_text(layout)
    program = folder / "tests" / "csrc" / "cuda" / "layout.cpp"
    program.parent.mkdir(parents=True)
    program.write_text((EMULATION / "layout.cpp").read_text())
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-o", str(folder / "layout"), str(program)], check=True)
    done = subprocess.run([str(folder / "layout")], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_every_layout_holds(tmp_path):
    assert verdict((SOURCES / "layout.h").read_text(), tmp_path) == (0, "every layout holds\n")


@pytest.mark.parametrize(("line", "planted"), [
    ("return n / 2 * 8 + 2 * quarter + n % 2;", "return n / 2 * 8 + quarter + 4 * (n % 2);"),
    ("2 * lane_pair(lane) + number % 2 + number / 4 * 8", "2 * lane_pair(lane) + number % 2 + number / 2 % 2 * 8"),
    ("number / 4 * 2 + number % 2,", "number / 4 + number % 2,"),
    ("return quarter * 8 + n;", "return n * 4 + quarter;"),
    ("index / tokens * HALVES + number", "index / tokens + number * 96"),
])
def test_a_planted_bug_shows(tmp_path, line, planted):
    text = (SOURCES / "layout.h").read_text()
    assert line in text
    code, said = verdict(text.replace(line, planted), tmp_path)
    assert code == 1
    assert "does not hold" in said
