"""diffusers pipelines: loading and freezing them, finding their text projections, drawing pictures."""
