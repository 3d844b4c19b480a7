"""The methods by name, each as changed options: STAMINA, the baselines it is compared with, and ablations of its mask.

All run through the same operators, trainer and fold, so that a difference in results comes from the method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..adapter.config import StaminaConfig
from ..errors import InputError
from .options import TrainOptions


@dataclass(frozen=True)
class Method:
    """The options that a method sets.

    config    fields of StaminaConfig that define the method: they replace those of the given config
    options   the same for TrainOptions
    proposes  penalty weights that replace a weight of 0; any other weight is kept
    """

    summary: str
    config: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    proposes: Mapping[str, float] = field(default_factory=dict)


NO_MASK = {"mask": "none", "sparsity_weight": 0.0}

METHODS = {
    "stamina": Method("hard masks sampled with noise over low-rank residuals, and an MLP token (arXiv 2311.18763)"),
    "c-stamina": Method(
        "stamina with C-LoRA's penalty on changing what earlier concepts changed", proposes={"forgetting_weight": 100.0},
    ),
    "fixed-gate": Method("stamina whose mask is trained without noise: M = [L > 0] at every step", {"noise": False}),
    "random-mask": Method(
        "low-rank residuals under a random mask of the same density that is not trained", {"mask": "random-low-rank"},
    ),
    "lora": Method("sequential low-rank adaptation: no mask, no penalty", NO_MASK | {"forgetting_weight": 0.0}),
    "c-lora": Method(
        "low-rank residuals without a mask, penalised where the folded past is large, and a token that is learned itself "
        "(arXiv 2304.06027, Eq. 3)", NO_MASK | {"token_mlp": False},
        proposes={"forgetting_weight": 100.0},
    ),
    "token-only": Method(
        "textual inversion: the token alone is trained, the weights stay as they are",
        NO_MASK | {"forgetting_weight": 0.0, "rank": 1, "token_mlp": False}, {"learning_rate": 0.0},
    ),
}


def apply(name: str, config: StaminaConfig, options: TrainOptions):
    """(config, options) as the method called `name` changes them.

    Raises InputError, with all names, for a method that does not exist.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; the methods are {', '.join(METHODS)}")
    method = METHODS[name]
    proposed = {key: value for key, value in method.proposes.items() if getattr(config, key) == 0}
    return dataclasses.replace(config, **method.config, **proposed), dataclasses.replace(options, **method.options)


def settings(method: str, config: StaminaConfig, options: TrainOptions, changes: Mapping[str, object]):
    """(config, options) of a method, after `changes` to the fields of either. A field that both have is changed in the options.

    Raises InputError for a name that is a field of neither.
    """
    of_options, of_config = ({field.name for field in dataclasses.fields(kind)} for kind in (TrainOptions, StaminaConfig))
    unknown = sorted(set(changes) - of_options - of_config)
    if unknown:
        raise InputError(f"there is no option {unknown[0]!r}; the options are {', '.join(sorted(of_options | of_config))}")
    config = dataclasses.replace(config, **{key: value for key, value in changes.items() if key not in of_options})
    options = dataclasses.replace(options, **{key: value for key, value in changes.items() if key in of_options})
    return apply(method, config, options)
