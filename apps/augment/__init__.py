"""Whether generated pictures help a classifier: trained with and without them, python -m apps.augment."""
