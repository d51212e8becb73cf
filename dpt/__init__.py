"""Discriminative Probing and Tuning (Qu et al., CVPR 2024): the UNet as a judge of text and image."""
