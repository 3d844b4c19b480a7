"""What csrc/cuda/ptx.h says to a GPU, read off its text: the emulation has other words for it, and only this looks here."""

import re
import struct
import subprocess

import pytest
from cudaemulation import COMPILER, SOURCES

TEXT = (SOURCES / "ptx.h").read_text()
HALVES = [0, 1, 2, 255, 256, 32767, 32768, 65534, 65535]


def bits(number):
    return struct.unpack("<I", struct.pack("<f", number))[0]


def permuted(a, b, selector):
    """prmt.b32 in its default mode: byte n of the result is byte s % 8 of the pair (b, a), s the selector's digit n in base 16;
    from 8 on, the sign of that byte eight times."""
    pair, result = a | b << 32, 0
    for n in range(4):
        s = selector >> 4 * n & 15
        byte = pair >> 8 * (s % 8) & 0xFF
        result |= (byte if s < 8 else 0xFF * (byte >> 7)) << 8 * n
    return result


def test_a_half_is_kept_below_zero():
    said = re.search(r'prmt\.b32 %0, %1, %2, (0x\w+);" : "=r"\(kept\) : "f"\(margin_low\), "f"\(margin_high\)', TEXT)
    selector = int(said[1], 16)
    for low in (-1e-30, -2.0, 0.0, 3.0, float("inf")):
        for high in (-1e30, -0.5, 0.0, 1e-40):
            kept = 0xFFFF * (low < 0) | 0xFFFF0000 * (high < 0)
            assert permuted(bits(low), bits(high), selector) == kept


def test_a_half_of_a_word_becomes_a_uniform():
    exponent = int(re.search(r"UNIFORM_EXPONENT = (0x\w+)u", TEXT)[1], 16)
    odd, even = (int(s, 16) for s in re.search(r'"r"\(word\), "r"\(exponent\), "n"\(ODD \? (0x\w+) : (0x\w+)\)', TEXT).groups())
    for h in HALVES:
        for selector, word in ((even, 0xABCD0000 | h), (odd, h << 16 | 0x1234)):
            above = struct.unpack("<f", struct.pack("<I", permuted(word, exponent, selector)))[0]
            assert above - (128.0 - 2.0**-17) == (h + 0.5) / 65536


def test_every_instruction_is_of_its_dtype():
    said = {"Bf16": r"\bbf16|bf16x2", "Half": r"(?<!b)f16"}
    # what is between the name of a specialisation and its end
    found = re.findall(r"template <>\nSTAMINA_DEVICE \w+ \w+<(Bf16|Half)>\(.*?\n}", TEXT, re.DOTALL)
    bodies = re.findall(r"template <>\nSTAMINA_DEVICE \w+ \w+<(?:Bf16|Half)>(\(.*?\n)}", TEXT, re.DOTALL)
    found += re.findall(r"is_same_v<T, (\w+)>\) STAMINA_WGMMA", TEXT)
    bodies += re.findall(r'is_same_v<T, \w+>\) STAMINA_WGMMA_\d+\(("\w+")\)', TEXT)
    assert len(found) == len(bodies) == 12
    for dtype, body in zip(found, bodies, strict=True):
        (other,) = said.keys() - {dtype}
        # unpacking bf16 is a shift
        assert re.search(said[dtype], body) or "<< 16" in body, body
        assert not re.search(said[other], body), body


@pytest.mark.parametrize(("tokens", "name"), [(10, "STAMINA_WGMMA_80"), (20, "STAMINA_WGMMA_160")])
def test_a_product_of_four_warps_names_every_number_once(tokens, name):
    text = re.search(rf"#define {name}\(type\)(.*?)(?=#define|\n\n)", TEXT, re.DOTALL)[1]
    text = re.sub(r'["\\\s]+', " ", text)
    assert f"m64n{8 * tokens}k16" in text
    sums, a, rest = re.search(r"\{ (%0.*?)\}, \{(%\d+.*?)\}, (%\d+, p, 1, 1, 0); \}", text).groups()
    count = 4 * tokens
    assert [int(n) for n in re.findall(r"%(\d+)", sums)] == list(range(count))
    assert [int(n) for n in re.findall(r"%(\d+)", a)] == list(range(count, count + 4))
    # the descriptor of operand B; then the predicate, which is the last operand
    assert rest.startswith(f"%{count + 4},")
    assert f"setp.ne.b32 p, %{count + 5}, 0;" in text
    assert [int(n) for n in re.findall(r"STAMINA_FOUR\((\d+)\)", text)] == list(range(tokens))


PROGRAM = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
struct uint4 { uint32_t x, y, z, w; };
inline uint4 __ldg(const uint4* from) { return *from; }
inline float __uint_as_float(uint32_t) { return 0.0f; }
inline uint32_t __float_as_uint(float) { return 0; }
inline uint64_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
#include "ptx.h"
int main(int, char** of) {
  const auto number = [&](int n) { return static_cast<uint32_t>(std::strtoul(of[n], nullptr, 10)); };
  const uint64_t first = stamina::cuda::matrices_at(reinterpret_cast<void*>(static_cast<uintptr_t>(number(1))), number(2));
  std::printf("%llu\\n", static_cast<unsigned long long>(stamina::cuda::matrices_after(first, number(3))));
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_descriptor_says_where_its_matrices_are(tmp_path):
    """PTX ISA, "Matrix Descriptor Format", without swizzling: 14 bits each of address, of the step over 8 k and of that over 8
    columns, in units of 16 bytes, at bits 0, 16 and 32."""
    (tmp_path / "program.cpp").write_text(PROGRAM)
    program = tmp_path / "program"
    subprocess.run([COMPILER, "-std=c++17", "-O1", f"-I{SOURCES}", "-w", "-o", program, tmp_path / "program.cpp"], check=True)
    for address, step, further in ((0, 1280, 0), (1024, 1280, 4 * 1280), (197632, 2560, 4 * 2560)):
        done = subprocess.run([program, str(address), str(step), str(further)], capture_output=True, text=True, check=True)
        said = int(done.stdout)
        assert [said >> at & 0x3FFF for at in (0, 16, 32)] == [(address + further) // 16, step // 16, 128 // 16]
        # no base offset, no swizzling
        assert said >> 46 == 0
