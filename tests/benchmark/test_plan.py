"""Plans: which cells they expand to, what is refused before anything is begun, and which identities they use."""

import json

import pytest

from stamina_fast.adapter.checks import check_projections
from stamina_fast.adapter.config import StaminaConfig
from stamina_fast.benchmark.plan import Cell, Plan, check, load_plan, plan_names
from stamina_fast.benchmark.subjects import identities, pairs, scenes
from stamina_fast.errors import InputError
from stamina_fast.pipeline.projections import find_projections
from stamina_fast.tiny.identities import KINDS
from stamina_fast.tiny.pipeline import build_unet
from stamina_fast.training.methods import settings
from stamina_fast.training.options import TrainOptions


def plan(*groups, **sizes) -> Plan:
    return Plan.model_validate({"identities": 4, "cells": list(groups), **sizes})


def test_a_plan_expands_to_methods_times_seeds_times_changes():
    made = plan({"methods": ["stamina", "lora"], "seeds": [0, 1]},
                {"methods": ["c-lora"], "changes": [{"forgetting_weight": 1.0}, {"forgetting_weight": 2.0}]},
                {"methods": ["token-only"], "seeds": [3], "order": 7}, train={"steps": 5}).cells()
    assert [(cell.label, cell.seed, cell.order) for cell in made] == [
        ("stamina", 0, 0), ("lora", 0, 0), ("c-lora forgetting_weight=1.0", 0, 0), ("c-lora forgetting_weight=2.0", 0, 0),
        ("stamina", 1, 1), ("lora", 1, 1), ("token-only", 3, 7)]
    assert len({cell.id for cell in made}) == len(made)
    assert made[2].options == {"steps": 5, "forgetting_weight": 1.0}


def test_options_of_a_group_win_over_the_plans_and_are_no_part_of_the_label():
    made = plan({"methods": ["lora"], "train": {"learning_rate": 0.001}, "changes": [{}, {"rank": 3}]},
                {"methods": ["stamina"]}, train={"learning_rate": 0.002, "steps": 5}).cells()
    assert [cell.label for cell in made] == ["lora", "lora rank=3", "stamina"]
    assert [cell.options["learning_rate"] for cell in made] == [0.001, 0.001, 0.002]
    assert made[1].options == {"learning_rate": 0.001, "steps": 5, "rank": 3}


@pytest.mark.parametrize("change", [
    {"method": "lora"}, {"identities": 5}, {"seed": 1}, {"order": 1}, {"changes": {"rank": 3}}, {"train": {"steps": 3}},
    {"triangle": True},
])
def test_the_folder_of_a_cell_depends_on_every_setting(change):
    first = {"method": "stamina", "identities": 4, "seed": 0, "order": 0, "changes": {"rank": 2}, "train": {"steps": 2}}
    cell = Cell(**first)
    assert cell.id != Cell(**{**first, **change}).id
    assert cell.id.startswith("stamina-rank-2-")
    assert cell.id == Cell(**json.loads(json.dumps(cell.as_dict()))).id


def test_a_change_wins_over_what_the_plan_shares():
    assert Cell("lora", 4, 0, 0, {"rank": 3}, {"rank": 2, "steps": 9}).options == {"rank": 3, "steps": 9}


def test_every_plan_that_ships_is_sound():
    assert set(plan_names()) == {"quick", "fifty", "hundred", "sweep", "ablations"}
    for name in plan_names():
        cells = load_plan(name).cells()
        assert not {problem for cell in cells if (problem := cell.problem())}
    assert [load_plan(name).identities for name in ("quick", "fifty", "hundred")] == [3, 50, 100]
    fifty = load_plan("fifty").cells()
    for method in ("stamina", "lora", "c-stamina", "c-lora", "token-only", "custom-diffusion", "ewc", "null-space", "joint",
                   "frozen"):
        assert {cell.order for cell in fifty if cell.method == method} == {0, 1, 2}
    assert len({cell.label for cell in fifty if cell.method == "c-lora"}) == 3


