"""Seeds for everything random, as a pure function of what it is for: no state to save, none to lose."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *what: int | str) -> int:
    """A seed in [0, 2**63) for one purpose, such as `derive_seed(0, "crops", task, step)`; the same on every machine."""
    text = "/".join(str(part) for part in (seed, *what))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
