"""Pre-train the small Stable Diffusion on the procedural world: `python -m stamina_fast.tiny.pretrain --work DIR`.

Stages: pictures, autoencoder, its decoder alone, denoiser (with the text encoder), export. Run it again with the same folder to
continue where it stopped; `--steps` is the total. `--finish N` spends the last N steps on lowering the learning rate to zero.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from .canvas import value_noise
from .pipeline import TEXT_LENGTH, build_pipeline, build_text_encoder, build_tokenizer
from .world import scene


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
    os.replace(partial, path)


def log(path: Path, **row) -> None:
    with path.open("a") as f:
        f.write(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
    print(row, flush=True)


def _scenes(seeds: range) -> tuple[np.ndarray, list[str]]:
    made = [scene(seed) for seed in seeds]
    return np.stack([image for image, _ in made]), [caption for _, caption in made]


def pictures(work: Path, count: int) -> tuple[torch.Tensor, list[str]]:
    """`count` scenes as uint8 `[count, 3, 32, 32]`, and their captions."""
    path, captions_path = work / "pictures.safetensors", work / "captions.json"
    if not path.exists():
        with ProcessPoolExecutor() as pool:
            parts = list(pool.map(_scenes, [range(i, min(i + 500, count)) for i in range(0, count, 500)]))
        captions_path.write_text(json.dumps([c for _, captions in parts for c in captions]))
        images = torch.from_numpy(np.concatenate([images for images, _ in parts])).permute(0, 3, 1, 2)
        save({"images": images}, path)
    return load_file(path)["images"], json.loads(captions_path.read_text())


def textures(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Coloured noise with the falling spectrum of photographs, so that the autoencoder learns more than shapes."""
    out = np.zeros((count, 3, 32, 32), np.float32)
    for image in out:
        for cells in (2, 4, 8, 16):
            colour = rng.normal(0, 1, (3, 1, 1)) * 0.5 + rng.normal(0, 1)
            image += colour * (value_noise(rng, 32, cells) - 0.5) * 2 / cells**0.5
    return torch.from_numpy(np.clip(out * 0.8 + rng.normal(0, 0.3, (count, 3, 1, 1)), -1, 1)).float()


def descend(parameters, peak: float, rise: float, steps: int, losses, file: Path) -> None:
    """Make AdamW steps at a one-cycle rate, `rise` of them rising to `peak`, and log PSNR.

    losses: a function that draws a batch and returns its loss and its squared error on the scale of [-1, 1].
    """
    parameters, start = list(parameters), time.time()
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=rise)
    for step in range(steps):
        loss, error = losses()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            psnr = -10 * float(np.log10(error.item() / 4))
            log(file, step=step, loss=loss.item(), psnr=psnr, seconds=time.time() - start)


