"""Classifiers that guide and judge: loading, preprocessing, labels."""
