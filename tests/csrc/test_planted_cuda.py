"""The tests of csrc/cuda have teeth: each of these bugs, planted in a copy of the sources, makes test_cuda_kernels.py fail.

A bug is a file, what stands there, what is planted instead, and which of those tests look there. The emulation runs them; bugs
that only touch memory are looked for under the sanitizer of addresses. A product is a meeting of the lanes there, which it is
not for a GPU's memory: a missing __syncwarp beside one shows only under compute-sanitizer.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import cudaemulation
import pytest

pytestmark = [
    pytest.mark.skipif(cudaemulation.COMPILER is None, reason="no C++ compiler"),
    pytest.mark.timeout(1200),
]

# which tests look there: a part of their names, as pytest's -k takes it
VALUES, FOLDS, MASKS = "specification", "fold", "one_mask"
ORDER, HOPPER = "order", "sm_90"
PLANTED = {
    # what every kernel shares
    "the noisy gate is upside down": (
        "residual.h", "core::greater(u, core::odds_against(product[v], bias, u))",
        "core::greater(core::odds_against(product[v], bias, u), u)", VALUES),
    "every span draws the noise of the first": ("residual.h", "static_cast<uint32_t>(span) * core::LANES", "0", VALUES),
    "both rows of a lane draw one noise": ("residual.h", "static_cast<uint32_t>(strip.row + 8 * half)",
                                           "static_cast<uint32_t>(strip.row)", VALUES),
    "only the first 16 ranks count": ("residual.h", "for (int step = 1; step <", "for (int step = 1; step < 0 &&", VALUES),
    "the noisy margin is upside down": ("residual.h", "core::fused(-e, u, e) - u", "u - core::fused(-e, u, e)", MASKS),
    "the plain margin is upside down": ("residual.h", "(0.0f - bias) - product[v]", "product[v] - (0.0f - bias)", MASKS),
    "a gate at exactly 0 is open": ("residual.h", "(0.0f - bias) - product[v]", "-bias - product[v]", MASKS),
    "c has the wrong sign in a margin": ("residual.h", "bias * static_cast<float>(-core::LOG2E)",
                                         "bias * static_cast<float>(core::LOG2E)", MASKS),
    "the wrong half of the noise is parked": ("residual.h", "{a[2], b[2], a[3], b[3]}", "{a[0], b[0], a[1], b[1]}", MASKS),
    "parked noise comes back to other columns": ("residual.h", "{a[2], b[2], a[3], b[3]}", "{a[2], a[3], b[2], b[3]}", MASKS),
    "all threads park in one place": ("residual.h", "* WARP + static_cast<int>(threadIdx.x)] = ", "* WARP] = ", MASKS),
    # packing and sums
    "a tile takes the next projection's rows": ("pack.h", "at.row >= end ||", "at.row >= job.rows ||", VALUES),
    "the sum keeps the last part": ("pack.h", "sum += f.part[", "sum = f.part[", VALUES),
    "X is packed eight tokens at a time": ("layout.h", "{0, index % tokens, index / tokens * HALVES + number}",
                                           "{0, index % tokens / 8 * 8 + number, index / tokens * HALVES + index % 8}", VALUES),
    # the forward
    "the forward leaves the residual out": (
        "forward.h", "multiply<T>(sums[token_tile + n], residual[h], b[2 * n], b[2 * n + 1]);", "", VALUES),
    "the forward does not wait for its copies": ("forward.h", "copies_left<0>();", "copies_left<1>();", VALUES),
    "all blocks see the first tokens": (
        "forward.h", "f.x + eight * f.packed_tokens + static_cast<int64_t>(blockIdx.y) * TILES * HALVES;",
        "f.x + eight * f.packed_tokens;", VALUES),
    "the forward's copies overwrite what is read": ("forward.h", "copies_left<0>();\n    __syncthreads();", "copies_left<0>();",
                                                    ORDER),
    "y is written to the next projection": ("forward.h", "whole && tile.first + row + HALVES <= tile.end", "whole", ORDER),
    "y is staged over X that is still read": ("forward.h", "engine.finish();\n  __syncthreads();", "engine.finish();", ORDER),
    "neighbours change masks": ("forward.h", "margin[h][0], margin[h][1])", "margin[h][1], margin[h][0])", MASKS),
    "parked noise never comes back": ("forward.h", "Engine::NOISE_HELD) noise", "-1) noise", MASKS),
    # that of sm_90
    "it waits for the phase before": ("forward.h", "chunk / STAGES % 2)", "(chunk / STAGES + 1) % 2)", HOPPER),
    "it waits for the first phase alone": ("forward.h", "chunk / STAGES % 2)", "0)", HOPPER),
    "it waits for no phase": ("forward.h", "barrier_wait(barrier(chunk), chunk / STAGES % 2);", "", HOPPER),
    "it waits for fewer bytes": ("forward.h", "COLUMNS / HALVES * bytes", "bytes", HOPPER),
    "it does not wait for W": ("forward.h", "copies_left<STAGES - 2>()", "copies_left<STAGES - 1>()", HOPPER),
    "it copies over X that is still to be multiplied": ("forward.h", "products_left<0>();\n    copies", "copies", ORDER),
    "it copies over what slow warps read": ("forward.h", "% 2);\n    __syncthreads();", "% 2);", ORDER),
    "its barriers are used before they are there": ("forward.h", "(stage));\n    }\n    __syncthreads();", "(stage));\n    }",
                                                    ORDER),
    "it stores sums that are not there": ("forward.h", "finish() { products_left<0>(); }", "finish() {}", HOPPER),
    "its sums start from whatever was there": ("forward.h", "h > 0 || !first", "true", HOPPER),
    "its sums start anew": ("forward.h", "h > 0 || !first", "h > 0", HOPPER),
    "its two sub-blocks have one X": ("forward.h", "matrices_after(x, h * BLOCK", "matrices_after(x, 0 * BLOCK", HOPPER),
    "its second eight columns are the next tokens": ("forward.h", "column / HALVES * At::EIGHT, At::EIGHT)",
                                                     "column / HALVES * At::EIGHT, 128)", HOPPER),
    "its two sub-blocks have one W": ("forward.h", "column + BLOCK, w[1]", "column, w[1]", HOPPER),
    "it leaves the residual out": ("forward.h", "multiply_async<T>(sums, residual[h], here, true);", "", HOPPER),
    # dx
    "dx leaves the residual out": ("input.h", "multiply<T>(acc[m][token_tile], of_delta[m], g0, g1);", "", VALUES),
    "dx does not wait for its copies": ("input.h", "copies_left<1>();", "copies_left<2>();", VALUES),
    "the splits of dx overwrite each other": ("input.h", "(split * f.tokens + token)", "(token)", VALUES),
    "the residual is overwritten while it is read": (
        "input.h", "overwrites the residual and fills the other buffers\n    __syncthreads();", "\n", ORDER),
    "a residual is read before it is there": ("input.h", "copies_left<1>();\n    __syncthreads();", "copies_left<1>();",
                                              ORDER),
    # the gradients of the factors
    "dA and dB take every entry of dW": ("factors.h", "dw[v] = open[v] ? dw[v] : 0.0f", "dw[v] = dw[v]", VALUES),
    "dL takes only the open entries": ("factors.h", "(dw[v] * ab[v]) * slope", "(dw[v] * ab[v]) * (slope * open[v])", VALUES),
    "the rest of a split number is dropped": ("factors.h", "rest(value - head)", "rest(0.0f * value)", VALUES),
    "a warp's share of dA is lost": ("factors.h", "sum += shares[warp", "sum = shares[warp", VALUES),
    "dB of ranks over 16 goes to the first": ("factors.h", "rank = rank0 + place.row", "rank = place.row", VALUES),
    "c is pulled by entries that are not there": ("factors.h", "PENALTIES && column < f.stack.k && strip.exists(v / 2)",
                                                  "PENALTIES", VALUES),
    "dc is that of one sub-block": ("factors.h", "d_bias += ab[0][v] + ab[1][v]", "d_bias += ab[0][v]", VALUES),
    "shares are summed before they are there": ("factors.h", "__syncthreads();\n      store_left(", "store_left(", ORDER),
    "shares are overwritten while they are summed": ("factors.h", "rank0, shares);\n      __syncthreads();", "rank0, shares);",
                                                     ORDER),
    # the fold and the penalties
    "the fold has no gate": ("fold.h", "core::fold_element(entry, d[h][v], core::gate_open(l[h][v], bias))",
                             "core::fold_element(entry, d[h][v])", FOLDS),
    "all tasks have the first one's bias": ("fold.h", "bias[task * f.groups + tile.group]", "bias[tile.group]", FOLDS),
    "forgetting is not squared": ("fold.h", "overlap = core::fused(pull, pull, overlap)", "overlap += pull", VALUES),
    "the density counts rows that are not there": ("fold.h", "if (!strip.exists(v / 2) || column", "if (column", VALUES),
    "penalties are summed before they are there": ("fold.h", "overlap;\n  __syncthreads();", "overlap;", ORDER),
}
# under the sanitizer of addresses, where every tensor is an allocation of its own
MEMORY = {
    "a tile's copies of W go on past it": ("forward.h", "n < rows_ && column < columns_);", "true);", VALUES),
    "y is written past its last token": ("forward.h", "if (first_token + token >= f.tokens) continue;", "", VALUES),
    "the last tokens are copied as a whole block": ("forward.h", "left < TILES * HALVES ?", "left < 0 ?", HOPPER),
    "noise is parked past its place": ("forward.h", "BYTES = BARRIERS_AT + STAGES * static_cast<int>(sizeof(uint64_t))",
                                       "BYTES = PARKED_AT", HOPPER),
    "a row is read past its columns": ("residual.h", "exists && column + n < columns ? at", "exists ? at", VALUES),
    "more is packed than there is": ("pack.h", "if (index >= job.words) return;", "", VALUES),
    "a sum is written past its end": ("pack.h", "if (at >= f.width) return;", "", VALUES),
    "dx is written past its last token": ("input.h", "column < stack.k && token < f.tokens", "column < stack.k", VALUES),
    "dx reads rows past its tile": ("input.h", "exists = row < tile.end &&", "exists =", VALUES),
    "dA is written past its rows": ("factors.h", "row < tile.end && rank < ranks", "rank < ranks", VALUES),
    "dB is written past its ranks": ("factors.h", "rank < ranks && column < f.stack.k", "column < f.stack.k", VALUES),
    "the fold writes rows past its tile": ("fold.h", "if (strip.exists(n % 2)) store_after", "store_after", FOLDS),
    "the fold writes past its columns": ("fold.h", "if (column + n >= f.stack.k) break;", "", FOLDS),
}
ALL = [(kind, bug) for kind, bugs in (("values", PLANTED), ("memory", MEMORY)) for bug in bugs]
# every run plants these, in each file at least one; the long run plants all
QUICK = {
    "the noisy gate is upside down", "the sum keeps the last part", "X is packed eight tokens at a time",
    "the forward leaves the residual out", "its two sub-blocks have one W", "dx leaves the residual out",
    "dA and dB take every entry of dW", "the fold has no gate",
}  # fmt: skip
# flags of the compiler
KINDS = {"values": (), "memory": ("-fsanitize=address", "-g1", "-Wno-clobbered")}
# the sources that a changed header is compiled into; of layout.h, what packs
REACHED = {"residual.h": ("forward", "input", "factors", "fold"), "layout.h": ("pack",)}
PROGRAM = """
import sys
from pathlib import Path

