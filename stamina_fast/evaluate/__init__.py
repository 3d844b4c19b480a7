"""Measures and pictures of a run: MMD² to real images, forgetting, plasticity, grids and plots."""
