"""The warning of a token that has no say where it starts: given where it must be, and without a trace elsewhere."""

import subprocess
import sys
import warnings

import pytest
import tinypipes
import torch
from tinyruns import assert_same, run, tensors

from stamina_fast.adapter.tokens import TokenBank
from stamina_fast.errors import StaminaWarning
from stamina_fast.pipeline.load import load_pipeline
from stamina_fast.training import loop, start

PIPELINES = tinypipes.KINDS | {"tiny": lambda: load_pipeline("tiny", "cpu")}
STEPS = {"steps": 1, "crops": 1}


def plant(patch, factor):
    """Start every token at a size that is `factor` times a word's."""
    original = TokenBank._starts
    patch.setattr(TokenBank, "_starts", lambda bank, *how: {
        name: (rows * factor, draw) for name, (rows, draw) in original(bank, *how).items()
    })


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("vectors", [1, 2])
def test_a_start_without_a_say_is_warned_of_once_a_task(kind, vectors, three, tmp_path, monkeypatch):
    plant(monkeypatch, 0.01)
    with pytest.warns(StaminaWarning) as caught:
        run(PIPELINES[kind](), three, tmp_path / "run", token_vectors=vectors, **STEPS)
    said = [str(warning.message) for warning in caught if warning.category is StaminaWarning]
    assert [line.partition(":")[0] for line in said] == ["cat", "cup", "rocket"]
    assert all("token_init to a word" in line and "\n" not in line for line in said)


STARTS = {"random": {}, "mean": {"token_init": "mean"}, "word": {"initializer_token": "cat"}, "row": {"method": "c-lora"}}
# a random direction is no word: in the small model it has about a tenth of a word's say, a little more or less
ORDINARY = [(kind, how) for kind in PIPELINES for how in STARTS if kind != "tiny" or how in ("mean", "word")]


@pytest.mark.parametrize(("kind", "how"), ORDINARY)
def test_ordinary_starts_are_not_warned_of(kind, how, three, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaminaWarning)
        run(PIPELINES[kind](), three, tmp_path / "run", **STEPS, **STARTS[how])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seventh_of_a_word_is_too_little_for_the_small_model(dtype, three, tmp_path, monkeypatch):
    """As large as its rows that were never trained. Half precision blurs predictions, but not so much."""
    plant(monkeypatch, 1 / 7)
    with pytest.warns(StaminaWarning) as caught:
        run(load_pipeline("tiny", "cpu", dtype), three, tmp_path / "run", **STEPS)
    assert len(caught) == 3


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_looking_changes_no_bit(kind, three, tmp_path, monkeypatch):
    pipeline, untouched = tinypipes.KINDS[kind](), tinypipes.KINDS[kind]()
    state = torch.get_rng_state()
    run(pipeline, three, tmp_path / "run", steps=2)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    monkeypatch.setattr(loop, "share_of_a_word", lambda *given: None)
    run(untouched, three, tmp_path / "plain", steps=2)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same(tensors(pipeline), tensors(untouched))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_it_takes_a_handful_of_forwards_of_one_picture(kind, three, tmp_path, monkeypatch):
    shares, original = [], loop.share_of_a_word
    batches = []

    def watched(backbone, *given):
        hook = backbone.unet.register_forward_pre_hook(
            lambda module, args: batches.append((len(args[0]), torch.is_grad_enabled()))
        )
        shares.append(original(backbone, *given))
        again = original(backbone, *given)
        hook.remove()
        assert again == shares[-1]
        return shares[-1]

    monkeypatch.setattr(loop, "share_of_a_word", watched)
    run(tinypipes.KINDS[kind](), three, tmp_path / "run", **STEPS)
    assert batches == [(1, False)] * 2 * 3 * (start.WORDS + 2)
    # no task has the noise of another
    assert len(set(shares)) == 3


def test_where_words_move_nothing_there_is_nothing_to_say(three, tmp_path, monkeypatch):
    shares, original = [], loop.share_of_a_word
    monkeypatch.setattr(loop, "share_of_a_word", lambda *given: shares.append(original(*given)))
    pipeline = tinypipes.sd15()
    pipeline.unet.conv_out.weight.data.zero_()
    run(pipeline, three, tmp_path / "run", **STEPS)
    assert shares == [None] * 3


def test_the_command_line_prints_it_as_one_line():
    program = "import warnings; from stamina_fast import cli, errors; cli.quiet(); w = errors.StaminaWarning\n" \
              "for text in ('no say', 'no say'): warnings.warn(text, w)\nwarnings.warn('another')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    assert lines[:2] == ["stamina-fast: no say"] * 2
    assert "UserWarning: another" in lines[2]
