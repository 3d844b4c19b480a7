"""Fixed image encoders φ from pictures to features. None is trained here, and nothing is downloaded.

    layout          where colours and edges are; for small pictures, with scikit-image alone
    clip, dino      openai/clip-vit-base-patch32 and facebook/dinov2-base, if they are in the local hub cache
    anything else   the folder, or the id in the local hub cache, of a CLIP or DINOv2 model in the transformers format
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.color import rgb2gray, rgb2lab
from skimage.feature import hog

from ..errors import InputError

Encoder = Callable[[Sequence[Image.Image]], torch.Tensor]

SIDE = 32
HUB_IDS = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dinov2-base"}
# cells along a side; and the root mean square distance between two unrelated pictures of the pre-training world, by which
# a block is divided, so that blocks of any size weigh alike
COLOUR_GRIDS = ((8, 0.571), (4, 0.519))
EDGE_GRIDS = ((8, 1.200), (4, 1.026))


def _layout_blocks(image: Image.Image) -> list[np.ndarray]:
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
    lab, gray = rgb2lab(pixels) / 100, rgb2gray(pixels)
    blocks = []
    for cells, scale in COLOUR_GRIDS:
        side = SIDE // cells
        blocks.append(lab.reshape(cells, side, cells, side, 3).mean((1, 3)).ravel() / (cells * scale))
    for cells, scale in EDGE_GRIDS:
        # normalised over the whole picture: cell by cell, the grain of an empty sky would count as much as a face
        edges = hog(gray, orientations=9, pixels_per_cell=(SIDE // cells,) * 2, cells_per_block=(cells,) * 2, block_norm="L2")
        blocks.append(edges / scale)
    return blocks


def layout(images: Sequence[Image.Image]) -> torch.Tensor:
    """Where colours and edges are, float64 `[n, 960]`; deterministic.

    The picture is averaged down to 32 x 32. The features are two grids of mean CIELAB colours (8 x 8 and 4 x 4 cells) and
    two histograms of oriented gradients (cells of 4 and of 8 pixels, 9 orientations, scaled to length 1 over the whole
    picture). Each of the four is scaled so that unrelated pictures are 1 apart; the colours are then halved. So one fifth
    of the squared distance is colour and four fifths are edges: a picture with the right colours and no recognisable
    subject is still far away.
    """
    rows = []
    for image in images:
        *colours, fine, coarse = _layout_blocks(image)
        rows.append(np.concatenate([block / 2 for block in colours] + [fine, coarse]))
    return torch.from_numpy(np.stack(rows))


def _model_folder(name: str) -> str:
    """The folder of a model, given as a folder or as the id of one in the local hub cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return name
    hub_id = HUB_IDS.get(name, name)
    try:
        return snapshot_download(hub_id, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise InputError(f"features {name!r} are not on this machine; use 'layout', a folder with a CLIP or DINOv2 model, "
                         f"or a hub id fetched before with: hf download {hub_id}") from error


def transformers_encoder(name: str, device: str | torch.device = "cpu", batch: int = 32) -> Encoder:
    """The image embedding of CLIP, or the class token of DINOv2, scaled to length 1: float64 `[n, d]`."""
    from transformers import AutoImageProcessor, AutoModel

    folder = _model_folder(name)
    try:
        processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"features {name!r}: {folder} holds no image model that transformers can load "
                         f"({str(error).splitlines()[0]}); give the folder of a CLIP or DINOv2 model") from error

    @torch.no_grad()
    def encode(images: Sequence[Image.Image]) -> torch.Tensor:
        rows = []
        for i in range(0, len(images), batch):
            inputs = processor([image.convert("RGB") for image in images[i:i + batch]], return_tensors="pt").to(device)
            output = model.get_image_features(**inputs) if hasattr(model, "get_image_features") else model(**inputs)
            # before transformers 5 CLIP's answer is the embedding itself
            rows.append(getattr(output, "pooler_output", output).double().cpu())
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)

    return encode


def text_encoder(name: str, device: str | torch.device = "cpu") -> Callable[[Sequence[str]], torch.Tensor] | None:
    """The text embedding of a CLIP, scaled to length 1: a function from texts to float64 `[n, d]`. None for other encoders.

    Raises InputError as `encoder` does.
    """
    if name == "layout":
        return None
    from transformers import AutoModel, AutoTokenizer

    folder = _model_folder(name)
    try:
        model = AutoModel.from_pretrained(folder).to(device).eval()
        if not hasattr(model, "get_text_features"):
            return None
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"features {name!r}: {folder} holds no model and tokenizer that transformers can load "
                         f"({str(error).splitlines()[0]}); give the folder of a CLIP or DINOv2 model") from error

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> torch.Tensor:
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
        output = model.get_text_features(**inputs)
        return torch.nn.functional.normalize(getattr(output, "pooler_output", output).double().cpu(), dim=1)

    return encode


def encoder(name: str = "layout", device: str | torch.device = "cpu") -> Encoder:
    """The encoder of that name: a function from pictures to features float64 `[n, d]`. Raises InputError if it is not here."""
    return layout if name == "layout" else transformers_encoder(name, device)
