"""The tests of csrc/core and csrc/cpu have teeth: each of these bugs, planted in a copy of the sources, makes one fail.

A bug is a file, what stands there, and what is planted instead. The tests are the programs of tests/csrc/native, compiled
without inlining; bugs that only touch memory are looked for under the sanitizers.
"""

import shutil
import subprocess
from functools import cache
from types import SimpleNamespace

import pytest
from nativeanswers import answers
from nativebuild import FLAGS, GXX, ROOT, SANITIZE, compiled, is_x86, linked

pytestmark = [pytest.mark.skipif(GXX is None, reason="no g++ on PATH; install a C++ compiler"), pytest.mark.timeout(600)]

# seen by tests/csrc/native/headers.cpp
CORE = {
    "another number of rounds": ("philox.h", "constexpr int ROUNDS = 7", "constexpr int ROUNDS = 6"),
    "a row's words take another key": ("philox.h", "made.x2 = high ^ key.after(1).k1", "made.x2 = high ^ key.after(2).k1"),
    "a group's words take another key": ("philox.h", "high ^ U(key.after(2).k1)", "high ^ U(key.after(1).k1)"),
    "every span draws the noise of the first": ("philox.h", "column / SPAN * LANES + column % LANES", "column % LANES"),
    "the halves of a word change places": ("philox.h", "word >> 16 : word & U(0xffffu)", "word & U(0xffffu) : word >> 16"),
    "the upper half of the step is lost": ("philox.h", "U(static_cast<uint32_t>(wide >> 32))}", "U(0u)}"),
    "u can be 0": ("philox.h", "F(128.0f - 0x1p-17f)", "F(128.0f)"),
    "the upper half of a product is shifted": ("lanes.h", "product >> 32", "product >> 31"),
    "least is most": ("lanes.h", "a < b ? a : b", "a < b ? b : a"),
    "ties of bf16 go away from zero": ("rounding.h", "U(0x7fffu) + ((value >> 16) & U(1u))", "U(0x8000u)"),
    "not-a-number becomes infinity in bf16": ("rounding.h", "(value >> 16) | U(0x40u)", "value >> 16"),
    "ties of half go away from zero": ("rounding.h", "0xfffu + ((magnitude >> 13) & 1u)", "0x1000u"),
    "subnormal halves lose a bit": ("rounding.h", "magnitude >= 0x38800000u", "magnitude >= 0x38000000u"),
    "an infinite half is 65536": ("rounding.h", "magnitude < 0x7c00u ? scaled", "magnitude <= 0x7c00u ? scaled"),
    "c has the wrong sign": ("gate.h", "greater(product, F(0.0f) - bias)", "greater(product, F(0.0f) + bias)"),
    "exp without its factor for c": ("gate.h", "bias * F(-LOG2E)", "bias * F(-1.0f)"),
    "the slope is s squared": ("gate.h", "(u * inverse) * (capped * inverse)", "(u * inverse) * (u * inverse)"),
    "the tempered slope forgets 1 / tau": ("gate.h", "(inverse * inverse_tau)", "inverse"),
    "the slope of the density is the density": ("gate.h", "return (capped * inverse) * inverse", "return inverse"),
    "a coefficient of 2^x": ("gate.h", "F(2.40221197207513e-1f)", "F(2.40121197207513e-1f)"),
    "a coefficient of log2": ("gate.h", "F(1.0f / 3)", "F(1.0f / 2.9f)"),
    "the fold makes 0.0 of -0.0": ("fold.h", "choose(both(open, differ(residual, F(0.0f))),", "choose(open,"),
}

