"""Draw the training curve and samples of the small model: `python -m stamina_fast.tiny.report --work DIR --output DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from ..evaluate.classifier import train_classifier
from ..pipeline.load import load_pipeline
from ..pipeline.sampling import sample
from .faces import article
from .renders import of_kinds

PROMPTS = (
    "a photo of a man on a beach",
    "a photo of a pale woman with long red hair in a blue shirt on grass",
    "a photo of a dark man with sunglasses and a yellow hat by a wall",
    "a photo of a tanned woman with curly white hair and glasses at night",
    "a photo of a bald man with a beard in a striped shirt on snow",
    "a photo of a tower on grass",
    "a photo of a wide purple castle with a pointed pink top in a forest",
    "a photo of a white temple with a flat red top and bright windows at night",
    "a photo of a narrow orange bridge in the water",
    "a photo of a green dome with a round yellow top on a beach",
    "a photo of a black cat in a room",
    "a photo of a striped red cup on a table",
    "a photo of a yellow car on snow",
    "a photo of a woman left of a tower on a beach",
    "a photo of a blue house right of a tree on grass",
)
# samples of each kind that are named
NAMED = 12


def sample_sheet(folder: Path, guidance: float, steps: int, columns: int = 6, zoom: int = 2) -> Image.Image:
    """One row for each prompt: the prompt, and its pictures from seeds 0, 1, …."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    side, text = 32 * zoom, 430
    sheet = Image.new("RGB", (text + columns * side, len(PROMPTS) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(PROMPTS):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(columns)]
        images = pipe([prompt] * columns, guidance_scale=guidance, num_inference_steps=steps, generator=seeds).images
        draw.text((8, row * side + side // 2 - 6), prompt, fill="black")
        for column, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (text + column * side, row * side))
    return sheet


def kinds_named(folder: Path, guidance: float, steps: int) -> dict:
    """For each kind, the share of samples of 'a photo of a KIND' that a classifier gives its name; and how good that is.

    The classifier is trained on renders of all kinds, and judged on renders of identities that it has not seen.
    """
    pipe = load_pipeline(folder, "cpu")
    classifier = train_classifier(*of_kinds(200, first=2**33), steps=1500)
    renders, labels, kinds = of_kinds(40, first=2**34)
    found = classifier.probabilities(renders.float() / 255).argmax(1)
    shares = {}
    for kind in kinds:
        images = sample(pipe, f"a photo of {article(kind)}", NAMED, guidance=guidance, steps=steps, batch=NAMED)
        shares[kind] = classifier.share(images, kind)
    return {"named": sum(shares.values()) / len(shares), "classifier_on_renders": (found == labels).double().mean().item(),
            "samples": NAMED, "guidance": guidance, "steps": steps, "kinds": shares}


def read_log(path: Path) -> list[dict]:
    """The rows in the order of their steps. Steps repeated after a checkpoint count once, as they ran last."""
    rows = {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


def curve(rows: list[dict], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#2a6f97")
    axes.set(xlabel="step", ylabel="loss (v-prediction, mean square)", yscale="log", title="Pre-training of the small model")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the folder of the pre-training")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--sampling-steps", type=int, default=25)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = read_log(arguments.work / "denoiser.jsonl")
    (arguments.output / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve(rows, arguments.output / "curve.png")
    found = kinds_named(arguments.work / "model", arguments.guidance, arguments.sampling_steps)
    (arguments.output / "named.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['named']:.0%} of the samples of a kind are named rightly")
    sample_sheet(arguments.work / "model", arguments.guidance, arguments.sampling_steps).save(arguments.output / "samples.png")


if __name__ == "__main__":
    main()
