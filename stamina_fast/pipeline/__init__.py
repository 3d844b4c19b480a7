"""All that is known of diffusers pipelines: how they are found and loaded, what they project, how they draw pictures."""
