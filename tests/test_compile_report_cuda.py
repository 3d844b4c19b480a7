"""The report on the CUDA kernels, as committed: no fault that it does not name, and every fault would be found."""

import json

import pytest

from stamina_fast.bench import compile_report_cuda as report

ROWS = json.loads(report.OUTPUT.with_suffix(".json").read_text())
NAME = "_ZN7stamina4cuda14factors_kernelINS_4core4HalfELb1ELb0EEEvNS0_15FactorArgumentsIT_EE"


def test_the_committed_report_has_every_kernel_and_no_new_fault():
    assert {(row["arch"], row["kernel"]) for row in ROWS} >= {(a, k) for a in ("80", "89", "90a", "100") for k in report.TURNS}
    assert not [fault for row in ROWS for fault in report.faults(row)]
    assert report.OUTPUT.with_suffix(".md").read_text() == report.markdown(ROWS)


@pytest.mark.parametrize(("change", "said"), [
    ({"stack": 80}, "80 bytes of stack"), ({"tensor": {}}, "no tensor-core"), ({"widest": 8}, "at most 8 bytes"),
])
def test_a_fault_is_found(change, said):
    row = next(row for row in ROWS if row["kernel"] == "forward")
    assert said in " ".join(report.faults(row | change))


def test_a_spill_without_a_reason_is_found():
    row = next(row for row in ROWS if row["kernel"] == "input")
    assert report.faults(row | {"stack": 8, "spills": 2})


@pytest.mark.parametrize(("mangled", "wanted"), [
    (NAME, ("factors", "fp16, ranks to 16")),
    (NAME.replace("ELb1ELb0E", "ELb0ELb1E"), ("factors", "fp16, ranks over 16, penalties")),
    ("_ZN7stamina4cuda10sum_kernelIfEEvNS0_12SumArgumentsIT_EE", ("sum", "fp32")),
])
def test_names(mangled, wanted):
    assert report.named(mangled) == wanted
