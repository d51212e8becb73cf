"""What a run will do, told from its options and small files before any weight is loaded: names, classes, prompts, folders, checks."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from checks import validate
from config import NO_HYPERPARAMETERS, VERSION, RunConfig, UsageError


@dataclass(frozen=True)
class Plan:
    """What the options come to, told without loading a weight."""

    config: RunConfig  # with the class by its number
    guides: dict[str, int]  # name -> its index of the class, from 0
    judge: str | None
    judge_target: int | None  # None: the judge does not know the class
    label: str
    class_name: str  # in the prompts
    prompts: tuple[str, ...]
    folder: Any  # RunFolder
    device: Any  # torch.device
    dtype: Any  # torch.dtype
    saved: Any  # the vectors (N, width) found on disk, None with --train
    memory: float  # bytes that the chosen --memory takes, about


def hub_of(config: RunConfig):
    """How the options want files fetched."""
    from hub import Hub

    return Hub(config.cache_dir, config.local_files_only, config.revision)


def guides_of(config: RunConfig) -> list[str]:
    """Names of the guides, after the model's default."""
    from models import BROUGHT_CLASSIFIERS

    named = config.classifier or BROUGHT_CLASSIFIERS.get(config.model, "inet")
    guides = [n.strip() for n in named.split(",")]
    if len(set(guides)) < len(guides):
        raise UsageError(f"--classifier: {named!r} was given; allowed is each guide once")
    return guides


def judge_of(config: RunConfig, guides: list[str]) -> str | None:
    """Name of the judge, after the first guide's default."""
    from classifiers import parse_source

    judge = config.judge or parse_source("classifier", guides[0]).judge
    if judge in guides and config.judge:
        raise UsageError(f"--judge: {judge!r} was given, which guides; allowed is a classifier that does not, or none")
    if judge in (None, "none") or judge in guides:
        return None
    parse_source("judge", judge)
    return judge


def make_plan(config: RunConfig) -> Plan:
    """Resolve names and check them.

    Raises:
        UsageError: whatever is wrong and can be told before weights are loaded.
    """
    validate(config)
    from class_token import TEMPLATES, check_apart, fill
    from classifiers import read_labels, targets_of
    from hub import quiet_libraries
    from labels import find_class, match_label, prompt_class_name
    from memory import SETTINGS, estimate, with_memory
    from models import check_model, is_local, relative_size, resolve_device, resolve_dtype
    from outputs import RunFolder, class_folder

    quiet_libraries()
    check_model(config.model)
    names, hub = guides_of(config), hub_of(config)
    judge = judge_of(config, names)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.mixed_precision, device)
    labels = {name: read_labels(name, hub=hub) for name in names}
    first = labels[names[0]]
    number = find_class(names[0], first, config.class_index)
    config = replace(config, class_index=number, classifier=",".join(names), judge=judge or "none")
    targets = targets_of(labels, config.class_index - 1)
    known = match_label(first, config.class_index - 1, read_labels(judge, "judge", hub)) if judge and config.evaluate else None
    label = first[config.class_index - 1]
    class_name = config.prompt_name or prompt_class_name(label)
    prompts = [fill(t, config.placeholder_token, class_name) for t in TEMPLATES[: config.num_templates]]
    if config.prompt:
        prompts.append(config.prompt.replace("{token}", config.placeholder_token).replace("{class}", class_name))
    folder = RunFolder(config.output_path, class_folder(config.class_index, label), config.exp_id)
    check_origin(config, folder.token)
    saved = None if config.train else find_token(config, folder)
    vectors = config.num_vectors if saved is None else len(saved)
    check_apart(config.placeholder_token, prompts)
    check_against_model(config, hub, prompts, saved, vectors)
    # A dry run fetches nothing; what the hub has is taken to be a Stable Diffusion at its own size.
    size = relative_size(config.model, config.height, config.width, hub) if is_local(config.model) or not config.dry_run else 1.0
    config = with_memory(config, size, device, dtype)
    takes = estimate(SETTINGS[config.memory], size, device, dtype)
    return Plan(
        config, dict(zip(names, targets, strict=True)), judge, known, label, class_name, tuple(prompts), folder, device, dtype, saved, takes
    )


def check_against_model(config: RunConfig, hub, prompts: list[str], saved, number: int) -> None:
    """Check sizes, steps, words, prompts and a token on disk against the model's small files; a dry run fetches none.

    Raises:
        UsageError: something does not fit.
    """
    from class_token import check_words, tokenize, vector_names
    from models import check_sampling, fresh_scheduler, is_local, load_scheduler, load_tokenizer, text_width

    if config.dry_run and not is_local(config.model):
        return
    training_scheduler, training_steps = config.training_sampler
    steps = [("num_inference_steps", config.num_inference_steps), ("training_steps", training_steps)]
    steps += [("jump_at", s.num_inference_steps) for s in config.stages if s.num_inference_steps]
    check_sampling(config.model, config.height, config.width, steps, config.scheduler, hub)
    scheduler = fresh_scheduler(load_scheduler(config.model, config.scheduler, hub), training_scheduler)
    check_gradient_steps(config.gradient_steps, scheduler, training_steps)
    tokenizer, width = load_tokenizer(config.model, hub), text_width(config.model, hub)
    if saved is not None and saved.shape[1] != width:
        raise UsageError(f"the token's vector is {saved.shape[1]} wide; the text encoder of {config.model!r} takes {width}")
    check_words(tokenizer, config.placeholder_token, config.initializer_token, number)
    names = vector_names(config.placeholder_token, number)
    tokenizer.add_tokens(names)
    tokenize(tokenizer, prompts, names)


