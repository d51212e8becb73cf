"""Files from the Hugging Face hub: where they are looked for, and its errors told in one line."""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# The weights that the repository bundles.
MINIATURE = Path(__file__).parents[1] / "miniature" / "weights"


def fetch(repository: str, name: str, revision: str | None = None) -> Path:
    """One file of a repository on the hub, from its cache where it is there."""
    from huggingface_hub import hf_hub_download

    with hub_or_cache(repository):
        return Path(hf_hub_download(repository, name, revision=revision or None))


@contextmanager
def hub_or_cache(place: str) -> Iterator[None]:
    """Within the block the libraries take what the hub's cache holds, if the hub does not answer; a folder
    needs neither.

    They would try again and again, for half a minute, before they say so.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not (Path(place).is_dir() or hub_answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached; asked once, without a second try, until :func:`why` tells of it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (OSError, *hub_errors()):
        return False
    return True


def at_revision(name: str) -> tuple[str, str | None]:
    """``<id>@<revision>``, an id or a folder: the place, and the branch, tag or commit (None where none
    is given)."""
    if Path(name).is_dir():
        return name, None
    place, _, revision = name.partition("@")
    return place, revision or None


def quiet_libraries() -> None:
    """Keep the libraries' own reports back: what is wrong with weights or the network is one line of an
    error here."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers, of its own call


def one_line(error: Exception | str) -> str:
    """An error's message in one line of at most 500 characters, or its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"there is no {text}"  # it says the name alone
    return text if len(text) <= 500 else text[:500] + " ..."


def check_keys(missing: Iterable = (), unexpected: Iterable = (), mismatched: Iterable = ()) -> None:
    """Raises ValueError where a weight is missing (it would be random), unused, or of another shape, and
    lists them."""
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        listed = sorted(str(k[0] if isinstance(k, tuple) else k) for k in keys)
        if listed:
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            raise ValueError(f"{len(listed)} weights are {what}: {', '.join(listed[:8])}{more}")


def hub_errors() -> tuple[type[Exception], ...]:
    """Exceptions of the hub's client that are no OSError: those of httpx; requests, which huggingface_hub
    0 uses, has none."""
    import huggingface_hub.utils

    return (huggingface_hub.utils.httpx.HTTPError,) if hasattr(huggingface_hub.utils, "httpx") else ()


def why(error: Exception) -> str:
    """Why something cannot be had from the hub or a folder, in one line: what is known of it first, then the
    library's words.

    Without a network these are left out: they tell of files that the repository lacks.
    """
    advice = hub_advice(error)
    if advice.endswith(NOT_FETCHED):
        hub_answers.cache_clear()
        return advice
    return f"{advice} ({one_line(error)})" if advice else one_line(error)


NOT_FETCHED = "it was never fetched to the cache"


def hub_advice(error: BaseException | None) -> str:
    """What a user can do about a file that the hub does not give, or "" where that is not what ails."""
    from huggingface_hub import constants, errors

    is_set = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    advice = {
        errors.GatedRepoError: "the repository is gated: accept its licence on its page, "
        "then log in with `hf auth login`",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private "
        "(then `hf auth login` helps)",
        errors.RevisionNotFoundError: "the repository has no such revision",
        (
            errors.LocalEntryNotFoundError,
            errors.OfflineModeIsEnabled,
        ): f"{'HF_HUB_OFFLINE is set' if is_set else 'there is no network'} and {NOT_FETCHED}",
        errors.EntryNotFoundError: "the repository has no such file (of weights only safetensors are read)",
    }
    while error is not None:
        for kinds, text in advice.items():
            if isinstance(error, kinds):
                return text
        error = error.__cause__ or error.__context__
    return ""
