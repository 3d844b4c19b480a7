"""MMD against closed forms and plain loops, features against what they must see, measures against hand-made sequences."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import tinyencoders
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from stamina_fast.demo.photographs import prepare_concepts
from stamina_fast.errors import InputError
from stamina_fast.evaluate import features, plots
from stamina_fast.evaluate.measures import measure
from stamina_fast.evaluate.mmd import bootstrap, interval, median_distance, mmd2, resamples
from stamina_fast.tiny.world import scene


def normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def naive_mmd2(x, y, h):
    def k(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * h * h))

    x, y = x.tolist(), y.tolist()
    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_mmd2_equals_the_double_loop():
    x, y = normal(7, 3, 0), normal(5, 3, 1, 0.7)
    assert mmd2(x, y, 1.3) == pytest.approx(naive_mmd2(x, y, 1.3), abs=1e-14)
    assert mmd2(y, x, 1.3) == pytest.approx(mmd2(x, y, 1.3), abs=1e-15)


def test_mmd2_of_two_points_has_the_closed_form():
    x, y = torch.zeros(4, 2), torch.full((3, 2), 1.0)
    assert mmd2(x, y, 1.5) == pytest.approx(2 - 2 * math.exp(-2 / (2 * 1.5**2)), abs=1e-14)


def test_mmd2_of_two_gaussians_has_the_closed_form():
    # E k(x, y) for x ~ N(0, 1), y ~ N(shift, 1) is h/sqrt(h²+2) exp(-shift²/(2(h²+2)))
    h, shift = 1.1, 0.8
    expected = 2 * h / math.sqrt(h * h + 2) * (1 - math.exp(-(shift**2) / (2 * (h * h + 2))))
    values = [mmd2(normal(60, 1, s), normal(60, 1, s + 10_000, shift), h) for s in range(200)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 4 * error
    assert error < 0.1 * expected


def test_mmd2_is_unbiased_for_one_distribution():
    values = np.array([mmd2(normal(8, 4, s), normal(6, 4, s + 10_000), 2.0) for s in range(600)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert (values < 0).any()
    # the biased estimate, with the pairs i = j, would lie far above
    biased = np.array([naive_mmd2(normal(8, 4, s), normal(8, 4, s), 2.0) for s in range(3)])
    assert (biased < -0.01).all(), "equal samples are negative without the diagonal"


def test_mmd2_of_samples_of_the_same_noise_is_unbiased():
    def draw(s, paired):
        x = normal(8, 4, s)
        return mmd2(x, x + 0.3 * normal(8, 4, s + 10_000) - (1 - math.sqrt(1 - 0.09)) * x, 2.0, paired=paired)

    # y = sqrt(1 - 0.09) x + 0.3 noise has the distribution of x
    values = np.array([draw(s, True) for s in range(600)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert np.mean([draw(s, False) for s in range(100)]) < -0.02
    x = normal(5, 3, 0)
    assert mmd2(x, x, 1.0, paired=True) == pytest.approx(0, abs=1e-15)
    with pytest.raises(InputError, match="same noise"):
        mmd2(x, x[:4], 1.0, paired=True)


def test_mmd2_does_not_change_with_the_order_of_images():
    x, y = normal(9, 3, 0), normal(8, 3, 1)
    assert mmd2(x.flip(0), y[torch.randperm(8)], 1.0) == pytest.approx(mmd2(x, y, 1.0), abs=1e-14)


@pytest.mark.parametrize(("x", "y", "h"), [(1, 5, 1.0), (5, 1, 1.0), (5, 5, 0.0), (5, 5, math.nan)])
def test_mmd2_refuses_what_it_cannot_judge(x, y, h):
    with pytest.raises(InputError, match=r"at least two|bandwidth"):
        mmd2(normal(x, 3, 0), normal(y, 3, 1), h)


def test_median_distance_is_over_pairs():
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0


def test_bootstrap_of_every_image_once_is_the_estimate():
    x, y = normal(9, 3, 0), normal(7, 3, 1, 0.5)
    once = bootstrap(x, y, 1.2, torch.ones(1, 9, dtype=torch.float64), torch.ones(1, 7, dtype=torch.float64))
    assert once.item() == pytest.approx(mmd2(x, y, 1.2), abs=1e-14)


def test_bootstrap_equals_resampling_without_pairs_of_copies():
    x, y = normal(5, 2, 0), normal(4, 2, 1)
    times_x, times_y = resamples(5, 3, 0), resamples(4, 3, 1)
    got = bootstrap(x, y, 0.9, times_x, times_y)
    for b in range(3):
        ix = [i for i in range(5) for _ in range(int(times_x[b, i]))]
        iy = [i for i in range(4) for _ in range(int(times_y[b, i]))]

        def k(a, c):
            return math.exp(-(a - c).square().sum().item() / (2 * 0.9**2))

        xx = [k(x[i], x[j]) for i in ix for j in ix if i != j]
        yy = [k(y[i], y[j]) for i in iy for j in iy if i != j]
        xy = [k(x[i], y[j]) for i in ix for j in iy]
        assert got[b].item() == pytest.approx(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy), abs=1e-12)


def test_bootstrap_intervals_are_seeded_and_cover():
    expected = mmd2(normal(3000, 2, 50), normal(3000, 2, 51, 0.7), 1.5)
    covered = 0
    for s in range(40):
        x, y = normal(30, 2, s), normal(30, 2, s + 1000, 0.7)
        low, high = interval(bootstrap(x, y, 1.5, resamples(30, 300, s), resamples(30, 300, s + 1)))
        covered += low <= expected <= high
    assert 33 <= covered
    again = bootstrap(x, y, 1.5, resamples(30, 300, 39), resamples(30, 300, 40))
    assert interval(again) == [low, high]
    assert (resamples(30, 300, 0).sum(1) == 30).all()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Per subject, its training and its held-out pictures."""
    folder = prepare_concepts(tmp_path_factory.mktemp("photographs"), subjects=("face", "cat", "coffee", "rocket"))
    return {name.name: [[Image.open(p) for p in sorted((kind / name.name).glob("*.png"))]
                        for kind in (folder, folder.parent / "held-out")]
            for name in sorted(folder.iterdir())}


