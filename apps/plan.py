"""What a run will do, told from its options and small files before any weight is loaded.

Three steps for each class: resolve the class, find its token, check both against the model.
"""

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from apps.provenance import (
    check_interrupted,
    check_origin,
    dataset_options,
    is_learned,
    read_dataset_record,
)
from classifiers import BROUGHT_CLASSIFIERS, check_labels, parse_source, read_labels, targets_of
from config import RunConfig, number_or_name, refuse
from discriminative import VERSION
from discriminative.command_line import is_one_of_several
from discriminative.diffusion import memory
from discriminative.diffusion.inspect import (
    SD_1_4,
    ModelConfigs,
    Size,
    check_parts,
    check_sampling,
    check_tiny_vae,
    configs_of,
    read_configs,
    relative_size,
    walked,
)
from discriminative.diffusion.models import DiffusionModels, image_size
from discriminative.diffusion.schedulers import TRAINING_SPACING
from discriminative.diffusion.sources import check_source, is_local
from discriminative.errors import UsageError, WorkError
from discriminative.guides.classifier import Classifier
from discriminative.guides.labels import (
    classes_with,
    find_class,
    match_label,
    prompt_class_name,
    says_what_it_is,
)
from discriminative.hub import one_line, quiet_libraries
from discriminative.precision import evaluation_dtype, resolve_device, resolve_dtype, trains_in_bf16
from discriminative.records.files import image_files
from discriminative.records.layout import RunFolder, class_folder
from discriminative.records.summary import read as read_summary
from discriminative.settings import LearningSettings
from discriminative.tokens.dataset import check_dataset
from discriminative.tokens.files import read_origin, read_token
from discriminative.tokens.prompts import (
    TEMPLATES,
    check_apart,
    check_fields,
    check_words,
    fill,
    read_phrases,
    read_prompts,
    spelled_words,
    tokenize,
    vector_names,
)
from evaluate import arm_prompts, templates_of

SEVERAL = re.compile(r"\d+-\d+|\d+(-\d+)?(,\d+(-\d+)?)+")  # classes by their numbers
COMMENT = re.compile(r"(^|\s)#.*")
# {token:283} or {token:tiger cat}: another class's token.
MENTION = re.compile(r"\{token:([^{}]+)\}")
NEARBY = 3  # other tokens that an error names
WORK_WITH_MODEL = ("train", "evaluate", "prompt", "export_dataset", "export")
WORK = (*WORK_WITH_MODEL, "insight")


