"""A tiny model with random weights, and one output folder that two commands fill at the same time, for all tests here."""

import contextlib
import io
import threading

import pytest
import tinypipes

from stamina_fast.benchmark import Plan, run_benchmark

CELLS = {
    "identities": 2, "tuning": True, "samples": 2, "sampler_steps": 2, "scenes": 3, "scene_samples": 1, "pairs": 1,
    "train": {"steps": 3, "batch": 1, "read_every": 1, "crops": 1, "rank": 2, "gate_rank": 2},
    "renders": {"each": 2, "steps": 2},
    "cells": [{"methods": ["stamina"], "changes": [{"rank": 1000}, {}]}, {"methods": ["lora"]}],
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "sd15"
    tinypipes.sd15().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def plan():
    """Three cells; the first cannot be trained, since no projection has that rank."""
    return Plan.model_validate(CELLS)


@pytest.fixture(scope="session")
def filled(plan, model, tmp_path_factory):
    """(output folder, ids that each command says are not done, what both said) of two commands on one folder at once."""
    output, left, said = tmp_path_factory.mktemp("benchmark") / "out", [], io.StringIO()
    commands = [threading.Thread(target=lambda: left.append(run_benchmark(
        plan, output, model=model, command="stamina-fast benchmark --plan mine"))) for _ in range(2)]
    with contextlib.redirect_stdout(said):
        for command in commands:
            command.start()
        for command in commands:
            command.join()
    return output, left, said.getvalue()
