"""The table of methods."""

import dataclasses

import pytest

from stamina_fast.adapter.config import StaminaConfig
from stamina_fast.errors import InputError
from stamina_fast.training import methods
from stamina_fast.training.options import TrainOptions


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_valid_and_keeps_the_rest(name):
    config, options = methods.apply(name, StaminaConfig(gate_rank=3, code_width=5), TrainOptions(steps=7))
    assert (config.gate_rank, config.code_width, options.steps) == (3, 5, 7)
    fixed = methods.METHODS[name].config
    assert {key: getattr(config, key) for key in fixed} == dict(fixed)


def test_stamina_is_the_config_itself():
    pair = StaminaConfig(sparsity_weight=0.5), TrainOptions(seed=3)
    assert methods.apply("stamina", *pair) == pair


def test_methods_differ_in_what_makes_them():
    config, options = StaminaConfig(sparsity_weight=0.1), TrainOptions()
    lora, _ = methods.apply("lora", config, options)
    clora, _ = methods.apply("c-lora", config, options)
    assert (lora.mask, lora.sparsity_weight, lora.forgetting_weight) == ("none", 0.0, 0.0)
    assert dataclasses.replace(clora, forgetting_weight=0.0, token_mlp=True) == lora
    assert not clora.token_mlp
    assert clora.forgetting_weight > 0
    assert methods.apply("c-lora", StaminaConfig(forgetting_weight=7.0), options)[0].forgetting_weight == 7.0
    assert methods.apply("token-only", config, options)[1].learning_rate == 0


def test_unknown_method_lists_them_all():
    with pytest.raises(InputError, match="c-lora") as caught:
        methods.apply("clora", StaminaConfig(), TrainOptions())
    assert all(name in str(caught.value) for name in methods.METHODS)
