"""The loops of diffusers' training scripts with their defaults, rebuilt from the modules that diffusers and peft ship."""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stamina_fast.seeds import derive_seed
from stamina_fast.training.backbone import Backbone
from stamina_fast.training.data import Feed
from stamina_fast.training.step import Buffers

from .arms import PICTURES, SEED, TOKEN, WORD, Arm
from .phases import BACK_TEXT, BACK_UNET, DRAWS, LATENTS, LOSS, OPTIMIZER, TEXT, UNET, Mark


class Script(Arm):
    """What the loops of diffusers' scripts share: they encode latents and text at every step, and use torch's AdamW."""

    word, learning_rate, clears, autocasts = WORD, 0.0, True, False

    def start(self) -> None:
        from diffusers import DDPMScheduler

        case, pipeline, bank = self.case, self.pipeline, self.lesson.bank
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.vae = pipeline.vae
        self.setup()
        backbone = Backbone(pipeline)
        ids = backbone.tokenise([f"a photo of {self.word}"] * PICTURES)
        self.ids = [part[: case.batch].to(case.device) for part in ids]
        lengths, device = [part.shape[1] for part in ids], torch.device(case.device)
        self.buffers = Buffers.empty(case.batch, bank.mean.shape[1:], lengths, device)
        steps = self.scheduler.config.num_train_timesteps
        self.feed = Feed(bank, ids, case.pixels, steps, derive_seed(SEED, "feed"))
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        pipeline.unet.train()
        if case.checkpointing:
            pipeline.unet.enable_gradient_checkpointing()

    def setup(self) -> None:
        """Put what trains into the modules; set `trained` and `clipped`, lists of parameters."""
        raise NotImplementedError

    def states(self) -> tuple[Tensor, dict | None]:
        """Text states, and what else the U-Net takes."""
        raise NotImplementedError

    def error(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(predicted.float(), target.float(), reduction="mean")

    def autocast(self, wanted: bool = True):
        """What accelerate puts around the forward of the models that a script hands to it, in mixed precision."""
        half = wanted and self.case.dtype != torch.float32
        return torch.autocast(self.case.device.split(":")[0], self.case.dtype) if half else contextlib.nullcontext()

    def encoded(self) -> Tensor:
        """Latents of the pictures drawn, encoded now."""
        index, noise = self.lesson.bank.asked
        pixels = self.lesson.squares[index].to(next(self.vae.parameters()).dtype)
        posterior = self.vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * noise.to(posterior.mean)) * self.vae.config.scaling_factor
        return latents.to(self.case.dtype)

    def step(self, index: int) -> None:
        phases, buffers, scheduler = self.phases, self.buffers, self.scheduler
        with phases(DRAWS):
            self.feed.fill_(buffers, index)
        with phases(LATENTS):
            latents = self.encoded()
        noise, t = buffers.noise.to(latents.dtype), buffers.t
        noisy = scheduler.add_noise(latents, noise, t)
        with phases(TEXT):
            states, added = self.states()
            states = Mark.apply(phases, BACK_TEXT, states)[0] if phases.phase and states.requires_grad else states
        with phases(UNET), self.autocast(self.autocasts):
            predicted = self.pipeline.unet(noisy, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
        velocity = scheduler.config.prediction_type == "v_prediction"
        self.loss = self.error(predicted, scheduler.get_velocity(latents, noise, t) if velocity else noise)
        with phases(BACK_UNET):
            self.loss.backward()
        with phases(OPTIMIZER):
            self.prune()
            self.norm = nn.utils.clip_grad_norm_(self.clipped, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=self.clears)
        with phases(LOSS):
            # the scripts show the loss after every step
            self.loss.item()

    def prune(self) -> None:
        """What a script does to gradients before it clips them."""

    def gradient(self) -> float:
        return self.norm.item()


class Lora(Script):
    """train_dreambooth_lora.py, and for XL train_dreambooth_lora_sdxl.py: LoRA of rank 4 on all attention, no token."""

    name, learning_rate, autocasts = "lora", 5e-4, True

    def setup(self) -> None:
        from peft import LoraConfig

        unet, double = self.pipeline.unet, self.case.model.double
        self.note = "LoRA of rank 4 in every attention, no token; VAE " + (
            "in fp32 at every step, text once" if double else "and text encoder at every step"
        )
        torch.manual_seed(SEED)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        self.trained = self.clipped = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.kept = None
        if double:
            self.vae = nn.Module.to(copy.deepcopy(self.vae), torch.float32)

    def states(self) -> tuple[Tensor, dict | None]:
        if not self.case.model.double:
            return self.pipeline.text_encoder(self.ids[0])[0], None
        if self.kept is None:
            with torch.no_grad():
                self.kept = Backbone(self.pipeline).encode(self.ids)
        states, pooled = self.kept
        return states, {"text_embeds": pooled, "time_ids": self.buffers.frames.to(states.dtype)}


class CustomDiffusion(Script):
    """train_custom_diffusion.py with a new word: K and V of all cross-attention, and the whole table of embeddings."""

    name, learning_rate, clears, word = "custom-diffusion", 1e-5, False, TOKEN
    note = "K and V trained in full, with the whole embedding table in AdamW for the token; VAE and text encoder at every step"

    def setup(self) -> None:
        from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

        unet, encoder, words = self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.tokenizer
        start = words.encode(WORD, add_special_tokens=False)[0]
        words.add_tokens([TOKEN])
        encoder.resize_token_embeddings(len(words), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        new = words.convert_tokens_to_ids(TOKEN)
        table.data[new] = table.data[start]
        self.others = torch.arange(len(words)) != new
        processors, added = {}, []
        for name in unet.attn_processors:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            crossed = attention.is_cross_attention
            width, states = attention.to_k.weight.shape
            made = CustomDiffusionAttnProcessor2_0(train_kv=crossed, train_q_out=False, hidden_size=width,
                                                   cross_attention_dim=states if crossed else None).to(self.case.device)
            if crossed:
                made.to_k_custom_diffusion.weight.data.copy_(attention.to_k.weight)
                made.to_v_custom_diffusion.weight.data.copy_(attention.to_v.weight)
            processors[name] = made
            added += made.parameters()
        unet.set_attn_processor(processors)
        encoder.train()
        table.requires_grad_(True)
        self.table = table
        self.trained = [table, *added]
        # the script hands all of the text encoder to the clipping
        self.clipped = [*encoder.parameters(), *added]

    def states(self) -> tuple[Tensor, dict | None]:
        with self.autocast():
            states = self.pipeline.text_encoder(self.ids[0])[0]
        return states.float(), None

    def error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Within the mask of each picture, which is all of it here."""
        mask = torch.ones_like(target[:, :1], dtype=torch.float32)
        squares = F.mse_loss(predicted.float(), target.float(), reduction="none") * mask
        return (squares.sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()

    def prune(self) -> None:
        self.table.grad[self.others.to(self.table.device), :] = 0
