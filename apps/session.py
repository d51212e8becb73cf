"""Models and classifiers loaded once, and what is done with them: learn, evaluate, draw, save and load a
token.

from apps.session import Session

session = Session("miniature")
token = session.learn("bat, cricket bat")
print(session.evaluate(token, test_size=50)["verdict"])
session.draw(token, "A photo of {token} {class} on a beach")[0].save("bat.png")
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from apps.insight import look_into
from apps.plan import Plan, Sources, check_inputs, make_plan, uses_model
from apps.provenance import (
    dataset_options,
    evaluation_options,
    origin,
    read_dataset_record,
    training_options,
)
from classifiers import check_classifier, load_classifier
from config import PRESETS, RunConfig, check_values, deciding, validate, with_preset
from discriminative import VERSION
from discriminative.diffusion.kept import KeptLatents, weights_fingerprint
from discriminative.diffusion.models import DiffusionModels, load_models, load_tiny_vae, models_of
from discriminative.errors import UsageError
from discriminative.guides.attributes import Attributes, by_clip, by_own
from discriminative.guides.classifier import Classifier, Guide
from discriminative.guides.preprocess import Recipe
from discriminative.guides.similarity import TextSimilarity
from discriminative.precision import evaluation_dtype, resolve_device, resolve_dtype
from discriminative.records.environment import environment
from discriminative.records.evaluation import EvaluationRecord
from discriminative.records.files import to_pil, write_json, write_tensors
from discriminative.records.insight import InsightRecord
from discriminative.records.locks import alone_in
from discriminative.records.summary import remove_row, replace_row, row_of
from discriminative.records.tracking import Tracker
from discriminative.settings import LearningSettings
from discriminative.tokens.batch import Work
from discriminative.tokens.checkpoint import Checkpoint
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.dataset import Dataset
from discriminative.tokens.drawing import draw_to_folder, in_batches
from discriminative.tokens.files import (
    fingerprint,
    read_origin,
    read_token,
    token_tensors,
    write_pipeline,
    write_web_ui,
)
from discriminative.tokens.prompts import read_phrases
from evaluate import evaluate
from trainer import OnUpdate, Training, train

# Options of what is loaded once, and how.
OF_THE_SESSION = {
    "model",
    "classifier",
    "judge",
    "scheduler",
    "device",
    "mixed_precision",
    "compile",
    "memory",
}
OF_THE_SESSION |= {"decode_batch_size", "eval_batch_size", "gradient_checkpointing"}


@dataclass
class LearnedToken:
    """A class's token, as a session hands it out.

    Args:
        token: the word with its vectors (N, width).
        plan: the class that it is of.
        training: how it was learned; None where it was loaded.
    """

    token: ClassToken
    plan: Plan
    training: Training | None = None

    @property
    def path(self) -> Path:
        """The token's file, where it was learned."""
        return self.plan.folder.token


