"""Words that tokens start from, and tokens of several vectors, through whole runs and in plain diffusers."""

import dataclasses

import pytest
import tinypipes
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tinyruns import assert_same, run, run_until, tensors

from stamina_fast.adapter.tokens import TokenBank
from stamina_fast.errors import InputError
from stamina_fast.evaluate import evaluate_run
from stamina_fast.export import rebuild
from stamina_fast.io.concepts import Concept, load_concepts
from stamina_fast.io.run import Run
from stamina_fast.pipeline.load import pool_at_the_end
from stamina_fast.pipeline.sampling import check_tokens
from stamina_fast.training.backbone import Backbone

PROMPT = "a photo of <cup> left of <cat> on grass"
WORDS = {"cat": "dog", "cup": "house"}


def states(pipeline, prompt=PROMPT):
    """What the pipeline's own method makes of a prompt: text states, and pooled text where there is some."""
    made = pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return [made[i] for i in (0, 2) if i < len(made) and made[i] is not None]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_plain_diffusers_reads_model_and_tokens(kind, vectors, three, tmp_path):
    pipeline = tinypipes.KINDS[kind]()
    made = run(pipeline, three, tmp_path / "run", token_vectors=vectors)
    wanted = states(pipeline)
    # the prompt has all vectors: none can be left out without a change
    ids = Backbone(pipeline).tokenise([PROMPT])[0][0].tolist()
    names = ["<cup>", "<cup>_1", "<cup>_2"][:vectors]
    assert [ids.count(i) for i in pipeline.tokenizer.convert_tokens_to_ids(names)] == [1] * vectors
    # RUN/model, by itself
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model")
    for got in (states(loaded), Backbone(loaded).encode(Backbone(loaded).tokenise([PROMPT]))[: len(wanted)]):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    # the base model with the files of the tokens
    plain = tinypipes.KINDS[kind]()
    for name in ("cat", "cup", "rocket"):
        file = made.folder(name) / "token.safetensors"
        if kind == "sd15":
            plain.load_textual_inversion(str(file))
            continue
        rows = load_file(file)
        for part, end in (("clip_l", ""), ("clip_g", "_2")):
            assert rows[part].shape == (vectors, tinypipes.WIDTH)
            plain.load_textual_inversion(rows[part], token=f"<{name}>", tokenizer=getattr(plain, f"tokenizer{end}"),
                                         text_encoder=getattr(plain, f"text_encoder{end}"))
    pool_at_the_end(plain)
    assert all(torch.equal(a, b) for a, b in zip(states(plain), wanted, strict=True))
    with pytest.raises(InputError, match=r"knows <cat>, <cup>, <rocket>$"):
        check_tokens(plain, "a <dog>")


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("method", ["stamina", "c-lora"])
def test_the_vectors_of_a_token_learn_apart(kind, method, three, tmp_path):
    made = run(tinypipes.KINDS[kind](), three, tmp_path / "run", token_vectors=3, initializer_token="cat", method=method)
    for rows in made.load_task("cup").token.values():
        assert torch.pdist(rows).min() > 1e-4


@pytest.mark.parametrize("killed_at", [2, 6])
def test_resume_ends_in_the_same_bits_with_words_and_vectors(killed_at, three, tmp_path):
    options = {"token_vectors": 2, "initializer_token": WORDS, "save_every": 2}
    whole, pipeline = tinypipes.sd15(), tinypipes.sd15()
    run(whole, three, tmp_path / "whole", **options)
    run_until(killed_at, tinypipes.sd15(), three, tmp_path / "run", **options)
    with pytest.raises(InputError, match=r"concepts\.cat\.initializer_token was 'dog', is 'fish'"):
        run(tinypipes.sd15(), three, tmp_path / "run", resume=True, **options | {"initializer_token": WORDS | {"cat": "fish"}})
    with pytest.raises(InputError, match=r"token_vectors was 2, is 1"):
        run(tinypipes.sd15(), three, tmp_path / "run", resume=True, **options | {"token_vectors": 1})
    run(pipeline, three, tmp_path / "run", resume=True, **options)
    assert_same(tensors(pipeline), tensors(whole))


def test_evaluate_and_export_start_from_the_same_words(three, tmp_path, monkeypatch):
    begun, begin = [], TokenBank.begin
    monkeypatch.setattr(TokenBank, "begin", lambda bank, *how: begin(bank, *how) or begun.append(how))
    tinypipes.sd15().save_pretrained(tmp_path / "base")
    run(str(tmp_path / "base"), three, tmp_path / "run", token_vectors=2, initializer_token=WORDS, steps=1, device="cpu")
    trained, begun[:] = list(begun), []
    assert [word for _, _, word in trained] == ["dog", "house", None]
    evaluate_run(tmp_path / "run", samples=2, steps=1, guidance=(1.0,), device="cpu", progress=False)
    assert begun == trained
    again = rebuild(Run.open(tmp_path / "run"), ["cat", "cup", "rocket"], device="cpu")
    assert_same(tensors(again), tensors(DiffusionPipeline.from_pretrained(tmp_path / "run" / "model")))


def test_what_no_token_can_start_from_is_refused_before_a_file_is_written(three, tmp_path):
    listed = load_concepts(three)
    named = [Concept(c.name, c.images, c.prompt, c.token, initializer_token="photograph") for c in listed]
    cases = [
        (named, {}, "initializer_token must be a word of one token, got 'photograph'"),
        (listed, {"initializer_token": {"cat": "photograph"}}, "initializer_token must be a word of one token"),
        (listed, {"initializer_token": {"dog": "cat"}}, "which is no concept; the concepts are cat, cup, rocket"),
        (listed, {"token_init": "photograph"}, "token_init must be random, mean or a word of one token"),
        (listed, {"token_vectors": 20}, "shorten it"),
        (listed, {"token_vectors": 0}, "token_vectors must be an integer of at least 1"),
    ]
    for concepts, options, said in cases:
        with pytest.raises(InputError, match=said):
            run(tinypipes.sd15(), concepts, tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()
    # a word given for the run comes before the one that the concept names
    run(tinypipes.sd15(), named, tmp_path / "run", initializer_token="cat", steps=1)
    assert [concept["initializer_token"] for concept in Run.open(tmp_path / "run").config["concepts"]] == ["cat"] * 3


def test_prompts_are_measured_with_all_vectors_of_earlier_tokens(three, tmp_path):
    """Ten vectors of each of two tokens do not fit into 24 ids with the rest of the prompt."""
    first, second, _ = load_concepts(three)
    both = Concept(second.name, second.images, "a photo of <cup> left of <cat>", second.token)
    with pytest.raises(InputError, match="shorten it"):
        run(tinypipes.sd15(), [first, both], tmp_path / "run", token_vectors=10)
    assert not (tmp_path / "run").exists()


def test_tokens_that_clash_are_refused_before_a_file_is_written(three, tmp_path):
    concepts = load_concepts(three)
    concepts[2] = dataclasses.replace(concepts[2], token=f"{concepts[0].token}_1", prompt=f"a photo of {concepts[0].token}_1")
    with pytest.raises(InputError, match="is a word that the tokenizer has"):
        run(tinypipes.sd15(), concepts, tmp_path / "run", token_vectors=2)
    assert not (tmp_path / "run").exists()
