"""The report of a small output folder, and what it makes of results that are made up."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from stamina_fast.benchmark import summary, write_report
from stamina_fast.benchmark.report import by_age, by_chance
from stamina_fast.errors import InputError

NAMES = [f"c{i:02d}" for i in range(20)]


def made_up(label, seed, after, end, rise=0.0, forgotten=0.1):
    """A result of 20 concepts: shares recognised just after and at the end, and a P_mmd that rises by `rise` over the tasks."""
    draw = np.random.default_rng([seed, len(label)])
    order = [NAMES[i] for i in draw.permutation(20)]
    tasks = [{"name": name, "position": t, "named_after": after + draw.normal(0, 0.01), "named_end": end + draw.normal(0, 0.01),
              "mmd_after": 0.1 + rise * t / 19 + draw.normal(0, 1e-3), "mmd_end": 0.3 - 0.2 * end + draw.normal(0, 1e-3),
              "forgetting": None if t == 19 else forgotten + draw.normal(0, 1e-3)} for t, name in enumerate(order)]
    return {"label": label, "cell": {"method": label.split()[0], "seed": seed, "order": seed, "changes": label}, "tasks": tasks,
            "scenes": [{"prompt": "p", "seen": 4, "both": 3}, {"prompt": "q", "seen": 0, "both": 0}],
            "pairs": [{"pair": ["c00", "c01"], "both": 0.5}], "by_age": []}


@pytest.fixture
def arms():
    results = [made_up("lora", s, 0.9, 0.2, forgotten=0.4) for s in range(3)]
    results += [made_up("c-lora forgetting_weight=1.0", s, 0.8, 0.5, rise=0.2, forgotten=0.1) for s in range(3)]
    results += [made_up("c-lora forgetting_weight=9.0", s, 0.3, 0.3, rise=0.1, forgotten=0.0) for s in range(3)]
    results += [made_up("stamina", s, 0.9, 0.8, forgotten=0.1) for s in range(3)]
    return summary.arms_of(results)


def test_cells_of_other_seeds_are_one_arm(arms):
    assert list(arms) == ["c-lora forgetting_weight=1.0", "c-lora forgetting_weight=9.0", "lora", "stamina"]
    assert all(len(results) == 3 for results in arms.values())


def test_cells_with_other_shared_options_are_arms_of_their_own():
    one, two = made_up("lora", 0, 1, 1), made_up("lora", 1, 1, 1)
    two["cell"]["train"] = {"steps": 9}
    labels = list(summary.arms_of([one, two]))
    assert len(labels) == 2
    assert all(re.fullmatch(r"lora \[[0-9a-f]{4}\]", label) for label in labels)


def test_a_measure_is_averaged_over_seeds_and_redrawn_over_identities(arms):
    found = summary.values_of(arms["lora"], summary.BY_KEY["named_end"])
    for name in ("c00", "c13"):
        assert found[name] == pytest.approx(np.mean([task["named_end"] for result in arms["lora"] for task in result["tasks"]
                                                     if task["name"] == name]))
    values = np.array(list(found.values()))
    got = summary.mean_of(found)
    assert got["mean"] == pytest.approx(values.mean())
    draw = np.random.default_rng(0)
    redrawn = [draw.choice(values, 20).mean() for _ in range(4000)]
    np.testing.assert_allclose(got["interval"], np.quantile(redrawn, [0.025, 0.975]), atol=0.2 * values.std())
    assert summary.values_of(arms["lora"], summary.BY_KEY["kinds"]) == {"p": 0.75}
    assert summary.mean_of({}) is None


def test_a_difference_is_paired():
    one = {name: i * 1.0 for i, name in enumerate(NAMES)}
    two = {name: value + 0.5 for name, value in one.items()} | {"another": 9.0}
    got = summary.difference(two, one)
    assert got["mean"] == pytest.approx(0.5)
    assert got["interval"] == pytest.approx([0.5, 0.5])


def test_a_rise_is_that_of_the_line_through_all_tasks(arms):
    tasks = [task for result in arms["lora"] for task in result["tasks"]]
    slope = np.polyfit([task["position"] for task in tasks], [task["mmd_after"] for task in tasks], 1)[0]
    assert summary.rises([arms["lora"]])["mean"] == pytest.approx(19 * slope)
    # an identity that is drawn twice counts twice
    times = torch.randint(0, 3, (1, 20), generator=torch.Generator().manual_seed(1)).double()
    weights = [times[0, NAMES.index(task["name"])].item() for task in tasks]
    expected = np.polyfit([t["position"] for t in tasks], [t["mmd_after"] for t in tasks], 1, w=np.sqrt(weights))[0]
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "bootstrap", lambda count, statistic: kept.append(statistic(times).item()))
        summary.rises([arms["lora"]])
    assert kept == [pytest.approx(19 * expected)]


def test_orderings_are_seen_or_not_or_undecided(arms):
    found = {row["claim"]: row for row in summary.orderings(arms)}
    assert {claim: row["found"] for claim, row in found.items()} == {
        "Sequential tuning without a mask forgets": "seen",
        "C-LoRA forgets less than sequential LoRA": "seen",
        "C-LoRA learns later tasks worse": "seen",
        "C-LoRA's later tasks suffer more than sequential LoRA's": "seen",
        "STAMINA ends with the better A_mmd than C-LoRA": "seen",
        "STAMINA ends with the better A_mmd than sequential LoRA": "seen",
        "More is recognised at the end with STAMINA than with C-LoRA": "seen",
        "More is recognised at the end with STAMINA than with sequential LoRA": "seen",
        "STAMINA forgets less than C-LoRA, which the papers do not establish": "undecided",
        "Sequential LoRA is the worst forgetter, which it was not in C-LoRA's own figure": "seen",
    }
    assert found["Sequential tuning without a mask forgets"]["mean"] == pytest.approx(0.7, abs=0.02)
    # the best of C-LoRA's settings is compared
    assert "c-lora forgetting_weight=1.0" in found["C-LoRA forgets less than sequential LoRA"]["said"]


def test_an_ordering_the_other_way_round_is_not_seen_and_without_a_method_not_measured():
    found = {row["claim"]: row["found"] for row in summary.orderings(summary.arms_of(
        [made_up("stamina", 0, 0.9, 0.2), made_up("lora", 0, 0.9, 0.8)]))}
    assert found["More is recognised at the end with STAMINA than with sequential LoRA"] == "not seen"
    assert found["STAMINA ends with the better A_mmd than sequential LoRA"] == "not seen"
    assert found["C-LoRA learns later tasks worse"] == "not measured"


def test_stamina_and_lora_are_compared_where_both_have_the_same_changes():
    made = [made_up("stamina", 0, 0.9, 0.8, forgotten=0.0), made_up("lora", 0, 0.9, 0.8, forgotten=0.0)]
    made += [made_up("stamina rate=2", 0, 0.9, 0.5, forgotten=0.2), made_up("lora rate=2", 0, 0.9, 0.3, forgotten=0.4)]
    made += [made_up("stamina rate=3", 0, 0.9, 0.5)]
    found = {row["claim"]: row for row in summary.orderings(summary.arms_of(made))}
    assert not any("rate=3" in claim for claim in found)
    for claim, wanted in (("Sequential tuning without a mask forgets, with rate=2", 0.6),
                          ("STAMINA forgets less than sequential LoRA, both with rate=2", 0.2),
                          ("More is recognised at the end with STAMINA than with sequential LoRA, both with rate=2", 0.2)):
        assert found[claim]["found"] == "seen"
        assert found[claim]["mean"] == pytest.approx(wanted, abs=0.02), claim
    # the worst forgetter is looked for among the best settings of the other methods
    worst = found["Sequential LoRA is the worst forgetter, which it was not in C-LoRA's own figure"]
    assert worst["said"].endswith("minus stamina")


def test_a_random_mask_is_compared_where_it_has_the_same_changes():
    made = [made_up("stamina rate=2", 0, 0.9, 0.5, forgotten=0.2), made_up("random-mask rate=2", 0, 0.9, 0.7, forgotten=0.1)]
    found = {row["claim"]: row["found"] for row in summary.orderings(summary.arms_of(made))}
    assert found["STAMINA forgets less than a random mask, both with rate=2"] == "not seen"
    assert found["More is recognised at the end with STAMINA than with a random mask, both with rate=2"] == "not seen"


def test_shares_are_held_against_those_of_independent_masks():
    result = {"tasks": [{"density": 0.5}, {"density": 0.25}, {"density": 0.0}],
              "changes": {"shared": [[1.0, 0.35, 0.0], [0.7, 1.0, 0.0], [None] * 3],
                          "cosine": [[1.0, -0.02, None], [-0.04, 1.0, None], [None] * 3]}}
    assert "by 0.1500 on average, and by 0.200 at most; |cosine| is 0.030 on average" in by_chance(result)


def test_ages_are_grouped_where_there_are_many():
    """The concept of age a at the end is task 49 - a."""
    ages = [{"age": age, "named": 1 - age / 100, "concepts": 50 if age == 0 else 1} for age in range(50)]
    result = {"by_age": ages, "tasks": [{"named_after": 0.5 + t / 1000} for t in range(50)], "cell": {"triangle": False}}
    got = by_age([result, result])
    assert len(got) == 10
    assert got[0] == (pytest.approx(3.0), pytest.approx(0.97), pytest.approx(0.546)), "ages 1 to 5, tasks 48 to 44"
    assert by_age([result | {"by_age": ages[:3]}]) == [(1, 0.99, 0.548), (2, 0.98, 0.547)]


def test_ages_of_a_whole_triangle_have_all_concepts_as_old():
    ages = [{"age": age, "named": named, "concepts": 3 - age} for age, named in enumerate((1.0, 0.5, 0.4))]
    result = {"by_age": ages, "tasks": [{"named_after": x} for x in (0.6, 0.8, 0.9)], "cell": {"triangle": True}}
    assert by_age([result]) == [(1, 0.5, pytest.approx(0.7)), (2, 0.4, 0.6)]


def test_the_report_has_its_parts_and_is_one_file(filled, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(filled[0], output)
    page = write_report(output)
    text = (output / "report.md").read_text()
    for heading in ("## What names the pictures", "## Measures", "## Costs and weights", "## Learned, and still known",
                    "## Stability and plasticity", "## Accuracy by age", "## Which tasks change the same weights",
                    "## What was asked", "## Samples", "### stamina", "### lora", "## Cells without a result",
                    "## How to make it again"):
        assert heading in text, heading
    assert "2 identities of the small model's world for tuning; 2 finished cells of 2 methods" in text
    assert "stamina-fast benchmark --plan mine" in text
    assert re.search(r"- stamina-rank-1000\S*: failed: .*rank", text)
    value = r"-?[\d.e-]+ \[-?[\d.e-]+, -?[\d.e-]+\]"
    for method in ("lora", "stamina"):
        assert re.search(rf"^\| {method} \| 1 \|( {value} \|){{5}}", text, re.MULTILINE), method
    html = page.read_text()
    assert html.count("<table>") == 4
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == text.count("](report/") == 6
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).width > 300
    assert page.stat().st_size < 1_000_000


def test_a_report_is_the_same_where_the_results_alone_are_kept(filled, tmp_path):
    """As in a repository: without runs, and with what is drawn from samples."""
    output = tmp_path / "out"
    shutil.copytree(filled[0], output)
    write_report(output)
    text, walls = (output / "report.md").read_text(), sorted((output / "report").glob("wall-*"))
    assert len(walls) == 2
    for run in (output / "cells").glob("*/run"):
        shutil.rmtree(run)
    write_report(output)
    assert (output / "report.md").read_text() == text
    walls[0].unlink()
    write_report(output)
    assert "The samples of these are not kept: lora.\n" in (output / "report.md").read_text()


def test_a_folder_without_a_benchmark_is_refused(tmp_path):
    with pytest.raises(InputError, match="no benchmark"):
        write_report(tmp_path)
