"""The rules of the house that no single module can hold: who may import whom, what the wheel carries, what never appears."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "stamina_fast"

# from the ground floor up: a part may import the parts of floors below it, and itself
LAYERS = (
    ("errors", "seeds", "threads", "kernels"),
    ("quiet",),
    ("ops", "pipeline", "io"),
    ("adapter",),
    ("reopen",),
    ("training", "evaluate"),
    ("tiny",),
    ("export", "doctor", "bench"),
    ("demo", "benchmark"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FOLDERS = {"stamina_fast": PACKAGE, "kernels": ROOT / "kernels", "bench": ROOT / "bench"}


def modules():
    """(part, dotted module name, file) of every module that ships."""
    for name, folder in FOLDERS.items():
        prefix = () if name == "stamina_fast" else (name,)
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if parts[-1] != "__init__" or len(parts) > 1:
                yield parts[0], ".".join(("stamina_fast", *parts)), path


def imported_parts(path: Path, module: str):
    """The parts of stamina_fast that a file imports anywhere in it, inside functions too, with the line."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "stamina_fast":
                yield (parts[1] if len(parts) > 1 else ""), node.lineno


MODULES = list(modules())


def test_the_parts_are_the_known_ones():
    assert {part for part, _, _ in MODULES} == set(LEVEL), "a new part: give it its floor in LAYERS"


@pytest.mark.parametrize(("part", "module", "path"), MODULES, ids=[module for _, module, _ in MODULES])
def test_imports_go_downwards(part, module, path):
    # names of the public surface, as in `import stamina_fast as sf`, are no parts; only tools above train use them
    upwards = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for target, line in imported_parts(path, module)
        if (target in LEVEL and target != part and LEVEL[target] >= LEVEL[part])
        or (target not in LEVEL and LEVEL[part] < LEVEL["export"])
    ]
    assert not upwards


@pytest.mark.parametrize("file", ["library", "functional"])
def test_the_operators_know_no_backend_by_name(file):
    """A new backend is a line in the table of ops/dispatch.py, and no branch anywhere."""
    from stamina_fast.ops import dispatch

    strings = {node.value for node in ast.walk(ast.parse((PACKAGE / "ops" / f"{file}.py").read_text()))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not strings & set(dispatch.BACKENDS)


def test_kernels_is_no_package():
    """A top-level package `kernels` would shadow the one that diffusers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def readers_that_run_code(tree: ast.AST):
    """Lines that read or write a format which may hold code."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module.split(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.keyword):
            names = [f"{node.arg}="]
        if RUNS_CODE.intersection(names) or {"torch.load", "torch.save", "allow_pickle="}.intersection(names):
            yield node.lineno


@pytest.mark.parametrize("source", [
    "import pickle", "from dill import loads", "torch.load(f)", "torch.save(x, f)", "from torch import load",
    "np.load(f, allow_pickle=True)",
])
def test_the_search_for_code_in_files_finds(source):
    assert list(readers_that_run_code(ast.parse(source)))


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_no_file_format_that_runs_code(folder):
    found = [
        f"{path}:{line}" for path in folder.rglob("*.py") for line in readers_that_run_code(ast.parse(path.read_text()))
    ]
    assert not found


@pytest.mark.parametrize(("folders", "most"), [(FOLDERS.values(), 400), ([ROOT / "tests"], 600)], ids=["shipped", "tests"])
def test_files_stay_readable(folders, most):
    lines = {str(path): len(path.read_text().splitlines()) for folder in folders for path in folder.rglob("*.py")}
    assert not {path: count for path, count in lines.items() if count > most}


def isolated(program: str, cwd: Path, path: Path) -> str:
    """The output of a program that sees the unpacked wheel first, and not this checkout."""
    guard = f"import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n" \
            f"sys.path.insert(0, {str(path)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + program], cwd=cwd, capture_output=True, text=True, timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["compiled", "pure"])
def wheel(request, tmp_path_factory):
    """What `pip wheel` builds here, in the build folder that this checkout has, and what it builds where it cannot compile."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    options = {"compiled": [], "pure": ["-C", "wheel.cmake=false"]}[request.param]
    subprocess.run([*build, *options, str(ROOT)], check=True, timeout=900)
    (path,) = folder.glob("*.whl")
    if request.param == "compiled" and path.name.endswith("-none-any.whl"):
        reason = PACKAGE / "_C_cpu.reason"
        pytest.skip(reason.read_text().strip() if reason.exists() else "the build fell back to plain Python: no cmake")
    return path


@pytest.mark.timeout(900)
def test_wheel_is_complete(wheel):
    compiled = not wheel.name.endswith("-py3-none-any.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
    wanted = {
        f"stamina_fast/{'' if name == 'stamina_fast' else name + '/'}{path.relative_to(folder)}"
        for name, folder in FOLDERS.items() for path in folder.rglob("*.py")
    }
    model = PACKAGE / "tiny" / "model"
    wanted |= {f"stamina_fast/{path.relative_to(PACKAGE)}" for path in model.rglob("*") if path.is_file()}
    wanted |= {f"stamina_fast/benchmark/plans/{path.name}" for path in (PACKAGE / "benchmark" / "plans").glob("*.yaml")}
    assert (model / "model_index.json").is_file()
    assert any(path.startswith("stamina_fast/kernels/") for path in wanted)
    assert wanted <= carried
    assert ("stamina_fast/_C_cpu.so" in carried) == compiled
    assert not [name for name in carried if "__pycache__" in name or name.startswith(("tests/", "kernels/", "bench/", "csrc/"))]


@pytest.mark.timeout(900)
def test_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = [f"kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")] + ["bench.run"]
    program = (
        "import importlib, torch, stamina_fast as sf\n"
        f"files = [importlib.import_module(f'stamina_fast.{{name}}').__file__ for name in {names}]\n"
        "y = sf.masked_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3, 1), torch.ones(1, 1, 2))\n"
        "print('\\n'.join([*files, sf.__file__]))\nprint(*sf.launches(), sf.backends()['cpu'][1])"
    )
    *files, last = isolated(program, tmp_path, tmp_path / "site").splitlines()
    ran, _, reason = last.partition(" ")
    assert (ran == "masked_linear/cpu") == reason.endswith("generic") == ("-none-any" not in wheel.name)
    assert ran == "masked_linear/cpu" or "missing" in reason
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in files)
    assert len(files) == len(names) + 1


@pytest.mark.parametrize("user", ["evaluate", "export", "pipeline.sampling"])
def test_what_reads_a_run_imports_nothing_of_the_trainer(user):
    program = f"import sys, stamina_fast.{user}; print([name for name in sys.modules if 'stamina_fast.training' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_does_not_import_diffusers():
    program = "import sys, stamina_fast; print(sorted({'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_operators_need_torch_alone():
    """A machine that only times or tests kernels has no picture library and no command line."""
    program = (
        "import sys; sys.modules |= dict.fromkeys(('PIL', 'pydantic', 'rich', 'typer', 'yaml', 'diffusers', 'transformers'));"
        "import torch, stamina_fast as sf;"
        "sf.masked_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3, 1), torch.ones(1, 1, 2))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("first", ["stamina_fast.adapter.attach", "stamina_fast.training.loop", "stamina_fast.ops.reference"])
def test_public_names_do_not_depend_on_what_was_imported_first(first):
    program = f"import {first}\nimport stamina_fast as sf\nfor n in sf.__all__: getattr(sf, n)\n"
    program += "assert callable(sf.attach)\nassert callable(sf.train)\nassert callable(sf.reference.masked_linear)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
