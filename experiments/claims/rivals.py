"""What a user would do instead of learning a class token, and the token itself: each method learns for one
class, at a given cost, and can draw afterwards.

A method is a function that takes a ``Task`` and its settings, and gives a ``Learned``. All draw with the
sampler of the task, so that only what was learned differs.
"""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torchvision.transforms.functional import to_tensor

from config import with_preset
from discriminative.diffusion.kept import KeptLatents
from discriminative.diffusion.sampler import Walk, chunks, decode, draw_noise
from discriminative.guides.classifier import Guide
from discriminative.guides.labels import prompt_class_name
from discriminative.precision import channels_last, make_scaler, training_precision
from discriminative.records.layout import RunFolder
from discriminative.seeds import training_seeds, validation_seeds
from discriminative.settings import LearningSettings, SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import draw_all, in_batches
from discriminative.tokens.files import read_token, token_tensors
from discriminative.tokens.objective import Objective
from discriminative.tokens.prompts import TEMPLATES, fill, is_word
from experiments.claims.calls import Calls
from miniature.scenes import SceneClass, render, with_article
from trainer import train

BATCH = 20  # images drawn at once
FEW = 8  # images in a training's step, and noises that are optimised at once
STRIDE = 1000  # between the seeds of an image's candidates
REAL_IMAGES = 2_000_000  # index of the first render that stands for a real image
CHOOSING = 0.25  # share of the budget that goes into choosing among hard prompts
CHOOSING_NOISES = 4  # that each of them is drawn from
RESTART = 20  # updates with the same words after which a hard prompt begins anew
Draw = Callable[[str, list[int]], torch.Tensor]  # suffix of the prompt, seeds -> images (N, 3, H, W)


@dataclass(frozen=True)
class Budget:
    """What the class token came to, which is what its rivals may cost.

    Args:
        once: calls of the UNet for learning it.
        each: calls for drawing one image.
        images: that are drawn.
    """

    once: int
    each: float
    images: int

    @property
    def an_image(self) -> float:
        """Calls for one image where nothing is learned beforehand."""
        return self.once / self.images + self.each


@dataclass
class Task:
    """A class to draw, and what a method may use for it.

    Args:
        token: a class token of its own, on models of its own, not learned yet.
        calls: counts those of its UNet.
        scene_class: to be drawn.
        seed: of everything that is left to chance.
        sampler: all methods draw with.
        budget: None for a method with an end of its own.
        kept: where images of prompts without anything learned are kept.
        files: the folder of what was learned, by method.
    """

    token: ClassToken
    calls: Calls
    guide: Guide
    scene_class: SceneClass
    seed: int
    sampler: SamplerSettings
    budget: Budget | None = None
    kept: KeptLatents | None = None
    files: Path | None = None

    @property
    def class_name(self) -> str:
        """The name in the prompts, which says less than the class."""
        return prompt_class_name(self.scene_class.label)

    def several(self, number: int) -> ClassToken:
        """A token of several vectors in the place of the task's own."""
        models = replace(self.token.models, tokenizer=self.token.models.fresh_tokenizer())
        return ClassToken(models, f"{self.token.placeholder}s", self.token.initializer, number)

    def learning(self, preset: str = "default") -> LearningSettings:
        """Settings of a training."""
        given = {"model": "miniature", "seed": self.seed, "eval_batch_size": BATCH}
        return with_preset(preset, given).learning()

    def objective(self, token: ClassToken) -> Objective:
        """What is asked of a token, with the trainer's default settings."""
        return Objective(self.learning(), token, [self.guide], self.class_name)

    def drawn(self, prompt: str) -> Draw:
        """Images of a prompt."""

        def draw(suffix: str, seeds: list[int]) -> torch.Tensor:
            return draw_all(self.token, prompt + suffix, seeds, self.sampler, BATCH)

        return draw


@dataclass
class Learned:
    """What a method came to.

    Args:
        draw: images of the prompt, with a suffix, from seeds.
        tensors: what has to be kept for it.
        text: words that have to be kept.
        said: figures of its own.
        candidates: images that are drawn for each that is given.
        as_evaluated: drawn in float32, as the program's evaluation is; else as its training.
        once: calls and seconds of learning, where that was done before.
    """

    draw: Draw
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    text: str = ""
    said: dict = field(default_factory=dict)
    candidates: float = 1.0
    as_evaluated: bool = False
    once: dict | None = None