@dataclass(frozen=True)
class Plan:
    """What the options come to for one class."""

    config: RunConfig  # with the class by its number
    guides: dict[str, int]  # name -> its index of the class, from 0
    judge: str | None
    judge_target: int | None  # None: the judge does not know the class
    label: str
    class_name: str  # in the prompts
    folder: RunFolder
    vectors: torch.Tensor | None  # of the token that is there, (N, width); None where it is to be learned
    to_draw: tuple[str, ...]  # prompts for images, filled in
    others: dict[str, torch.Tensor]  # placeholder -> vectors of tokens of other classes in those prompts

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of training, filled in."""
        return tuple(fill(t, self.config.placeholder_token, self.class_name) for t in TEMPLATES)

    @property
    def prompts_to_evaluate(self) -> list[str]:
        """The prompts of all arms of the evaluation, filled in; none where nothing is to be evaluated."""
        if not self.config.evaluate:
            return []
        arms = [arm_prompts(self.config, t, self.class_name) for t in templates_of(self.config)]
        return [prompt for prompts in arms for prompt in prompts.values()]


class Sources:
    """A run's models and classifiers before their weights: small files, each read once.

    Args:
        config: the options; ``classifier`` and ``judge`` may be without names.
        models: that are loaded already; None reads the files of ``config.model``.
        classifiers: that are loaded already, by their names.

    Raises:
        UsageError: a name is not known, or the device is not there.
    """

    def __init__(
        self,
        config: RunConfig,
        models: DiffusionModels | None = None,
        classifiers: dict[str, Classifier] | None = None,
    ):
        quiet_libraries()
        self.models = models
        self.classifiers = classifiers or {}
        self.known_labels: dict[str, list[str]] = {}
        if not models:
            check_source(config.model)
        if config.trains_with_tiny_vae:
            check_source(config.tiny_vae, "tiny_vae")
        self.guides = self.guides_of(config)
        self.judge = self.judge_of(config)
        self.device = models.device if models else resolve_device(own_card(config.device))
        self.dtype = models.dtype if models else resolve_dtype(config.mixed_precision, self.device)
        evaluation_dtype(config.eval_precision, self.device, self.dtype)
        self.config = replace(config, classifier=",".join(self.guides), judge=self.judge or "none")
        self.first_plan: Plan | None = None

    def guides_of(self, config: RunConfig) -> list[str]:
        """Names of the guides, after the model's default."""
        named = config.classifier or BROUGHT_CLASSIFIERS.get(config.model, "inet")
        guides = [name.strip() for name in named.split(",")]
        if len(set(guides)) < len(guides):
            raise refuse("classifier", named, "each guide once")
        return guides

    def judge_of(self, config: RunConfig) -> str | None:
        """Name of the judge, after the first guide's default."""
        judge = config.judge
        if not judge and self.guides[0] not in self.classifiers:
            judge = parse_source("classifier", self.guides[0]).judge
        if judge in self.guides and config.judge:
            raise refuse("judge", judge, "a classifier that does not guide, or none")
        if judge in (None, "none") or judge in self.guides:
            return None
        if judge not in self.classifiers:
            parse_source("judge", judge)
        return judge

    def labels(self, name: str, flag: str = "classifier") -> list[str]:
        """A classifier's labels.

        Raises:
            UsageError: there are less than two, or they cannot be found.
        """
        if name not in self.known_labels:
            loaded = self.classifiers.get(name)
            labels = loaded.labels if loaded else read_labels(name, flag)
            check_labels(labels, name, flag)
            self.known_labels[name] = labels
        return self.known_labels[name]

    def judges(self, config: RunConfig) -> bool:
        """Whether the judge has something to judge."""
        return bool(self.judge and (config.evaluate or config.export_dataset))

    @property
    def is_known(self) -> bool:
        """Whether the model's files may be read: a dry run fetches none."""
        return bool(self.models) or is_local(self.config.model) or not self.config.dry_run

    @cached_property
    def configs(self) -> ModelConfigs:
        """The model's configurations."""
        if self.models:
            return configs_of(self.models, self.config.model)
        return read_configs(self.config.model, self.config.scheduler)

    def image_size(self, config: RunConfig) -> tuple[int, int]:
        """Height and width of the images in pixels, the model's own where no option says them."""
        return image_size(self.configs.unet, self.configs.vae, config.height, config.width)

    @cached_property
    def size(self) -> Size:
        """How large model and images are; of a model that is not known as SD 1.4's."""
        config = self.config
        others = (len(self.guides) - 1 + self.judges(config)) * memory.CLASSIFIER
        others += memory.CLIP * bool((config.evaluate or config.insight) and config.clip_name)
        if self.is_known:
            return relative_size(self.configs, config.height, config.width)._replace(others=others)
        area = (config.height or 512) * (config.width or 512) / 512**2
        return SD_1_4._replace(activations=area, others=others)

    @cached_property
    def memory(self) -> dict:
        """The options that ``--memory`` stands for."""
        config = self.config
        name = config.memory
        if name == "auto":
            name = memory.choose(self.size, self.device, self.dtype, config.trains_with_tiny_vae)
        setting = memory.SETTINGS[name]
        return {
            "memory": name,
            "decode_batch_size": config.decode_batch_size or setting.decode_batch_size,
            "eval_batch_size": config.eval_batch_size or setting.eval_batch_size,
        }

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """The models whose activations are not kept."""
        return memory.checkpointed(self.memory["memory"], self.config.gradient_checkpointing)


