"""The report on the CUDA kernels, as committed: no fault that it does not name, and every fault would be found."""

import json

import pytest

from stamina_fast.bench import compile_report_cuda as report

ROWS = json.loads(report.OUTPUT.with_suffix(".json").read_text())
NAME = "_ZN7stamina4cuda14factors_kernelINS_4core4HalfELb1ELb0EEEvNS0_15FactorArgumentsIT_EE"


def test_the_committed_report_has_every_kernel_and_no_new_fault():
    portable, hopper = set(report.TURNS) - {"forward_hopper"}, set(report.TURNS) - {"forward"}
    wanted = {(arch, kernel) for arch in ("80", "89", "100") for kernel in portable} | {("90a", kernel) for kernel in hopper}
    assert {(row["arch"], row["kernel"]) for row in ROWS if row["kernel"] in report.TURNS} == wanted
    assert not [fault for row in ROWS for fault in report.faults(row)]
    assert report.OUTPUT.with_suffix(".md").read_text() == report.markdown(ROWS)


@pytest.mark.parametrize(("change", "said"), [
    ({"stack": 80}, "80 bytes of stack"), ({"tensor": {}}, "no tensor-core"), ({"widest": 8}, "at most 8 bytes"),
])
def test_a_fault_is_found(change, said):
    row = next(row for row in ROWS if row["kernel"] == "forward")
    assert said in " ".join(report.faults(row | change))


def test_a_hopper_kernel_without_its_means_is_found():
    row = next(row for row in ROWS if row["kernel"] == "forward_hopper")
    assert not report.faults(row)
    assert report.faults(row | {"bulk": 0})
    assert report.faults(row | {"tensor": {"HMMA": 64}})


@pytest.mark.parametrize(("mangled", "wanted"), [
    (NAME, ("factors", "fp16, ranks to 16")),
    (NAME.replace("ELb1ELb0E", "ELb0ELb1E"), ("factors", "fp16, ranks over 16, penalties")),
    (NAME.replace("14factors", "21forward_hopper").replace("ELb1ELb0E", "ELb1ELb1ELi20E"),
     ("forward_hopper", "fp16, ranks to 16, noise, 160 tokens")),
    ("_ZN7stamina4cuda10sum_kernelIfEEvNS0_12SumArgumentsIT_EE", ("sum", "fp32")),
])
def test_names(mangled, wanted):
    assert report.named(mangled) == wanted
