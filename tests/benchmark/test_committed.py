"""The results in the repository: cells of the plans that ship, and a report that follows from them alone."""

import re
import shutil
from pathlib import Path

import pytest

from stamina_fast.benchmark import write_report
from stamina_fast.benchmark.plan import load_plan
from stamina_fast.io.files import read_json

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "benchmark"
FOLDERS = [COMMITTED / name for name in ("fifty", "sweep")]


def test_every_committed_folder_is_looked_at():
    assert sorted(path for path in COMMITTED.iterdir() if path.is_dir()) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_cells_are_those_of_the_plan(folder):
    plan = load_plan(folder.name)
    cells = {cell.id: cell for cell in plan.cells()}
    found = sorted((folder / "cells").glob("*/result.json"))
    assert found
    for path in found:
        result = read_json(path)
        assert result["cell"] == cells[path.parent.name].as_dict()
        assert len(result["tasks"]) == plan.identities
        assert len({task["name"] for task in result["tasks"]}) == plan.identities
        for task in result["tasks"]:
            assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in [task["sha256"], *task["files"].values()])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_committed_report_follows_from_the_results(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    write_report(tmp_path / "copy")
    # its last part names the folder
    texts = [(path / "report.md").read_text().partition("## How to make it again") for path in (tmp_path / "copy", folder)]
    assert texts[0][:2] == texts[1][:2]
    kept = texts[1][0]
    pictures = re.findall(r"\(report/([^)]+)\)", kept)
    assert pictures
    assert {path.name for path in (folder / "report").iterdir()} == set(pictures)
