"""The MLP token: where it starts, that it trains, and that folding leaves a plain pipeline in which nothing else changed."""

import pytest
import tinypipes
import torch
from tokenbanks import CONFIG, KINDS, bank_of, parts, states, tables, train, vocabularies
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from stamina_fast.adapter.config import StaminaConfig
from stamina_fast.adapter.tokens import TokenBank
from stamina_fast.adapter.words import words_in_use
from stamina_fast.errors import InputError, StaminaError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mlp", [True, False])
def test_a_token_trains_and_folds_into_one_row(kind, mlp):
    pipeline = KINDS[kind]()
    before, plain = tables(pipeline), states(pipeline, "a photo of a cat").detach()
    bank = bank_of(pipeline, mlp=mlp)
    objects = list(bank.parameters())
    bank.begin("<one>")
    assert bank.active == "<one>"
    start = states(pipeline, "a photo of <one>").detach()
    train(bank, pipeline, "a photo of <one>")
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bank.parameters())
    during = states(pipeline, "a photo of <one>").detach()
    assert (during - start).abs().max() > 1e-3
    frozen = tables(pipeline)
    folded = bank.fold_()
    after = tables(pipeline)
    for name, encoder, tokenizer in parts(pipeline):
        index = tokenizer.convert_tokens_to_ids("<one>")
        assert index == len(before[name]) == len(tokenizer) - 1 == encoder.config.vocab_size - 1
        assert torch.equal(after[name][:index], before[name])
        assert torch.equal(frozen[name][:index], before[name])
        # trained beside the table, written into it once
        assert not torch.equal(frozen[name][index], after[name][index])
        assert torch.equal(after[name][index], folded[name])
        assert folded[name].dtype == torch.float32
        assert not encoder.get_input_embeddings().weight.requires_grad
    # what was trained is what was folded, and other prompts never noticed
    assert torch.equal(states(pipeline, "a photo of <one>"), during)
    assert torch.equal(states(pipeline, "a photo of a cat"), plain)
    assert bank.active is None
    assert list(bank.tokens) == ["<one>"]
    assert [id(p) for p in bank.parameters()] == [id(p) for p in objects]


def test_a_later_token_leaves_the_earlier_ones_to_the_bit():
    pipeline = tinypipes.sdxl()
    bank = bank_of(pipeline)
    objects, seen = [id(p) for p in bank.parameters()], {}
    for i, token in enumerate(("<one>", "<two>", "<three>", "V*")):
        bank.begin(token, seed=i)
        train(bank, pipeline, f"a photo of {token} and <one>", 1)
        bank.fold_()
        now = tables(pipeline)
        for name, rows in seen.items():
            assert torch.equal(now[name][: len(rows)], rows)
        seen = now
    assert [id(p) for p in bank.parameters()] == objects
    vectors = [v["text_encoder"] for v in bank.tokens.values()]
    assert len({tuple(v.tolist()) for v in vectors}) == 4


@pytest.mark.parametrize(("init", "mlp"), [("random", True), ("random", False), ("mean", True), ("cat", True), ("cat", False)])
def test_the_start_is_like_a_word(init, mlp):
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline, mlp=mlp, init=init)
    table = tables(pipeline)["text_encoder"]
    bank.begin("<one>", seed=3)
    vector = bank.fold_()["text_encoder"]
    if init == "cat":
        expected = table[pipeline.tokenizer.convert_tokens_to_ids("cat</w>")]
        assert torch.allclose(vector, expected, atol=1e-6)
    else:
        words = table[words_in_use(table, pipeline.tokenizer)]
        assert vector.norm().item() == pytest.approx(words.norm(dim=1).median().item(), rel=1e-5)
    if init == "mean":
        assert torch.cosine_similarity(vector, words.mean(0), 0) > 0.9999


