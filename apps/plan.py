"""What a run will do, told from its options and small files before any weight is loaded: names, classes, prompts, folders, checks."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from apps.provenance import check_origin, is_learned
from config import MEMORY_OPTIONS, RunConfig, number_or_name, validate
from discriminative.errors import UsageError, WorkError

# In a prompt {token} is the run's own token, {token:283} or {token:tiger cat} that of another class.
SEVERAL = re.compile(r"\d+-\d+|\d+(-\d+)?(,\d+(-\d+)?)+")  # classes by their numbers
MENTION = re.compile(r"\{token(?::([^{}]+))?\}")


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
    size: Any  # architecture.Size: what memory goes by
    labels: dict[str, list[str]]  # of the guides and, where there is something to judge, of the judge
    to_draw: tuple[str, ...] = ()  # prompts for images, filled in
    others: dict[str, Any] = field(
        default_factory=dict
    )  # placeholder -> vectors of tokens of other classes in those prompts


def hub_of(config: RunConfig):
    """How the options want files fetched."""
    from discriminative.hub import Hub

    return Hub(config.cache_dir, config.local_files_only, config.revision)


def guides_of(config: RunConfig) -> list[str]:
    """Names of the guides, after the model's default."""
    from classifiers import BROUGHT_CLASSIFIERS

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
        raise UsageError(
            f"--judge: {judge!r} was given, which guides; allowed is a classifier that does not, or none"
        )
    if judge in (None, "none") or judge in guides:
        return None
    parse_source("judge", judge)
    return judge


WORK = ("train", "evaluate", "prompt", "prompts_file", "export_dataset", "export", "save_as_full_pipeline")


def works(config: RunConfig) -> bool:
    """Whether there is more to do than to report what is there."""
    return not config.report or any(getattr(config, name) for name in WORK)


def make_plan(config: RunConfig, resume: bool = False, like: Plan | None = None) -> Plan:
    """Resolve names and check them.

    Args:
        resume: take a token that was learned with these options rather than learn it again.
        like: the plan of another class of this run, whose model has been checked.

    Raises:
        UsageError: whatever is wrong and can be told before weights are loaded.
    """
    validate(config)
    if not like:
        check_inputs(config)
    from classifiers import read_labels, targets_of
    from discriminative.diffusion.sources import check_source
    from discriminative.guides.labels import find_class, match_label, prompt_class_name
    from discriminative.hub import quiet_libraries
    from discriminative.precision import resolve_device, resolve_dtype
    from discriminative.records.layout import RunFolder, class_folder
    from discriminative.tokens.dataset import check_dataset
    from discriminative.tokens.prompts import TEMPLATES, check_apart, fill

    quiet_libraries()
    check_source(config.model)
    if config.trains_with_tiny_vae:
        check_source(config.tiny_vae, "tiny_vae")
    names, hub = guides_of(config), hub_of(config)
    judge = judge_of(config, names)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.mixed_precision, device)
    judges = judge and (config.evaluate or config.export_dataset)
    judged = {judge: "judge"} if judges else {}
    # A long list is read once, not once a class.
    labels = (
        like.labels
        if like
        else {
            name: read_labels(name, flag, hub)
            for name, flag in (dict.fromkeys(names, "classifier") | judged).items()
        }
    )
    first = labels[names[0]]
    number = find_class(names[0], first, config.class_index)
    config = replace(config, class_index=number, classifier=",".join(names), judge=judge or "none")
    targets = targets_of({name: labels[name] for name in names}, config.class_index - 1)
    known = match_label(first, config.class_index - 1, labels[judge]) if judges else None
    label = first[config.class_index - 1]
    class_name = config.prompt_name or prompt_class_name(label)
    prompts = [fill(t, config.placeholder_token, class_name) for t in TEMPLATES[: config.num_templates]]
    to_draw, mentioned = prompts_to_draw(
        config, class_name, lambda wanted: find_class(names[0], first, number_or_name(wanted))
    )
    folder = RunFolder(config.output_path, class_folder(config.class_index, label), config.exp_id)
    check_origin(config, folder.token)
    saved = (
        None if config.train and not (resume and is_learned(config, folder)) else find_token(config, folder)
    )
    check_dataset(config, folder, saved)
    vectors = config.num_vectors if saved is None else len(saved)
    others = {
        placeholder: token_of_class(config, other, first[other - 1])
        for placeholder, other in mentioned.items()
    }
    checked = [*prompts, *to_draw, *prompts_to_evaluate(config, class_name)]
    check_apart(config.placeholder_token, checked)
    if like:
        config, size = (
            replace(config, **{name: getattr(like.config, name) for name in MEMORY_OPTIONS}),
            like.size,
        )
    else:
        check_against_model(config, hub, checked, saved, vectors, others)
        size = size_of(config, hub, further=len(names) - 1 + bool(judges))
        config = with_memory(config, size, device, dtype)
    guides = dict(zip(names, targets, strict=True))
    return Plan(
        config,
        guides,
        judge,
        known,
        label,
        class_name,
        tuple(prompts),
        folder,
        device,
        dtype,
        saved,
        size,
        labels,
        tuple(to_draw),
        others,
    )


