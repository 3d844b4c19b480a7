"""The sequential trainer: concept after concept, each folded into the weights before the next."""

import sys
from types import ModuleType

from .loop import train
from .options import TrainOptions

__all__ = ["TrainOptions", "train"]


class _Train(ModuleType):
    """Importing this package binds its name in `stamina_fast`, where the function `train` is expected: it is called alike."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Train
