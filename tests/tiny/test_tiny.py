"""The small model: its world, its words, its pre-training, and the weights that travel along."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from stamina_fast.tiny import pretrain
from stamina_fast.tiny.colours import COLOURS
from stamina_fast.tiny.identities import KINDS
from stamina_fast.tiny.pipeline import TEXT_LENGTH, build_pipeline, build_tokenizer
from stamina_fast.tiny.places import PLACES
from stamina_fast.tiny.things import TEXTURES
from stamina_fast.tiny.world import WORDS, scene, vocabulary

MODEL = Path(pretrain.__file__).parent / "model"


def test_a_scene_is_a_function_of_its_seed():
    for seed in (0, 7, 2**40):
        image, caption = scene(seed)
        again, same = scene(seed)
        assert image.shape == (32, 32, 3)
        assert image.dtype == "uint8"
        assert caption == same
        assert (image == again).all()
    assert len({hashlib.sha256(scene(seed)[0].tobytes()).digest() for seed in range(50)}) == 50


def test_captions_follow_the_grammar_and_reach_every_word():
    captions = [scene(seed, 8)[1] for seed in range(3000)]
    opening = re.compile(r"^(a (photo|picture|drawing)|a close up) of an? ")
    assert all(opening.match(caption) for caption in captions)
    assert not [c for c in captions if re.search(r"\ban [^aeiou]|\ba [aeiou]", c)]
    assert {word for caption in captions for word in caption.split()} == set(vocabulary())
    assert max(len(caption.split()) for caption in captions) <= WORDS <= TEXT_LENGTH - 2
    for words in (COLOURS, TEXTURES[1:], KINDS, PLACES):
        assert all(any(word in caption for caption in captions) for word in words)


def test_every_word_is_one_token_and_captions_fit():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    assert max(len(tokenizer(scene(seed, 8)[1]).input_ids) for seed in range(1000)) <= TEXT_LENGTH
    assert tokenizer.unk_token_id not in tokenizer("zebra-7, don't.").input_ids[1:-1]


def test_the_vocabulary_is_the_same_in_every_process():
    code = "from stamina_fast.tiny.pipeline import build_tokenizer as b; print(b().backend_tokenizer.to_str())"
    one, two = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab")
    assert one == two


@pytest.mark.filterwarnings("ignore")
def test_pre_training_resumes_to_the_same_bits(tmp_path):
    def run(work, steps, *more):
        few = ["--pictures", "24", "--autoencoder-steps", "2", "--batch", "2"]
        pretrain.main(["--work", str(work), *few, "--steps", str(steps), *more])
        return load_file(work / "denoiser.safetensors")

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    further = run(tmp_path / "further", 1, "--start", str(tmp_path / "whole" / "model"), "--autoencoder-steps", "0")
    weight = next(key for key in whole if key.startswith("weight/unet") and key.endswith("weight"))
    assert not [p for p in (tmp_path / "further" / "model").rglob("*.json") if str(tmp_path) in p.read_text()]
    assert (further[weight] - whole[weight.replace("weight/", "average/", 1)].half().float()).abs().max() < 1e-4


def test_the_decoder_is_trained_alone_and_not_twice(tmp_path):
    torch.manual_seed(0)
    pipe = build_pipeline()
    vae, images = pipe.vae, torch.stack([torch.from_numpy(scene(seed)[0]) for seed in range(8)]).permute(0, 3, 1, 2)
    latents = pretrain.encode(vae, images, tmp_path, "cpu", None)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    pretrain.train_decoder(vae, images, latents, tmp_path, 30, 8, "cpu")
    after = vae.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    rows = [json.loads(line) for line in (tmp_path / "decoder.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 29]
    assert rows[1]["psnr"] > rows[0]["psnr"] + 1
    other = build_pipeline().vae
    pretrain.train_decoder(other, images, latents, tmp_path, 30, 8, "cpu")
    assert all(torch.equal(after[name], other.state_dict()[name]) for name in after if name.startswith("decoder"))
    assert len((tmp_path / "decoder.jsonl").read_text().splitlines()) == 2


def test_training_goes_on_with_the_words_of_today(tmp_path):
    """A word that the older tokenizer had too keeps its embedding, whatever its id; a new one has a fresh row."""
    pipe = build_pipeline(older := CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(["cat</w>", "zebra</w>", "<|startoftext|>", "<|endoftext|>"])}, merges=[],
        unk_token="<|endoftext|>", bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"))
    before, position = pipe.text_encoder.get_input_embeddings().weight.clone(), "embeddings.position_embedding.weight"
    kept = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items() if k.endswith(position)}
    pretrain.renew_words(pipe)
    now, table = pipe.tokenizer.get_vocab(), pipe.text_encoder.get_input_embeddings().weight
    assert now == build_tokenizer().get_vocab()
    assert len(table) == len(now) == pipe.text_encoder.config.vocab_size
    for word in ("cat</w>", "<|startoftext|>", "<|endoftext|>"):
        assert torch.equal(table[now[word]], before[older.get_vocab()[word]])
    assert not (table[now["castle</w>"]] == before).all(1).any()
    state = pipe.text_encoder.state_dict()
    assert kept
    assert all(torch.equal(state[k], v) for k, v in kept.items())
    encoder = pipe.text_encoder
    pretrain.renew_words(pipe)
    assert pipe.text_encoder is encoder, "nothing is renewed twice"


def test_the_model_that_travels_along_is_this_one_and_small():
    size = sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file())
    assert size <= 24e6
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    pipe = build_pipeline(tokenizer)
    for part in ("unet", "vae", "text_encoder"):
        stored = load_file(next((MODEL / part).glob("*.safetensors")))
        wanted = getattr(pipe, part).state_dict()
        assert {k: v.shape for k, v in stored.items()} == {k: wanted[k].shape for k in stored}
        assert all(torch.isfinite(tensor).all() for tensor in stored.values())
    assert sum(name.endswith("attn2.to_k.weight") for name in pipe.unet.state_dict()) >= 3
