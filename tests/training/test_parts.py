"""Parts of the trainer by themselves: options, diffusion process, crops and latents, the flat vector."""

import dataclasses
import math

import pytest
import tinypipes
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from stamina_fast.errors import InputError
from stamina_fast.io.images import crop
from stamina_fast.seeds import derive_seed
from stamina_fast.training.diffusion import Diffusion
from stamina_fast.training.flat import ALIGN, Flat, Optimizer
from stamina_fast.training.latents import encode, variants
from stamina_fast.training.options import TrainOptions

CPU = torch.device("cpu")


@pytest.mark.parametrize("change", [
    {"steps": 0}, {"steps": 2.0}, {"batch": True}, {"learning_rate": math.nan}, {"learning_rate": -1e-3}, {"gradient_clip": 0},
    {"lr_schedule": "step"}, {"crop_scale": 0}, {"crop_scale": 1.5}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"seed": -1},
    {"seed": 2**63}, {"min_snr": -5.0}, {"resolution": 4},
])
def test_options_refuse_what_cannot_be(change):
    with pytest.raises(InputError, match=next(iter(change))) as caught:
        TrainOptions(**change)
    assert "\n" not in str(caught.value)


def test_options_are_plain_and_frozen():
    options = TrainOptions(betas=[0.5, 0.6], min_snr=5)
    assert TrainOptions(**options.as_dict()) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.steps = 3


def test_learning_rate_rises_and_falls():
    options = TrainOptions(steps=10, warmup=3, lr_schedule="cosine")
    rates = [options.rate(i) for i in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.1
    assert TrainOptions(steps=10, lr_schedule="linear").rate(5) == 0.5


def test_seeds_do_not_collide_and_do_not_move():
    seeds = {derive_seed(0, "batch", task, step) for task in range(10) for step in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(0, 1, 23) != derive_seed(0, 12, 3)
    assert derive_seed(7, "batch", 1) == 169363049283118330


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_targets_rebuild_the_clean_latents(prediction, zero_snr):
    scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr, **tinypipes.BETAS)
    process = Diffusion(scheduler, CPU, min_snr=5.0)
    clean, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 500, 999])
    noisy, target = process.noised(clean, noise, t)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, t), rtol=1e-5, atol=1e-5)
    a, s = (table[t].view(-1, 1, 1, 1) for table in (process.alpha, process.sigma))
    if prediction == "epsilon":
        assert target is noise
    else:
        # x_0 = alpha x_t - sigma v holds at every timestep, also at one without signal
        torch.testing.assert_close(a * noisy - s * target, clean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, t), rtol=1e-5, atol=1e-5)
    assert (process.alpha[-1] == 0) == zero_snr
    assert torch.isfinite(process.weight).all()
    assert torch.isfinite(process.loss(noisy, target, t))


def test_min_snr_weights():
    scheduler = DDPMScheduler(**tinypipes.BETAS)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    torch.testing.assert_close(Diffusion(scheduler, CPU, 5.0).weight, snr.clamp(max=5) / snr, rtol=1e-4, atol=1e-6)
    assert (Diffusion(scheduler, CPU).weight == 1).all()


def test_flow_matching_is_refused():
    with pytest.raises(InputError, match="FlowMatchEuler"):
        Diffusion(FlowMatchEulerDiscreteScheduler(), CPU)


def test_crops_lie_where_their_frame_says():
    across, down = torch.linspace(-1, 1, 60).expand(40, 60), torch.linspace(-1, 1, 40)[:, None].expand(40, 60)
    image = torch.stack([across, down, torch.zeros(40, 60)])
    square, frame = crop(image, 32, 0.8, (1.0, 0.0), flip=False)
    assert square.shape == (3, 32, 32)
    # the lower left corner of the picture
    assert square[0, :, 0].max() < -0.9
    assert square[1, -1].min() > 0.9
    assert frame.tolist() == [40, 60, 8, 0]
    flipped, _ = crop(image, 32, 0.8, (1.0, 0.0), flip=True)
    assert torch.equal(flipped, square.flip(-1))


def test_variants_start_with_the_whole_and_repeat():
    images = [torch.rand(3, 33, 47, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(3)]
    squares, picture, frames = variants(images, 16, 4, 0.6, True, seed=5)
    again, _, _ = variants(images, 16, 4, 0.6, True, seed=5)
    other, _, _ = variants(images, 16, 4, 0.6, True, seed=6)
    assert squares.shape == (12, 3, 16, 16)
    assert picture.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(squares, again)
    assert torch.equal(squares[::4], other[::4])
    assert not torch.equal(squares, other)
    assert frames[0].tolist() == [16, 23, 0, 3]
    # a picture's variants do not depend on its neighbours
    assert torch.equal(variants(images[:1], 16, 4, 0.6, True, seed=5)[0], squares[:4])


def test_bank_holds_the_posterior_in_fp32_and_gives_the_vae_back():
    vae = tinypipes.sdxl().vae
    squares = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = vae.encode(squares).latent_dist
    bank = encode(vae, squares, torch.arange(5), torch.zeros(5, 4), batch=2)
    torch.testing.assert_close(bank.mean, exact.mean, rtol=1e-4, atol=1e-5)
    index, noise = torch.tensor([3, 1]), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(bank.draw(index, noise), (exact.mean + exact.std * noise.new_zeros(()))[index] * 0.13025
                               + exact.std[index] * noise * 0.13025, rtol=1e-4, atol=1e-5)
    half = vae.to(torch.bfloat16)
    assert encode(half, squares, torch.arange(5), torch.zeros(5, 4), batch=5).mean.dtype == torch.float32
    assert half.dtype == torch.bfloat16


def parameters():
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (1,), (7, 2, 2), (64,)]
    return [(f"p{i}", nn.Parameter(torch.randn(shape, generator=draw))) for i, shape in enumerate(shapes)]


def test_flat_steps_as_torch_does():
    named, twins = parameters(), parameters()
    flat = Flat(named)
    optimizer = Optimizer([(flat, 1e-2)], (0.9, 0.99), 0.1)
    reference = torch.optim.AdamW([p for _, p in twins], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    assert all(v.data_ptr() % (4 * ALIGN) == flat.values.data_ptr() % (4 * ALIGN) for v in flat.views)
    for _ in range(2):
        for step in range(5):
            optimizer.zero_grads_()
            reference.zero_grad()
            for pairs in (named, twins):
                sum((p * (step + 1)).sin().sum() for _, p in pairs).backward()
            norms = optimizer.norms()
            torch.testing.assert_close(norms, torch.stack([p.grad.norm() for _, p in twins]))
            optimizer.scale_grads_((0.5 / norms.norm()).clamp(max=1))
            torch.nn.utils.clip_grad_norm_([p for _, p in twins], 0.5)
            optimizer.step_()
            reference.step()
        for (_, p), (_, twin) in zip(named, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
        # a second task: both start with fresh moments
        optimizer.reset_()
        reference = torch.optim.AdamW([p for _, p in twins], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)


def test_flat_ties_again_and_names_what_is_not_finite():
    named = parameters()
    flat = Flat(named)
    named[2][1].data = torch.full((7, 2, 2), 3.0)
    flat.tie_()
    assert named[2][1].data_ptr() == flat.views[2].data_ptr()
    assert (flat.views[2] == 3).all()
    assert flat.non_finite() == []
    named[1][1].data.fill_(math.inf)
    assert flat.non_finite() == ["p1"]