def check_inputs(config: RunConfig) -> None:
    """Check the files and folders that an evaluation reads, and the summary that it writes, from which a training takes old figures.

    Raises:
        UsageError: a folder without pictures, a file without prompts, a summary of another version.
    """
    from discriminative.records.files import image_files
    from discriminative.tokens.prompts import read_prompts
    from discriminative.records.summary import read

    if config.reference_images and not image_files(config.reference_images):
        raise UsageError(
            f"--reference_images: {config.reference_images!r} was given, which holds no picture; allowed is a folder of them"
        )
    if config.eval_prompts:
        read_prompts(config.eval_prompts, "eval_prompts")
    if config.evaluate or config.train:
        read(config.output_path)


def size_of(config: RunConfig, hub, further: int):
    """How large model and images are, an ``architecture.Size``; a dry run fetches nothing, and takes what the hub has for SD 1.4.

    Args:
        further: classifiers beside the first guide.

    Raises:
        UsageError: the model's configuration files cannot be found or fetched.
    """
    from discriminative.diffusion.inspect import Size, relative_size
    from discriminative.diffusion.memory import CLASSIFIER, CLIP
    from discriminative.diffusion.sources import is_local

    others = further * CLASSIFIER + CLIP * bool(config.evaluate and config.clip_model)
    if is_local(config.model) or not config.dry_run:
        return relative_size(config.model, config.height, config.width, hub)._replace(others=others)
    return Size((config.height or 512) * (config.width or 512) / 512**2, 1.0, others=others)


def prompts_to_evaluate(config: RunConfig, class_name: str) -> list[str]:
    """The prompts of all arms of the evaluation, filled in; none where nothing is to be evaluated.

    Raises:
        UsageError: one names another class's token.
    """
    from evaluate import arm_prompts, templates_of

    if not config.evaluate:
        return []
    prompts = [
        prompt
        for template in templates_of(config)
        for prompt in arm_prompts(config, template, class_name).values()
    ]
    if any("{token:" in prompt for prompt in prompts):
        raise UsageError(
            f"--eval_prompts: {config.eval_prompts!r} names another class's token; allowed are {{token}} and {{class}}"
        )
    return prompts


def prompts_to_draw(
    config: RunConfig, class_name: str, find: Callable[[str], int]
) -> tuple[list[str], dict[str, int]]:
    """The prompts for images, filled in, and the other classes whose tokens they hold: placeholder -> number.

    Args:
        find: the number of a class by number or name.

    Raises:
        UsageError: the file holds none, or there is no such class.
    """
    others = {}

    def word(match: re.Match) -> str:
        if not match[1]:
            return config.placeholder_token
        try:
            number = find(match[1])
        except UsageError as error:
            raise UsageError(f"{match[0]} in a prompt: {error}".replace("--class_index: ", "")) from None
        if number == config.class_index:
            return config.placeholder_token
        placeholder = f"classtoken{number}"
        if placeholder == config.placeholder_token:
            raise UsageError(
                f"--placeholder_token: {placeholder!r} was given, which stands for {match[0]} in prompts; give another"
            )
        others[placeholder] = number
        return placeholder

    from discriminative.tokens.prompts import read_prompts

    given = [config.prompt] if config.prompt else []
    given += read_prompts(config.prompts_file, "prompts_file") if config.prompts_file else []
    return [MENTION.sub(word, prompt).replace("{class}", class_name) for prompt in given], others


def is_sweep(config: RunConfig) -> bool:
    """Whether several classes are asked for, or all: what is there already is then left out, and one that fails does not end the run."""
    return config.class_index == "all" or SEVERAL.fullmatch(str(config.class_index)) is not None


