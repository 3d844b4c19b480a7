"""Memory safety: no kernel reads or writes outside its tensors, and no two programs of a launch meet in one element.

Everything a launcher is given or makes lies between guards of NaN, in an interpreter that checks each address. That both see
something is shown with copies of the kernels in which one half of one mask is missing.
"""

import ast
import os
import random
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import DEVICE, everything, problem, run, strided
from checked import Checked, Guards
from plantedkernels import KERNELS, copy  # noqa: F401
from triton.runtime.errors import InterpreterError

from stamina_fast.kernels import tiles
from stamina_fast.ops.backend import Factors
from stamina_fast.ops.triton import Triton

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="through the interpreter; compute-sanitizer has a GPU's")

# tokens, k, sizes, r, s: each dimension at 1, at tiles and one next to them, at primes
SHAPES = [
    (1, 1, (1,), 1, 1),
    (15, 33, (16, 0, 1), 16, 15),
    (16, 31, (15, 17), 15, 17),
    (17, 32, (63,), 17, 16),
    (3, 65, (65, 2), 3, 5),
    (2, 129, (0, 5, 0), 2, 1),
    (5, 255, (3,), 1, 2),
    (33, 257, (7,), 1, 3),
]
MANY = {
    "tokens": (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129),
    "k": (1, 7, 31, 32, 33, 63, 64, 65, 127, 129, 191, 193, 255, 256, 257, 300),
    "rows": (0, 1, 3, 15, 16, 17, 63, 64, 65, 70),
    "rank": (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 80),
}


def guarded(shape, dtype, kind, gate, penalised):
    """`everything` of arguments between guards, every access checked: no NaN comes in, nothing else is changed."""
    plain, guards = problem(*shape, dtype, gate=gate), Guards()
    arguments = [t if t is None else guards.around(strided(t, kind) if kind != "plain" and t.ndim > 1 else t) for t in plain]
    with guards, Checked(guards):
        made = everything(Triton(), arguments, shape[2], penalised)
    guards.assert_intact()
    for argument, tensor in zip(arguments, plain, strict=True):
        assert tensor is None or torch.equal(argument, tensor)
    assert all(tensor.isfinite().all() for tensor in made)


def random_shape(seed):
    draw = random.Random(seed)
    # without any row nothing would be launched
    sizes = (*(draw.choice(MANY["rows"]) for _ in range(draw.randint(0, 2))), draw.choice(MANY["rows"][1:]))
    return draw.choice(MANY["tokens"]), draw.choice(MANY["k"]), sizes, draw.choice(MANY["rank"]), draw.choice(MANY["rank"])


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=map(str, SHAPES))
def test_every_access_is_inside(index, monkeypatch):
    """Half of the shapes with a GPU's tiles, a third behind other strides, some without gate or penalties."""
    if index % 2:
        monkeypatch.setattr(tiles, "interpreted", lambda: False)
    dtype = (torch.float16, torch.float16, torch.float32)[index % 3]
    guarded(SHAPES[index], dtype, ("plain", "transposed", "gaps")[index // 2 % 3], index % 5 != 2, index % 4 != 3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200))
def test_every_access_is_inside_of_many(seed, monkeypatch):
    draw = random.Random(seed)
    of_gpu = draw.random() < 0.5
    monkeypatch.setattr(tiles, "interpreted", lambda: not of_gpu)
    dtype, kind = draw.choice((torch.float16, torch.float32)), draw.choice(("plain", "transposed", "gaps"))
    guarded(random_shape(seed), dtype, kind, draw.random() < 0.9, draw.random() < 0.5)


# ---- these tests have teeth ----------------------------------------------------------------------------------------


def halves_of_masks():
    """(module, line, the line with one half of its mask missing) for every mask of a load or a store in the kernels."""
    for path in sorted(Path(KERNELS).glob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            access = isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store")
            named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "mask"
            masks = node.args[1:] if access else [node.value] if named else []
            for mask in masks:
                source, line = ast.get_source_segment(text, mask), text.splitlines()[mask.lineno - 1]
                halves = []
                if isinstance(mask, ast.BinOp) and isinstance(mask.op, ast.BitAnd):
                    halves = [ast.get_source_segment(text, half) for half in (mask.left, mask.right)]
                elif isinstance(mask, ast.Compare):
                    halves = [f"{ast.get_source_segment(text, mask.left)} >= 0"]
                yield from ((path.stem, line, line.replace(source, half)) for half in halves)


HALVES = sorted(set(halves_of_masks()))


def launch(backend, module, arguments, sizes):
    """The launchers that take the code of a module, and few others."""
    if module in ("masked_linear", "factors", "penalties"):
        run(backend, *arguments, sizes, past=arguments[2])
    elif module == "rebuild":
        backend.rebuild_(arguments[2].clone(), arguments[2], [Factors(*arguments[3:])], sizes, None)
    else:
        backend.fold_(arguments[2].clone(), Factors(*arguments[3:]), sizes, None)


@pytest.mark.parametrize(("module", "line", "bug"), HALVES, ids=[f"{module}: {bug.strip()}" for module, _, bug in HALVES])
def test_half_a_mask_is_caught(module, line, bug, copy):  # noqa: F811
    backend = copy(module, line, bug)
    guards, said = Guards(), r"outside its tensors|another program|written twice"
    with pytest.raises(InterpreterError, match=said), Checked(guards), guards:
        launch(backend, module, problem(3, 40, (7, 3), 3, 5, torch.float32), (7, 3))


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("masked_linear", "dx_ptr + split * T * k", "dx_ptr + 0 * split"),
        ("factors", "(part.to(tl.int64) * N + rows", "(0 * part.to(tl.int64) + rows"),
        ("fold", "tl.program_id(1)", "0 * tl.program_id(1)"),
    ],
)
def test_two_programs_in_one_element_are_caught(module, old, new, copy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    backend, sizes = copy(module, old, new), (7, 3)
    with pytest.raises(InterpreterError, match="another program"), Checked():
        launch(backend, module, problem(3, 300, sizes, 3, 5, torch.float16), sizes)


@pytest.mark.parametrize("module", ["masked_linear", "factors"])
def test_a_false_multiple_is_caught(module, copy):  # noqa: F811
    """Rows that are said to begin and end at multiples of 16 and do not: a GPU would read several at once and miss some."""
    backend, sizes = copy("tables", "gcd(16, *sizes)", "16"), (7, 3)
    with pytest.raises(InterpreterError, match="not a multiple of"), Checked():
        launch(backend, module, problem(3, 40, sizes, 3, 5, torch.float32), sizes)


def test_a_write_next_to_a_tensor_shows(copy):  # noqa: F811
    """Without the checked interpreter the guards alone see it."""
    backend = copy("masked_linear", "mask_n[:, None] & mask_t[None, :])", "mask_n[:, None])")
    arguments, guards = problem(3, 40, (7, 3), 3, 5, torch.float32), Guards()
    with guards:
        run(backend, *arguments, (7, 3))
    with pytest.raises(AssertionError, match="written next to a tensor of shape"):
        guards.assert_intact()


def test_a_read_next_to_a_tensor_shows(copy):  # noqa: F811
    """The guard is NaN, which no product with 0 makes harmless."""
    backend = copy("masked_linear", "mask_k[:, None] & mask_t[None, :]", "mask_t[None, :]")
    arguments, guards = problem(3, 40, (7, 3), 3, 5, torch.float32), Guards()
    y = run(backend, *(guards.around(t) for t in arguments), (7, 3))[0]
    assert y.isnan().any()
