"""The sequential trainer: concept after concept, each folded into the weights before the next."""

from .loop import train
from .options import TrainOptions

__all__ = ["TrainOptions", "train"]
