"""The frozen text-to-image model: loading, sampling, and gradients through its denoising steps."""
