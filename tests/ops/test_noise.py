"""The noise stream: known answers, layout, extremes, injectivity."""

import cases
import pytest
import torch

import stamina_fast as sf
from stamina_fast.ops import noise as stream

# Random123's published test vectors: (counter, key, rounds, words)
KNOWN = [
    ((0,) * 4, (0,) * 2, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 7, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 7, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ((0,) * 4, (0,) * 2, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 10, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "rounds", "words"), KNOWN)
def test_philox_known_answers(counter, key, rounds, words):
    got = stream.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)), rounds)
    assert " ".join(f"{int(w):08x}" for w in got) == words


def philox_in_integers(counter, key):
    """Seven rounds in Python integers, written from the paper's round function."""
    c, k = list(counter), list(key)
    for _ in range(7):
        one, two = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(two >> 32) ^ c[1] ^ k[0], two % 2**32, (one >> 32) ^ c[3] ^ k[1], one % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (5, 7), (2**63 - 1, 2**63 - 1), (2**40 + 3, 2**33 + 1)])
def test_layout_is_the_documented_one(seed, step):
    k = 600
    u = sf.gate_uniforms(sf.GateNoise(seed, step), (2, 3), k)
    assert u.shape == (5, k)
    assert u.dtype == torch.float64
    for row, column in [(0, 0), (0, 31), (1, 32), (4, 255), (2, 256), (3, 599), (4, 300)]:
        counter = ((column // 256) * 32 + column % 32, row, step % 2**32, step >> 32)
        j = column % 256 // 32
        half = philox_in_integers(counter, (seed % 2**32, seed >> 32))[j // 2] >> 16 * (j % 2) & 0xFFFF
        assert u[row, column].item() == (half + 0.5) / 65536


def test_sizes_and_k_do_not_enter():
    noise = sf.GateNoise(11, 12)
    whole = sf.gate_uniforms(noise, (8,), 700)
    assert torch.equal(sf.gate_uniforms(noise, (3, 0, 5), 40), whole[:, :40])
    assert torch.equal(sf.gate_uniforms(noise, (2,), 700), whole[:2])


def test_tensors_and_ints_give_the_same_stream():
    a = sf.gate_uniforms(sf.GateNoise(2**50, 3), (4,), 300)
    b = sf.gate_uniforms(sf.GateNoise(torch.tensor(2**50), torch.tensor(3)), (4,), 300)
    assert torch.equal(a, b)


def test_no_two_elements_share_a_draw_beyond_2_to_the_32():
    """Every field has its own bits of key and counter, so the map is injective; steps 2**32 apart differ."""
    seen = set()
    for seed in (0, 1, 2**32, 2**62):
        for step in (0, 1, 2**32, 2**62):
            for row in (0, 1, 2**31 - 1):
                for group in (0, 31, 32, 2**29):
                    seen.add((group, row, step & 0xFFFFFFFF, step >> 32, seed & 0xFFFFFFFF, seed >> 32))
    assert len(seen) == 4 * 4 * 3 * 4
    draws = [sf.gate_uniforms(sf.GateNoise(s, t), (4,), 256) for s in (0, 2**32) for t in (0, 1, 2**32, 2**33)]
    for i, one in enumerate(draws):
        assert not any(torch.equal(one, other) for other in draws[i + 1 :])


def test_uniform_enough():
    """Mean, variance and the correlation of neighbours of a million draws, each within five standard errors."""
    u = sf.gate_uniforms(sf.GateNoise(1, 2), (1024,), 1024)
    n = u.numel()
    assert abs(u.mean().item() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var().item() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    centred = u - 0.5
    for lag in (1, 32, 256):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean().item()) < 5 / 12 / (n * (1 - lag / 1024)) ** 0.5
    assert abs((centred[1:] * centred[:-1]).mean().item()) < 5 / 12 / n**0.5


def test_extreme_words_stay_finite(monkeypatch):
    for half in (0, 65535):
        monkeypatch.setattr(stream, "halves", lambda *_, half=half: torch.full((2, 3), half))
        u = stream.uniforms(sf.GateNoise(0, 0), 2, 3, torch.device("cpu"), torch.float32)
        logistic = torch.log(u) - torch.log(1 - u)
        assert ((u > 0) & (u < 1)).all()
        assert torch.isfinite(logistic).all()


@pytest.mark.parametrize("bad", [-1, 2**63, 1.0, True, torch.tensor(1.0), torch.tensor([1])])
def test_bad_seeds_are_refused(bad):
    with pytest.raises((ValueError, TypeError), match="seed must be"):
        sf.GateNoise(bad, 0)
    with pytest.raises((ValueError, TypeError), match="step must be"):
        sf.GateNoise(0, bad)


def test_every_language_states_the_same_stream():
    """Python, Triton and C++ each state the numbers once; the compiled library says its own."""
    pytest.importorskip("triton")
    from stamina_fast.kernels import philox

    stated = {"rounds": stream.ROUNDS, "span": stream.SPAN, "lanes": stream.LANES}
    assert {name: getattr(philox, name.upper()).value for name in stated} == stated
    cases.need("cpu")
    said = dict(pair.split("=") for pair in torch.ops.stamina_fast.cpu_stream().split())
    assert {name: int(number) for name, number in said.items()} == stated
