"""A whole training step beside diffusers' own: `python -m stamina_fast.bench.step`."""
