"""The methods by name: STAMINA, the baselines it is compared with, and ablations of its mask.

All run through the same operators, trainer and fold, so that a difference in results comes from the method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ...adapter.config import StaminaConfig
from ...errors import InputError
from ..options import TrainOptions
from . import ewc, joint, lora_merge, null_space, o_lora, plain, replay
from .base import Method, Strategy

__all__ = ["METHODS", "Method", "Strategy", "settings"]

METHODS: dict[str, Method] = plain.METHODS | {
    "lora-merge": lora_merge.METHOD,
    "o-lora": o_lora.METHOD,
    "null-space": null_space.METHOD,
    "ewc": ewc.METHOD,
    "replay": replay.METHOD,
    "joint": joint.METHOD,
}


def settings(name: str, config: StaminaConfig, options: TrainOptions, changes: Mapping[str, object]):
    """(config, options, strategy) of the method called `name`, after `changes` to the fields of any of the three.

    A field that config and options both have is changed in the options. What defines the method wins over `changes`.
    Raises InputError, with all names, for a method that does not exist or a name that is a field of none of the three.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; the methods are {', '.join(METHODS)}")
    method = METHODS[name]
    kinds = (TrainOptions, StaminaConfig, method.strategy)
    of_options, of_config, of_strategy = ({field.name for field in dataclasses.fields(kind)} for kind in kinds)
    known = of_options | of_config | of_strategy
    unknown = sorted(set(changes) - known)
    if unknown:
        raise InputError(f"there is no option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
    config = dataclasses.replace(config, **{key: value for key, value in changes.items() if key in of_config - of_options})
    options = dataclasses.replace(options, **{key: value for key, value in changes.items() if key in of_options})
    proposed = {key: value for key, value in method.proposes.items() if getattr(config, key) == 0}
    strategy = method.strategy(**{key: value for key, value in changes.items() if key in of_strategy})
    return dataclasses.replace(config, **method.config, **proposed), dataclasses.replace(options, **method.options), strategy
