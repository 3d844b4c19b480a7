"""The examples of the docstrings and the README run as they stand, on the small model that travels with the package."""

import doctest
import importlib
import re
from importlib import resources
from pathlib import Path

import pytest
import torch

import stamina_fast as sf

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "stamina_fast"
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]
NAMES = [".".join(("stamina_fast", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in WITH_EXAMPLES]
# takes the place of the README's own "..."
LOOP = """
ids = pipe.tokenizer("a photo of <cat>", padding="max_length", return_tensors="pt").input_ids
config = pipe.unet.config
for step in range(2):
    noisy = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    pipe.unet(noisy, torch.tensor(5), pipe.text_encoder(ids)[0]).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def examples(module):
    # nothing is at hand in an example but what it imports
    return [found for found in doctest.DocTestFinder().find(module, globs={}) if found.examples]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings(name):
    for example in examples(importlib.import_module(name)):
        said = []
        result = doctest.DocTestRunner().run(example, out=said.append)
        assert not result.failed, "".join(said)


@pytest.mark.parametrize("name", ["masked_linear", "fold_", "attach"])
def test_these_have_an_example(name):
    assert [found for found in doctest.DocTestFinder(recurse=False).find(getattr(sf, name)) if found.examples]


def readme(start: str) -> str:
    """The Python block of the README that starts with these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(start)]
    return block


def test_the_program_of_the_readme():
    program = readme("import torch")
    folder = str(resources.files("stamina_fast.tiny") / "model")
    for old, new in (('"./stable-diffusion-v1-5"', repr(folder)), (r"\.\.\. .*", LOOP)):
        program, count = re.subn(old, lambda _, new=new: new, program)
        assert count == 1, old
    torch.manual_seed(0)
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    pipe, adapters = names["pipe"], names["adapters"]
    assert adapters.folded == ["cat"]
    assert all(p.grad is None for part in (pipe.unet, pipe.text_encoder, pipe.vae) for p in part.parameters())
    assert all(p.requires_grad for p in pipe.unet.parameters())
    base = type(pipe).from_pretrained(folder).unet.state_dict()
    changed = {name for name, tensor in pipe.unet.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name in base if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_equivalent_of_the_readme(dtype):
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 5, 7), "weight": (6, 7), "a": (6, 3), "b": (1, 3, 7), "p": (6, 2), "q": (1, 2, 7), "gate_bias": (1,)}
    given = {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()}
    names = dict(given)
    exec(compile(readme("mask ="), "README.md", "exec"), names)
    assert 0 < names["mask"].double().mean() < 1
    torch.testing.assert_close(sf.masked_linear(**given), names["y"])
