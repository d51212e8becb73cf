"""How good the shipped miniature is: the figures of miniature/README.md, and a sheet of what it draws.

    python -m miniature.report                # all figures, 100 images a prompt
    python -m miniature.report --images 10    # a quick look

Every figure is measured on scenes of the test split or on images drawn from noise, never on what was
trained on.
"""

import argparse
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from classifiers import load_classifier
from discriminative.diffusion.models import load_models
from discriminative.diffusion.sampler import SamplerSettings
from discriminative.guides.classifier import verdicts
from discriminative.hub import MINIATURE
from discriminative.records.files import grid, write_image, write_json
from discriminative.tokens.class_token import ClassToken
from miniature.classifiers import accuracy, reconstructions
from miniature.scenes import CLASSES, GROUPS, with_article
from miniature.training import renders
from miniature.vae import psnr

CPU = torch.device("cpu")
SETTINGS = SamplerSettings(num_inference_steps=30, guidance_scale=7.0)
# images drawn at once; images of a prompt on the sheet
BATCH = 50
SHOWN = 12


def held_out_figures(token: ClassToken, classifiers: dict, work: Path) -> dict:
    """PSNR of the VAE in dB, and each classifier's accuracy on test renders and on their reconstructions."""
    vae = token.models.vae
    scenes = renders(work, "test", 500).images
    images, *_, labels = renders(work, "test", 50 * len(CLASSES), labelled=True)
    decoded = reconstructions(vae, images, 0.0, CPU)
    figures = {"vae_psnr": psnr(vae, scenes)}
    for name, classifier in classifiers.items():
        figures[f"{name}_renders"] = accuracy(classifier.model, images, labels, CPU)
        figures[f"{name}_reconstructions"] = accuracy(classifier.model, decoded, labels, CPU)
    return figures


def embedding_rms(token: ClassToken) -> float:
    """Root mean square of the embeddings of the words that name the classes."""
    words = {w for c in CLASSES for w in f"{c.word} {c.name}".split()}
    rows = [token.models.tokenizer(w, add_special_tokens=False).input_ids[0] for w in sorted(words)]
    return token.models.text_encoder.get_input_embeddings().weight[rows].square().mean().sqrt().item()


@cache
def loaded() -> tuple[ClassToken, dict]:
    """The miniature (with a class token that no prompt here holds), guide and judge; once a process."""
    entries = {"guide": "miniature", "judge": "miniature-judge"}
    classifiers = {name: load_classifier(entry, CPU, torch.float32) for name, entry in entries.items()}
    return ClassToken(load_models("miniature", CPU, torch.float32), "newclas", "a"), classifiers