class Session:
    """Models and classifiers, each loaded when it is first needed, and kept.

    Args:
        model: a short name, a hub id, a folder, or a Stable Diffusion pipeline of diffusers. A pipeline's
            parts are frozen and put into evaluation mode; they are shared, not copied.
        classifier: the guide: a name, several with commas, a :class:`Classifier`, or a module that takes
            images (B, 3, H, W) in [0, 1] to logits (B, K).
        judge: that only evaluates, named likewise; None is the guide's own.
        labels: K names, of a module as classifier.
        recipe: its preprocessing; None has images as they come.
        preset: "default" or "paper".
        options: further options of ``RunConfig`` by their names, ``output_path`` and ``device`` among them.

    Raises:
        UsageError: an option is not known, or not allowed.
    """

    def __init__(
        self,
        model: Any = "sd1.4",
        classifier: str | Classifier | torch.nn.Module | None = None,
        judge: str | Classifier | None = None,
        labels: list[str] | None = None,
        recipe: Recipe | None = None,
        preset: str = "default",
        **options,
    ):
        if preset not in PRESETS:
            raise UsageError(f"preset: {preset!r} was given; allowed is {' or '.join(PRESETS)}")
        models = None
        name = str(model)
        if not isinstance(model, str | Path):
            models = models_of(model, options.get("scheduler"))
            name = pipeline_name(model)
            check_pipeline_options(models, options)
        if isinstance(classifier, torch.nn.Module):
            classifier = as_classifier(classifier, labels, recipe)
        loaded = [c for c in (classifier, judge) if isinstance(c, Classifier)]
        given = {"model": name, "classifier": name_of(classifier), "judge": name_of(judge)} | options
        check_names(options)
        config = with_preset(preset, given)
        check_values(config)
        self.start(Sources(config, models, {c.name: c for c in loaded}))

    @classmethod
    def of(cls, sources: Sources) -> "Session":
        """A session of what plans were made from."""
        session = cls.__new__(cls)
        session.start(sources)
        return session

    def start(self, sources: Sources) -> None:
        """Take over the sources; nothing is loaded yet."""
        self.sources = sources
        self.config = sources.config
        self.loaded: dict[str, Classifier] = dict(sources.classifiers)
        self.checked: set[tuple] = set()  # what classifiers were seen to do
        self.clips: dict[str, TextSimilarity] = {}
        self.scorers: dict[tuple[str, ...], Attributes] = {}
        self.tiny_vaes: dict[str, Any] = {}

    # Models and classifiers.

    def classifier(self, name: str, config: RunConfig, flag: str = "classifier") -> Classifier:
        """A classifier by its name, that was seen to score images of the options' size.

        Raises:
            UsageError: it cannot be loaded, or cannot do what is asked of it.
        """
        if name not in self.loaded:
            self.loaded[name] = load_classifier(name, self.sources.device, self.sources.dtype, flag)
        guides = config.train and flag == "classifier"
        asked = (name, *self.sources.image_size(config), guides, flag)
        if asked not in self.checked:
            check_classifier(self.loaded[name], *asked[1:])
            self.checked.add(asked)
        return self.loaded[name]

    def clip(self, name: str | None) -> TextSimilarity | None:
        """The model of text similarity, where one is named.

        Raises:
            UsageError: it cannot be loaded.
        """
        if name and name not in self.clips:
            self.clips[name] = TextSimilarity(name, self.sources.device)
        return self.clips.get(name)

    def attributes(self, config: RunConfig) -> Attributes:
        """The phrases of ``--insight``, with what scores them.

        Raises:
            UsageError: the file, a phrase, or what scores them is not allowed.
            WorkError: one's own function fails on noise.
        """
        name = config.clip_model
        phrases = read_phrases(config.insight, "insight")
        asked = (name, *phrases)
        if asked not in self.scorers:
            is_clip = name == config.clip_name
            found = by_clip(self.clip(name), name, phrases) if is_clip else by_own(name, phrases)
            noise = torch.Generator().manual_seed(0)
            size = self.sources.image_size(config)
            found.scores(torch.rand(2, 3, *size, generator=noise))  # before any work
            self.scorers[asked] = found
        return self.scorers[asked]

    @cached_property
    def models(self) -> DiffusionModels:
        """The frozen parts of the pipeline."""
        config = self.config
        device = self.sources.device
        dtype = self.sources.dtype
        models = self.sources.models
        if models is None:
            models = load_models(config.model, device, dtype, self.sources.checkpointed, config.scheduler)
        if config.compile:
            models.compile()
        return models

    def load_tiny_vae(self, config: RunConfig) -> None:
        """Load the small decoder that training is to have, where one is named."""
        name = config.tiny_vae
        if name and name not in self.tiny_vaes:
            self.tiny_vaes[name] = load_tiny_vae(name, self.sources.device, self.sources.dtype)
            if config.compile:
                self.tiny_vaes[name].decoder.compile(dynamic=False)
        self.models.tiny_vae = self.tiny_vaes.get(name)

    def load_all(self) -> None:
        """Load what the options need: what is missing ends the run, not one class."""
        config = self.config
        # Classifiers first: they are small.
        if config.train or config.evaluate or config.export_dataset:
            for name in self.sources.guides:
                self.classifier(name, config)
        if self.sources.judges(config):
            self.classifier(self.sources.judge, config, "judge")
        if config.evaluate:
            self.clip(config.clip_name)
        if config.insight:
            self.attributes(config)
        if uses_model(config):
            self.models  # noqa: B018 (loads them)
        if config.train:
            self.load_tiny_vae(config)

    # One class, as planned.

    def guides(self, plan: Plan) -> list[Guide]:
        """The guides, asked for the plan's class."""
        return [Guide(self.classifier(name, plan.config), target) for name, target in plan.guides.items()]

    def judge(self, plan: Plan) -> Guide | None:
        """The judge, asked for the plan's class; None where there is none, or where it does not know the
        class."""
        if not (self.sources.judges(plan.config) and plan.judge_target is not None):
            return None
        return Guide(self.classifier(plan.judge, plan.config, "judge"), plan.judge_target)

    def token(self, plan: Plan) -> ClassToken:
        """The class's token, with a tokenizer of its own, which knows no other class's word."""
        config = plan.config
        number = config.num_vectors if plan.vectors is None else len(plan.vectors)
        models = replace(self.models, tokenizer=self.models.fresh_tokenizer())
        token = ClassToken(models, config.placeholder_token, config.initializer_token, number)
        if plan.vectors is not None:
            token.load(plan.vectors)
        return token

    def train(
        self,
        plan: Plan,
        token: ClassToken,
        on_update: OnUpdate | None = None,
        learning: LearningSettings | None = None,
        work: Work | None = None,
    ) -> Training:
        """Train in a folder of its own, then put the token and how it came about in the place of what is
        there. A training that was interrupted goes on.

        Args:
            on_update: is given each update's log row and images (N, 3, H, W) in [0, 1].
            learning: the trainer's settings; None is those of the options.
            work: does what the training asks of the models; None does it at once.
        """
        config = plan.config
        folder = plan.folder
        settings = learning or config.learning()
        tracker = None
        if config.report_to != "none":
            place = Path(config.output_path) / "tracking"
            tracker = Tracker(config.report_to, place, f"{folder.name}/{config.exp_id}", asdict(config))

        def note(row: dict, images: torch.Tensor) -> None:
            for use in (tracker.log if tracker else None, on_update):
                if use:
                    use(row, images)

        if not folder.unfinished.checkpoint.exists():
            shutil.rmtree(folder.unfinished_records, ignore_errors=True)  # of a run that broke off early
        made_with = training_options(config, settings)
        unfinished = folder.unfinished
        checkpoint = Checkpoint(
            unfinished.checkpoint, made_with, config.checkpoint_seconds, unfinished.check_claim
        )
        try:
            training = train(
                settings,
                token,
                self.guides(plan),
                plan.class_name,
                folder.unfinished,
                note,
                checkpoint,
                work,
            )
        finally:
            if tracker:
                tracker.close()
        said = origin(config, plan.label, plan.class_name)
        where = {"environment": environment(token.models.device)}
        write_tensors(folder.unfinished.token, token_tensors(token), said)
        write_json(folder.unfinished.config, record_of(plan, settings, training) | where)
        folder.take_training()
        remove_row(config.output_path, config.class_index, plan.label, config.exp_id)
        return training

    def export(self, plan: Plan, token: ClassToken) -> dict[str, Path]:
        """Write the token in other tools' formats, where that was asked for; what is where."""
        config = plan.config
        folder = plan.folder
        written = {}
        if "a1111" in config.exports:
            path = folder.web_ui / f"{config.placeholder_token}.safetensors"
            said = origin(config, plan.label, plan.class_name)
            if not config.train:
                said = read_origin(Path(config.token_path or folder.token))
            write_web_ui(path, token, said)
            written["a1111"] = path
        if "pipeline" in config.exports:
            # Diffusers reads every word that the tokenizer knows: it may know no more than the token has.
            alone = self.token(replace(plan, vectors=token.vector.detach()))
            write_pipeline(folder.pipeline, alone)
            written["pipeline"] = folder.pipeline
        return written

    def run_evaluation(self, plan: Plan, token: ClassToken) -> dict[str, Any]:
        """Evaluate; what ``evaluation.json`` holds."""
        config = plan.config
        clip = self.clip(config.clip_name)
        options = evaluation_options(config)
        guides = self.guides(plan)
        judge = self.judge(plan)
        kept = self.kept_latents(plan)
        return evaluate(config, token, guides, judge, plan.class_name, plan.folder, clip, options, kept)

    def look_into(self, plan: Plan, vectors: torch.Tensor) -> InsightRecord:
        """Score the phrases of ``--insight`` on the evaluation's pictures.

        Args:
            vectors: of the token (N, width).
        """
        return InsightRecord(look_into(plan, fingerprint(vectors), self.attributes(plan.config)))

    def kept_latents(self, plan: Plan) -> KeptLatents | None:
        """Latents of images without the token; none of a pipeline from elsewhere, which may hold adapters
        and hooks that no fingerprint sees."""
        return None if self.sources.models else KeptLatents(plan.folder.kept_latents, self.unet_fingerprint)

    @cached_property
    def unet_fingerprint(self) -> str:
        """Of the frozen UNet, taken once."""
        return weights_fingerprint(self.models.unet)

    def summarize(self, plan: Plan) -> Path:
        """Put the class's row into the summary, whose path it gives."""
        return replace_row(plan.config.output_path, row_of(EvaluationRecord.read(plan.folder)))

    def generate(self, plan: Plan, token: ClassToken, resume: bool = False) -> list[Path]:
        """Sample images of the plan's prompts, singly and as a grid; the folders that they are in, one a
        prompt.

        Args:
            resume: leave out what is there already.
        """
        config = plan.config
        seeds = list(range(config.seed, config.seed + config.num_images))
        for placeholder, vectors in plan.others.items():
            token.join(placeholder, vectors)
        vectors = {config.placeholder_token: token.vector} | plan.others
        said = {"model": config.model, "classifier": config.classifier, "class_name": plan.label}
        said["tokens"] = {placeholder: fingerprint(v) for placeholder, v in vectors.items()}
        root = plan.folder.prompt_images
        return [
            draw_to_folder(root, token, prompt, seeds, config.sampler, config.eval_batch_size, said, resume)
            for prompt in plan.to_draw
        ]

    def fill_dataset(self, plan: Plan, token: ClassToken) -> tuple[int, int]:
        """Bring the class's data set to its number of images; how many it holds, and how many were thrown
        away now."""
        config = plan.config
        made_with = dataset_options(config, token.vector)
        judge = self.judge(plan)
        dataset = Dataset(plan.folder.dataset, self.guides(plan), judge, made_with, read_dataset_record)
        thrown_away = dataset.fill(
            token,
            plan.class_name,
            config.export_dataset,
            config.sampler,
            config.eval_batch_size,
            only_correct=config.keep == "correct",
        )
        return len(dataset.rows), thrown_away

    # For users of Python.

    def plan(
        self,
        class_index: int | str,
        vectors: torch.Tensor | None = None,
        learning: LearningSettings | None = None,
        **options,
    ) -> Plan:
        """What is to be done with one class, checked.

        Raises:
            UsageError: something is wrong with it.
        """
        config = replace(self.changed_config(options), class_index=class_index)
        if not config.evaluate:  # a session may have options of evaluations that are to come
            unused = ("eval_prompts", "reference_images", "clip_model", "eval_precision", "insight")
            config = replace(config, **dict.fromkeys(unused))
        if not config.train:
            config = replace(config, report_to="none")
        validate(config)
        check_inputs(config)
        evaluation_dtype(config.eval_precision, self.sources.device, self.sources.dtype)
        self.sources.first_plan = None  # options may have changed: all is checked again
        return make_plan(config, self.sources, vectors=vectors, learning=learning)

    def changed_config(self, options: dict[str, Any]) -> RunConfig:
        """The session's options with those of one call.

        Raises:
            UsageError: one is not known, is the whole session's, or is not allowed.
        """
        check_names(options)
        for name in options:
            if name in OF_THE_SESSION:
                raise UsageError(f"{name}: is the whole session's; give it to Session(...)")
        config = replace(self.config, **options)
        check_values(config)
        return config

    def learn(
        self,
        class_index: int | str,
        on_update: OnUpdate | None = None,
        constants: dict[str, float] | None = None,
        **options,
    ) -> LearnedToken:
        """Learn a class's token, and write it with its records below ``output_path``.

        Args:
            class_index: the class's number, from 1, or its name.
            on_update: is given each update's log row and images (N, 3, H, W) in [0, 1].
            constants: settings of the training that are no options, such as ``fine_rate``.
            options: of ``RunConfig``, for this class alone.

        Raises:
            UsageError: an option is not allowed, there is no such class, or another run is at work on it.
            WorkError: the training failed.
        """
        config = self.changed_config(options)
        try:
            learning = config.learning(**(constants or {}))
        except (TypeError, ValueError) as error:
            raise UsageError(f"constants: {error}") from error
        plan = self.plan(class_index, learning=learning, train=True, **options)
        learning = plan.config.learning(**(constants or {}))
        self.load_tiny_vae(plan.config)
        token = self.token(plan)
        with alone_in(plan.folder.records) as claim:
            plan.folder.claimed_by(claim.check)
            if plan.folder.is_to_be_taken:
                plan.folder.take_training()
            training = self.train(plan, token, on_update, learning)
        return LearnedToken(token, replace(plan, vectors=token.vector.detach().cpu().clone()), training)

    def evaluate(self, learned: LearnedToken, **options) -> dict[str, Any]:
        """The same unseen seeds with and without the token; what ``evaluation.json`` holds, "verdict" in
        one line.

        Raises:
            UsageError: an option is not allowed, or another run is at work on the class.
            WorkError: most images are not finite.
        """
        plan = self.plan(
            learned.plan.config.class_index,
            vectors=learned.plan.vectors,
            **(changed(learned, self.config) | {"evaluate": True} | options),
        )
        there = plan.folder.token
        with alone_in(plan.folder.records) as claim:
            plan.folder.claimed_by(claim.check)
            if there.exists() and fingerprint(read_token(there)[1]) != fingerprint(plan.vectors):
                raise UsageError(
                    f"{there}: is another token of this class and experiment; give another exp_id"
                )
            result = self.run_evaluation(plan, learned.token)
            self.summarize(plan)
            if plan.config.insight:
                result["insight"] = self.look_into(plan, plan.vectors).content
        return result

    def draw(
        self, learned: LearnedToken, prompt: str, seeds: Sequence[int] = range(4), **options
    ) -> list[Image.Image]:
        """Images of a prompt in which {token} and {class} are filled in, one from each seed.

        Raises:
            UsageError: a prompt is too long, or {token:...} names a class without a token.
        """
        plan = self.plan(
            learned.plan.config.class_index,
            vectors=learned.plan.vectors,
            **(changed(learned, self.config) | {"prompt": prompt} | options),
        )
        token = self.token(plan)
        for placeholder, vectors in plan.others.items():
            token.join(placeholder, vectors)
        images = []
        for text in plan.to_draw if seeds else ():
            in_batches(
                token,
                [text] * len(seeds),
                list(seeds),
                plan.config.sampler,
                plan.config.eval_batch_size,
                lambda part, _: images.extend(to_pil(image) for image in part),
            )
        return images

    def save(self, learned: LearnedToken, path: str | Path) -> None:
        """Write the token as a file that :meth:`load` and diffusers' ``load_textual_inversion`` read."""
        plan = learned.plan
        write_tensors(
            Path(path), token_tensors(learned.token), origin(plan.config, plan.label, plan.class_name)
        )

    def load(self, path: str | Path, class_index: int | str | None = None) -> LearnedToken:
        """A token from its file.

        Args:
            class_index: the class that it is of; None is what the file says.

        Raises:
            UsageError: the file holds no token, or does not say of which class of this classifier it is.
        """
        _, vectors = read_token(Path(path))
        if class_index is None:
            said = read_origin(Path(path))
            classifier = self.config.classifier
            number = said.get("class_index", "")
            if not number.isdecimal() or said.get("classifier", classifier) != classifier:
                wanted = f"of which class of {classifier} it is"
                raise UsageError(f"{path}: does not say {wanted}; give class_index")
            class_index = int(number)
        plan = self.plan(class_index, vectors=vectors, prompt="{token} {class}")
        return LearnedToken(self.token(plan), replace(plan, to_draw=()))


