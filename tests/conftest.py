"""Settings that must be in force before torch, Triton or matplotlib is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# nothing is downloaded at run time; without this a misspelt path would be looked up on a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    # must be decided before a kernel module is imported: @triton.jit reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cases
import pytest
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

quiet = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", settings(derandomize=True, **quiet))
settings.register_profile("long", settings(max_examples=20_000, **quiet))
settings.load_profile("default")


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    """Calls that name no backend run on this one."""
    cases.need(request.param)
    monkeypatch.setenv("STAMINA_BACKEND", request.param)
    return request.param
