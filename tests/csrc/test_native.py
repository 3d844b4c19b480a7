"""csrc from a plain compiler, under the sanitizers of addresses and undefined behaviour: the headers of csrc/core against the
specification bit for bit, the whole CPU operator on odd shapes, threads, other processors, and the names that are defined."""

import json
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from nativeanswers import answers
from nativebuild import CPU, CROSS, FLAGS, GXX, INLINE_NOTHING, NATIVE, ROOT, SANITIZE, compiled, is_x86, linked, passed

needs_compiler = pytest.mark.skipif(GXX is None, reason="no g++ on PATH; install a C++ compiler")


# ---- the headers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    answers(folder)
    return folder


@needs_compiler
def test_headers(known, tmp_path):
    compiled(NATIVE / "headers.cpp", tmp_path / "headers.o", *SANITIZE)
    passed(linked(tmp_path / "headers", [tmp_path / "headers.o"], *SANITIZE), known)


# ---- the operator --------------------------------------------------------------------------------------------------


def operator(folder, sets, *flags, compiler=GXX):
    """tests/csrc/native/operator.cpp with everything of csrc/cpu but the bindings, for these instruction sets."""
    objects = []
    for source in (NATIVE / "operator.cpp", CPU / "operator.cpp", *(CPU / f"isa_{name}.cpp" for name in sets)):
        objects.append(folder / f"{len(objects)}-{source.stem}.o")
        own = FLAGS[source.stem.removeprefix("isa_")] if source.stem.startswith("isa_") else []
        compiled(source, objects[-1], *flags, *own, compiler=compiler)
    return linked(folder / "operator", objects, *flags, compiler=compiler)


@needs_compiler
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FLAGS)
def test_operator_on_odd_shapes(tmp_path, name):
    """Every run has the same program without the sanitizers, in test_planted_native.py."""
    if name != "generic" and not is_x86():
        pytest.skip("not this compiler's processor")
    passed(operator(tmp_path, [name], *SANITIZE), name)


@needs_compiler
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_threads_share_nothing(tmp_path):
    """Under the sanitizer of threads."""
    passed(operator(tmp_path, ["generic"], "-O1", "-fsanitize=thread"), "generic")


needs_cross = pytest.mark.skipif(CROSS is None, reason="no aarch64-linux-gnu-g++ on PATH; Debian: g++-aarch64-linux-gnu")


@needs_cross
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="no cmake and ninja; pip install cmake ninja")
@pytest.mark.parametrize("flags", [
    pytest.param(("-O0", *INLINE_NOTHING), id="quick"), pytest.param((), id="as built", marks=pytest.mark.long),
])
@pytest.mark.timeout(1200)
def test_what_is_built_for_aarch64_compiles(tmp_path, flags):
    """What CMakeLists.txt takes there is the instruction set of every machine; it compiles with torch's headers, no warning."""
    sources, built = tmp_path / "sources", tmp_path / "built"
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", sources)
    (sources / "stamina_fast").mkdir()
    machine = {
        "Python_EXECUTABLE": sys.executable, "CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": CROSS, "CMAKE_EXPORT_COMPILE_COMMANDS": "ON", "STAMINA_CUDA": "OFF",
    }  # fmt: skip
    settings = [f"-D{name}={value}" for name, value in machine.items()]
    subprocess.run(["cmake", "-S", sources, "-B", built, "-G", "Ninja", *settings], check=True, capture_output=True)
    commands = json.loads((built / "compile_commands.json").read_text())
    assert sorted(Path(of["file"]).name for of in commands) == ["bindings.cpp", "isa_generic.cpp", "operator.cpp"]
    for of in commands:
        done = subprocess.run([*shlex.split(of["command"]), *flags], cwd=of["directory"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@needs_cross
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="no qemu-aarch64 on PATH; Debian: qemu-user")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_runs_on_aarch64(known, tmp_path):
    compiled(NATIVE / "headers.cpp", tmp_path / "headers.o", "-O1", compiler=CROSS)
    headers = linked(tmp_path / "headers", [tmp_path / "headers.o"], "-static", compiler=CROSS)
    passed("qemu-aarch64", headers, known)
    passed("qemu-aarch64", operator(tmp_path, ["generic"], "-O1", "-static", compiler=CROSS), "generic")


# ---- names ---------------------------------------------------------------------------------------------------------


def names(file, *options):
    """The names of a library or object that `nm` lists, without their versions."""
    done = subprocess.run(["nm", "-C", "--format=just-symbols", *options, file], capture_output=True, text=True, check=True)
    return [line.split("@")[0] for line in done.stdout.splitlines()]


@needs_compiler
@pytest.mark.parametrize("name", FLAGS)
def test_an_instruction_set_defines_only_its_own_names(tmp_path, name):
    """Two definitions of one name are one to the linker, which might take that of a machine with more instructions.

    Nothing is inlined here, so that whatever could be emitted is.
    """
    if name != "generic" and not is_x86():
        pytest.skip("not this compiler's processor")
    compiled(CPU / f"isa_{name}.cpp", tmp_path / "set.o", *FLAGS[name])
    defined = names(tmp_path / "set.o", "--defined-only", "--extern-only")
    assert f"stamina::{name}::float32" in defined
    assert [n for n in defined if f"stamina::{name}::" not in n] == []


LIBRARIES = [found.origin for name in ("_C_cpu", "_C_cuda") if (found := find_spec(f"stamina_fast.{name}"))]


@pytest.mark.skipif(not LIBRARIES, reason="no compiled library is installed")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on PATH; install binutils")
def test_a_library_shows_nothing_and_asks_for_stable_names():
    """Nothing of ours or of torch's is exported; of torch, only its stable ABI, which is C, is asked for."""
    for library in LIBRARIES:
        shown = names(library, "-D", "--defined-only")
        assert [n for n in shown if "stamina" in n or "torch" in n] == []
        asked = names(library, "-D", "--undefined-only")
        assert [n for n in asked if any(space in n for space in ("at::", "c10::", "torch::"))] == []
        assert [n for n in asked if n.startswith(("aoti_torch_", "torch_"))]