def changed(images, change):
    return [Image.fromarray(np.clip(change(np.asarray(image, float)), 0, 255).astype(np.uint8)) for image in images]


def shuffled(pixels, draw):
    """The same 16 tiles in another order: every colour and texture, no subject."""
    tiles = [pixels[y:y + 8, x:x + 8] for y in range(0, 32, 8) for x in range(0, 32, 8)]
    order = draw.permutation(16)
    return np.concatenate([np.concatenate([tiles[i] for i in order[r:r + 4]], 1) for r in range(0, 16, 4)], 0)


def test_layout_is_deterministic_and_balanced():
    images = [Image.fromarray(scene((1 << 40) + i)[0]) for i in range(200)]
    x = features.layout(images)
    assert x.dtype == torch.float64
    assert x.shape == (200, 960)
    assert torch.equal(x, features.layout(images))
    blocks = x.split([192, 48, 576, 144], 1)
    squares = [(b[::2] - b[1::2]).square().sum(1).mean().item() for b in blocks]
    assert squares == pytest.approx([0.25, 0.25, 1, 1], rel=0.15)


def test_layout_takes_any_size_and_flat_pictures():
    x = features.layout([Image.new("RGB", size, colour) for size, colour in (((1, 1), "black"), ((512, 300), "white"))])
    assert x.isfinite().all()
    gray = features.layout([Image.new("L", (64, 64), 128)])
    assert gray.shape == (1, 960)


@pytest.mark.parametrize("name", ["face", "cat", "coffee", "rocket"])
def test_layout_sees_the_subject_and_not_only_its_colours(photographs, name):
    trained, real = photographs[name]
    noun = {"face": "woman", "coffee": "cup", "rocket": "tower"}.get(name, name)
    captioned = (scene((1 << 40) + i) for i in range(1500))
    fitting = (Image.fromarray(image) for image, caption in captioned if noun in caption.split())
    base = list(itertools.islice(fitting, 16))
    assert len(base) == 16
    phi = features.layout
    x = phi(real)
    h = median_distance(x)
    to_base = mmd2(x, phi(base), h)

    def ratio(change, copies=1):
        return mmd2(x, phi(changed(trained * copies, change)), h) / to_base

    # other crops of the photograph, also somewhat soft, are near; its colours as a broad blur or in another order are not
    draw = np.random.default_rng(0)
    soft = ratio(lambda p: gaussian_filter(p, (0.8, 0.8, 0)))
    assert ratio(lambda p: p) < 0.1
    assert soft < 0.25
    assert ratio(lambda p: gaussian_filter(p, (6, 6, 0))) > 1
    assert ratio(lambda p: p.mean((0, 1)) + 0 * p) > 1
    assert ratio(lambda p: shuffled(p, draw), copies=4) > soft + 0.3


@pytest.fixture(scope="module")
def image_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tinyencoders.clip(folder / "clip")
    tinyencoders.dino(folder / "dino")
    return folder