support, file, library, which = sys.argv[1:]
sys.path.insert(0, support)
import cudaemulation
import pytest

cudaemulation.build = lambda folder: Path(library)
sys.exit(pytest.main(["-x", "-q", "-s", "-p", "no:cacheprovider", "-m", "long or not long", "-k", which, file]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of a kind: the library of the sources as they are, built once, and the commands for each source and for the linker."""

    @cache
    def built(kind):
        commands, run = [], subprocess.run

        def noted(command, **options):
            commands.append(command)
            return run(command, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "run", noted)
            library = cudaemulation.build(tmp_path_factory.mktemp(kind), *KINDS[kind])
        *compiles, link = commands
        by_source = {Path(command[command.index("-c") + 1]).stem: command for command in compiles}
        return SimpleNamespace(library=library, compiles=by_source, link=link)

    return built


def planted(folder, whole, file, old, new):
    """The library with one bug, which only the sources that include its file are compiled for."""
    root = cudaemulation.ROOT
    for place in ("csrc/core", "csrc/cuda", "tests/csrc/cuda"):
        shutil.copytree(root / place, folder / place)
    path = folder / "csrc" / "cuda" / file
    text = path.read_text()
    assert text.count(old), f"{file} no longer says {old!r}"
    path.write_text(text.replace(old, new))

    library, objects = folder / "planted.so", {}
    for name in REACHED.get(file, (path.stem,)):
        *command, target = whole.compiles[name]
        for place in ("csrc", "tests"):
            command = [word.replace(f"{root / place}/", f"{folder / place}/") for word in command]
        objects[target] = str(folder / f"{name}.o")
        subprocess.run([*command, objects[target], "-w"], check=True, timeout=300)
    link = [str(library) if word.endswith(".so") else objects.get(word, word) for word in whole.link]
    subprocess.run(link, check=True, timeout=300)
    return library


def outcome(library, kind, which):
    """A process in which the tests of these names use this library."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    if kind == "memory":
        where = [cudaemulation.COMPILER, "-print-file-name=libasan.so"]
        environment["LD_PRELOAD"] = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    support, here = Path(cudaemulation.__file__).parent, Path(__file__)
    command = [sys.executable, "-c", PROGRAM, support, here.with_name("test_cuda_kernels.py"), library, which]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=cudaemulation.ROOT, env=environment)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found_where_nothing_is_planted(whole, kind):
    """Under the sanitizer: no kernel, on no shape of its tests, touches what is not of its tensors or its shared memory."""
    done = outcome(whole(kind).library, kind, "test")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("kind", "bug"), [pytest.param(kind, bug, marks=() if bug in QUICK else pytest.mark.long) for kind, bug in ALL]
)
def test_is_caught(tmp_path, whole, kind, bug):
    *change, which = (PLANTED if kind == "values" else MEMORY)[bug]
    done = outcome(planted(tmp_path, whole(kind), *change), kind, which)
    assert done.returncode != 0, f"no test sees that {bug}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    if kind == "memory":
        assert "AddressSanitizer" in done.stdout + done.stderr, done.stdout + done.stderr
    elif done.returncode > 0:
        # else the process ended: the emulation saw what no GPU does, or another one's memory was written
        assert " failed" in done.stdout, done.stdout + done.stderr
