"""Draw the training curve and samples of the small model: `python -m stamina_fast.tiny.report --work DIR --output DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

PROMPTS = (
    "a photo of a red ball on grass",
    "a photo of a big blue cube on a table",
    "a photo of a cat in a room",
    "a photo of a black dog on snow",
    "a photo of a woman on a beach",
    "a photo of a man by a wall",
    "a photo of a white cup on a table",
    "a photo of a rocket in the sky",
    "a photo of a striped green fish in the water",
    "a photo of a yellow star on a purple background",
    "a picture of a red car left of a blue house",
    "a close up of a spotted pink mushroom in a forest",
)


def sample_sheet(folder: Path, guidance: float, steps: int, columns: int = 6, zoom: int = 2) -> Image.Image:
    """One row for each prompt: the prompt, and its pictures from seeds 0, 1, …."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    side, text = 32 * zoom, 330
    sheet = Image.new("RGB", (text + columns * side, len(PROMPTS) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(PROMPTS):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(columns)]
        images = pipe([prompt] * columns, guidance_scale=guidance, num_inference_steps=steps, generator=seeds).images
        draw.text((8, row * side + side // 2 - 6), prompt, fill="black")
        for column, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (text + column * side, row * side))
    return sheet


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
    sample_sheet(arguments.work / "model", arguments.guidance, arguments.sampling_steps).save(arguments.output / "samples.png")


if __name__ == "__main__":
    main()