def numbers_of(class_index: str, most: int) -> list[int]:
    """The classes of "3,5-7": 3, 5, 6 and 7.

    Raises:
        UsageError: there are no more than ``most``, or a range runs backwards.
    """
    found = []
    for part in class_index.split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not (numbers and numbers[0] >= 1 and numbers[-1] <= most):
            raise UsageError(
                f"--class_index: {part!r} of {class_index!r} was given; allowed is 1 to {most}, the smaller first"
            )
        found += numbers
    return list(dict.fromkeys(found))


def make_plans(config: RunConfig) -> tuple[list[Plan], list[str]]:
    """The plans of all classes that the options ask for, by the first guide's numbers; and what is wrong with the others.

    Of "all" those without a token are left out where none is to be learned.

    Raises:
        UsageError: whatever is wrong and can be told before weights are loaded, with one class, or with every one.
    """
    if not is_sweep(config):
        return [make_plan(config)], []
    from classifiers import read_labels
    from discriminative.records.layout import RunFolder, class_folder

    for name in ("token_path", "reference_images", "prompt_name"):
        if getattr(config, name):
            raise UsageError(
                f"--{name}: {getattr(config, name)!r} was given with --class_index {config.class_index}; allowed is one class"
            )
    labels = read_labels(guides_of(config)[0], hub=hub_of(config))
    folders = [
        RunFolder(config.output_path, class_folder(i, label), config.exp_id)
        for i, label in enumerate(labels, start=1)
    ]
    numbers = [i for i, folder in enumerate(folders, start=1) if config.train or folder.token.exists()]
    if config.class_index != "all":
        numbers = numbers_of(config.class_index, len(labels))
    if not numbers:
        raise UsageError(
            f"--class_index: 'all' was given, but there is no token below {config.output_path}; add --train True to learn them"
        )
    plans, wrong = [], []
    for i in numbers:
        try:
            plans.append(
                make_plan(replace(config, class_index=i), resume=True, like=plans[0] if plans else None)
            )
        except (UsageError, WorkError) as error:
            wrong.append(f"class {i} ({labels[i - 1]}): {error}")
    if not plans:
        raise UsageError(f"no class can be done; {wrong[0]}")
    return plans, wrong


def check_against_model(
    config: RunConfig, hub, prompts: list[str], saved, number: int, others: dict[str, Any]
) -> None:
    """Check sizes, steps, words, prompts and a token on disk against the model's small files; a dry run fetches none.

    Raises:
        UsageError: something does not fit.
    """
    from discriminative.diffusion.inspect import check_sampling, check_tiny_vae, text_width
    from discriminative.diffusion.models import load_tokenizer
    from discriminative.diffusion.schedulers import TRAINING_SPACING, fresh_scheduler, load_scheduler
    from discriminative.diffusion.sources import is_local
    from discriminative.tokens.prompts import check_words, tokenize, vector_names

    if config.dry_run and not is_local(config.model):
        return
    training_scheduler, training_steps = config.training_sampler
    steps = [("num_inference_steps", config.num_inference_steps), ("training_steps", training_steps)]
    steps += [("jump_at", s.num_inference_steps) for s in config.stages if s.num_inference_steps]
    check_sampling(config.model, config.height, config.width, steps, config.scheduler, hub)
    if config.trains_with_tiny_vae and (is_local(config.tiny_vae) or not config.dry_run):
        check_tiny_vae(config.tiny_vae, config.model, hub)
    if config.gradient_mode in ("last", "random"):
        own = load_scheduler(config.model, config.scheduler, hub)
        check_gradient_steps(
            config.gradient_steps, fresh_scheduler(own, training_scheduler, TRAINING_SPACING), training_steps
        )
    tokenizer, width = load_tokenizer(config.model, hub), text_width(config.model, hub)
    for vectors in (saved, *others.values()):
        if vectors is not None and vectors.shape[1] != width:
            raise UsageError(
                f"the token's vector is {vectors.shape[1]} wide; the text encoder of {config.model!r} takes {width}"
            )
    tokens = []
    for placeholder, vectors in {
        config.placeholder_token: number,
        **{p: len(v) for p, v in others.items()},
    }.items():
        check_words(tokenizer, placeholder, config.initializer_token, vectors)
        tokens.append(vector_names(placeholder, vectors))
        tokenizer.add_tokens(tokens[-1])
    tokenize(tokenizer, prompts, *tokens)


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
    from discriminative.tokens.files import read_token

    path = Path(config.token_path) if config.token_path else folder.token
    if not path.is_file():
        options = (
            f"this command's model ({config.model}), classifier ({config.classifier}), --preset and --exp_id"
        )
        learn = (
            ""
            if config.token_path
            else f"; learn it with --class_index {config.class_index} --train True, and {options}"
        )
        others = (
            sorted(p.parent.name for p in folder.records.parent.glob(f"*/{folder.token.name}"))
            if learn
            else []
        )
        learn += f" (there is one of --exp_id {' and '.join(others)})" if others else ""
        raise UsageError(
            f"--{'token_path' if config.token_path else 'train'}: there is no token at {path}{learn}"
        )
    if folder.token.exists() and path.resolve() != folder.token.resolve():
        raise UsageError(
            f"--token_path: {path} was given, but a token of this class and experiment is there; give another --exp_id"
        )
    return read_token(path)[1]