@torch.no_grad()
def prompt_figures(prompt: str, number: int) -> tuple[dict, torch.Tensor]:
    """How often each classifier sees each class in ``number`` images of a prompt, and the first few
    images (SHOWN, 3, H, W)."""
    torch.set_num_threads(1)  # a process a core: small models gain little from threads
    token, classifiers = loaded()
    seeds = list(range(number))
    images = torch.cat(
        [
            token.sample([prompt] * len(s), s, SETTINGS)
            for s in (seeds[i : i + BATCH] for i in range(0, number, BATCH))
        ]
    )
    counts = {
        name: torch.bincount(verdicts(classifier, images, 100), minlength=len(CLASSES)).div(number).tolist()
        for name, classifier in classifiers.items()
    }
    return counts, images[:SHOWN]


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def summary(
    shares: dict[str, dict], held_out: dict, rms: float, weights_mb: float
) -> list[tuple[str, str, str]]:
    """The figures with their targets: rows of (figure, target, measured)."""

    def of(kind: str, classifier: str) -> float:
        return mean([shares[c.name][classifier][c.index] for c in CLASSES if c.kind == kind])

    rare = {c.word: shares[c.word]["guide"][c.index] for c in CLASSES if c.kind == "rare"}
    between = sum(0.05 <= v <= 0.45 for v in rare.values())
    pair = "{:.3f} / {:.3f}".format
    return [
        ("VAE on held-out renders, PSNR", "at least 27 dB", f"{held_out['vae_psnr']:.1f} dB"),
        *[
            (
                f"{n} on held-out renders / their reconstructions",
                "at least .99 / .98",
                pair(held_out[f"{n}_renders"], held_out[f"{n}_reconstructions"]),
            )
            for n in ("guide", "judge")
        ],
        (
            "plain nouns, by guide / by judge",
            "at least .95 each",
            pair(of("plain", "guide"), of("plain", "judge")),
        ),
        (
            "precise phrase, common sense, by guide / by judge",
            "at least .95",
            pair(of("common", "guide"), of("common", "judge")),
        ),
        (
            "precise phrase, rare sense, by guide / by judge",
            "at least .85",
            pair(of("rare", "guide"), of("rare", "judge")),
        ),
        ("imprecise word -> its rare sense, by guide", "mean under .25", f"{mean(list(rare.values())):.3f}"),
        (
            "groups with that share between .05 and .45",
            f"at least {len(GROUPS) // 2} of {len(GROUPS)}",
            f"{between} of {len(GROUPS)}",
        ),
        ("word embeddings, root mean square", ".010 to .020", f"{rms:.4f}"),
        ("all weights", "under 40 MB", f"{weights_mb:.1f} MB"),
    ]


def table(rows: list[tuple], header: tuple) -> str:
    """Rows as a Markdown table."""
    lines = [header, tuple("-" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(v) for v in line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100, help="images a prompt")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that draw, a thread each"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/miniature"), help="folder of the test renders"
    )
    parser.add_argument(
        "--out", type=Path, default=MINIATURE.parent, help="folder for report.json and classes.png"
    )
    args = parser.parse_args()
    started = time.monotonic()
    token, classifiers = loaded()
    with torch.no_grad():
        held_out = held_out_figures(token, classifiers, args.work)
    phrases = [*(c.name for c in CLASSES), *(g.word for g in GROUPS)]
    prompts = {phrase: f"A photo of {with_article(phrase)}" for phrase in phrases}
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        jobs = pool.map(prompt_figures, prompts.values(), [args.images] * len(prompts))
        results = dict(zip(prompts, tqdm(jobs, total=len(prompts), unit="prompt"), strict=True))
    shares = {phrase: counts for phrase, (counts, _) in results.items()}
    shown = [images for _, images in results.values()]
    weights_mb = sum(f.stat().st_size for f in MINIATURE.rglob("*.safetensors")) / 1e6
    rows = summary(shares, held_out, embedding_rms(token), weights_mb)
    print(table(rows, ("figure", "target", "measured")), end="\n\n")
    by = [
        (
            c.index + 1,
            c.name,
            c.word,
            c.kind,
            *(f"{shares[p][k][c.index]:.2f}" for p in (c.name, c.word) for k in ("guide", "judge")),
        )
        for c in CLASSES
    ]
    print(
        table(
            by,
            (
                "class",
                "precise phrase",
                "word",
                "sense",
                "phrase, guide",
                "phrase, judge",
                "word, guide",
                "word, judge",
            ),
        )
    )
    hardware = f"{platform.machine()}, {args.workers} processes, torch {torch.__version__}"
    write_json(
        args.out / "report.json",
        {
            "images": args.images,
            "hardware": hardware,
            "seconds": round(time.monotonic() - started),
            "summary": rows,
            "classes": by,
        },
    )
    write_image(args.out / "classes.png", grid(torch.cat([i[: SHOWN // 2] for i in shown]), columns=SHOWN))
    print(
        f"\n{args.images} images a prompt, {hardware}; written to {args.out / 'report.json'} and "
        f"{args.out / 'classes.png'}"
    )


if __name__ == "__main__":
    main()