# seen by tests/csrc/native/operator.cpp
OPERATOR = {
    "lanes that all draw for the first": ("lanes_generic.h", "WordVector{0, 1, 2, 3}", "WordVector{0, 0, 0, 0}"),
    "the density counts columns that are not there": ("spans.h", "c < span.count ? T(1) : T(0)", "T(1)"),
    "every projection has the first one's right factor": ("spans.h", "rows.group * factors.steps * columns +", "0 +"),
    "the vectors of a span repeat their noise": ("spans.h", "(span.first) + i * F::width", "(span.first)"),
    "the noisy gate is upside down": ("spans.h", "greater(u, odds_against(product, bias, u))",
                                      "greater(odds_against(product, bias, u), u)"),
    "the residual meets x unrounded": ("spans.h", "if constexpr (sizeof(Store) == 2)", "if constexpr (sizeof(Store) == 1)"),
    "c is that of the first projection": ("spans.h", "(gate.bias)[group]", "(gate.bias)[0]"),
    "a product overwrites what it should add to": ("product.h", "add ? load(to, F()) + sums[m][v] : sums[m][v]", "sums[m][v]"),
    "a long sum repeats its first chain": ("product.h", "right += steps * right_stride;", ""),
    "a block leaves its last row out": ("product.h", "rows == ROWS) return block<E, ROWS, VECTORS>",
                                        "rows == ROWS) return block<E, ROWS - (ROWS > 1), VECTORS>"),
    "the penalties are one": ("forward.h", "f.sums[2 * strip + 1] = sums[1]", "f.sums[2 * strip + 1] = sums[0]"),
    "all blocks of tokens see the first": ("forward.h", "x += tokens * (columns / VALUES)", "x += 0"),
    "forgetting is not squared": ("forward.h", "overlap = fused(met, met, overlap)", "overlap = overlap + met"),
    "S pulls with its sign": ("backward.h", "(s * s) * (delta * twice)", "s * (delta * twice)"),
    "dA and dB take every entry of dW": ("backward.h", "store(room.d_weight + at, masked<MODE>(d, product, bias, u))",
                                         "store(room.d_weight + at, d)"),
    "dL takes only the open entries": ("backward.h", "(d * residual) * slope", "(d * delta) * slope"),
    "dc keeps the last vector alone": ("backward.h", "sum.add(d_logits);", "sum.sum = d_logits;"),
    "c is pulled by columns that are not there": ("backward.h", "load(room.exists + c, F()), soft", "F(1.0f), soft"),
    "dx leaves the last row out": ("backward.h", "vectors, rows.rows, {room.grad, BACKWARD_ROWS, 1}",
                                   "vectors, rows.rows - 1, {room.grad, BACKWARD_ROWS, 1}"),
    "the gradient's columns are taken for contiguous": ("backward.h", "rows.first * f.grad.column", "rows.first"),
    "dx leaves the residual out": ("backward.h", "load(weight + c, F()) + rounded<Store>(delta)", "load(weight + c, F())"),
    "the fold leaves the second task out": ("fold.h", "for (int64_t i = 1; i < f.count", "for (int64_t i = 2; i < f.count"),
    "the fold repeats the first ranks": ("fold.h", "right + done * columns, columns", "right, columns"),
    "the fold has no gate": ("fold.h", "gate ? fold_element(before, sums[m][v], open[m][v]) :", "false ? before :"),
    "the fold rounds between tasks": ("fold.h", "store(wide + c + v * F::width, sums[m][v])",
                                      "store(wide + c + v * F::width, rounded<Store>(sums[m][v]))"),
    "dc is that of the last piece": ("operator.cpp", "[pieces[i].rows.group] += dc[i]", "[pieces[i].rows.group] = dc[i]"),
    "a penalty is that of the last strip": ("operator.cpp", "penalties[i % 2] += sums[i]", "penalties[i % 2] = sums[i]"),
    "only the last part counts": ("operator.cpp", "row[c] += part[i * columns + c]", "row[c] = part[i * columns + c]"),
    "the density is spread over padding": ("operator.cpp", "(rows * k, 1)", "(rows * columns, 1)"),
    "dx starts from whatever was there": ("operator.cpp", "std::fill_n(dx[split], tokens * columns, T(0));", ";"),
    "every projection has the first one's transposed factor": ("pack.h", "(g * rank + r) * k + c]", "r * k + c]"),
    "x's columns are taken for contiguous": ("pack.h", "from[t * x.row + c * x.column]", "from[t * x.row + c]"),
}
# under the sanitizers of addresses and undefined behaviour
MEMORY = {
    "a strip runs into the next projection": ("operator.cpp", "std::min(most, sizes[group] - done)", "most"),
    "y is written past its last token": ("forward.h", "t < smaller(tokens, f.tokens - t0)", "t < tokens"),
    "a span's end is read as a whole vector": ("spans.h", "matrix.column == 1 && span.count == span.lanes) return from",
                                               "matrix.column == 1) return from"),
    "the fold writes past its columns": ("fold.h", "return matrix.column == 1 && span.count == span.lanes; }",
                                         "return matrix.column == 1; }"),
    "x is read past its tokens": ("pack.h", "t0 + t < tokens && c < problem_.k", "c < problem_.k"),
    "a factor is read past its columns": ("pack.h", "c < problem_.k ? core::widen(row[c]) : T(0)", "core::widen(row[c])"),
    "scratch has no room for a row of W": ("backward.h", "row(scratch.take<Store>(SPAN)) {}", "row(scratch.take<Store>(0)) {}"),
}
# under the sanitizer of threads
THREADS = {
    "threads share their scratch": ("pack.h", "workers.fetch_add(1) * stride", "0 * workers.fetch_add(1) * stride"),
}
# of the code for machines that multiply pairs of bf16, and of AVX2
PAIRS = {
    "an odd rank is paired with the next row": ("pack.h", "2 * i + 1 < rank ? pair[1] : Bf16{}", "pair[1]"),
    "the first token of a pair keeps what was there": ("backward.h", "t % 2 ? pair | value << 16 : value", "pair | value"),
    "the weight's product forgets the residual's": ("forward.h", "weight, x, tokens, room.out, TOKEN_BLOCK, true",
                                                    "weight, x, tokens, room.out, TOKEN_BLOCK, false"),
}
WIDE = {
    "odd lanes take even lanes' product": ("lanes_avx2.h", "epi64(even, 32), odd, 0xAA", "epi64(even, 32), odd, 0x55"),
    "half a vector of bf16 is stored twice": ("lanes_avx2.h", "extracti128_si256(low, 1)", "castsi256_si128(low)"),
}
# a folder of csrc, an instruction set, flags, the bugs, and what a sanitizer says of them
KINDS = {
    "core": ("core", None, (), CORE, ""),
    "operator": ("cpu", "generic", (), OPERATOR, ""),
    "memory": ("cpu", "generic", tuple(SANITIZE), MEMORY, "AddressSanitizer"),
    "threads": ("cpu", "generic", ("-O1", "-fsanitize=thread"), THREADS, "ThreadSanitizer"),
    "pairs": ("cpu", "avx512_bf16", (), PAIRS, ""),
    "wide": ("cpu", "avx2", (), WIDE, ""),
}
# a part of a program: its source, and its own flags
PARTS = {
    "headers": "tests/csrc/native/headers.cpp", "test": "tests/csrc/native/operator.cpp", "operator": "csrc/cpu/operator.cpp",
}  # fmt: skip
PARTS |= {name: f"csrc/cpu/isa_{name}.cpp" for name in FLAGS}
# every run plants these, in each header of numbers and in each kernel one; the long run plants all
QUICK = {
    "a row's words take another key", "ties of bf16 go away from zero", "the tempered slope forgets 1 / tau",
    "the fold makes 0.0 of -0.0", "all blocks of tokens see the first", "dA and dB take every entry of dW",
    "the fold leaves the second task out", "only the last part counts",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of known answers, and the objects of the sources as they are, each compiled once."""
    folder = tmp_path_factory.mktemp("whole")
    answers(folder)

    @cache
    def part(name, flags):
        target = folder / f"{name}{len(list(folder.iterdir()))}.o"
        compiled(ROOT / PARTS[name], target, *flags, *FLAGS.get(name, []))
        return target

    return SimpleNamespace(folder=folder, part=part)


def planted(folder, kind, file, old, new):
    """The object of the one part of its program that a bug reaches, from a copy of the sources that has it."""
    place, instructions, flags, *_ = KINDS[kind]
    for name in ("csrc/core", "csrc/cpu", "tests/csrc/native"):
        shutil.copytree(ROOT / name, folder / name)
    path = folder / "csrc" / place / file
    text = path.read_text()
    assert text.count(old), f"{file} no longer says {old!r}"
    path.write_text(text.replace(old, new))
    part = "headers" if place == "core" else "operator" if file in ("operator.cpp", "pack.h") else instructions
    compiled(folder / PARTS[part], folder / "part.o", "-w", *flags, *FLAGS.get(part, []))
    return {part: folder / "part.o"}


def verdict(folder, whole, kind, changed):
    """What the program of this kind says with some of its parts changed, once it has run."""
    place, instructions, flags, *_ = KINDS[kind]
    if instructions not in (None, "generic") and not is_x86():
        pytest.skip("not this compiler's processor")
    names = ["headers"] if place == "core" else ["test", "operator", instructions]
    objects = [changed[name] if name in changed else whole.part(name, flags) for name in names]
    program = linked(folder / "program", objects, *flags)
    argument = whole.folder if place == "core" else instructions
    done = subprocess.run([program, argument], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    return done


@pytest.mark.parametrize("kind", [k if k in ("core", "operator") else pytest.param(k, marks=pytest.mark.long) for k in KINDS])
def test_nothing_is_found_where_nothing_is_planted(tmp_path, whole, kind):
    done = verdict(tmp_path, whole, kind, {})
    assert done.stdout == "0 failures\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "bug"),
    [pytest.param(kind, bug, marks=() if bug in QUICK else pytest.mark.long) for kind in KINDS for bug in KINDS[kind][3]],
)
def test_is_caught(tmp_path, whole, kind, bug):
    *_, bugs, says = KINDS[kind]
    done = verdict(tmp_path, whole, kind, planted(tmp_path, kind, *bugs[bug]))
    assert done.returncode != 0, f"no test sees that {bug}"
    assert says in done.stderr
    if not says:
        assert done.stdout, done.stderr


def test_the_quick_ones_exist():
    assert QUICK <= {bug for kind in KINDS.values() for bug in kind[3]}
