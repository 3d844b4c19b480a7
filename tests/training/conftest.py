"""Pictures to learn, and one uninterrupted run: made once for all tests of the trainer."""

import pytest
import tinypipes
from tinyruns import run, tensors, write_concepts


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("concepts"), 4)


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture(scope="session")
def uninterrupted(three, tmp_path_factory):
    """A run of three tasks that nothing interrupts, and the tensors of the pipeline at its end."""
    pipeline = tinypipes.sd15()
    return run(pipeline, three, tmp_path_factory.mktemp("whole") / "run"), tensors(pipeline)
