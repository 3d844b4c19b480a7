"""The command line: help, the whole path on a tiny model, and one clear line for everything a person can get wrong."""

import ast
import errno
import importlib
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tinypipes
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tinyruns import tensors, write_concepts
from typer.testing import CliRunner

from stamina_fast import cli
from stamina_fast.adapter.config import StaminaConfig
from stamina_fast.cli import app
from stamina_fast.training import TrainOptions

COMMANDS = ("demo", "train", "sample", "evaluate", "export", "benchmark", "bench", "doctor")
SMALL = ("--steps", "2", "--rank", "2", "--batch", "1", "--device", "cpu")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments, say):
    """The one line of a command that must end with exit code 2 and no traceback, and hold every word of `say`."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output + repr(result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("stamina-fast: ")
    missing = [word for word in say if word not in line]
    assert not missing, line
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "sd15"
    tinypipes.sd15().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("photos"), 2)


@pytest.fixture(scope="module")
def run(model, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    result = call("train", "--model", model, "--concepts", photos, "--output", output, *SMALL)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return output


def test_the_trainer_gets_every_option(model, photos, tmp_path, monkeypatch):
    """What the command line says, by the trainer's own names; what it leaves out is left to the trainer."""
    heard, trainer = {}, importlib.import_module("stamina_fast.training")
    monkeypatch.setattr(trainer, "train", lambda *places, **options: heard.update(options))
    given = {"accumulate": 2, "prior_weight": 0.5, "attention": "math", "cache_latents": tmp_path / "kept", "save_every": 7,
             "token_vectors": 3}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    switches = ("gradient_checkpointing", "channels_last", "compile")
    more = [f"--{name.replace('_', '-')}" for name in switches]
    places = ("train", "--model", model, "--concepts", photos, "--output", tmp_path / "run")
    assert call(*places, *flags, *more, "--no-capture").exit_code == 0
    assert {name: heard[name] for name in given} == given
    assert all(heard[name] is True for name in switches)
    assert heard["capture"] is False
    for words, wanted in ((("pet",), "pet"), (("cat=pet", "my cup=mug"), {"cat": "pet", "my cup": "mug"})):
        assert call(*places, *(part for word in words for part in ("--initializer-token", word))).exit_code == 0
        assert heard["initializer_token"] == wanted
    heard.clear()
    assert call(*places).exit_code == 0
    defaults = TrainOptions().as_dict()
    assert all(defaults[name] == value for name, value in heard.items() if name in defaults)
    assert not {"capture", "initializer_token"} & set(heard)
    assert heard["token_vectors"] == StaminaConfig().token_vectors


def test_words_to_start_from_that_do_not_fit(model, photos, tmp_path):
    places = ("train", "--model", model, "--concepts", photos, "--output", tmp_path / "run", *SMALL)
    for words, say in ((("dog=pet",), ("'dog'", "cat, cup")), (("photograph",), ("'photograph'", "choose a more common word")),
                       (("pet", "cat=pet"), ("NAME=WORD", "cat=animal"))):
        refused(*places, *(part for word in words for part in ("--initializer-token", word)), say=say)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda names: " ".join(names) or "all")
