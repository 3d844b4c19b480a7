"""The known answers that tests/csrc/native/headers.cpp reads."""

import numpy as np
import torch

from stamina_fast.ops.noise import GateNoise, halves, uniforms

# Random123's answers of Philox4x32-7: key [2], counter [4], words [4]
KNOWN = (
    "00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662",
    "a4093822 299f31d0 243f6a88 85a308d3 13198a2e 03707344 4dfccaba 190a87f0 c47362ba b6b5242a",
)


def answers(folder):
    """What the specification, torch and numpy make of the arguments that headers.cpp reads beside them."""

    def write(name, values, dtype):
        np.asarray(values).astype(dtype).tofile(folder / name)

    write("known", [[int(word, 16) for word in line.split()] for line in KNOWN], "uint32")
    places = ((0, 0, 3, 300), (2**63 - 1, 2**63 - 1, 2, 513), (0x1234567_89ABCDEF, (5 << 32) + 7, 65, 40))
    for index, place in enumerate(places):
        noise, cpu = GateNoise(*place[:2]), torch.device("cpu")
        write(f"place{index}", place, "int64")
        write(f"draws{index}", halves(noise, *place[2:], cpu), "int32")
        write(f"uniforms{index}", uniforms(noise, *place[2:], cpu), "float64")

    patterns = torch.arange(0x10000).to(torch.int32).to(torch.int16)
    for name, dtype in (("bf16", torch.bfloat16), ("half", torch.float16)):
        write(f"{name}_widened", patterns.view(dtype).float(), "float32")
    # every upper half with a tie of bf16 and its neighbours; every tie of half precision and its neighbours, in both signs
    upper = torch.arange(0x10000, dtype=torch.int64).unsqueeze(1) << 16
    bits = (upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten().to(torch.int32)
    finite = patterns.view(torch.float16).float()
    finite = finite[finite.isfinite()].sort().values
    ties = ((finite[1:] + finite[:-1]) / 2).view(torch.int32).unsqueeze(1) + torch.tensor([-1, 0, 1], dtype=torch.int32)
    edge = torch.tensor([65519.996, 65520.0, -65520.0, 2.0**-25, -(2.0**-25), 2.0**-26]).view(torch.int32)
    floats = torch.cat([bits, ties.flatten(), edge]).view(torch.float32)
    write("floats", floats, "float32")
    for name, dtype in (("bf16", torch.bfloat16), ("half", torch.float16)):
        write(f"{name}_narrowed", floats.to(dtype).view(torch.int16), "int16")

    size = torch.tensor([0.0, 1e-30, 1e-3, 0.5, 1, 5, 11, 12, 50, 80])
    h = torch.tensor([0, 1, 2, 255, 32767, 32768, 65000, 65533, 65534, 65535])
    logits, h, tau = torch.cartesian_prod(torch.cat([size, -size]).double(), h.double(), torch.tensor([0.3, 1, 8]).double()).T
    logits, tau, u = logits.float().double(), tau.float().double(), (h + 0.5) / 65536
    z = logits + torch.log(u) - torch.log1p(-u)
    soft = torch.sigmoid(-z.abs() / tau)
    write("logits", logits, "float64")
    write("u", u, "float64")
    write("taus", tau, "float64")
    write("open", torch.where(z.abs() < 1e-5, 2, (z > 0).int()), "int32")
    write("slopes", soft * (1 - soft) / tau, "float64")
    write("soft", torch.sigmoid(logits), "float64")