def test_the_start_is_a_function_of_the_seed_alone():
    vectors = []
    for seed in (7, 7, 8):
        pipeline = tinypipes.sd15()
        bank = bank_of(pipeline)
        torch.manual_seed(len(vectors))
        state = torch.get_rng_state()
        bank.begin("<one>", seed=seed)
        # nobody else's random numbers are used up
        assert torch.equal(torch.get_rng_state(), state)
        vectors.append(bank.fold_()["text_encoder"])
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_a_step_is_a_few_percent_of_an_embedding():
    """The learning rate means the same for each width: an Adam step moves the output by a similar share of its norm."""
    shares = []
    for width in (16, 256):
        pipeline = tinypipes.sd15()
        bank = TokenBank(pipeline, StaminaConfig(token_width=width))
        bank.begin("<one>")
        maker = bank.makers["text_encoder"]
        start = maker().detach()
        optimizer = torch.optim.Adam(bank.parameters(), 5e-3)
        (maker() * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        optimizer.step()
        shares.append(((maker() - start).norm() / start.norm()).item())
    assert all(0.003 < share < 0.3 for share in shares)
    assert max(shares) / min(shares) < 6


@pytest.mark.parametrize(("token", "said"), [
    ("cat", "has"), ("<|endoftext|>", "has"), ("<one>", "has"), ("<ONE>", "has"), ("", "one word"), ("<a b>", "one word"),
    (" <x>", "one word"), ("<x>\n", "one word"), ("<\u200b>", "one word"), ("<\u00a0>", "one word"), (3, "one word"),
])
def test_refused_tokens_change_nothing(token, said):
    pipeline = tinypipes.sdxl()
    bank = bank_of(pipeline)
    bank.begin("<one>")
    bank.fold_()
    before = tables(pipeline), [len(t) for _, _, t in parts(pipeline)]
    with pytest.raises(InputError, match=said) as caught:
        bank.begin(token)
    assert "\n" not in str(caught.value)
    assert bank.active is None
    assert before[1] == [len(t) for _, _, t in parts(pipeline)]
    assert all(torch.equal(table, before[0][name]) for name, table in tables(pipeline).items())
    bank.begin("<two>")


def test_a_token_that_splits_is_taken_back():
    pipeline = tinypipes.sdxl()
    bank = bank_of(pipeline)
    before, words = tables(pipeline), vocabularies(pipeline)
    with pytest.raises(InputError, match="would split"):
        bank.begin("x<|endoftext|>y")
    assert vocabularies(pipeline) == words
    assert all(torch.equal(table, before[name]) for name, table in tables(pipeline).items())


def test_a_bare_word_does_not_split_longer_words():
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline)
    before = pipeline.tokenizer.tokenize("a photozz concatenation")
    bank.begin("zz")
    assert pipeline.tokenizer.tokenize("a photozz concatenation") == before
    assert pipeline.tokenizer.tokenize("a zz cat")[1] == "zz"


def test_order_of_calls():
    bank = bank_of(tinypipes.sd15())
    for call in (bank.fold_, bank.discard):
        with pytest.raises(StaminaError, match="no token is active"):
            call()
    bank.begin("<one>")
    with pytest.raises(StaminaError, match="still active"):
        bank.begin("<two>")
    with pytest.raises(StaminaError, match="still active"):
        bank.add("<two>", {"text_encoder": torch.zeros(tinypipes.WIDTH)})
    bank.detach()
    with pytest.raises(StaminaError, match="detached"):
        bank.begin("<two>")


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_discard_and_detach_leave_what_was_there(kind):
    pipeline = KINDS[kind]()
    before, words = tables(pipeline), vocabularies(pipeline)
    plain = states(pipeline, "a photo of <one>").detach()
    bank = bank_of(pipeline)
    bank.begin("<one>")
    assert not torch.equal(states(pipeline, "a photo of <one>"), plain)
    bank.discard()
    assert bank.active is None
    assert torch.equal(states(pipeline, "a photo of <one>"), plain)
    bank.begin("<one>")
    bank.detach()
    assert torch.equal(states(pipeline, "a photo of <one>"), plain)
    assert vocabularies(pipeline) == words
    for name, encoder, _ in parts(pipeline):
        assert torch.equal(encoder.get_input_embeddings().weight, before[name])
        assert encoder.config.vocab_size == len(before[name])
        assert not encoder.get_input_embeddings()._forward_hooks


def test_discard_with_a_token_added_after_is_refused():
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline)
    bank.begin("<one>")
    pipeline.tokenizer.add_tokens("<other>")
    with pytest.raises(StaminaError, match="remove the token added after"):
        bank.discard()
    assert bank.active == "<one>"


def test_a_table_with_spare_rows_is_not_grown():
    pipeline = tinypipes.sd15()
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer) + 3, mean_resizing=False)
    before = tables(pipeline)["text_encoder"]
    bank = bank_of(pipeline)
    bank.begin("<one>")
    bank.discard()
    assert torch.equal(tables(pipeline)["text_encoder"], before)
    bank.begin("<one>")
    row = bank.fold_()["text_encoder"]
    after = tables(pipeline)["text_encoder"]
    assert torch.equal(after[-3], row)
    assert torch.equal(after[-2:], before[-2:])


