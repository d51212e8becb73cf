"""Learn the cricket bat of the bundled miniature from its classifier, evaluate the token, and draw with it.

    python docs/examples/learn_and_draw.py bat

Run from the root of the repository, or anywhere after `pip install -e .`; half a minute on a laptop.
"""

import sys
from pathlib import Path

from apps.session import Session

out = Path(sys.argv[1] if len(sys.argv) > 1 else "bat")
session = Session("miniature", output_path=str(out), device="cpu")
token = session.learn("bat, cricket bat", on_update=lambda row, images: print(row["epoch"], row["loss"]))
result = session.evaluate(token, test_size=10)
print(result["verdict"])
for seed, image in enumerate(session.draw(token, "A photo of {token} {class}", seeds=range(4))):
    image.save(out / f"bat_{seed}.png")
session.save(token, out / "bat.safetensors")
again = session.load(out / "bat.safetensors")
print("learned with", len(token.training.rows), "updates;", again.plan.label)
