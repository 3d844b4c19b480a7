"""The table of methods, and what holds for every one of them."""

import dataclasses

import pytest
import tinypipes
from tinyruns import CHEAP, SMALL, Killed, assert_same, run, tensors

from stamina_fast.adapter.config import StaminaConfig
from stamina_fast.errors import InputError
from stamina_fast.io.run import Run
from stamina_fast.training import methods
from stamina_fast.training.options import TrainOptions

WITH_CODE = [name for name, method in methods.METHODS.items() if method.strategy is not methods.Strategy]


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_valid_and_keeps_the_rest(name):
    given = StaminaConfig(gate_rank=3, code_width=5), TrainOptions(batch=7)
    config, options, _ = methods.settings(name, *given, {"flip": False})
    assert (config.gate_rank, config.code_width, options.batch, options.flip) == (3, 5, 7, False)
    method = methods.METHODS[name]
    assert {key: getattr(config, key) for key in method.config} == dict(method.config)
    assert {key: getattr(options, key) for key in method.options} == dict(method.options)


def test_stamina_is_the_config_itself():
    pair = StaminaConfig(sparsity_weight=0.5), TrainOptions(seed=3)
    *same, strategy = methods.settings("stamina", *pair, {})
    assert tuple(same) == pair
    assert type(strategy) is methods.Strategy


def test_methods_differ_in_what_makes_them():
    config, options = StaminaConfig(sparsity_weight=0.1), TrainOptions()
    lora, _, _ = methods.settings("lora", config, options, {})
    clora, _, _ = methods.settings("c-lora", config, options, {})
    assert (lora.mask, lora.sparsity_weight, lora.forgetting_weight) == ("none", 0.0, 0.0)
    assert dataclasses.replace(clora, forgetting_weight=0.0, token_mlp=True) == lora
    assert not clora.token_mlp
    assert clora.forgetting_weight > 0
    assert methods.settings("c-lora", config, options, {"forgetting_weight": 7.0})[0].forgetting_weight == 7.0
    assert methods.settings("token-only", config, options, {})[1].learning_rate == 0
    # a method with code is lora in all else
    for name in WITH_CODE:
        assert dataclasses.replace(methods.settings(name, config, options, {})[0], forgetting_weight=0.0) == lora


def test_unknown_names_list_all_that_there_are():
    pair = StaminaConfig(), TrainOptions()
    with pytest.raises(InputError, match="c-lora") as caught:
        methods.settings("clora", *pair, {})
    assert all(name in str(caught.value) for name in methods.METHODS)
    with pytest.raises(InputError, match=r"no option 'replay_number'; .*rank, .*replay_count"):
        methods.settings("replay", *pair, {"replay_number": 3})
    with pytest.raises(InputError, match="no option 'replay_count'"):
        methods.settings("stamina", *pair, {"replay_count": 3})


def test_no_option_has_two_meanings():
    shared = {field.name for kind in (StaminaConfig, TrainOptions) for field in dataclasses.fields(kind)}
    own = [field.name for name in WITH_CODE for field in dataclasses.fields(methods.METHODS[name].strategy)]
    assert len(own) == len(set(own))
    assert not shared & set(own)


@pytest.mark.parametrize(("name", "change"), [
    ("null-space", {"null_energy": 1.1}), ("null-space", {"null_energy": float("nan")}), ("ewc", {"fisher_batches": 0}),
    ("ewc", {"fisher_batches": 2.0}), ("replay", {"replay_share": -0.1}), ("replay", {"replay_count": True}),
    ("replay", {"replay_steps": 0}), ("replay", {"replay_guidance": 0.5}),
])
def test_own_options_refuse_what_cannot_be(name, change):
    with pytest.raises(InputError, match=next(iter(change))) as caught:
        methods.settings(name, StaminaConfig(), TrainOptions(), change)
    assert "\n" not in str(caught.value)