def test_a_replaced_embedding_is_noticed():
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline)
    old = pipeline.text_encoder.get_input_embeddings()
    pipeline.text_encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(old.weight.detach().clone()))
    with pytest.raises(StaminaError, match="was replaced"):
        bank.begin("<one>")


@pytest.mark.parametrize("word", ["<new>", "photograph", "two words"])
def test_a_start_that_is_no_word_is_refused(word):
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline, init=word)
    with pytest.raises(InputError, match="token_init must be"):
        bank.begin("<one>")
    assert "<one>" not in pipeline.tokenizer.get_vocab()


def test_no_text_encoder():
    with pytest.raises(InputError, match="no text encoder"):
        TokenBank(object(), CONFIG)


def test_an_embedding_that_is_not_finite_is_not_folded():
    pipeline = tinypipes.sdxl()
    bank = bank_of(pipeline)
    bank.begin("<one>")
    with torch.no_grad():
        bank.makers["text_encoder_2"].biases[-1][0] = float("nan")
    before = tables(pipeline)
    with pytest.raises(StaminaError, match="text_encoder_2 is not finite"):
        bank.fold_()
    assert all(torch.equal(table, before[name]) for name, table in tables(pipeline).items())
    bank.discard()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folds_what_it_trained(dtype):
    pipeline = tinypipes.sd15()
    pipeline.text_encoder.to(dtype)
    bank = bank_of(pipeline)
    bank.begin("<one>")
    assert all(p.dtype == torch.float32 for p in bank.parameters())
    during = states(pipeline, "a photo of <one>")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bank.makers["text_encoder"]().dtype == torch.float32
        vector = bank.fold_()["text_encoder"]
    assert torch.equal(states(pipeline, "a photo of <one>"), during)
    assert torch.equal(tables(pipeline)["text_encoder"][-1], vector.to(dtype))


def test_state_dict_restores_a_token_in_the_middle():
    pipeline, other = tinypipes.sd15(), tinypipes.sd15()
    bank, twin = bank_of(pipeline), bank_of(other)
    bank.begin("<one>", seed=1)
    train(bank, pipeline, "a photo of <one>")
    twin.begin("<one>", seed=2)
    twin.load_state_dict(bank.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(bank.fold_().values(), twin.fold_().values(), strict=True))
    assert not any("encoder.embed" in key or "text_model" in key for key in bank.state_dict())


def test_gradient_checkpointing_is_exact():
    grads = []
    for wrap in (False, True):
        pipeline = tinypipes.sd15()
        bank = bank_of(pipeline)
        bank.begin("<one>")
        ids = pipeline.tokenizer("a photo of <one>", return_tensors="pt").input_ids

        def run(ids, encoder=pipeline.text_encoder):
            return encoder(ids)[0]

        out = checkpoint(run, ids, use_reentrant=False) if wrap else run(ids)
        out.square().sum().backward()
        grads.append([p.grad.clone() for p in bank.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiled_without_a_break_and_without_a_new_program_for_the_next_token():
    pipeline = tinypipes.sd15()
    # rows to spare, so that the table keeps its shape
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer) + 3, mean_resizing=False)
    bank = bank_of(pipeline)
    embedding = pipeline.text_encoder.get_input_embeddings()
    compiles = CompileCounterWithBackend("aot_eager")
    program = torch.compile(lambda ids: embedding(ids), backend=compiles, fullgraph=True)
    for token in ("<one>", "<two>", "<three>"):
        bank.begin(token)
        ids = torch.tensor([[1, 2, pipeline.tokenizer.convert_tokens_to_ids(token)]])
        out, eager = program(ids), embedding(ids)
        assert torch.equal(out, eager)
        out[0, 2].sum().backward()
        assert all(p.grad is not None for p in bank.parameters())
        row = bank.fold_()["text_encoder"]
        assert torch.equal(program(ids)[0, 2], row)
    # one with and one without gradients recorded at most
    assert compiles.frame_count <= 2


def test_tokens_in_one_word_stay_apart():
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline)
    tokens = ["<x>", "<x>y", "z<x>", "<x", "<\u00e9>", "<\u732b>", "a*"]
    for token in tokens:
        bank.begin(token)
        bank.fold_()
    for token in tokens:
        ids = pipeline.tokenizer(f"a photo of {token} on a table").input_ids
        assert ids.count(pipeline.tokenizer.convert_tokens_to_ids(token)) == 1
        assert len(ids) == 2 + len(("a", "photo", "of", token, "on", "a", "table"))
