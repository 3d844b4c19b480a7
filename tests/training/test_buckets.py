"""Aspect buckets: each picture gets the nearest crop size, a batch has one size, each size is recorded once."""

import types

import pytest
import tinypipes
import torch
from replay import Replay
from tinyruns import assert_same, run, run_until, size_of, tensors

from stamina_fast.errors import InputError
from stamina_fast.io.concepts import Concept
from stamina_fast.io.images import crop, write_image
from stamina_fast.training import loop
from stamina_fast.training.buckets import crop_sizes, in_buckets
from stamina_fast.training.data import TaskData

# sizes of pictures, and their crop sizes: sides in multiples of 32, about 96 x 96 pixels
WIDE, TALL, ALMOST = (36, 80), (90, 40), (36, 40)
SHAPE = {WIDE: (64, 128), TALL: (128, 64), ALMOST: (96, 96)}
OPTIONS = {"aspect_buckets": True, "resolution": 96, "steps": 8, "crops": 1, "accumulate": 2}


def drawn(file, size, seed):
    draw = torch.Generator().manual_seed(seed)
    write_image(file, (torch.sin(torch.arange(size[1]) * (0.2 + seed / 9)) * torch.rand(3, size[0], 1, generator=draw)))
    return file


def concept(folder, name, *sizes):
    files = [drawn(folder / f"{name}{i}.png", size, i) for i, size in enumerate(sizes)]
    captions = [f"a photo of <{name}> {'big ' * i}" for i in range(len(files))]
    return Concept(name, files, f"a photo of <{name}>", f"<{name}>", f"a photo of a {name}", captions)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two concepts: the second has one crop size of the first, and one that the first has not."""
    folder = tmp_path_factory.mktemp("pictures")
    return [concept(folder, "cat", WIDE, ALMOST, WIDE), concept(folder, "cup", TALL, WIDE)]


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """An uninterrupted run, the tensors of its pipeline, and of each step: crop size, latents' shape, target size, ids."""
    batches, pipeline = [], tinypipes.sd15()

    def keep(step, task, i):
        to = step.buffers
        batches.append((size_of(step), tuple(to.latents.shape), to.frames[:, 4:].clone(), to.ids[0].clone()))

    made = run(pipeline, two, tmp_path_factory.mktemp("whole") / "run", on_step=keep, **OPTIONS)
    return made, tensors(pipeline), batches


def curves(made):
    return [made.load_task(task["name"]).curve for task in made.tasks()]


@pytest.mark.parametrize(("size", "multiple"), [(512, 64), (1024, 64), (768, 64), (96, 32), (64, 32), (32, 32)])
def test_crop_sizes_have_nearly_the_pixels_of_the_square(size, multiple):
    found = crop_sizes(size, multiple)
    assert found[0] == (size, size)
    assert len(set(found)) == len(found)
    for height, width in found:
        assert height % multiple == width % multiple == 0
        assert (width, height) in found
        assert size / 2 <= height <= 2 * size
        short, long = sorted((height, width))
        assert short * long <= size**2 < short * (long + multiple)


def test_crop_sizes_of_stable_diffusion():
    assert {size for size in crop_sizes(512, 64) if size[0] <= size[1]} == {
        (512, 512), (448, 576), (384, 640), (320, 768), (256, 1024)
    }


def test_a_picture_goes_to_the_nearest_aspect_ratio():
    sizes = [(300, 400), (400, 300), (500, 500), (90, 160), (10, 400), (495, 500), (400, 10)]
    found = in_buckets([torch.zeros(3, *size) for size in sizes], crop_sizes(512, 64))
    assert found == {(448, 576): [0], (576, 448): [1], (512, 512): [2, 5], (384, 640): [3], (256, 1024): [4], (1024, 256): [6]}


def test_a_crop_of_any_shape_lies_where_its_frame_says():
    across, down = torch.linspace(-1, 1, 60).expand(40, 60), torch.linspace(-1, 1, 40)[:, None].expand(40, 60)
    image = torch.stack([across, down, torch.zeros(40, 60)])
    part, frame = crop(image, (16, 64), 0.8, (1.0, 0.5), flip=False)
    assert part.shape == (3, 16, 64)
    # the part is 12 rows at the bottom and 48 columns in the middle, enlarged by 4/3
    assert frame.tolist() == [53, 80, 37, 8]
    assert part[0, 8, 0].item() == pytest.approx(-1 + 2 * 6 / 59, abs=0.03)
    assert part[1, -1, 9].item() == pytest.approx(1, abs=0.05)
    whole, frame = crop(image, (64, 96), 1.0, (0.5, 0.5), flip=True)
    assert frame.tolist() == [64, 96, 0, 0]
    assert whole[0, 9, 0].item() == pytest.approx(1, abs=0.03)
    # one number means a square
    for share in (0.61, 0.8, 1.0):
        for one, other in zip(*(crop(image, size, share, (0.3, 0.9), False) for size in (24, (24, 24))), strict=True):
            assert torch.equal(one, other)


