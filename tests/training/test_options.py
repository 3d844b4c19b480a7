"""Options around the step: class pictures, cached latents, memory order, attention kernels, compiler."""

import json
import logging
import types

import pytest
import tinypipes
import torch
from tinyruns import assert_same, run, tensors, write_concepts

from stamina_fast.errors import FileError, InputError
from stamina_fast.io.concepts import Concept, load_concepts
from stamina_fast.training import attention, data, latents, loop
from stamina_fast.training.attention import check_kernel
from stamina_fast.training.data import row_weights
from stamina_fast.training.unet import REGIONS, stepping, with_compiled_regions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A concepts_list.json of two concepts, each with class pictures."""
    root = tmp_path_factory.mktemp("listed")
    write_concepts(root, 4)
    pairs = (("cat", "cup"), ("rocket", "face"))
    entries = [
        {"instance_data_dir": name, "instance_prompt": f"a photo of <{name}>", "class_data_dir": other,
         "class_prompt": f"a photo of a {other}"} for name, other in pairs
    ]
    (root / "list.json").write_text(json.dumps(entries))
    return root / "list.json"


def curve(made, key="denoising"):
    return torch.tensor([[row[key] for row in made.load_task(task["name"]).curve] for task in made.tasks()])


def test_class_pictures_are_every_second_row(listed, tmp_path):
    """They have the class prompt, and the weight `prior_weight` in the loss."""
    seen, pipeline = [], tinypipes.sd15()
    run(pipeline, listed, tmp_path / "run", prior_weight=0.5, on_step=lambda step, *_: seen.append(step.buffers.ids[0].clone()))
    (ids,) = loop.Backbone(pipeline).tokenise(["a photo of <cat>", "a photo of a cup"])
    assert torch.equal(seen[0], ids.repeat(2, 1))
    share = row_weights(2, 1, 0.5, CPU)
    assert share.tolist() == [2, 1, 2, 1]
    losses = torch.tensor([3.0, 5.0, 7.0, 11.0])
    # the mean over the concept's pictures, plus the weight times the mean over the class pictures
    assert (share * losses).mean() == 5 + 0.5 * 8
    assert sum((row_weights(2, 2, 0.5, CPU) * part).mean() for part in losses.chunk(2)) == 9
    assert row_weights(2, 1, 0.0, CPU) is None


def test_class_pictures_in_parts_are_the_batch(listed, tmp_path):
    whole, parts = (run(tinypipes.sd15(), listed, tmp_path / str(n), prior_weight=1.0, accumulate=n) for n in (1, 2))
    torch.testing.assert_close(curve(parts), curve(whole), rtol=1e-4, atol=1e-5)


def test_without_a_weight_class_pictures_change_nothing(listed, tmp_path):
    named = [Concept(c.name, c.images, c.prompt, c.token) for c in load_concepts(listed)]
    one, two = (run(tinypipes.sd15(), concepts, tmp_path / str(i)) for i, concepts in enumerate((listed, named)))
    assert torch.equal(curve(one), curve(two))
    with pytest.raises(InputError, match="prior_weight needs class pictures, 'cat' has none"):
        run(tinypipes.sd15(), named, tmp_path / "none", prior_weight=1.0)


def test_kept_latents_are_encoded_once_and_have_the_same_bits(three, uninterrupted, tmp_path, monkeypatch):
    calls, encode = [], latents.encode
    monkeypatch.setattr(data, "encode", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    for count in (3, 3):
        pipeline = tinypipes.sd15()
        run(pipeline, three, tmp_path / f"run{len(calls)}", cache_latents=tmp_path / "kept")
        assert_same(tensors(pipeline), uninterrupted[1])
        assert len(calls) == count
    # other crops are not taken from the cache
    run(tinypipes.sd15(), three, tmp_path / "other", cache_latents=tmp_path / "kept", steps=1, crops=1)
    files = sorted((tmp_path / "kept").iterdir())
    assert (len(calls), len(files)) == (6, 6)
    for file in files:
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.write_bytes(damaged)
    with pytest.raises(FileError, match="damaged"):
        run(tinypipes.sd15(), three, tmp_path / "broken", cache_latents=tmp_path / "kept")


@pytest.mark.parametrize("change", [{"channels_last": True}, {"attention": "math"}])
def test_memory_order_and_kernel_change_roundings_alone(change, three, uninterrupted, tmp_path):
    made, pipeline = [], tinypipes.sd15()

    def state(unet):
        (_, order) = torch.backends.cuda.flash_sdp_enabled(), torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
        return unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last), order[0].name

    before = {name: tensor.stride() for name, tensor in pipeline.unet.state_dict().items()}
    changed = run(pipeline, three, tmp_path / "run", on_step=lambda *_: made.append(state(pipeline.unet)), **change)
    assert (curve(changed) - curve(uninterrupted[0])).abs().max() < 1e-5
    assert set(made) == {(change.get("channels_last", False), "MATH" if "attention" in change else made[0][1])}
    # the U-Net is plain again
    assert {name: tensor.stride() for name, tensor in pipeline.unet.state_dict().items()} == before
    assert type(pipeline.unet).from_pretrained(tmp_path / "run" / "model", subfolder="unet").conv_in.weight.is_contiguous()


def test_the_measured_attention_is_the_fastest_and_the_run_keeps_it(three, tmp_path, monkeypatch, caplog):
    asked, used, times = [], [], {"math": 2.0, "flash": 1.0}

    class Timed(attention.Attention):
        def __init__(self, shape, *others):
            super().__init__(shape, *others)
            self.shape = shape

        def seconds(self, kernel):
            asked.append((kernel, self.shape))
            return times[kernel]

    monkeypatch.setattr(attention, "Attention", Timed)
    monkeypatch.setattr(loop, "stepping", lambda unet, options: used.append(options.attention) or stepping(unet, options))
    options = {"steps": 1, "attention": "measured", "accumulate": 2}
    with caplog.at_level(logging.INFO, "stamina_fast"), pytest.raises(KeyboardInterrupt):
        run(tinypipes.sd15(), three, tmp_path / "run", on_task=interrupt, **options)
    # one level has attention: of a picture to itself, and to the prompt; a CPU has two kernels
    shapes = [(1, 2, 64, 64, 8), (1, 2, 64, 24, 8)]
    assert asked == [(kernel, shape) for kernel in ("math", "flash") for shape in shapes]
    assert "attention flash, measured: math 4e+03 ms, flash 2e+03 ms" in caplog.messages
    # the resumed run keeps its kernel, although another would be faster now
    times["math"] = 0.5
    made = run(tinypipes.sd15(), three, tmp_path / "run", resume=True, **options)
    assert (made.config["train"]["attention"], made.config["measured"]) == ("measured", {"attention": "flash"})
    assert used == ["flash"] * 3
    assert len(asked) == 4
    with pytest.raises(InputError, match="attention was 'measured', is 'flash'"):
        run(tinypipes.sd15(), three, tmp_path / "run", resume=True, **options | {"attention": "flash"})


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_measurement_takes_time_and_finds_a_kernel_that_can():
    attend = attention.Attention(attention.AttentionShape(1, 2, 64, 16, 8), CPU, torch.float32)
    assert 0 < attend.seconds("math") < 1
    assert attention.fastest_kernel(tinypipes.sd21().unet, 1, 8, 16) in ("math", "flash")
    # other ranks take the kernel of rank 0
    second = types.SimpleNamespace(rank=1, meet=lambda: ["math", ""])
    assert attention.kernel_of_run(None, False, None, None, second) == "math"


def test_what_cannot_attend_here_is_refused_in_one_line(three, tmp_path):
    with pytest.raises(InputError, match=r"attention 'cudnn' cannot run here, with heads of 8") as caught:
        check_kernel(tinypipes.sd15().unet, "cudnn")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"stamina-fast\[xformers\]"):
        run(tinypipes.sd15(), three, tmp_path / "run", attention="xformers")
    with pytest.raises(InputError, match="attention must be one of"):
        run(tinypipes.sd15(), three, tmp_path / "run", attention="fast")
    wavering = tinypipes.sd15()
    wavering.unet = tinypipes.unet(dropout=0.1)
    with pytest.raises(InputError, match=r"without dropout, got 0\.1"):
        run(wavering, three, tmp_path / "run", gradient_checkpointing=True)
    assert not (tmp_path / "run").exists()


def test_compiled_regions_are_the_blocks_that_repeat_and_plain_afterwards():
    unet = tinypipes.sd15().unet
    with with_compiled_regions(unet):
        compiled = {type(module).__name__ for module in unet.modules() if module._compiled_call_impl is not None}
    assert compiled == set(REGIONS)
    assert all(module._compiled_call_impl is None for module in unet.modules())