def test_help(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_commands_import_what_they_run_when_they_run():
    heavy = {"torch", "diffusers", "transformers", "matplotlib", "skimage"}
    tree = ast.parse(Path(cli.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.Import):
            assert not heavy & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            ours = node.level and node.module in ("errors", "quiet")
            assert ours or (not node.level and node.module.split(".")[0] not in heavy)


def test_train_leaves_a_run_whose_model_is_plain(run):
    assert [task["name"] for task in json.loads((run / "manifest.json").read_text())["tasks"]] == ["cat", "cup"]
    pipeline = StableDiffusionPipeline.from_pretrained(run / "model")
    assert {"<cat>", "<cup>"} <= set(pipeline.tokenizer.get_added_vocab())


def test_sample_writes_pictures_that_depend_on_seed_and_number(run, tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        result = call("sample", run, "--prompt", "my <cat>", "--count", count, "--steps", 2, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output + repr(result.exception)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["0000.png", "0001.png"]
    names = "one/0000.png", "two/0000.png", "two/0001.png"
    one, same, other = (np.asarray(Image.open(tmp_path / name), np.int16) for name in names)
    # a batch of another size may be summed in another order, which moves a rounding here and there
    assert abs(one - same).max() <= 1
    assert abs(one - other).max() > 20


def test_export_of_all_concepts_has_the_bits_of_the_run(run, tmp_path):
    result = call("export", run, "--format", "diffusers", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output + repr(result.exception)
    files = {path.relative_to(run / "model") for path in (run / "model").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    assert all((tmp_path / "out" / name).read_bytes() == (run / "model" / name).read_bytes() for name in files)


def test_export_of_some_concepts_rebuilds_the_weights(run, model, tmp_path):
    for name, tasks in (("both", "cup,cat"), ("one", "cup")):
        result = call("export", run, "--output", tmp_path / name, "--tasks", tasks, "--device", "cpu")
        assert result.exit_code == 0, result.output + repr(result.exception)
    folders = run / "model", tmp_path / "both", tmp_path / "one", model
    whole, both, one, base = (StableDiffusionPipeline.from_pretrained(folder) for folder in folders)
    bits, again = tensors(whole), tensors(both)
    assert all(torch.equal(again[name], tensor) for name, tensor in bits.items())
    assert set(one.tokenizer.get_added_vocab()) - set(base.tokenizer.get_added_vocab()) == {"<cup>"}
    kept, plain = tensors(one), tensors(base)
    changed = [name for name in plain if name.startswith("unet.") and not torch.equal(kept[name], plain[name])]
    assert changed
    assert any(not torch.equal(kept[name], bits[name]) for name in changed)


def test_evaluate_measures_the_run(run):
    result = call("evaluate", run, "--samples", 2, "--steps", 1, "--guidance", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "A_mmd" in result.stdout
    assert len(json.loads((run / "metrics.json").read_text())["tasks"]) == 2


def test_doctor_and_bench(tmp_path):
    result = call("doctor")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("torch", "reference", "available", "cpu"))
    result = call("bench", "--rounds", 1, "--backend", "reference", "--device", "cpu", "--output", tmp_path / "times.json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    arms = json.loads((tmp_path / "times.json").read_text())["arms"]
    assert {"one product", "masked_linear/reference", "fold_/reference"} <= set(arms)
    assert all(len(times) == 1 for times in arms.values())


def huge_png() -> bytes:
    """A few bytes that claim 60,000 x 60,000 pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def one_picture(folder, data=None):
    folder.mkdir(parents=True)
    if data is None:
        Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    else:
        (folder / "a.png").write_bytes(data)
    return folder


def listed(root, *entries):
    one_picture(root / "cat")
    (root / "list.json").write_text(json.dumps([{"instance_data_dir": "cat", **entry} for entry in entries]))
    return root / "list.json"


def tiny_picture(root):
    one_picture(root / "cat")
    Image.new("RGB", (4, 4)).save(root / "cat" / "a.png")
    return root


def folder_for_picture(root):
    one_picture(root / "cat")
    (root / "cat" / "b.png").mkdir()
    return root


BAD_CONCEPTS = {
    "missing folder": (lambda root: root / "nowhere", ["nowhere", "check the path"]),
    "empty folder": (lambda root: root, ["holds no pictures", "folder of pictures"]),
    "folder where a picture should be": (folder_for_picture, ["b.png", "not a file"]),
    "tiny picture": (tiny_picture, ["a.png", "4 x 4", "larger"]),
    "huge picture": (lambda root: one_picture(root / "cat", huge_png()).parent, ["a.png", "64,000,000 pixels", "smaller"]),
    "no picture": (lambda root: one_picture(root / "cat", b"plain text").parent, ["a.png", "as a picture", "save it again"]),
    "cut off": (lambda root: one_picture(root / "cat", huge_png()[:40]).parent, ["a.png"]),
    "duplicate names": (
        lambda root: listed(root, {"instance_prompt": "<a>", "name": "Cat"}, {"instance_prompt": "<b>", "name": "cat"}),
        ["Cat", "cat", "differ", "rename"]),
    "duplicate tokens": (
        lambda root: listed(root, {"instance_prompt": "<a>", "name": "a"}, {"instance_prompt": "my <a>", "name": "b"}),
        ["<a>", "differ"]),
    "hostile name": (lambda root: listed(root, {"instance_prompt": "<a>", "name": "a\n\x1b[2J"}), ["name", "printable"]),
    "hostile folder": (lambda root: listed(root, {"instance_prompt": "<a>", "instance_data_dir": "a\0b"}), ["a\\x00b"]),
    "prompt without token": (lambda root: listed(root, {"instance_prompt": "a photo of a cat"}), ["a photo of a cat", "<cat>"]),
    "prompt without the named token": (
        lambda root: listed(root, {"instance_prompt": "a photo", "token": "<cat>"}), ["a photo", "<cat>"]),
    "no list": (lambda root: [(root / "x.json").write_text("{"), root / "x.json"][1], ["x.json", "JSON"]),
}


@pytest.mark.parametrize("case", BAD_CONCEPTS)
def test_bad_concepts_are_one_line_and_leave_nothing(case, model, tmp_path):
    make, say = BAD_CONCEPTS[case]
    root, output = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    refused("train", "--model", model, "--concepts", make(root), "--output", output, *SMALL, say=say)
    assert not output.exists()


@pytest.mark.parametrize(("change", "say"), [
    (("--model", "nowhere"), ["nowhere", "model_index.json"]),
    (("--method", "stamin"), ["stamin", "c-lora"]),
    (("--rank", "1000"), ["rank", "1000"]),
    (("--learning-rate", "nan"), ["learning_rate", "nan"]),
])
def test_bad_options_are_one_line_and_leave_nothing(change, say, model, photos, tmp_path):
    output = tmp_path / "out"
    refused("train", "--model", model, "--concepts", photos, "--output", output, *SMALL, *change, say=say)
    assert not output.exists()


def test_a_model_without_cross_attention_is_refused(photos, tmp_path):
    pipeline = tinypipes.sd15()
    pipeline.unet = tinypipes.unet(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None,
    )
    pipeline.save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    refused("train", "--model", tmp_path / "model", "--concepts", photos, "--output", output, *SMALL, say=["cross-attention"])
    assert not output.exists()


def test_an_output_that_is_in_use_is_refused_and_kept(model, photos, run, tmp_path):
    before = (run / "manifest.json").read_bytes()
    refused("train", "--model", model, "--concepts", photos, "--output", run, *SMALL, say=["not empty", "resume"])
    assert (run / "manifest.json").read_bytes() == before
    (tmp_path / "mine").write_text("kept")
    for command in (("export", run), ("sample", run, "--prompt", "<cat>", "--steps", 1)):
        refused(*command, "--output", tmp_path, say=[str(tmp_path), "already"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_one_line(model, photos, run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", full)
    say = ["No space left", "free some space"]
    refused("train", "--model", model, "--concepts", photos, "--output", output, *SMALL, say=say)
    refused("export", run, "--output", tmp_path / "model", say=say)
    refused("sample", run, "--prompt", "<cat>", "--steps", 1, "--count", 1, "--output", tmp_path / "pictures", say=say)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("command", "say"), [
    (("sample", "RUN", "--prompt", "a photo of <dog>", "--output", "NEW"), ["<dog>", "<cat>", "<cup>"]),
    (("sample", "nowhere", "--prompt", "x", "--output", "NEW"), ["nowhere"]),
    (("evaluate", "MODEL"), ["not a run", "manifest.json"]),
    (("evaluate", "nowhere"), ["nowhere", "not a run"]),
    (("export", "RUN", "--output", "NEW", "--tasks", "cat,dog"), ["dog", "cat, cup"]),
    (("export", "RUN", "--output", "NEW", "--tasks", ","), ["at least one", "cat, cup"]),
    (("export", "RUN", "--output", "NEW", "--tasks", "cat", "--model", "OTHER"), ["base model"]),
    (("bench", "--shape", "huge"), ["huge", "sdxl"]),
    (("bench", "--backend", "fast"), ["fast"]),
])
def test_other_commands_refuse_in_one_line(command, say, run, model, tmp_path):
    places = {"RUN": run, "MODEL": model, "NEW": tmp_path / "new", "OTHER": run / "model"}
    refused(*(places.get(word, word) for word in command), say=say)
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback():
    result = call("--debug", "evaluate", "nowhere")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "FileError"