def record_of(plan: Plan, settings: LearningSettings, training: Training) -> dict[str, Any]:
    """What ``config.json`` holds beside the environment: options, constants, and how the training ended."""
    return {
        "version": VERSION,
        "config": asdict(plan.config),
        "constants": settings.constants,
        "class_name": plan.label,
        "classifier": plan.config.classifier,
        "training": {
            "updates": len(training.rows),
            "kept_after_updates": training.kept_updates,
            "stopped_by": training.stopped_by,
            "gain": asdict(training.gain) if training.gain else None,
            "sureness": training.sureness,
            "images": training.images,
            "seconds": round(training.seconds, 2),
            "precision": training.precision,
            "learning_rate": training.learning_rate,
        },
    }


def changed(learned: LearnedToken, config: RunConfig) -> dict[str, Any]:
    """The options that a token was learned with and that are other ones now; not what was to be done."""
    then = asdict(learned.plan.config)
    names = {*deciding("drawing"), "placeholder_token", "exp_id", "output_path"} - OF_THE_SESSION
    return {name: then[name] for name in names if then[name] != getattr(config, name)}


def check_names(options: dict[str, Any]) -> None:
    """Check that options are fields of ``RunConfig``.

    Raises:
        UsageError: one is not.
    """
    unknown = sorted(set(options) - set(RunConfig.__dataclass_fields__))
    if unknown:
        raise UsageError(f"no option is called {unknown[0]!r}")