def test_own_options_are_recorded_and_compared(three, tmp_path):
    output, options = tmp_path / "run", {"method": "replay", "steps": 1, "replay_count": 1, "replay_steps": 1}
    made = run(tinypipes.sd15(), three, output, **options)
    assert made.config["method_options"] == {
        "replay_share": 0.5, "replay_count": 1, "replay_steps": 1, "replay_guidance": 3.0,
    }
    with pytest.raises(InputError, match=r"method_options\.replay_count was 1, is 2"):
        run(tinypipes.sd15(), three, output, resume=True, **options | {"replay_count": 2})


@pytest.fixture(scope="module")
def whole(three, tmp_path_factory):
    """A function: the uninterrupted run of a method, and the tensors of the pipeline at its end."""
    made = {}

    def of(method):
        if method not in made:
            pipeline, output = tinypipes.sd15(), tmp_path_factory.mktemp(method) / "run"
            made[method] = run(pipeline, three, output, **options_of(method)), tensors(pipeline)
        return made[method]

    return of


def options_of(method):
    return {"method": method, "save_every": 2, **CHEAP.get(method, {})}


@pytest.mark.parametrize("where", ["within", "after a checkpoint", "between"])
@pytest.mark.parametrize("method", WITH_CODE)
def test_a_method_with_code_resumes_with_the_same_bits(method, where, three, whole, tmp_path):
    other, bits = whole(method)
    # the last task that makes steps, of which all before it are finished
    last = max(i for i, task in enumerate(other.tasks()) if other.load_task(task["name"]).curve)
    at = {"within": (last, 1), "after a checkpoint": (last, 3)}.get(where)

    def kill(step, task, i):
        if (task, i) == at:
            raise Killed

    def kill_after(pipeline, made, concept):
        if where == "between" and len(made.tasks()) == 2:
            raise Killed

    with pytest.raises(Killed):
        run(tinypipes.sd15(), three, tmp_path / "run", on_step=kill, on_task=kill_after, **options_of(method))
    made = Run.open(tmp_path / "run")
    assert len(made.tasks()) == (2 if where == "between" else last)
    assert (made.load_checkpoint() is not None) == (where == "after a checkpoint")
    pipeline = tinypipes.sd15()
    resumed = run(pipeline, three, tmp_path / "run", resume=True, **options_of(method))
    assert_same(tensors(pipeline), bits)
    for mine, theirs in zip(resumed.tasks(), other.tasks(), strict=True):
        # task.json holds the seconds
        assert {**mine["files"], "task.json": ""} == {**theirs["files"], "task.json": ""}


@pytest.mark.parametrize("method", WITH_CODE)
def test_a_method_is_not_lora(method, three, whole, tmp_path):
    """What the strategy does reaches the factors of the last task; the first task of most methods is that of lora."""
    made, _ = whole(method)
    lora = run(tinypipes.sd15(), three, tmp_path / "run", method="lora")
    last = [task["sha256"] for task in (made.tasks()[-1], lora.tasks()[-1])]
    assert last[0] != last[1]
    assert (made.tasks()[0]["sha256"] == lora.tasks()[0]["sha256"]) == (method not in ("null-space", "joint"))


def test_frozen_changes_nothing_but_adds_each_token_where_it_starts(three, tmp_path):
    from stamina_fast.adapter.attach import attach
    from stamina_fast.seeds import derive_seed

    pipeline = tinypipes.sd15()
    before = tensors(pipeline)
    made = run(pipeline, three, tmp_path / "run", method="frozen")
    after = tensors(pipeline)
    (table,) = [name for name in before if before[name].shape != after[name].shape]
    assert_same({**after, table: after[table][: len(before[table])]}, before)
    adapters = attach(tinypipes.sd15(), StaminaConfig.from_dict(made.config["stamina"]))
    adapters.tokens.begin("<cup>", derive_seed(derive_seed(0, "task", 1), "token"))
    start = adapters.tokens.fold_()["text_encoder"]
    assert (made.load_task("cup").token["text_encoder"] - start).abs().max() == 0
    assert len(made.load_task("cup").curve) == 1 < SMALL["steps"]