def test_every_batch_is_of_one_shape_with_its_own_pictures(two, whole):
    _, _, batches = whole
    backbone = loop.Backbone(tinypipes.sd15())
    for i, one in enumerate(two):
        seen = batches[8 * i : 8 * i + 8]
        sizes = (WIDE, ALMOST, WIDE) if one.name == "cat" else (TALL, WIDE)
        assert {shape for shape, *_ in seen} == {SHAPE[size] for size in sizes}
        for shape, latents, target, ids in seen:
            assert latents == (2, 4, shape[0] // 4, shape[1] // 4)
            assert target.tolist() == [list(shape)] * 2
            there = [one.texts[j].count("big") for j, size in enumerate(sizes) if SHAPE[size] == shape]
            big = backbone.tokenise(["big"])[0][0, 1]
            assert set((ids == big).sum(1).tolist()) <= set(there)


def test_crop_sizes_come_as_often_as_they_have_pictures():
    feeds = {size: types.SimpleNamespace(learned=n) for size, n in (((8, 8), 3), ((8, 16), 1))}
    seen = [[TaskData(feeds, 5).size_at(step) for step in range(400)] for _ in range(2)]
    assert seen[0] == seen[1]
    assert 270 < seen[0].count((8, 8)) < 330


def test_one_shape_has_the_bits_of_squares(two, tmp_path):
    square = [Concept(c.name, c.images[:1], c.prompt, c.token) for c in two]
    for one in square:
        drawn(tmp_path / f"{one.name}.png", ALMOST, 7)
    square = [Concept(c.name, [tmp_path / f"{c.name}.png"], c.prompt, c.token) for c in square]
    runs = [run(tinypipes.sd15(), square, tmp_path / str(on), **OPTIONS | {"aspect_buckets": on}) for on in (False, True)]
    assert curves(runs[0]) == curves(runs[1])
    assert [task["sha256"] for task in runs[0].tasks()] == [task["sha256"] for task in runs[1].tasks()]


def test_each_shape_is_recorded_once(two, whole, tmp_path, monkeypatch):
    recorders, made, pipeline = [], [], tinypipes.sd15()
    captured = loop.Captured
    monkeypatch.setattr(loop, "recorder", lambda *_: recorders.append(Replay()) or recorders[-1])
    monkeypatch.setattr(loop, "Captured", lambda *args: made.append(captured(*args)) or made[-1])
    result = run(pipeline, two, tmp_path / "run", **OPTIONS)
    assert curves(result) == curves(whole[0])
    assert_same(tensors(pipeline), whole[1])
    # the first task has two sizes; the second has one of them, and a third
    often = [sum(shape == SHAPE[size] for shape, *_ in whole[2]) for size in (WIDE, ALMOST, TALL)]
    assert [each.recordings for each in made] == [int(n > 3) for n in often]
    assert [each.recorder.replayed for each in made] == [max(0, n - 3) for n in often]
    assert sum(n > 3 for n in often) >= 2


@pytest.mark.parametrize("at", [3, 8 + 5])
def test_a_resumed_run_has_the_same_bits(at, two, whole, tmp_path):
    run_until(at, tinypipes.sd15(), two, tmp_path / "run", save_every=2, **OPTIONS)
    pipeline = tinypipes.sd15()
    made = run(pipeline, two, tmp_path / "run", resume=True, **OPTIONS)
    assert curves(made) == curves(whole[0])
    assert_same(tensors(pipeline), whole[1])


def test_class_pictures_are_there_in_every_shape(two, tmp_path):
    seen = []
    others = drawn(tmp_path / "other.png", TALL, 3)
    given = [Concept(c.name, c.images, c.prompt, c.token, c.class_prompt, None, (others,)) for c in two[:1]]
    pipeline = tinypipes.sd15()
    options = OPTIONS | {"prior_weight": 1.0, "on_step": lambda step, *_: seen.append(step.buffers.ids[0].clone())}
    run(pipeline, given, tmp_path / "run", **options)
    wanted = loop.Backbone(pipeline).tokenise(["a photo of <cat>", "a photo of a cat"])[0].repeat(2, 1)
    assert len(seen) == OPTIONS["steps"]
    assert all(torch.equal(ids, wanted) for ids in seen)


def test_what_has_no_buckets_is_refused(two, tmp_path):
    with pytest.raises(InputError, match="multiple of 32 for this model with aspect_buckets, got 40"):
        run(tinypipes.sd15(), two, tmp_path / "run", **OPTIONS | {"resolution": 40})
    with pytest.raises(InputError, match="aspect_buckets must be true or false"):
        run(tinypipes.sd15(), two, tmp_path / "run", **OPTIONS | {"aspect_buckets": 1})
    assert not (tmp_path / "run").exists()
