"""Does discriminative tuning make pictures follow their text? One command, ``python -m dpt experiment``."""