def own_card(device: str) -> str:
    """The device of one process of several on a machine, as "cuda:1"; a card that is named stays."""
    if not (is_one_of_several() and device in ("auto", "cuda") and torch.cuda.is_available()):
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def works(config: RunConfig) -> bool:
    """Whether there is more to do than to report what is there."""
    return not config.report or any(getattr(config, name) for name in WORK)


def uses_model(config: RunConfig) -> bool:
    """Whether the diffusion model is needed, as it is not to look into pictures that are there."""
    return any(getattr(config, name) for name in WORK_WITH_MODEL)


def make_plan(
    config: RunConfig,
    sources: Sources,
    resume: bool = False,
    vectors: torch.Tensor | None = None,
    learning: LearningSettings | None = None,
) -> Plan:
    """The plan of one class.

    Args:
        config: options that :func:`config.validate` has seen.
        resume: take a token that was learned with these options rather than learn it again.
        vectors: of the token (N, width), where it is at hand; None looks for its file.
        learning: the training that is asked for; None is that of the options.

    Raises:
        UsageError: whatever is wrong and can be told before weights are loaded.
    """
    plan = resolve_class(config, sources)
    plan = find_token(plan, sources, resume, vectors, learning)
    if sources.first_plan is None:
        check_against_model(plan, sources)
        sources.first_plan = plan
    else:
        check_apart(plan.config.placeholder_token, [*plan.prompts, *plan.to_draw, *plan.prompts_to_evaluate])
    return replace(plan, config=replace(plan.config, **sources.memory))


def resolve_class(config: RunConfig, sources: Sources) -> Plan:
    """The class by its number, in the labels of every guide and of the judge; its folder.

    Raises:
        UsageError: there is no such class, or a guide does not know it.
    """
    labels = {name: sources.labels(name) for name in sources.guides}
    first = labels[sources.guides[0]]
    known = sources.labels(sources.judge, "judge") if sources.judges(config) else None
    number = find_class(sources.guides[0], first, config.class_index)
    label = first[number - 1]
    targets = targets_of(labels, number - 1)
    return Plan(
        config=replace(
            config, class_index=number, classifier=sources.config.classifier, judge=sources.config.judge
        ),
        guides=dict(zip(sources.guides, targets, strict=True)),
        judge=sources.judge,
        judge_target=match_label(first, number - 1, known) if known else None,
        label=label,
        class_name=config.prompt_name or class_name_of(label, sources.guides[0]),
        folder=RunFolder(config.output_path, class_folder(number, label), config.exp_id),
        vectors=None,
        to_draw=(),
        others={},
    )


def class_name_of(label: str, classifier: str) -> str:
    """The name of a class in the prompts.

    Raises:
        UsageError: its label names nothing, as "LABEL_0" does not.
    """
    if not says_what_it_is(label):
        raise UsageError(
            f"--prompt_name: nothing was given, and the label {label!r} of {classifier!r} does not say what "
            "the class is; needed is its name in the prompts"
        )
    return prompt_class_name(label)


def find_token(
    plan: Plan,
    sources: Sources,
    resume: bool,
    vectors: torch.Tensor | None,
    learning: LearningSettings | None,
) -> Plan:
    """The plan with the token's vectors, where they are there, and with those of other classes in its
    prompts.

    Raises:
        UsageError: a token is wanted that is not there, or is damaged, or is of another model or classifier.
    """
    config = plan.config
    labels = sources.labels(sources.guides[0])
    to_draw, mentioned = prompts_to_draw(
        config, plan.class_name, lambda wanted: find_class(sources.guides[0], labels, number_or_name(wanted))
    )
    if vectors is None:
        check_origin(config, plan.folder.token)
        learns = config.train and not (resume and is_learned(config, plan.folder, learning))
        if learns:
            check_interrupted(config, plan.folder, learning or config.learning())
        vectors = None if learns else token_on_disk(config, plan.folder)
    if config.export_dataset:
        check_dataset(plan.folder.dataset, dataset_options(config, vectors), read_dataset_record)
    others = {
        placeholder: token_of_class(config, number, labels[number - 1])
        for placeholder, number in mentioned.items()
    }
    return replace(plan, vectors=vectors, to_draw=tuple(to_draw), others=others)


