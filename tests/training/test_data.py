"""The data of a task: each picture is decoded once, when its task begins, and damage is found as early as it can be."""

import gc

import pytest
import tinypipes
import torch
from PIL import Image, ImageFile
from tinyruns import Killed, assert_same, run, run_until, tensors, write_concepts

from stamina_fast.errors import InputError
from stamina_fast.io.concepts import Concept, load_concepts
from stamina_fast.io.run import Run

NAMES = ("cat", "cup", "rocket")


@pytest.fixture
def decoded(monkeypatch):
    """The files whose pixels were decoded so far, as FOLDER/NAME."""
    found, load = [], ImageFile.ImageFile.load

    def watched(image):
        # loading again what is decoded already does nothing
        if image.tile:
            found.append("/".join(image.fp.name.split("/")[-2:]))
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    return found


def files_of(*names):
    return [f"{name}/{i}.png" for name in names for i in range(2)]


def test_a_picture_is_decoded_once_when_its_task_begins(three, uninterrupted, tmp_path, decoded):
    at_steps, pipeline = [], tinypipes.sd15()
    run(pipeline, three, tmp_path / "run", on_step=lambda step, task, i: at_steps.append((task, list(decoded))))
    assert decoded == files_of(*NAMES)
    assert all(there == files_of(*NAMES[: task + 1]) for task, there in at_steps)
    assert_same(tensors(pipeline), uninterrupted[1])


def test_class_pictures_are_decoded_once_and_only_where_they_count(three, tmp_path, decoded):
    cat, _, rocket = load_concepts(three)
    given = [Concept("cat", cat.images, cat.prompt, cat.token, "a photo of a cat", None, rocket.images)]
    run(tinypipes.sd15(), given, tmp_path / "without", steps=1)
    assert decoded == files_of("cat")
    run(tinypipes.sd15(), given, tmp_path / "with", steps=1, prior_weight=1.0)
    assert decoded == files_of("cat", "cat", "rocket")


def test_a_resumed_run_decodes_what_it_has_not_learned(three, tmp_path, decoded):
    run_until(6, tinypipes.sd15(), three, tmp_path / "run")
    decoded.clear()
    run(tinypipes.sd15(), three, tmp_path / "run", resume=True)
    assert decoded == files_of("cup", "rocket")


def test_pictures_are_freed_before_the_first_step(three, tmp_path):
    def no_pixels(step, task, i):
        assert not [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape == (3, 36, 40)]
        raise Killed

    with pytest.raises(Killed):
        run(tinypipes.sd15(), three, tmp_path / "run", on_step=no_pixels)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-40])


def other_format(file):
    file.write_bytes(b"GIF89a, or so it says")


@pytest.mark.parametrize("harm", [cut_off, other_format])
def test_a_broken_picture_of_the_third_concept_stops_before_anything_starts(harm, tmp_path, decoded):
    folder = write_concepts(tmp_path / "concepts", 3)
    harm(folder / "rocket" / "1.png")
    with pytest.raises(InputError, match=r"rocket/1\.png.*save it again as JPEG or PNG"):
        run(None, folder, tmp_path / "run")
    assert not decoded
    assert not (tmp_path / "run").exists()


def test_damage_that_only_decoding_shows_keeps_the_concepts_before(tmp_path):
    folder = write_concepts(tmp_path / "concepts", 3)
    broken = folder / "rocket" / "1.png"
    Image.open(broken).save(broken.with_suffix(".bmp"))
    broken.unlink()
    cut_off(broken.with_suffix(".bmp"))
    pipeline, kept = tinypipes.sd15(), {}
    with pytest.raises(InputError, match=r"rocket/1\.bmp.*truncated.*save it again") as caught:
        run(pipeline, folder, tmp_path / "run", on_task=lambda learned, *_: kept.update(tensors(learned)))
    assert "\n" not in str(caught.value)
    assert [task["name"] for task in Run.open(tmp_path / "run").tasks()] == ["cat", "cup"]
    assert_same(tensors(pipeline), kept)


def test_resume_refuses_another_picture_before_anything_is_written(tmp_path, decoded):
    folder = write_concepts(tmp_path / "concepts", 2)
    run_until(5, tinypipes.sd15(), folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    decoded.clear()
    (folder / "cup" / "0.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"concepts\.cup\.pictures was '[0-9a-f]{64}'"):
        run(tinypipes.sd15(), folder, tmp_path / "run", resume=True)
    assert not decoded
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