def train_autoencoder(vae, images, work: Path, steps: int, batch: int, device) -> None:
    path = work / "vae.safetensors"
    if path.exists():
        vae.load_state_dict(load_file(path))
        return
    if not steps:
        return
    vae.to(device).train()
    draw, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        x = images[torch.randint(len(images), (batch,), generator=draw)].float() / 127.5 - 1
        # colours and contrasts that the world lacks: swapped channels, inverted or dimmed pictures
        x = x[:, torch.randperm(3, generator=draw)] * (torch.rand(batch, 1, 1, 1, generator=draw) * 1.6 - 0.6).sign()
        x = torch.cat([x[: batch * 3 // 4], textures(rng, batch // 4)]).to(device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        error = F.mse_loss(y, x)
        return error + 0.3 * F.l1_loss(y, x) + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel(), error

    descend(vae.parameters(), 2e-3, 0.05, steps, losses, work / "vae.jsonl")
    save(vae.state_dict(), path)


@torch.no_grad()
def encode(vae, images, work: Path, device, scale: float | None) -> torch.Tensor:
    """The latent means of all pictures times `scale`, fp16. Default scale: unit deviation. The scale is registered."""
    path = work / "latents.safetensors"
    if not path.exists():
        vae.to(device).eval()
        means = [vae.encode(x.to(device).float() / 127.5 - 1).latent_dist.mean.cpu() for x in images.split(500)]
        save({"latents": torch.cat(means).half()}, path)
    latents = load_file(path)["latents"]
    scale = scale or 1 / latents[:2000].float().std().item()
    vae.register_to_config(scaling_factor=scale)
    return latents.float().mul_(scale).half()


def train_decoder(vae, images, latents, work: Path, steps: int, batch: int, device) -> None:
    """Train the decoder alone on the latents of today's pictures: the encoder, and so the denoiser's work, stays the same.

    A little noise on the latents stands for the denoiser's errors.
    """
    path = work / "decoder.safetensors"
    parts = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).to(device)
    if path.exists():
        parts.load_state_dict(load_file(path))
        return
    if not steps:
        return
    parts.train()
    draw = torch.Generator().manual_seed(2)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        pick = torch.randint(len(images), (batch,), generator=draw)
        z = latents[pick].float()
        z = z + 0.05 * torch.rand(batch, 1, 1, 1, generator=draw) * torch.randn(z.shape, generator=draw)
        x = images[pick].float().to(device) / 127.5 - 1
        y = vae.decode(z.to(device) / vae.config.scaling_factor).sample
        error = F.mse_loss(y, x)
        return F.l1_loss(y, x) + error, error

    descend(parts.parameters(), 1e-3, 0.1, steps, losses, work / "decoder.jsonl")
    save(parts.state_dict(), path)


class Checkpoint:
    """Weights, their moving average, AdamW's moments, the step and the random state, in one safetensors file."""

    def __init__(self, path: Path, parameters: dict[str, torch.nn.Parameter], optimizer, draw: torch.Generator):
        self.path, self.parameters, self.optimizer, self.draw, self.step = path, parameters, optimizer, draw, 0
        self.average = {k: p.detach().clone() for k, p in parameters.items()}

    def update_average(self) -> None:
        decay = min(0.999, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def save(self) -> None:
        tensors = {"step": torch.tensor(self.step), "draw": self.draw.get_state()}
        for name, p in self.parameters.items():
            state = self.optimizer.state[p]
            tensors |= {f"weight/{name}": p.detach(), f"average/{name}": self.average[name],
                        f"exp_avg/{name}": state["exp_avg"], f"exp_avg_sq/{name}": state["exp_avg_sq"]}
        save(tensors, self.path)

    def load(self) -> None:
        if not self.path.exists():
            return
        tensors = load_file(self.path)
        self.step = int(tensors["step"])
        self.draw.set_state(tensors["draw"])
        for name, p in self.parameters.items():
            p.data.copy_(tensors[f"weight/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
            moments = {key: tensors[f"{key}/{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}


def train_denoiser(pipe, latents, captions, work: Path, steps: int, batch: int, finish: int, peak: float, device) -> int:
    unet, text = pipe.unet.to(device).train(), pipe.text_encoder.to(device).train()
    parameters = {f"unet.{k}": p for k, p in unet.named_parameters()} | {f"text.{k}": p for k, p in text.named_parameters()}
    decayed = [p for p in parameters.values() if p.ndim > 1]
    plain = [p for p in parameters.values() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
                                  lr=peak, betas=(0.9, 0.99), fused=True)
    draw = torch.Generator().manual_seed(1)
    checkpoint = Checkpoint(work / "denoiser.safetensors", parameters, optimizer, draw)
    checkpoint.load()
    padded = pipe.tokenizer(["", *captions], padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    ids = padded.input_ids
    alphas = pipe.scheduler.alphas_cumprod
    start, losses = time.time(), []
    while checkpoint.step < steps:
        step = checkpoint.step
        rate = peak * min(1, (step + 1) / 200) * (min(1, (steps - step) / finish) if finish else 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = torch.randint(len(latents), (batch,), generator=draw)
        keep = torch.rand(batch, generator=draw) > 0.1
        # stratified timesteps lower the variance of the gradient; every second one is drawn towards the middle of the
        # schedule (logit-normal), where shapes are decided
        t = (torch.arange(batch) + torch.rand(batch, generator=draw)) / batch
        t[::2] = torch.special.ndtri(t[::2]).sigmoid()
        t = (t * 1000).long().clamp_(max=999)
        clean = latents[pick].float()
        noise = torch.randn(clean.shape, generator=draw)
        a = alphas[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noisy, target = a * clean + s * noise, a * noise - s * clean
        states = text(ids[(pick + 1) * keep].to(device)).last_hidden_state
        loss = F.mse_loss(unet(noisy.to(device), t.to(device), states).sample, target.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        checkpoint.step += 1
        checkpoint.update_average()
        losses.append(loss.item())
        if checkpoint.step % 100 == 0 or checkpoint.step == steps:
            log(work / "denoiser.jsonl", step=checkpoint.step, loss=float(np.mean(losses)), batch=batch, rate=rate,
                seconds=time.time() - start)
            losses = []
        if checkpoint.step % 500 == 0 or checkpoint.step == steps:
            checkpoint.save()
    for name, p in parameters.items():
        p.data.copy_(checkpoint.average[name])
    return checkpoint.step


@torch.no_grad()
def renew_words(pipe) -> None:
    """Give a pipeline the words of today's world. Words that it knew keep their embeddings, and new ones start fresh."""
    before, tokenizer = pipe.tokenizer.get_vocab(), build_tokenizer()
    now = tokenizer.get_vocab()
    if now == before:
        return
    encoder, known = build_text_encoder(tokenizer), sorted(now.keys() & before.keys())
    table, old = encoder.get_input_embeddings().weight, pipe.text_encoder.get_input_embeddings().weight
    table[[now[word] for word in known]] = old[[before[word] for word in known]]
    state = pipe.text_encoder.state_dict() | {next(k for k, v in encoder.named_parameters() if v is table): table}
    encoder.load_state_dict(state)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="pictures, checkpoints and logs")
    parser.add_argument("--start", type=Path, help="a pipeline to go on from; with --autoencoder-steps 0 its VAE is kept")
    parser.add_argument("--output", type=Path, help="where to write the pipeline (fp16); default: WORK/model")
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=0, help="of the decoder alone, with the encoder as it is")
    parser.add_argument("--steps", type=int, default=20_000, help="total steps of the denoiser")
    parser.add_argument("--finish", type=int, default=0, help="lower the learning rate to 0 over the last N steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if arguments.start:
        pipe = StableDiffusionPipeline.from_pretrained(arguments.start, dtype=torch.float32)
        for part in (pipe, pipe.unet, pipe.vae):
            # the exported files must not tell where they came from
            part.register_to_config(_name_or_path="")
        renew_words(pipe)
    else:
        if not (work / "tokenizer").exists():
            build_tokenizer().save_pretrained(work / "tokenizer")
        pipe = build_pipeline(CLIPTokenizer.from_pretrained(work / "tokenizer"))
    images, captions = pictures(work, arguments.pictures)
    train_autoencoder(pipe.vae, images, work, arguments.autoencoder_steps, 32, device)
    latents = encode(pipe.vae, images, work, device, pipe.vae.config.scaling_factor if arguments.start else None)
    train_decoder(pipe.vae, images, latents, work, arguments.decoder_steps, 32, device)
    train_denoiser(pipe, latents, captions, work, arguments.steps, arguments.batch, arguments.finish, arguments.rate, device)
    pipe.to("cpu", torch.float16).save_pretrained(arguments.output or work / "model", safe_serialization=True)


if __name__ == "__main__":
    main()