def check_against_model(plan: Plan, sources: Sources) -> None:
    """Check inputs, sizes, steps, words, prompts and tokens against the model's small files, where they
    are known.

    Raises:
        UsageError: something does not fit.
    """
    config = plan.config
    prompts = [*plan.prompts, *plan.to_draw, *plan.prompts_to_evaluate]
    check_apart(config.placeholder_token, prompts)
    if not sources.is_known:
        return
    configs = sources.configs
    check_parts(configs)
    steps = [("num_inference_steps", config.num_inference_steps), ("training_sampler", config.training_steps)]
    steps += [("jump_at", s.num_inference_steps) for s in config.stages if s.num_inference_steps]
    check_sampling(configs, config.height, config.width, steps)
    if config.trains_with_tiny_vae and (is_local(config.tiny_vae, "tiny_vae") or not config.dry_run):
        check_tiny_vae(config.tiny_vae, configs)
    check_schedulers(config, configs)
    tokens = {config.placeholder_token: plan.vectors} | plan.others
    tokenizer = copy.deepcopy(configs.tokenizer)
    names = []
    for placeholder, vectors in tokens.items():
        if vectors is not None and vectors.shape[1] != configs.width:
            raise UsageError(
                f"the token's vector is {vectors.shape[1]} wide; "
                f"the text encoder of {config.model!r} takes {configs.width}"
            )
        number = config.num_vectors if vectors is None else len(vectors)
        check_words(tokenizer, placeholder, config.initializer_token, number)
        names.append(vector_names(placeholder, number))
        tokenizer.add_tokens(names[-1])
    try:
        tokenize(tokenizer, prompts, *names)
    except UsageError as error:
        advice = "give a shorter --prompt or --prompt_name, or fewer --num_vectors"
        raise UsageError(f"{error}; {advice}") from error


def check_schedulers(config: RunConfig, configs: ModelConfigs) -> None:
    """Check that the schedulers can walk, and training's has as many steps as are to carry gradient.

    Raises:
        UsageError: they cannot; the scheduler's list is shorter.
    """
    walked(configs, config.num_inference_steps)
    scheduler = walked(configs, config.training_steps, config.training_scheduler, TRAINING_SPACING)
    most = len(scheduler.timesteps)
    if config.path.mode in ("last", "random") and config.path.steps > most:
        raise refuse("gradient_mode", config.gradient_mode, f"1 to {most} steps, the scheduler's own list")


def check_inputs(config: RunConfig) -> None:
    """Check the files and folders that a run reads beside models, and the summary that it writes.

    Raises:
        UsageError: a folder without pictures, a file without prompts or phrases, or with something else in
            braces than {token} and {class}; a summary of another version.
    """
    if config.reference_images and not image_files(config.reference_images):
        raise UsageError(
            f"--reference_images: {config.reference_images!r} was given, which holds no picture; "
            "allowed is a folder of them"
        )
    for template in templates_of(config):
        check_fields(template, "eval_prompts")
    if config.insight:
        read_phrases(config.insight, "insight")
    if config.evaluate or config.train:
        read_summary(config.output_path)


