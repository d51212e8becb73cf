"""The bundled miniature: a small picture world, and the Stable Diffusion and classifiers trained on it."""
