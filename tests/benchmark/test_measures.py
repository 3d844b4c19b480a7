"""Each measure against plain loops that share no code with it."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from unets import SMALL, unet

import stamina_fast as sf
from stamina_fast.benchmark import measures
from stamina_fast.benchmark.names import ByNearest, accuracy, half, of_subjects
from stamina_fast.benchmark.plan import Renders, load_plan
from stamina_fast.benchmark.subjects import identities
from stamina_fast.errors import InputError
from stamina_fast.evaluate.classifier import OTHER, Classifier, Network
from stamina_fast.evaluate.features import layout
from stamina_fast.tiny.identities import identity
from stamina_fast.tiny.renders import beside, cut_half, halves


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def names(count, seed):
    return list(np.random.default_rng(seed).choice(["cat", "cup", "other"], count))


def test_accuracy_by_age_is_the_mean_over_concepts_of_that_age():
    values = np.random.default_rng(0).random((5, 5))
    shares = {(t, j): values[t, j] for t in range(5) for j in range(t + 1)}
    got = measures.by_age(shares)
    assert [row["age"] for row in got] == [0, 1, 2, 3, 4]
    for age, row in enumerate(got):
        assert row["named"] == pytest.approx(np.diag(values, -age).mean())
        assert row["concepts"] == 5 - age


def test_what_is_kept_of_a_scene_is_counted_picture_by_picture():
    base, end = names(40, 0), names(40, 1)
    got = measures.kept(base, end, "cat")
    was, now = np.array(base) == "cat", np.array(end) == "cat"
    assert got == {"base": was.mean(), "end": now.mean(), "seen": was.sum(), "both": (was & now).sum()}
    assert 0 < got["both"] < got["seen"]


def test_a_pair_counts_only_with_both_halves_named():
    left, right = names(60, 2), names(60, 3)
    got = measures.both_named(left, right, ("cat", "cup"))
    one, two = np.array(left) == "cat", np.array(right) == "cup"
    assert got == {"left": one.mean(), "right": two.mean(), "both": (one & two).mean()}
    assert 0 < got["both"] < min(got["left"], got["right"])


def test_the_pictures_of_the_base_are_compared_pair_by_pair():
    x, y = rows(7, 3, 0), rows(7, 3, 1) + 0.4
    h = np.median([math.dist(a, b) for a, b in itertools.combinations(x.tolist(), 2)])

    def k(a, b):
        return math.exp(-math.dist(a, b) ** 2 / (2 * h * h))

    apart = [(i, j) for i in range(7) for j in range(7) if i != j]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in apart) / len(apart)
    assert measures.drawn_apart(x, y) == pytest.approx(expected, abs=1e-12)
    assert measures.drawn_apart(x, x) == 0


def test_cosines_and_drift():
    x, y = (torch.nn.functional.normalize(rows(n, 4, n), dim=1) for n in (5, 3))
    a, b = x.numpy(), y.numpy()
    assert measures.cosine(x, y) == pytest.approx(np.mean([np.dot(u, v) for u in a for v in b]))
    assert measures.drift(x[:3], y) == pytest.approx(1 - np.mean([np.dot(u, v) for u, v in zip(a[:3], b, strict=True)]))
    assert measures.drift(x, x) == pytest.approx(0)
    with pytest.raises(InputError, match="picture by picture"):
        measures.drift(x, y)


def test_changes_of_tasks_are_compared_entry_by_entry():
    model = unet()
    adapters = sf.attach(model, SMALL)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    deltas = []
    for i, name in enumerate(("one", "two", "three")):
        adapters.rewind([])
        adapters.reset_(i)
        with torch.no_grad():
            for stack in adapters.stacks:
                stack.a.copy_(rows(*stack.a.shape, i))
        adapters.fold_(name)
        adapters.rewind([name])
        deltas.append(np.concatenate([(tensor - before[key]).double().flatten().numpy()
                                      for key, tensor in model.state_dict().items() if key in before]))
    got = measures.changes(adapters, ["one", "two", "three"])
    for t, i in itertools.product(range(3), repeat=2):
        one, two = deltas[t], deltas[i]
        assert got["shared"][t][i] == pytest.approx(((one != 0) & (two != 0)).sum() / (one != 0).sum(), abs=1e-3)
        assert got["cosine"][t][i] == pytest.approx(one @ two / np.sqrt((one @ one) * (two @ two)), abs=1e-4)
    assert 0 < got["shared"][0][1] < 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if key in before)


def test_a_task_that_changes_nothing_has_no_overlap():
    got = measures.compare(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    assert got["shared"] == [[1.0, 0.0], [None, None]]
    assert got["cosine"] == [[pytest.approx(1.0), None], [None, None]]


def test_the_nearest_centroid_names_a_picture():
    pictures = {name: half([picture], False) for name, picture in zip("abc", noisy(3), strict=True)}
    namer = ByNearest(layout, pictures)
    assert namer.name([pictures[name][0] for name in "cab"]) == ["c", "a", "b"]
    centroids = {name: layout(images).mean(0).numpy() for name, images in pictures.items()}
    other = noisy(6)
    features = layout(other).numpy()
    assert namer.name(other) == [min(centroids, key=lambda name: np.linalg.norm(x - centroids[name])) for x in features]


def noisy(count):
    draw = np.random.default_rng(5)
    return [Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def test_a_half_is_the_middle_rows_of_one_side_enlarged():
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    picture[:, :, 8:24, :16], picture[:, :, 8:24, 16:] = 100, 200
    assert set(cut_half(picture, False).flatten().tolist()) == {100}
    assert set(cut_half(picture, True).flatten().tolist()) == {200}
    subject, seeds = identity(5, "cat"), range(2)
    whole = [beside(subject, seed, right) for seed, right in zip(seeds, (False, True), strict=True)]
    expected = [np.asarray(half([to_image(picture)], right)[0]) for picture, right in zip(whole, (False, True), strict=True)]
    np.testing.assert_array_equal(halves(subject, seeds).permute(0, 2, 3, 1).numpy(), np.stack(expected))
    assert half([to_image(whole[0])], False)[0].size == (32, 32)


def to_image(pixels):
    return Image.fromarray(pixels)


def test_accuracy_is_the_share_of_rightly_named_renders():
    torch.manual_seed(0)
    classifier = Classifier(["a", "b", OTHER], Network(3))
    pictures, labels = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8), torch.arange(3).repeat(10)
    got, found = accuracy(classifier, pictures, labels), classifier.name(pictures.float() / 255)
    by_name = {name: np.mean([found[i] == name for i in range(k, 30, 3)]) for k, name in enumerate(classifier.names)}
    assert got["mean"] == pytest.approx((by_name["a"] + by_name["b"]) / 2)
    assert got[OTHER] == pytest.approx(by_name[OTHER])
    assert got["least"][1] == pytest.approx(min(by_name["a"], by_name["b"]))


def test_the_classifier_tells_identities_apart_whole_and_in_halves():
    subjects = identities(load_plan("quick"))
    classifier, measured = of_subjects(subjects, 32, Renders(each=20, steps=50))
    assert classifier.names == [*subjects, OTHER]
    for what in ("whole", "halves"):
        assert measured[what]["mean"] > 0.7, measured
        assert measured[what][OTHER] > 0.6, measured