def prompts_to_draw(
    config: RunConfig, class_name: str, find: Callable[[str], int]
) -> tuple[list[str], dict[str, int]]:
    """The prompts for images, filled in, and the other classes whose tokens they hold: placeholder -> number.

    Args:
        find: the number of a class by number or name.

    Raises:
        UsageError: the file holds none, there is no such class, or something else stands in braces.
    """
    others = {}

    def word(match: re.Match) -> str:
        try:
            number = find(match[1])
        except UsageError as error:
            raise UsageError(f"{match[0]} in a prompt: {error}".replace("--class_index: ", "")) from None
        if number == config.class_index:
            return "{token}"
        placeholder = f"classtoken{number}"
        if placeholder == config.placeholder_token:
            raise UsageError(
                f"--placeholder_token: {placeholder!r} was given, which stands for {match[0]} in prompts; "
                "give another"
            )
        others[placeholder] = number
        return placeholder

    given = []
    if config.prompt:
        is_file = config.prompt.startswith("@")
        given = read_prompts(config.prompt[1:], "prompt") if is_file else [config.prompt]
    templates = [MENTION.sub(word, prompt) for prompt in given]
    for template in templates:
        check_fields(template, "prompt")
    return [fill(template, config.placeholder_token, class_name) for template in templates], others


def is_sweep(config: RunConfig) -> bool:
    """Whether several classes are asked for, or all: what is done is left out, a failure does not end the
    run."""
    asked = str(config.class_index)
    return asked == "all" or asked.startswith("@") or SEVERAL.fullmatch(asked) is not None


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
            whole = f" of {class_index!r}" if part != class_index else ""
            given = f"--class_index: {part!r}{whole} was given"
            raise UsageError(f"{given}; allowed is 1 to {most}, the smaller first")
        found += numbers
    return list(dict.fromkeys(found))


def numbers_in_file(path: str, classifier: str, labels: list[str]) -> list[int]:
    """The classes of a text file: a line has numbers and ranges, or a name, or several with semicolons.

    What follows a # is left out; a class that stands twice counts once.

    Raises:
        UsageError: it cannot be read or names no class; or a line names none, by file and line.
    """
    given = f"--class_index: '@{path}' was given"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{given}, which cannot be read ({one_line(error)})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        for text in filter(None, map(str.strip, COMMENT.sub("", line).split(";"))):
            try:
                found += numbers_of_text(text, classifier, labels)
            except UsageError as error:
                reason = str(error).removeprefix("--class_index: ")
                raise UsageError(f"--class_index: {path}, line {number}: {reason}") from error
    if not found:
        raise UsageError(f"{given}, which names no class; allowed are numbers, ranges or names, one a line")
    return list(dict.fromkeys(found))


def numbers_of_text(text: str, classifier: str, labels: list[str]) -> list[int]:
    """The classes of "3, 5-7 9" or of a name.

    Raises:
        UsageError: there is no such class.
    """
    numbers = re.sub(r"[\s,]+", ",", re.sub(r"\s*-\s*", "-", text)).strip(",")
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", numbers):
        return numbers_of(numbers, len(labels))
    return [find_class(classifier, labels, text)]


def check_sweep(config: RunConfig) -> None:
    """Check the options that go with one class alone.

    Raises:
        UsageError: one was given with several.
    """
    for name in ("token_path", "reference_images", "prompt_name") if is_sweep(config) else ():
        value = getattr(config, name)
        if value:
            given = f"--{name}: {value!r} was given with --class_index {config.class_index}"
            raise UsageError(f"{given}; allowed is one class")


def make_plans(config: RunConfig, sources: Sources) -> tuple[list[Plan], list[str]]:
    """The plans of all classes that the options ask for, by the first guide's numbers; what is wrong with
    the others.

    Of "all" those without a token are left out where none is to be learned.

    Raises:
        UsageError: whatever is wrong and can be told before weights are loaded, with one class, or with
            every one.
    """
    check_sweep(config)
    check_inputs(config)
    if not is_sweep(config):
        if config.classes_per_batch > 1:
            raise refuse("classes_per_batch", config.classes_per_batch, "1 with one class")
        return [make_plan(config, sources, resume=config.train)], []
    labels = sources.labels(sources.guides[0])
    plans = []
    wrong = []
    for i in classes_of(config, sources.guides[0], labels):
        try:
            plans.append(make_plan(replace(config, class_index=i), sources, resume=True))
        except (UsageError, WorkError) as error:
            wrong.append(f"class {i} ({labels[i - 1]}): {error}")
    if not plans:
        raise UsageError(f"no class can be done; {wrong[0]}")
    return plans, wrong