@pytest.mark.parametrize(("name", "width"), [("clip", 16), ("dino", 32)])
def test_transformers_models_from_a_folder(image_models, photographs, name, width):
    images = photographs["cat"][0]
    phi = features.encoder(str(image_models / name))
    x = phi(images)
    assert x.shape == (8, width)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x.norm(dim=1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(phi(images[3:4]), x[3:4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(x[0], x[2])


@pytest.mark.parametrize("name", ["clip", "nobody/nothing", "../not a hub id/x"])
def test_features_that_are_not_here_say_so_in_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="not on this machine") as error:
        features.encoder(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model_says_so_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no image model") as error:
        features.encoder(str(tmp_path))
    assert "\n" not in str(error.value)


def clouds(*shifts, n=16):
    return [normal(n, 4, int(100 * s) + 7, s) for s in shifts]


def test_measures_follow_their_definitions():
    real, base = clouds(0.0, 1.0, 2.0), clouds(3.0, 3.2, -1.0)
    samples = [dict(enumerate(row)) for row in (clouds(0.1), clouds(0.5, 1.1), clouds(0.9, 1.4, 2.05))]
    got = measure(real, base, samples, draws=50)
    h = [median_distance(x) for x in real]
    assert got["P_mmd"] == pytest.approx([mmd2(real[j], samples[j][j], h[j]) for j in range(3)])
    assert got["A_mmd"] == pytest.approx(np.mean([mmd2(real[j], samples[2][j], h[j]) for j in range(3)]))
    assert got["F_mmd"] == pytest.approx(np.mean([mmd2(samples[j][j], samples[2][j], h[j], paired=True) for j in range(2)]))
    for j, task in enumerate(got["tasks"]):
        assert task["mmd_base"] == pytest.approx(mmd2(real[j], base[j], h[j]))
        assert task["ratio_after"] == pytest.approx(task["mmd_after"] / task["mmd_base"])
        for key, (low, high) in task["intervals"].items():
            assert low <= high
            assert low - 0.3 < task[key] < high + 0.3
    assert got["matrix"][0][1:] == [None, None]
    assert got["matrix"][2][0] == got["tasks"][0]["mmd_end"]
    last = got["tasks"][2]
    assert last["mmd_after"] == last["mmd_end"]
    assert last["intervals"]["mmd_after"] == last["intervals"]["mmd_end"]
    assert got == measure(real, base, samples, draws=50)
    json.dumps(got, allow_nan=False)
    alone = measure(real, None, samples, draws=50)
    assert alone | {"tasks": None} == got | {"tasks": None}
    of_base = ("mmd_base", "ratio_after", "ratio_end")
    for task, whole in zip(alone["tasks"], got["tasks"], strict=True):
        left = {key: value for key, value in whole.items() if key not in of_base}
        assert task == left | {"intervals": {key: whole["intervals"][key] for key in ("mmd_after", "mmd_end")}}
    ends = measure(real, base, [samples[0], {1: samples[1][1]}, samples[2]], draws=50)
    assert ends["matrix"][1] == [None, got["matrix"][1][1], None]
    assert ends | {"matrix": None} == got | {"matrix": None}, "the matrix alone needs every sample"


def test_a_single_concept_has_nothing_to_forget():
    got = measure(clouds(0.0), clouds(2.0), [{0: clouds(0.1)[0]}], draws=20)
    assert got["F_mmd"] is None
    assert got["tasks"][0]["forgetting"] is None


def test_measures_refuse_a_missing_sample():
    one = clouds(0.1)[0]
    both = {0: one, 1: one}
    for rows in ([{0: one}, {0: one}], [{0: one}, {1: one}], [{}, both], [both, both], [{0: one}]):
        with pytest.raises(InputError, match="after its task and at the end"):
            measure(clouds(0.0, 1.0), clouds(2.0, 2.0), rows)


def is_drawn(path, least_width):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert image.width >= least_width
    assert not list(path.parent.glob(".*"))
    return (pixels < 250).mean() > 0.01


@pytest.mark.parametrize("count", [1, 4, 20])
def test_every_plot_is_drawn(tmp_path, photographs, count):
    images = photographs["cat"][0]
    names = [f"$concept {i}$" for i in range(count)]
    ratios = [[0.5 if j <= t else None for j in range(count)] for t in range(count)]
    curve = [{"step": s, "loss": 1 / (s + 1), "forgetting": 0.01 * s} for s in range(30)]
    curve[9]["density"] = curve[29]["density"] = 0.5
    keys = ("mmd_base", "mmd_after", "mmd_end")
    tasks = [dict.fromkeys(keys, 0.3) | {"intervals": {key: [0.2, 0.4] for key in keys}}] * count
    plots.concept_grid(tmp_path / "grid.png", "cat", [("real", "held out", images), ("base", "", images[:3])])
    plots.overview(tmp_path / "overview.png", "all", ["real", "base"], [(name, [images, images]) for name in names])
    plots.heat_map(tmp_path / "heat.png", names, ratios, "note")
    plots.training_curves(tmp_path / "curves.png", names, [curve] * count)
    plots.mmd_bars(tmp_path / "bars.png", names, tasks, "note")
    for name in ("grid", "overview", "heat", "curves", "bars"):
        assert is_drawn(tmp_path / f"{name}.png", 500), name


def test_mosaic_enlarges_by_whole_pixels():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    got = plots.mosaic([image] * 3, columns=2, rows=2, side=128, gap=4)
    assert got.shape == (260, 260, 3)
    np.testing.assert_array_equal(got[:128, :128], np.asarray(image).repeat(4, 0).repeat(4, 1))
    assert (got[132:, 132:] == 255).all(), "no fourth picture"


def test_a_failed_plot_keeps_the_old_one(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    (tmp_path / "x.png").write_bytes(b"old")

    def broken(figure, data, **_):
        data.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plt.Figure, "savefig", broken)
    with pytest.raises(OSError, match="No space"):
        plots.save_figure(plt.figure(), tmp_path / "x.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.png", b"old")]
    assert not plt.get_fignums()
