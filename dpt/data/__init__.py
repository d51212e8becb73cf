"""Images with captions, negatives and referring expressions: the miniature's scenes, or COCO and RefCOCO."""
