"""What `stamina-fast doctor` says of backends and of the defaults on GPUs."""

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from stamina_fast import doctor
from stamina_fast.ops import cpu, dispatch


@pytest.fixture
def said():
    def report():
        console = Console(file=io.StringIO(), width=200)
        doctor.report(console)
        return console.file.getvalue()

    return report


def rows(text, title):
    """The cells of one table, headings left out."""
    lines = text[text.index(title) :].split("\n\n")[0].splitlines()[2:]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_no_gpu_has_a_default_without_a_result(said, monkeypatch):
    monkeypatch.setattr(dispatch, "VERIFIED", {})
    text = said()
    table = rows(text, "default on GPUs")
    assert {"sm_80", "sm_89", "sm_90", "sm_100"} <= {name for name, *_ in table}
    assert all(row == [row[0], "reference", f"no result is committed for {row[0]}"] for row in table)
    assert "no result is committed for any GPU yet" in text


def test_a_result_makes_a_default(said, monkeypatch):
    monkeypatch.setattr(dispatch, "VERIFIED", {(9, 0): "triton", (12, 0): "cuda"})
    text = said()
    table = {name: rest for name, *rest in rows(text, "default on GPUs")}
    assert table["sm_90"] == ["triton", "verified by the result committed for sm_90"]
    assert table["sm_120"][0] == "cuda"
    assert table["sm_80"] == ["reference", "no result is committed for sm_80"]
    assert "any GPU" not in text


def test_the_machine_itself_is_in_the_table(said, monkeypatch):
    monkeypatch.setattr(dispatch, "VERIFIED", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 1))
    monkeypatch.setattr(doctor, "devices", list)
    assert ["sm_121", "reference", "no result is committed for sm_121"] in rows(said(), "default on GPUs")


def test_a_backend_that_is_missing_says_what_to_do(said, monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: "no C++ compiler of any kind")
    table = {name: rest for name, *rest in rows(said(), "backends")}
    assert table["cpu"] == ["refused", "no C++ compiler of any kind"]
    assert table["reference"][0] == "available"


def test_architectures_are_those_of_the_build():
    cmake = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "CMakeLists.txt"
    built = set(re.findall(r"\b(\d{2,3})a?-(?:real|virtual)", cmake.read_text()))
    assert built == {"{}{}".format(*capability) for capability in doctor.ARCHITECTURES}
