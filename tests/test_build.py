"""Installed where something is missing: the package works as far as it can, says what it lacks, and passes its tests.

Each machine is a PATH on which those tools are not, and a fresh environment into which pip installs a copy of the sources.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = r"nvcc"
COMPILERS = r"(.*-)?(g\+\+|gcc|c\+\+|cc|c89|c99|clang|clang\+\+|icpx|icx|nvc\+\+)(-[\d.]+|-gcc)?|nvcc"
SAYS = """
import io, json
from rich.console import Console
import stamina_fast as sf
from stamina_fast import doctor

console = Console(file=io.StringIO(), width=250)
doctor.report(console)
print(json.dumps([sf.__file__, sf.backends(), console.file.getvalue()]))
"""


def path_without(folder, names):
    """A PATH with this one's programs but those whose names match."""
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in place.iterdir() if place.is_dir() else ():
            link = folder / program.name
            if not re.fullmatch(names, program.name) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


class Machine:
    """A copy of the sources, and an environment of its own with what this one has but stamina-fast."""

    def __init__(self, folder, lacking):
        self.sources, here = folder / "sources", folder / "environment"
        for name in ("stamina_fast", "kernels", "bench", "csrc", "tests"):
            shutil.copytree(ROOT / name, self.sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.reason"))
        for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.sources / name)
        venv.create(here, symlinks=True)
        self.python = here / "bin" / "python"
        self.packages = Path(self.run("import sysconfig; print(sysconfig.get_paths()['purelib'])", PATH=""))
        # a folder named in a .pth file is searched, but its own .pth files, of an editable install, are not read
        others = [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
        (self.packages / "others.pth").write_text("\n".join(others))
        self.path = path_without(folder / "bin", lacking)

    def command(self, *words, **environment):
        # a process that a test starts does not import what lies in the working folder either
        environment = {"PYTHONSAFEPATH": "1"} | environment
        plain = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDACXX", "PYTHONPATH")}
        done = subprocess.run(
            [str(word) for word in words], cwd=self.sources, capture_output=True, text=True, timeout=1500,
            env=plain | {"PATH": getattr(self, "path", "")} | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
        return done.stdout.strip()

    def run(self, program, **environment):
        # -P: not what lies in the working folder
        return self.command(self.python, "-P", "-c", program, **environment)

    def install(self):
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", self.packages]
        self.command(sys.executable, "-m", "pip", "install", *options, self.sources)
        return self

    def says(self):
        """The package's backends, and what doctor prints."""
        file, backends, doctor = json.loads(self.run(SAYS))
        assert Path(file).is_relative_to(self.packages)
        return backends, doctor

    def passes(self, *tests):
        """How many of these tests passed there, and what the others were skipped for."""
        said = self.command(self.python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600",
                            *(f"tests/{test}" for test in tests))
        return int(re.search(r"(\d+) passed", said)[1]), said


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    pytest.importorskip("scikit_build_core")
    return Machine(tmp_path_factory.mktemp("bare"), COMPILERS).install()


NO_COMPILER = "no C++ compiler was found; install one (Debian: g++), then install again with --no-build-isolation"


@pytest.mark.timeout(600)
def test_without_a_compiler_it_is_plain_python_and_says_so(bare):
    backends, doctor = bare.says()
    assert not any(bare.packages.glob("stamina_fast/*.so"))
    assert backends["reference"][0]
    assert backends["cpu"] == [False, f"the compiled part is missing: {NO_COMPILER} (README, Install)"]
    assert backends["cuda"] == [False, "the CUDA part is missing; reinstall where nvcc is found (README, Install)"]
    assert NO_COMPILER in doctor
    assert "masked_linear on this machine runs on: reference" in doctor
    passed, said = bare.passes("ops/test_reference.py", "ops/test_cpu.py", "csrc/test_native.py")
    assert passed > 10
    # of the compiled part, every test is skipped with the reason
    assert re.search(rf"SKIPPED \[\d+\] tests/ops/test_cpu.py.*{re.escape(NO_COMPILER)}", said)
    assert re.search(r"SKIPPED \[\d+\] tests/csrc/test_native.py.*no g\+\+ on PATH", said)


REAL = (
    "ops/test_operators.py", "ops/test_reference.py", "ops/test_fold.py", "adapter/test_attach.py", "adapter/test_stack.py",
    "training/test_step.py",
)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_without_a_compiler_the_tests_pass(bare):
    passed, _ = bare.passes(*REAL)
    assert passed > 100


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_without_nvcc_the_cpu_part_is_compiled_and_the_tests_pass(tmp_path):
    pytest.importorskip("scikit_build_core")
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        pytest.skip("no C++ compiler on PATH")
    machine = Machine(tmp_path, CUDA).install()
    backends, doctor = machine.says()
    assert backends["cpu"][0]
    assert backends["cuda"] == [False, "the CUDA part is missing; reinstall where nvcc is found (README, Install)"]
    assert [path.name for path in machine.packages.glob("stamina_fast/*.so")] == ["_C_cpu.so"]
    assert "masked_linear on this machine runs on: cpu" in doctor
    assert "reinstall where nvcc is found" in doctor
    passed, _ = machine.passes(*REAL, "ops/test_cpu.py", "ops/test_backends.py")
    assert passed > 200
