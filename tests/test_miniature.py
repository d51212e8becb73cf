"""The bundled world and its model."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import weight_hashes

from classifiers import load_classifier
from config import RunConfig
from discriminative.diffusion.models import load_models
from discriminative.diffusion.sampler import SamplerSettings
from discriminative.hub import MINIATURE
from discriminative.seeds import evaluation_seeds
from discriminative.tokens.class_token import ClassToken
from miniature.build import STAGES, drop
from miniature.calibrate import EQUIVALENT_SCALE, GUIDANCE_SCALE, calibrated
from miniature.export import export
from miniature.scenes import BACKGROUNDS, CLASSES, GROUPS, HUES, PLAIN, SPRITES, TINTABLE, render, sprite
from miniature.training import Trainee, lr_factor, to_tensor
from miniature.unet import TEXT, loss_weights, rescale_embeddings

CPU = torch.device("cpu")


def digest(scene):
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


def test_the_world_is_as_wide_as_promised():
    assert len(CLASSES) >= 40
    assert len(GROUPS) >= 15
    assert sum(g.fine for g in GROUPS) >= 3
    assert len(PLAIN) >= 12
    assert len({c.label for c in CLASSES}) == len(CLASSES)
    assert {p.stem for p in SPRITES.glob("*.png")} == {c.name.replace(" ", "_") for c in CLASSES}


def test_scenes_are_reproducible_and_the_splits_never_overlap():
    digests = {
        split: {digest(render(split, i)) for i in range(300)} for split in ("train", "validation", "test")
    }
    assert all(len(d) == 300 for d in digests.values())
    assert not digests["train"] & digests["validation"]
    assert not digests["train"] & digests["test"]
    assert not digests["validation"] & digests["test"]
    assert digest(render("test", 7)) == digest(render("test", 7))


def test_boxes_lie_in_the_picture():
    for i in range(100):
        scene = render("train", i)
        assert 1 <= len(scene.things) <= 3
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64


def test_captions_name_relations_as_the_boxes_stand():
    found = 0
    for i in range(300):
        scene = render("train", i, count=2)
        first, second = (((t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2) for t in scene.things)
        for relation, axis, sign in (
            (" left of ", 0, 1),
            (" right of ", 0, -1),
            (" above ", 1, 1),
            (" below ", 1, -1),
        ):
            if relation in scene.caption:
                assert sign * (second[axis] - first[axis]) >= 0
                found += 1
    assert found > 40


def test_colour_words_name_things_and_not_backgrounds_only():
    tinted = [
        s
        for s in (render("train", i, count=1, class_index=CLASSES[-1].index) for i in range(60))
        if s.things[0].colour
    ]
    named = [s for s in tinted if f"{s.things[0].colour} {CLASSES[-1].name}" in s.caption]
    assert len(named) > len(tinted) / 2 > 5
    assert all(np.any(np.asarray(sprite(n, "blue")) != np.asarray(sprite(n, "red"))) for n in TINTABLE)
    assert set(HUES) < set(BACKGROUNDS)


def test_captions_are_imprecise_and_labels_are_not():
    bats = [render("train", i, count=1, class_index=1) for i in range(200)]
    imprecise = sum("cricket" not in s.caption for s in bats)
    assert 0.25 < imprecise / 200 < 0.55
    assert all(s.things[0].class_index == 1 for s in bats)
    assert CLASSES[1].label == "bat, cricket bat"


def test_the_precise_caption_differs_in_its_nouns_alone():
    differing = 0
    for i in range(300):
        scene = render("train", i)
        words = {
            t.class_index: (CLASSES[t.class_index].word, CLASSES[t.class_index].name) for t in scene.things
        }
        imprecise = scene.precise_caption
        for word, name in words.values():
            imprecise = imprecise.replace(name, word)
        precise = scene.caption
        for word, name in words.values():
            precise = precise.replace(name, word)
        assert precise.replace("an ", "a ") == imprecise.replace("an ", "a ")
        differing += scene.caption != scene.precise_caption
    assert 60 < differing < 150


def test_guidance_7_of_the_calibrated_prediction_is_the_smaller_guidance_of_the_first():
    cond, uncond = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guided = uncond + GUIDANCE_SCALE * (calibrated(cond, uncond) - uncond)
    torch.testing.assert_close(guided, uncond + EQUIVALENT_SCALE * (cond - uncond))


def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path):
    def trainee(steps):
        torch.manual_seed(0)
        t = Trainee({"m": torch.nn.Linear(3, 2)}, tmp_path, "stage", [(6, 1e-2)])
        t.resume()
        while t.step < steps:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(t.step))
            t.update(t.modules["m"](x).square().mean())
        return t

    whole = trainee(6)
    trainee(3).save()
    resumed = trainee(6)
    assert weight_hashes(resumed.modules["m"], resumed.average["m"]) == weight_hashes(
        whole.modules["m"], whole.average["m"]
    )


def test_the_learning_rate_warms_up_holds_and_falls_to_zero():
    factors = [lr_factor(s, 1000, warmup=100) for s in range(1001)]
    assert factors[0] == 0.01
    assert factors[100] == factors[699] == 1.0
    assert factors[1000] == pytest.approx(0.0, abs=1e-9)


def test_scaling_the_embeddings_keeps_what_the_text_encoder_says():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=50, max_position_embeddings=8, eos_token_id=49, **TEXT)
    ).eval()
    ids = torch.randint(50, (3, 8))
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(3)
        before = encoder(ids).last_hidden_state
        rescale_embeddings(encoder, ids.unique(), 0.0145)
        after = encoder(ids).last_hidden_state
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)
    assert encoder.get_input_embeddings().weight[ids.unique()].square().mean().sqrt().item() == pytest.approx(
        0.0145, rel=1e-4
    )


def test_loss_weights_are_capped_and_floored():
    alphas_cumprod = torch.tensor([0.9991, 0.5, 0.005])
    assert loss_weights(alphas_cumprod, "min_snr").tolist() == pytest.approx([0.05, 1, 1])
    assert loss_weights(alphas_cumprod, "debiased").tolist() == pytest.approx([0.05, 1, 8])


def test_each_round_of_training_has_its_own_learning_rate_curve(tmp_path):
    trainee, rates = Trainee({"m": torch.nn.Linear(3, 2)}, tmp_path, "stage", [(400, 1e-2), (1000, 1e-2)]), []
    for _ in range(1000):
        trainee.update(trainee.modules["m"].weight.square().sum())
        rates.append(trainee.optimizer.param_groups[0]["lr"])
    assert rates[250] == rates[700] == 1e-2
    assert rates[399] < 1e-4 > rates[999]
    assert rates[400] == pytest.approx(1e-2 / 200)


@pytest.fixture(scope="module")
def token():
    return ClassToken(load_models("miniature", CPU, torch.float32), "newclas", "a")


def test_word_embeddings_are_as_large_as_those_of_stable_diffusion(token):
    words = {w for c in CLASSES for w in c.name.split()}
    rows = [token.models.tokenizer(w, add_special_tokens=False).input_ids for w in words]
    assert all(len(r) == 1 for r in rows)
    rms = (
        token.models.text_encoder.get_input_embeddings()
        .weight[[r[0] for r in rows]]
        .square()
        .mean()
        .sqrt()
        .item()
    )
    assert 0.010 <= rms <= 0.020


def test_the_weights_are_small_and_safetensors_only():
    assert sum(f.stat().st_size for f in MINIATURE.rglob("*.safetensors")) < 40e6
    assert not [f for f in MINIATURE.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_the_stock_pipeline_draws_our_image_bit_for_bit(token):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MINIATURE / "model")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(11))
    theirs = pipeline(
        "A photo of a bat", num_inference_steps=8, guidance_scale=7.0, latents=noise, output_type="pt"
    ).images
    ours = token.sample(
        ["A photo of a bat"], [11], SamplerSettings(num_inference_steps=8, guidance_scale=7.0)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["miniature", "miniature-judge", "miniature-judge2"])
def test_guide_and_judge_know_unseen_renders(name):
    classifier = load_classifier(name, CPU, torch.float32)
    scenes = [
        render("test", 2_000_000 + i, count=1, class_index=i % len(CLASSES)) for i in range(5 * len(CLASSES))
    ]
    images = to_tensor(np.stack([np.asarray(s.image) for s in scenes]), CPU) / 2 + 0.5
    with torch.no_grad():
        right = classifier.logits(images).argmax(1) == torch.tensor([s.things[0].class_index for s in scenes])
    assert classifier.labels == [c.label for c in CLASSES]
    assert right.float().mean() > 0.97


def test_plain_nouns_are_drawn_as_themselves_and_a_word_mostly_as_its_common_sense(token):
    guide = load_classifier("miniature", CPU, torch.float32)
    seeds = evaluation_seeds(12)
    frogs = token.sample(["A photo of a frog"] * 12, seeds, RunConfig().sampler)
    bats = token.sample(["A photo of a bat"] * 12, seeds, RunConfig().sampler)
    with torch.no_grad():
        assert (guide.logits(frogs).argmax(1) == guide.labels.index("frog")).sum() >= 10
        assert (guide.logits(bats).argmax(1) == guide.labels.index("bat, fruit bat")).sum() >= 6


def test_redoing_a_stage_drops_what_was_made_from_it(tmp_path):
    for folder in STAGES.values():
        if folder:
            (tmp_path / folder).mkdir()
    drop("unet", tmp_path)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"tokenizer", "vae", "guide", "judge", "judge2", "detector"}
    drop("vae", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer"}


def test_an_incomplete_export_leaves_the_shipped_weights_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="has no vae, text_encoder"):
        export(tmp_path / "work", tmp_path / "out")
    assert (tmp_path / "out").exists()