@pytest.mark.parametrize("name", plan_names())
def test_every_cell_of_a_plan_fits_the_small_model(name):
    """Ranks above its narrowest projection would be found only when the cell is reached."""
    unet = build_unet()
    slots = find_projections(unet)
    for cell in load_plan(name).cells():
        config, _, _ = settings(cell.method, StaminaConfig(), TrainOptions(), cell.options)
        check_projections(unet, slots, config)


def test_a_seed_is_no_option_of_a_plan():
    assert "seeds" in Cell("stamina", 4, 0, 0, {"seed": 3}, {}).problem()
    assert Cell("stamina", 4, 0, 0, {"rank": 3}, {}).problem() is None


def test_what_cannot_be_trained_is_listed_before_anything_is_begun():
    cells = plan({"methods": ["stamina", "no-such", "nor-this"], "seeds": [0, 1]},
                 {"methods": ["lora"], "changes": [{"no_option": 1}]}, {"methods": ["lora"], "changes": [{"rank": 0}]}).cells()
    with pytest.raises(InputError, match="6 of 8 cells cannot be trained") as error:
        check(cells)
    said = str(error.value)
    assert all(word in said for word in ("no-such", "nor-this", "no_option", "lora rank=0")), said
    assert "\n" not in said
    check([cell for cell in cells if cell.label == "stamina"])


@pytest.mark.parametrize(("content", "say"), [
    ("identities: 4\ncells: []\n", "cells"), ("identities: 1\ncells: [{methods: [lora]}]\n", "identities"),
    ("identities: 4\nsteps: 3\ncells: [{methods: [lora]}]\n", "steps"), ("[", "YAML"),
    ("identities: 4\ncells: [{methods: [lora], seeds: [x]}]\n", "seeds"),
])
def test_a_plan_that_does_not_fit_says_where(tmp_path, content, say):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises((InputError, OSError), match=say) as error:
        load_plan(tmp_path / "mine.yaml")
    assert "\n" not in str(error.value)


def test_a_plan_that_is_not_there_names_those_that_are():
    with pytest.raises(InputError, match="ablations, fifty, hundred, quick, sweep"):
        load_plan("sixty")


def test_the_same_cell_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        plan({"methods": ["lora"]}, {"methods": ["stamina", "lora"]}).cells()


def test_identities_are_never_shared_between_tuning_and_the_benchmark():
    for_results, for_tuning = (identities(plan({"methods": ["lora"]}, tuning=tuning).model_copy(update={"identities": 100}))
                               for tuning in (False, True))
    assert not set(for_results.values()) & set(for_tuning.values())
    assert len(set(for_results.values())) == 100
    with pytest.raises(ValueError, match="10000"):
        # the ranges would meet
        plan({"methods": ["lora"]}, identities=80_001)


def test_identities_are_of_the_three_groups_in_equal_shares():
    chosen = identities(plan({"methods": ["lora"]}, identities=50))
    assert list(chosen)[:4] == ["face-01-man", "landmark-01-tower", "thing-01-ball", "face-02-woman"]
    counts = [sum(name.startswith(group) for name in chosen) for group in ("face", "landmark", "thing")]
    assert counts == [17, 17, 16]
    assert all(name.endswith(subject.kind) for name, subject in chosen.items())
    longer = identities(plan({"methods": ["lora"]}, identities=100))
    assert list(longer.items())[:50] == list(chosen.items())


def test_scenes_show_one_subject_of_a_kind_in_equal_shares():
    found = scenes(len(KINDS))
    assert sorted(kind for _, kind in found) == sorted(KINDS)
    for caption, kind in found:
        assert [word for word in caption.split() if word in KINDS] == [kind]
        assert "close up" not in caption
    assert scenes(5) == found[:5]


def test_pairs_are_of_different_concepts_and_fixed():
    found = pairs(["a", "b", "c", "d"], 5)
    assert len(set(found)) == 5
    assert all(one != two for one, two in found)
    assert found == pairs(["a", "b", "c", "d"], 5)
    assert len(pairs(["a", "b"], 9)) == 2