def check_pipeline_options(models: DiffusionModels, options: dict[str, Any]) -> None:
    """Check the options that stand beside an existing pipeline, which brings a device and a precision.

    Raises:
        UsageError: the pipeline has another.
    """
    device = options.get("device", "auto")
    precision = options.get("mixed_precision", "auto")
    has = {
        "device": device == "auto" or resolve_device(device).type == models.device.type,
        "mixed_precision": precision == "auto" or resolve_dtype(precision, models.device) == models.dtype,
        "gradient_checkpointing": not options.get("gradient_checkpointing"),
    }
    for name, holds in has.items():
        if not holds:
            raise UsageError(f"{name}: {options[name]!r} was given with a pipeline, which has its own")


def as_classifier(module: torch.nn.Module, labels: list[str] | None, recipe: Recipe | None) -> Classifier:
    """A module as a classifier.

    Raises:
        UsageError: without labels.
    """
    if not labels:
        raise UsageError("classifier: a module was given without labels; give labels=[...], one a logit")
    as_it_is = Recipe(None, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    frozen = module.requires_grad_(False).eval()
    return Classifier(type(module).__name__, frozen, list(labels), recipe or as_it_is)


def name_of(classifier: str | Classifier | None) -> str | None:
    """A classifier's name."""
    return classifier.name if isinstance(classifier, Classifier) else classifier


def pipeline_name(pipeline: Any) -> str:
    """The id or folder that a pipeline was loaded from."""
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