def check_gradient_steps(gradient_steps: int, scheduler: Any, training_steps: int) -> None:
    """Check that training's trajectory has as many steps as are to carry gradient.

    Raises:
        UsageError: the scheduler's list of ``training_steps`` is shorter.
    """
    scheduler.set_timesteps(training_steps)
    if gradient_steps > len(scheduler.timesteps):
        raise UsageError(
            f"--gradient_steps: {gradient_steps} was given; allowed is 1 to {len(scheduler.timesteps)}, the scheduler's own list"
        )


def find_token(config: RunConfig, folder):
    """The vectors (N, width) of the token on disk: ``--token_path``, or the one learned for this class.

    Raises:
        UsageError: there is none, or it is damaged; or evaluating a token from elsewhere would replace the records of one learned here.
    """
    from class_token import read_token

    path = Path(config.token_path) if config.token_path else folder.token
    if not path.is_file():
        learn = "" if config.token_path else f"; learn it with --class_index {config.class_index} --train True"
        raise UsageError(f"--{'token_path' if config.token_path else 'train'}: there is no token at {path}{learn}")
    if folder.token.exists() and path.resolve() != folder.token.resolve():
        raise UsageError(f"--token_path: {path} was given, but a token of this class and experiment is there; give another --exp_id")
    return read_token(path)[1]


def other_origin(config: RunConfig, path: Path) -> list[str]:
    """What a token file says that it was learned with, where that is not what is given now: "--model: 'sd1.5'"."""
    from class_token import read_origin
    from models import model_id

    origin = read_origin(path) if path.exists() else {}
    now = {"model": model_id(config.model), "classifier": config.classifier}
    then = {flag: model_id(origin[flag]) if flag == "model" else origin[flag] for flag in now if flag in origin}
    return [f"--{flag}: {now[flag]!r} was given, but {path} was learned with {then[flag]!r}" for flag in then if then[flag] != now[flag]]


def check_origin(config: RunConfig, path: Path) -> None:
    """Check that a token which is there belongs to this model and classifier: else it would be lost, or judged by the wrong ones.

    Raises:
        UsageError: it was learned with another model or classifier.
    """
    for difference in other_origin(config, path):
        raise UsageError(f"{difference}; give that, or another --exp_id")


def changed_settings(plan: Plan) -> list[str]:
    """What a token on disk was learned with and is now drawn with otherwise: "guidance_scale 5.0 -> 7.0"."""
    if plan.config.token_path:
        return other_origin(plan.config, Path(plan.config.token_path))
    if plan.config.train or not plan.folder.config.exists():
        return []
    then, now = json.loads(plan.folder.config.read_text())["config"], asdict(plan.config)
    names = ("revision", "scheduler", "prompt_name", "initializer_token", "num_inference_steps", "guidance_scale", "height", "width")
    return [f"{n} {then[n]} -> {now[n]}" for n in names if n in then and then[n] != now[n]]


def describe(plan: Plan) -> str:
    """The resolved configuration and the plan as JSON."""
    from memory import checkpointed

    steps = [verb for verb in ("train", "evaluate") if getattr(plan.config, verb)] + ["generate"] * bool(plan.config.prompt)
    steps += [f"export {plan.config.export}"] * bool(plan.config.export) + ["save pipeline"] * plan.config.save_as_full_pipeline
    names = {"do": steps, "classifier": plan.config.classifier, "judge": plan.judge, "class": plan.label, "prompts": plan.prompts}
    places = {
        "device": str(plan.device),
        "precision": str(plan.dtype),
        "checkpointed": checkpointed(plan.config),
        "memory": f"about {plan.memory / 1e9:.1f} GB with --memory {plan.config.memory}",
        "token": str(plan.folder.token),
        "images": str(plan.folder.eval_images),
    }
    return json.dumps({"config": asdict(plan.config), "plan": names | places}, indent=2)


def origin(plan: Plan) -> dict[str, str]:
    """What a token file says of itself."""
    from models import model_id

    config = plan.config
    steps = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NO_HYPERPARAMETERS}
    said = {"class_index": config.class_index, "class_name": plan.label, "prompt_name": plan.class_name}
    said |= {"placeholder": config.placeholder_token, "model": model_id(config.model), "revision": config.revision or ""}
    said |= {"classifier": plan.config.classifier, "hyperparameters": json.dumps(steps), "version": VERSION}
    return {k: str(v) for k, v in said.items()}