def token_of_class(config: RunConfig, number: int, label: str) -> Any:
    """The vectors (N, width) of another class's token, of the same experiment.

    Raises:
        UsageError: it has none, or it is of another model or classifier.
    """
    from discriminative.records.layout import RunFolder, class_folder

    folder = RunFolder(config.output_path, class_folder(number, label), config.exp_id)
    check_origin(config, folder.token)
    return find_token(replace(config, class_index=number, token_path=None), folder)


def describe(plan: Plan) -> str:
    """The plan and the resolved configuration as JSON."""
    import torch

    from apps.plan import checkpointed
    from discriminative.diffusion.memory import CUDA_OVERHEAD, SETTINGS, estimate
    from discriminative.precision import trains_in_bf16

    setting, tiny_vae = SETTINGS[plan.config.memory], plan.config.trains_with_tiny_vae
    coarse = trains_in_bf16(plan.config.mixed_precision, plan.device)
    memory = f"about {estimate(setting, plan.size, plan.device, plan.dtype, tiny_vae) / 1e9:.1f} GB here for an update of five images"
    if plan.device.type == "cpu":
        on_gpu = estimate(setting, plan.size, torch.device("cuda"), torch.float16, tiny_vae)
        memory += f", on a GPU in half precision {on_gpu / 1e9:.1f} GB ({CUDA_OVERHEAD / 1e9:.1f} of them CUDA's own, a guess),"
    steps = [verb for verb in ("train", "evaluate") if getattr(plan.config, verb)] + ["generate"] * bool(
        plan.to_draw
    )
    steps += ["export data set"] * bool(plan.config.export_dataset)
    steps += [f"export {plan.config.export}"] * bool(plan.config.export) + [
        "save pipeline"
    ] * plan.config.save_as_full_pipeline
    names = {
        "do": steps,
        "classifier": plan.config.classifier,
        "judge": plan.judge,
        "class": plan.label,
        "prompts": (*plan.prompts, *plan.to_draw),
    }
    places = {
        "device": str(plan.device),
        "precision": str(plan.dtype).removeprefix("torch.")
        + ", bfloat16 without gradient in training" * coarse,
        "checkpointed": checkpointed(plan.config),
        "memory": f"{memory} with --memory {plan.config.memory}",
        "token": str(plan.folder.token),
        "images": str(plan.folder.eval_images),
    }
    return json.dumps({"plan": names | places, "config": asdict(plan.config)}, indent=2)


def with_memory(config: RunConfig, size, device, dtype) -> RunConfig:
    """The options with those filled in that ``--memory`` stands for; what the user gave stays."""
    from discriminative.diffusion.memory import SETTINGS, choose

    name = (
        choose(size, device, dtype, config.trains_with_tiny_vae) if config.memory == "auto" else config.memory
    )
    setting = SETTINGS[name]
    return replace(
        config,
        memory=name,
        batch_size=config.batch_size or config.images_per_update,
        decode_batch_size=config.decode_batch_size or setting.decode_batch_size,
        eval_batch_size=config.eval_batch_size or setting.eval_batch_size,
    )


def checkpointed(config: RunConfig) -> tuple[str, ...]:
    """The models whose activations are not kept, of options that :func:`with_memory` has filled in."""
    from discriminative.diffusion.memory import SETTINGS

    if config.gradient_checkpointing is None:
        return SETTINGS[config.memory].checkpointed
    return ("unet", "vae") if config.gradient_checkpointing else ()