# Without learning.


def plain_prompt(task: Task) -> Learned:
    """The word with the initializer in the token's place."""
    return Learned(task.drawn(fill(TEMPLATES[0], task.token.initializer, task.class_name)))


def precise_phrase(task: Task) -> Learned:
    """What the model draws where the user finds the words."""
    return Learned(task.drawn(f"A photo of {with_article(task.scene_class.name)}"))


def best_of_k(task: Task) -> Learned:
    """The plain prompt, and of k images the one that the guide is surest of.

    So many are drawn that all cost what the class token costs with its images.
    """
    prompt = fill(TEMPLATES[0], task.token.initializer, task.class_name)
    each = task.budget.an_image / task.budget.each

    def draw(suffix: str, seeds: list[int]) -> torch.Tensor:
        number = max(len(seeds), math.floor(each * len(seeds)))
        best = torch.full((len(seeds),), -math.inf)  # (N,)
        images = [None] * len(seeds)
        for first in range(0, number, len(seeds)):
            turn = [seed + STRIDE * (first // len(seeds)) for seed in seeds]
            found = candidates(task, prompt + suffix, turn, number - first)  # (M, 3, H, W)
            for i, score in enumerate(log_probabilities(task.guide, found).tolist()):
                if score >= best[i]:
                    best[i] = score
                    images[i] = found[i]
        return torch.stack(images)

    return Learned(draw, said={"k": each}, candidates=each)


def candidates(task: Task, prompt: str, seeds: list[int], number: int) -> torch.Tensor:
    """The images (M, 3, H, W) of the first ``number`` seeds; whole batches are drawn, as they are kept."""
    wanted = min(len(seeds), -(-number // BATCH) * BATCH)
    parts = []
    in_batches(
        task.token,
        [prompt] * wanted,
        seeds[:wanted],
        task.sampler,
        BATCH,
        lambda part, _: parts.append(part),
        task.kept,
    )
    return torch.cat(parts)[:number]


@torch.no_grad()
def log_probabilities(guide: Guide, images: torch.Tensor) -> torch.Tensor:
    """Log-probability (N,) that the guide gives the class; of an image that is not finite, minus infinity."""
    found = guide.classifier.logits(images).log_softmax(1)[:, guide.target]  # (N,)
    return found.nan_to_num(-math.inf)


# Tokens.


def class_token(task: Task, preset: str) -> Learned:
    """This project's, with the settings of a preset."""
    token = task.token
    with tempfile.TemporaryDirectory() as folder:
        files = RunFolder(folder, "class", preset)
        training = train(task.learning(preset), token, [task.guide], task.class_name, files)
    said = {"updates": len(training.rows), "trained_on": training.images, "stopped_by": training.stopped_by}
    return with_token(task, said)


def with_token(task: Task, said: dict) -> Learned:
    """The token as it is now, in the first template."""
    token = task.token
    prompt = fill(TEMPLATES[0], token.placeholder, task.class_name)
    return Learned(task.drawn(prompt), token_tensors(token), said=said)


def drawn_as_evaluated(task: Task, method: str, preset: str) -> Learned:
    """The class token of a method, drawn with its preset's own sampler in float32; learned where its file is
    missing."""
    path = task.files / artefact(method, task.scene_class.index + 1, task.seed)
    once = None
    if path.exists():
        task.token.load(read_token(path)[1])
        with safe_open(path, "pt") as file:
            once = json.loads(file.metadata()["once"])
    else:
        class_token(task, preset)
    task.sampler = with_preset(preset, {"model": "miniature"}).sampler
    return replace(with_token(task, {}), as_evaluated=True, once=once)


def artefact(method: str, class_index: int, seed: int) -> Path:
    """Where what a method learned lies; ``class_index`` is from 1."""
    return Path(method.replace(" ", "_").replace(",", "")) / f"{class_index:04d}_{seed}.safetensors"


def textual_inversion(task: Task, real: int, rate: float, prompt: str) -> Learned:
    """A word learned from renders as real images, by the loss of diffusers' ``textual_inversion.py``: the
    error of the predicted noise, at uniform timesteps, AdamW on the one vector.

    Args:
        real: images.
        rate: of AdamW.
        prompt: what stands for the class, with {token}; its start is the class's word where it stands alone,
            the initializer where it stands beside the word.
    """
    token = task.token
    alone = "{class}" not in prompt
    token.load(token.start_vector("class" if alone else "initializer", task.class_name))
    said = prompt.replace("{class}", task.class_name).replace("{token}", token.placeholder)
    prompts = [template.replace("{token} {class}", said) for template in TEMPLATES]
    rng = torch.Generator().manual_seed(task.seed)
    mean, deviation = encoded(token.models, real_images(task.scene_class, task.seed, real))
    optimizer = torch.optim.AdamW([token.vector], lr=rate, weight_decay=1e-2)
    steps = 0
    with channels_last(token.models):
        for _ in task.calls.rounds(task.budget.once):
            steps += 1
            picked = torch.randint(len(mean), (FEW,), generator=rng)  # (B,)
            drawn = torch.randn(mean[picked].shape, generator=rng)
            latents = mean[picked] + deviation[picked] * drawn  # (B, C, h, w)
            words = [prompts[i] for i in torch.randint(len(prompts), (FEW,), generator=rng).tolist()]
            optimizer.zero_grad()
            denoising_loss(token, words, latents, rng).backward()
            optimizer.step()
    draw = task.drawn(prompts[0])
    return Learned(draw, token_tensors(token), said={"steps": steps, "norm": token.norm()})


def real_images(scene_class: SceneClass, seed: int, number: int) -> torch.Tensor:
    """Renders of one thing (N, 3, 64, 64) in [0, 1], of a split that no model was trained on."""
    first = REAL_IMAGES + STRIDE * seed
    scenes = [render("test", first + i, count=1, class_index=scene_class.index) for i in range(number)]
    return torch.stack([to_tensor(scene.image) for scene in scenes])


@torch.no_grad()
def encoded(models, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the scaled latents, (2N, C, h, w) each, of images (N, 3, H, W) and their
    mirror images."""
    both = torch.cat([images, images.flip(3)]) * 2 - 1  # (2N, 3, H, W) in [-1, 1]
    found = models.vae.encode(both.to(models.device, models.dtype)).latent_dist
    scale = models.vae.config.scaling_factor
    return found.mean * scale, found.std * scale


def denoising_loss(
    token: ClassToken, prompts: list[str], latents: torch.Tensor, rng: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the UNet's prediction, a scalar, for latents (B, C, h, w) under new noise."""
    models = token.models
    scheduler = models.scheduler
    noise = torch.randn(latents.shape, generator=rng)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=rng)  # (B,)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    found = models.unet(noisy, timesteps, encoder_hidden_states=token.encode(prompts)).sample
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        a = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        target = a.sqrt() * noise - (1 - a).sqrt() * latents
    return F.mse_loss(found.float(), target.float())


# Words of the vocabulary.


def hard_prompt(task: Task, words: int, rate: float, stage: int) -> Learned:
    """Words in the token's place, by PEZ (Wen et al. 2023, algorithm 1): soft vectors are moved by the
    gradient that the guide's loss has at their nearest words.

    The loss is that of the class token's training. Where the words stay the same for long, others are begun
    from. The prompts that did best while they were tried are compared on a few validation noises, with the
    last quarter of the budget.

    Args:
        words: how many.
        rate: of AdamW, for each image of an update, over the root mean square of a word's embedding.
        stage: of the class token's stages, from 0, whose gradient is taken.
    """
    token = task.several(words)
    ids = whole_words(token)  # (V,)
    table = token.table[ids]  # (V, width)
    objective = task.objective(token)
    with training_precision(token.models, "auto"):
        tried = tried_words(task, objective, table, rate, stage)
        best = best_words(task, objective, tried, table, CHOOSING * task.budget.once)
    tokens = token.models.tokenizer.convert_ids_to_tokens(ids[list(best)].tolist())
    text = " ".join(word.removesuffix("</w>") for word in tokens)
    said = {"words": text, "tried": len(tried)}
    return Learned(task.drawn(fill(TEMPLATES[0], text, task.class_name)), text=text, said=said)


def tried_words(
    task: Task, objective: Objective, table: torch.Tensor, rate: float, stage: int
) -> dict[tuple[int, ...], list[float]]:
    """Rows of the table (V, width) that were tried together, and the losses that they had."""
    token = objective.token
    rng = torch.Generator().manual_seed(task.seed)
    step = rate * token.word_rms * objective.settings.images_per_update
    scaler = make_scaler(token.models)
    tried = {}
    same = RESTART
    for epoch in task.calls.rounds((1 - CHOOSING) * task.budget.once):
        if same == RESTART:
            picked = torch.randint(len(table), (len(token.vector),), generator=rng)  # (words,)
            soft = torch.nn.Parameter(table[picked].clone())
            optimizer = torch.optim.AdamW([soft], lr=step, weight_decay=0.0)
            words = ()
        before = words
        words = tuple(nearest_words(soft, table).tolist())
        same = same + 1 if words == before else 0
        token.load(table[list(words)])
        token.vector.grad = None
        losses = objective.accumulate(epoch, scaler, stage)[1]  # (B,)
        tried.setdefault(words, []).extend(losses.tolist())
        soft.grad = token.vector.grad.clone()
        optimizer.step()
        with torch.no_grad():  # as short as words are, so that what is new counts
            soft.mul_((token.word_norm / soft.norm(dim=1, keepdim=True)).clamp(max=1))
    return tried


def whole_words(token: ClassToken) -> torch.Tensor:
    """Ids (V,) of the vocabulary's entries that a text can spell, and that stay one word there."""
    tokenizer = token.models.tokenizer
    found = [
        i
        for word, i in tokenizer.get_vocab().items()
        if word.endswith("</w>") and i < token.first_id and is_word(tokenizer, word.removesuffix("</w>"))
    ]
    return torch.tensor(sorted(found))


def nearest_words(vectors: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows (N,) of a table (V, width) that vectors (N, width) are nearest to, by angle."""
    return (F.normalize(vectors.detach(), dim=1) @ F.normalize(table, dim=1).T).argmax(1)


def best_words(task: Task, objective: Objective, tried: dict, table: torch.Tensor, budget: float) -> tuple:
    """Of words that were tried those with the least loss on validation noises; so many are compared as the
    budget allows, best ones first."""
    ranked = sorted(tried, key=lambda words: fmean(tried[words]))
    found = {}
    for i in task.calls.rounds(budget):
        if i == len(ranked):
            break
        objective.token.load(table[list(ranked[i])])
        rows = objective.score_seeds(validation_seeds(CHOOSING_NOISES))
        found[ranked[i]] = fmean(loss for _, loss, _ in rows)
    return min(found, key=found.get)


# Weights.


def reward_lora(task: Task, rank: int, rate: float, steps: int) -> Learned:
    """LoRA on the UNet's attention by the gradient of the guide's loss, in AlignProp's manner (Prabhudesai
    et al. 2023): through the last steps, their number drawn anew for each update.

    Args:
        rank: of the matrices.
        rate: of AdamW.
        steps: with gradient, at most.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    token = task.token
    models = token.models
    torch.manual_seed(task.seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    models.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    trained = [p for p in models.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    objective = task.objective(token)
    prompts = [fill(template, token.initializer, task.class_name) for template in TEMPLATES]
    rng = torch.Generator().manual_seed(task.seed)
    i = 0
    with training_precision(models, "auto"):
        for i in task.calls.rounds(task.budget.once):
            seeds = training_seeds(task.seed, i, FEW)
            words = [prompts[seed % len(prompts)] for seed in seeds]
            number = int(torch.randint(1, steps + 1, (1,), generator=rng))
            images = with_gradient(token, words, seeds, task.sampler, number)
            optimizer.zero_grad()
            objective.class_loss(images)[0].mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    kept = {name: p.detach().clone() for name, p in get_peft_model_state_dict(models.unet).items()}
    return Learned(task.drawn(prompts[0]), kept, said={"updates": i + 1})


def with_gradient(
    token: ClassToken, prompts: list[str], seeds: list[int], settings: SamplerSettings, steps: int
) -> torch.Tensor:
    """Images (B, 3, H, W) whose gradient goes through the last steps, to the UNet's weights."""
    models = token.models
    with torch.no_grad():
        cond = token.encode(prompts)
    noise = draw_noise(seeds, models.latent_shape(settings.height, settings.width))
    walk = Walk(models, cond, token.unconditional, noise, settings)
    first = max(0, len(walk.timesteps) - steps)
    # Both halves of the guidance see the weights.
    latents = walk.reach(first).requires_grad_()
    return decode(models, walk.run(latents, first, len(walk.timesteps)), settings)


# Noises.


def noise_optimisation(task: Task, steps: int, rate: float) -> Learned:
    """The noise of each image is moved until the guide sees the class, in ReNO's manner (Eyring et al. 2024).

    The gradient goes through a sampler of few steps and is clipped; the steps are Nesterov's, and a penalty
    keeps the noise as long as noises are.

    The best noise of each image is drawn as all others are.

    Args:
        steps: of that sampler.
        rate: step size.
    """
    prompt = fill(TEMPLATES[0], task.token.initializer, task.class_name)
    few = replace(task.sampler, num_inference_steps=steps)
    shape = task.token.models.latent_shape(few.height, few.width)

    def draw(suffix: str, seeds: list[int]) -> torch.Tensor:
        parts = []
        for chunk in chunks(len(seeds), FEW):
            noises = draw_noise(seeds[chunk], shape)  # (B, C, h, w)
            noises = optimised(task, prompt + suffix, noises, few, rate)
            parts.append(images_of(task, prompt + suffix, noises, task.sampler))
        return torch.cat(parts)

    return Learned(draw)


NOISE_WEIGHT = 0.01  # of the regulariser
MOMENTUM = 0.9
LONGEST_GRADIENT = 0.1  # of each noise


def optimised(
    task: Task, prompt: str, noises: torch.Tensor, settings: SamplerSettings, rate: float
) -> torch.Tensor:
    """Of the noises (B, C, h, w) on each one's way the one that the guide is surest of.

    Where the way ends is looked at without a gradient, for which the budget has to last.
    """
    noises = noises.clone().requires_grad_()
    best = noises.detach().clone()
    surest = torch.full((len(noises),), -math.inf)  # (B,)
    optimizer = torch.optim.SGD([noises], lr=rate, momentum=MOMENTUM, nesterov=True)

    def look(at: torch.Tensor) -> torch.Tensor:
        images = images_of(task, prompt, at, settings)  # (B, 3, H, W)
        reward = task.guide.classifier.logits(images).log_softmax(1)[:, task.guide.target]  # (B,)
        better = reward.detach() > surest
        surest[better] = reward.detach()[better]
        best[better] = at.detach()[better]
        return reward

    of_last = 2 * settings.num_inference_steps  # calls, with guidance
    for _ in task.calls.rounds(len(noises) * (task.budget.once / task.budget.images - of_last)):
        reward = look(noises)
        optimizer.zero_grad()
        (NOISE_WEIGHT * unlikely_norm(noises) - reward).sum().backward()
        lengths = noises.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        noises.grad *= (LONGEST_GRADIENT / lengths).clamp(max=1)
        optimizer.step()
    look(noises.detach())
    return best


def unlikely_norm(noises: torch.Tensor) -> torch.Tensor:
    """How unlikely the norm of each noise (B, C, h, w) is, (B,): the negative log-density of a chi
    distribution, up to a constant (ReNO, equation 4)."""
    norms = noises.flatten(1).norm(dim=1)  # (B,)
    return norms**2 / 2 - (noises[0].numel() - 1) * norms.log()


def images_of(task: Task, prompt: str, noises: torch.Tensor, settings: SamplerSettings) -> torch.Tensor:
    """Images (B, 3, H, W) of a prompt from noises (B, C, h, w), with their gradient where that is wanted."""
    token = task.token
    with torch.no_grad():
        cond = token.encode([prompt] * len(noises))
    walk = Walk(token.models, cond, token.unconditional, noises, settings)
    with torch.set_grad_enabled(noises.requires_grad):
        return decode(token.models, walk.run(walk.start, 0, len(walk.timesteps)), settings)