def classes_of(config: RunConfig, classifier: str, labels: list[str]) -> list[int]:
    """Numbers of the classes of a sweep.

    Raises:
        UsageError: there are none.
    """
    if config.class_index.startswith("@"):
        return numbers_in_file(config.class_index[1:], classifier, labels)
    if config.class_index != "all":
        return numbers_of(config.class_index, len(labels))
    if config.train:
        return list(range(1, len(labels) + 1))
    folders = {
        i: RunFolder(config.output_path, class_folder(i, label), config.exp_id)
        for i, label in enumerate(labels, start=1)
    }
    numbers = [i for i, folder in folders.items() if folder.token.exists()]
    if not numbers:
        raise UsageError(
            f"--class_index: 'all' was given, but there is no token below {config.output_path}; "
            "add --train True to learn them"
        )
    return numbers


def listed_classes(config: RunConfig, classifier: str, labels: list[str]) -> list[int]:
    """Numbers of the classes to list: all, or those that ``--class_index`` names or whose labels hold it.

    Raises:
        UsageError: there are none.
    """
    wanted = config.class_index
    if wanted in (None, "all"):
        return list(range(1, len(labels) + 1))
    if is_sweep(config):
        return classes_of(config, classifier, labels)
    holding = classes_with(labels, wanted) if isinstance(wanted, str) else []
    return holding or [find_class(classifier, labels, wanted)]


def token_on_disk(config: RunConfig, folder: RunFolder) -> torch.Tensor:
    """The vectors (N, width) of the token on disk: ``--token_path``, or the one learned for this class.

    Raises:
        UsageError: there is none, or it is damaged; or evaluating a token from elsewhere would replace
            the records of one learned here.
    """
    path = Path(config.token_path) if config.token_path else folder.token
    if not path.is_file():
        if config.token_path:
            raise UsageError(f"--token_path: there is no token at {path}")
        raise UsageError(f"there is no token at {path}{how_to_learn(config, folder)}")
    if folder.token.exists() and path.resolve() != folder.token.resolve():
        given = f"--token_path: {path} was given"
        raise UsageError(f"{given}, but a token of this class and experiment is there; give another --exp_id")
    return read_token(path)[1]


def how_to_learn(config: RunConfig, folder: RunFolder) -> str:
    """What a user can do about a token that is not there."""
    options = (
        f"this command's model ({config.model}), classifier ({config.classifier}), --preset and --exp_id"
    )
    advice = f"; learn it with --class_index {config.class_index} --train True, and {options}"
    return advice + tokens_nearby(folder)


def tokens_nearby(folder: RunFolder) -> str:
    """Which tokens are there instead, of the class or else of others, and what they were learned with."""
    name = folder.token.name
    of_class = sorted(folder.records.parent.glob(f"*/{name}"))
    paths = of_class or sorted(folder.records.parents[1].glob(f"*/*/{name}"))
    told = []
    for path in paths[:NEARBY]:
        said = read_origin(path)
        flags = [f"--{flag} {said[flag]}" for flag in ("model", "classifier") if flag in said]
        told.append(" ".join([path.parents[1].name, f"of --exp_id {path.parent.name}", *flags]))
    more = f" and {len(paths) - NEARBY} more" if len(paths) > NEARBY else ""
    return f"; there is {', '.join(told)}{more}" if told else ""


def token_of_class(config: RunConfig, number: int, label: str) -> torch.Tensor:
    """The vectors (N, width) of another class's token, of the same experiment.

    Raises:
        UsageError: it has none, or it is of another model or classifier.
    """
    folder = RunFolder(config.output_path, class_folder(number, label), config.exp_id)
    check_origin(config, folder.token)
    return token_on_disk(replace(config, class_index=number, token_path=None), folder)


def strange_words(plan: Plan, sources: Sources) -> list[str]:
    """A line of the class's words that the model hardly knows, where its files are known; else none."""
    if not sources.is_known:
        return []
    spelled = spelled_words(sources.configs.tokenizer, plan.class_name)
    told = f"{plan.config.model} spells {' and '.join(map(repr, spelled))} letter by letter: it may not know"
    return [f"{told} the class; --prompt_name gives it another name"] if spelled else []


def notes_on(plan: Plan, sources: Sources) -> list[str]:
    """What may come out otherwise than it was meant."""
    placeholder = plan.config.placeholder_token.lower()
    templates = templates_of(plan.config) if plan.config.evaluate else []
    without = [template for template in templates if "{token}" not in template]
    without += [prompt for prompt in plan.to_draw if placeholder not in prompt.lower()]
    notes = [f"{prompt!r} does not hold {{token}}, so the token is not used in it" for prompt in without]
    return strange_words(plan, sources) + notes


def describe(plans: list[Plan], sources: Sources, config: RunConfig) -> str:
    """The plans and the resolved configuration as one JSON object; of several classes "plan" is a list.

    Args:
        config: the options as they were given.
    """
    told = [describe_class(plan, sources) for plan in plans]
    resolved = plans[0].config
    if is_sweep(config):
        resolved = replace(resolved, class_index=config.class_index)
    record = {"version": VERSION, "constants": config.learning().constants, "config": asdict(resolved)}
    return json.dumps({"plan": told if is_sweep(config) else told[0]} | record, indent=2)


def describe_class(plan: Plan, sources: Sources) -> dict:
    """What is to be done with one class."""
    config = plan.config
    learns = config.train and plan.vectors is None
    steps = ["train"] * learns + ["evaluate"] * config.evaluate
    steps += ["insight"] * bool(config.insight)
    steps += ["generate"] * bool(plan.to_draw)
    steps += ["export data set"] * bool(config.export_dataset)
    steps += [f"export {name}" for name in config.exports]
    coarse = trains_in_bf16(config.mixed_precision, sources.device)
    precision = str(sources.dtype).removeprefix("torch.")
    precision += ", bfloat16 without gradient in training" * coarse
    precision += f", {config.eval_precision} in evaluation" if config.eval_precision else ""
    return {
        "do": steps,
        "class_index": config.class_index,
        "classifier": config.classifier,
        "judge": plan.judge,
        "class": plan.label,
        "prompts": plan.prompts if learns else (),
        "prompts_to_evaluate": plan.prompts_to_evaluate,
        "prompts_to_generate": plan.to_draw,
        "notes": notes_on(plan, sources),
        "device": str(sources.device),
        "precision": precision,
        "checkpointed": sources.checkpointed,
        "memory": describe_memory(config, sources),
        "token": str(plan.folder.token),
        "images": str(plan.folder.eval_images),
    }


def describe_memory(config: RunConfig, sources: Sources) -> str:
    """How much memory an update of five images takes, about."""
    setting = memory.SETTINGS[config.memory]

    def gigabytes(device: torch.device, dtype: torch.dtype) -> str:
        needed = memory.estimate(setting, sources.size, device, dtype, config.trains_with_tiny_vae)
        return f"{needed / 1e9:.1f} GB"

    told = f"about {gigabytes(sources.device, sources.dtype)} here for an update of five images"
    if sources.device.type == "cpu":
        on_gpu = gigabytes(torch.device("cuda"), torch.float16)
        overhead = f"{memory.CUDA_OVERHEAD / 1e9:.1f}"
        told += f", on a GPU in half precision {on_gpu} ({overhead} of them CUDA's own, a guess),"
    return f"{told} with --memory {config.memory}"
