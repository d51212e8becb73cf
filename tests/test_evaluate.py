"""Scoring: the right class by the right classifier, and what is made of it."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import tiny_classifier, tiny_models, tiny_tokenizer
from PIL import Image

from config import RunConfig
from discriminative.diffusion.memory import Batches
from discriminative.errors import UsageError, WorkError
from discriminative.guides.classifier import Classifier, Guide, verdicts
from discriminative.guides.similarity import TextSimilarity
from discriminative.records.files import read_image, to_pil
from discriminative.records.layout import RunFolder
from discriminative.records.pictures import Shown, framed
from discriminative.records.scores import (
    distances,
    interval,
    mcnemar,
    paired,
    paired_log_probabilities,
    ranks,
    spread,
)
from discriminative.tokens.class_token import ClassToken
from evaluate import Arm, Seen, arm_prompts, compare, evaluate, shares, verdict


def certain(target: int, classes: int = 3) -> Guide:
    """A classifier that sees class ``target`` in every image, asked for class 0."""
    model = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, classes)
    )
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.eye(classes)[target] * 9)
    return Guide(
        Classifier(
            f"sees {target}",
            model.requires_grad_(False),
            ["cat", "bat", "tiger"][:classes],
            lambda images: images,
        ),
        0,
    )


def test_accuracy_is_the_share_of_images_given_to_the_class():
    classifier = tiny_classifier()
    images = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = Seen(Guide(classifier, 2))
    right = torch.cat([seen.keep(*seen.look(images[:4])), seen.keep(*seen.look(images[4:]))])
    expected = verdicts(classifier, images, 9) == 2
    assert torch.equal(right, expected)
    assert torch.equal(seen.right, expected)
    assert seen.figures()["accuracy"] == int(expected.sum()) / 9
    assert seen.figures()["probability"] == pytest.approx(
        classifier.logits(images).softmax(1)[:, 2].mean().item()
    )


def test_images_whose_logits_are_not_finite_are_no_verdict():
    """The most probable of NaNs would be the first class."""
    with pytest.raises(WorkError, match="not finite"):
        verdicts(tiny_classifier(), torch.full((2, 3, 16, 16), float("nan")), 2)
    seen = Seen(Guide(tiny_classifier(), 0))
    images = torch.full((2, 3, 16, 16), float("nan"))
    assert seen.keep(*seen.look(images)).tolist() == seen.right.tolist() == [False, False]


def test_features_are_what_the_last_layer_is_given():
    classifier = tiny_classifier()
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits, features = classifier.look(images)
    (head,) = [
        m
        for m in classifier.model.modules()
        if isinstance(m, torch.nn.Linear) and m.out_features == len(classifier.labels)
    ][-1:]
    torch.testing.assert_close(head(features), logits)
    assert not any(m._forward_pre_hooks for m in classifier.model.modules())


def test_a_judge_that_never_sees_the_class_is_no_fault_of_the_token(tmp_path):
    token, folder = ClassToken(tiny_models(), "newclas", "a"), RunFolder(str(tmp_path), "c", "e")
    config = RunConfig(
        class_index=1, evaluate=True, num_inference_steps=2, test_size=3, classifier="g", judge="j"
    )
    result = evaluate(config, token, [certain(0)], certain(1), "cat", folder)
    # The plain prompt's images are as far apart: it is not the token.
    assert result["verdict"].endswith("judge 0.00 -> 0.00 [0.00, 0.56], p=1, diversity 1.00x")
    assert result["prompts"][0]["arms"]["token"]["judge"]["predicted"] == [["bat", 1.0]]
    agreed = evaluate(config, token, [certain(0)], certain(0), "cat", folder)
    assert "fools" not in agreed["verdict"]
    assert agreed["verdict"].startswith(
        "cat: guide 1.00 -> 1.00 [0.44, 1.00], judge 1.00 -> 1.00 [0.44, 1.00], p=1"
    )


@pytest.mark.parametrize("number", [10, 100])
def test_a_gap_of_just_twenty_points_is_not_called_out_however_it_is_rounded(number):
    def line(guide: int, judge: int, before: int = 0) -> str:
        token, baseline = (
            {
                who: shares(torch.arange(number) < right, "accuracy") | {"log_probability": -1.0, "rank": 2}
                for who, right in (("guide", g), ("judge", j))
            }
            for g, j in ((guide, judge), (before, 0))
        )
        first = {
            "arms": {"token": token, "baseline": baseline},
            "paired": {"guide": {"p_value": 1.0, "log_probability_p_value": 1.0}},
            "diversity_ratio": None,
        }
        return verdict({"class_name": "cat", "prompts": [first]})

    fifth = number // 5
    for guide in range(fifth, number + 1):
        assert "fools" not in line(guide, guide - fifth)
        assert guide == fifth or line(guide, guide - fifth - 1).endswith(
            "; the token fools the guide: the judge does not see the class"
        )
        assert "fools" not in line(guide, 0, before=guide - fifth)  # the gap was there before


def logits_classifier(gain: float) -> Guide:
    """A guide that never gives an image to class 1, but the more the brighter it is."""

    class Bright(torch.nn.Module):
        def forward(self, images):
            brightness = images.mean((1, 2, 3))
            return torch.stack([torch.full_like(brightness, 10.0), gain * brightness], 1)

    return Guide(Classifier(f"gain {gain}", Bright(), ["bat", "cat"], lambda images: images), 1)


def test_a_gain_below_the_first_right_image_is_seen():
    generator = torch.Generator().manual_seed(0)
    without = torch.rand(8, 3, 8, 8, generator=generator) / 2
    arms = {
        name: Arm(name, [logits_classifier(4.0)], logits_classifier(2.0)) for name in ("token", "baseline")
    }
    arms["baseline"].look(without)
    arms["token"].look(without + 0.4)
    told = compare(arms, None)
    of_token, of_baseline = (told["arms"][arm]["guide"] for arm in ("token", "baseline"))
    assert of_token["accuracy"] == of_baseline["accuracy"] == 0
    assert of_token["log_probability"] - of_baseline["log_probability"] == pytest.approx(1.6, abs=0.01)
    for who in ("guide", "judge"):
        assert told["paired"][who]["p_value"] == 1
        assert told["paired"][who]["log_probability_p_value"] == pytest.approx(2 / 2**8)
    line = verdict({"class_name": "cat", "prompts": [told | {"template": ""}]})
    assert "guide 0.00 -> 0.00" in line
    before = of_baseline["log_probability"]
    assert f"log-probability {before:.2f} -> {before + 1.6:.2f} (p=0.008), rank 2 -> 2" in line


def test_one_pair_of_images_says_nothing():
    told = paired_log_probabilities(torch.tensor([-1.0]), torch.tensor([-3.0]))
    assert told == {"log_probability_difference": 2.0, "log_probability_p_value": 1.0}


def test_the_rank_counts_from_the_most_probable_label():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])
    assert ranks(logits, 1).tolist() == [2, 2, 1]


def test_with_several_guides_the_log_probability_is_of_all():
    both = [logits_classifier(4.0), logits_classifier(2.0)]
    arm = Arm("p", both, None)
    arm.look(torch.full((2, 3, 8, 8), 0.5))
    told = arm.figures(None)
    of_each = [told["guides"][name]["log_probability"] for name in told["guides"]]
    apart = [seen.log_probabilities.mean().item() for seen in arm.by_guide]
    assert told["guide"]["log_probability"] == pytest.approx(sum(apart) / 2)
    assert of_each[-1] == pytest.approx(apart[-1])


def test_a_token_that_draws_one_image_only_has_no_diversity_at_all():
    arms = {"token": Arm("newclas cat", [certain(0)], None), "baseline": Arm("a cat", [certain(0)], None)}
    arms["token"].look(torch.ones(3, 3, 8, 8))
    arms["baseline"].look(torch.rand(3, 3, 8, 8))
    arms["baseline"].by_guide[0].features = torch.eye(3)
    assert compare(arms, None)["diversity_ratio"] == pytest.approx(0, abs=1e-6)
    assert compare(arms, None)["diversity_ratio"] is not None


def test_figures_never_stand_beside_pictures_of_another_evaluation(tmp_path, monkeypatch):
    token, folder = ClassToken(tiny_models(), "newclas", "a"), RunFolder(str(tmp_path), "c", "e")
    config = RunConfig(class_index=1, evaluate=True, num_inference_steps=2, test_size=2, classifier="g")
    evaluate(config, token, [certain(0)], None, "cat", folder)

    def no_space(*args):
        raise OSError("no space left")

    monkeypatch.setattr("discriminative.records.layout.shutil.move", no_space)
    with pytest.raises(OSError, match="no space"):
        evaluate(config, token, [certain(1)], None, "cat", folder)
    assert not folder.result.exists()


def test_a_label_of_two_lines_is_framed_as_one():
    shown = Shown(torch.rand(3, 8, 8), True, "tiger\ncat")
    assert (
        framed({"without:\na photo": [shown]}).tobytes()
        == framed({"without: a photo": [replace(shown, label="tiger cat")]}).tobytes()
    )


def test_photos_are_read_as_they_are_seen(tmp_path):
    """A camera that was turned says so beside the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").shape == (3, 40, 20)


def test_an_image_is_right_where_every_guide_says_so():
    images = torch.rand(2, 3, 8, 8)
    assert Arm("a cat", [certain(0), certain(0)], None).look(images).tolist() == [True, True]
    assert Arm("a cat", [certain(0), certain(1)], None).look(images).tolist() == [False, False]


def test_a_batch_that_runs_out_of_memory_half_seen_is_not_counted_twice():
    arm, images = Arm("a cat", [certain(0)], certain(1)), torch.rand(4, 3, 8, 8)
    look = arm.by_judge.look

    def full(part):
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return look(part)

    arm.by_judge.look = full
    Batches(None).over(4, lambda chunk: arm.look(images[chunk]))
    assert (len(arm.by_guide[0].logits), len(arm.by_judge.logits), len(arm.shown)) == (4, 4, 4)


def test_the_plain_prompt_is_drawn_where_it_is_another_than_the_initializers():
    config = RunConfig(initializer_token="pet")
    assert arm_prompts(RunConfig(), "A photo of {token} {class}", "cat") == {
        "token": "A photo of newclas cat",
        "baseline": "A photo of a cat",
    }
    assert arm_prompts(config, "A photo of {token} {class}", "cat")["plain"] == "A photo of a cat"


def test_an_article_in_front_of_the_token_does_not_stand_twice_without_it():
    prompts = arm_prompts(RunConfig(), "A {token} {class} in a {token} house, banana {token}", "cat")
    assert prompts["token"] == "A newclas cat in a newclas house, banana newclas"
    assert prompts["baseline"] == "A cat in a house, banana a"


def test_an_evaluation_that_breaks_off_leaves_the_last_one(tmp_path, monkeypatch):
    token, folder = ClassToken(tiny_models(), "newclas", "a"), RunFolder(str(tmp_path), "c", "e")
    config = RunConfig(
        class_index=1,
        evaluate=True,
        num_inference_steps=2,
        test_size=2,
        eval_batch_size=1,
        classifier="g",
        judge="j",
    )
    evaluate(config, token, [certain(0)], certain(1), "cat", folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(list(folder.eval_images.glob("*.png"))) == 4

    def breaks_off(images):
        raise KeyboardInterrupt

    breaking = certain(0)
    breaking.classifier.look = breaks_off
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, token, [certain(0)], breaking, "cat", folder)
    assert {path: path.read_bytes() for path in before} == before
    evaluate(config, token, [certain(0)], certain(1), "cat", folder)
    assert not folder.unfinished_eval_images.exists()


def test_intervals_are_wilsons():
    """By the formula; 8 of 10 is the textbook's [0.490, 0.943]."""
    z = 1.959963984540054
    for right, number in ((0, 10), (8, 10), (94, 100), (100, 100)):
        p = right / number
        middle, half = (
            p + z * z / (2 * number),
            z * math.sqrt(p * (1 - p) / number + z * z / (4 * number * number)),
        )
        expected = [(middle + sign * half) / (1 + z * z / number) for sign in (-1, 1)]
        assert interval(right, number) == pytest.approx(expected, abs=1e-9)
    assert [round(end, 3) for end in interval(8, 10)] == [0.49, 0.943]


def test_p_values_are_mcnemars_exact_ones():
    """Counted out: all ways in which the pairs that differ could have fallen."""
    for only_with, only_without in ((5, 1), (3, 3), (0, 7), (0, 0), (9, 2)):
        number = only_with + only_without
        ways = [sum(way) for way in product((0, 1), repeat=number)]
        as_uneven = sum(abs(ones - number / 2) >= abs(only_with - number / 2) for ones in ways) / len(ways)
        assert mcnemar(only_with, only_without) == pytest.approx(as_uneven)


def test_pairs_are_compared_seed_by_seed():
    with_token, without = torch.tensor([1, 1, 1, 0, 1]).bool(), torch.tensor([0, 1, 0, 1, 0]).bool()
    assert paired(with_token, without) == {
        "difference": 0.4,
        "only_with": 3,
        "only_without": 1,
        "p_value": 0.625,
    }


def test_diversity_is_the_mean_distance_of_pairs():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert spread(features) == pytest.approx(2 / 3)  # two of the three pairs stand at a right angle
    assert spread(features[:1]) is None


def test_distances_are_nothing_for_the_same_images_and_grow_with_the_shift():
    features = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    same, near, far = (distances(features + shift, features) for shift in (0.0, 1.0, 2.0))
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)
    # Of clouds of one shape the Fréchet distance is the squared distance of their means: four coordinates.
    assert near["frechet_distance"] == pytest.approx(4, rel=1e-3)
    assert far["frechet_distance"] == pytest.approx(16, rel=1e-3)
    assert same["kernel_distance"] < near["kernel_distance"] < far["kernel_distance"]
    assert distances(features, features[:1]) == {"frechet_distance": None, "kernel_distance": None}
    assert distances(features + 1, features) == near  # its subsets are drawn the same every time


def test_likeness_to_a_text_is_that_of_the_clip_model_itself(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    CLIPModel(
        CLIPConfig(
            text_config=text | small,
            vision_config={"image_size": 16, "patch_size": 8} | small,
            projection_dim=8,
        )
    ).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), tokenizer).save_pretrained(
        tmp_path
    )
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    found = TextSimilarity(str(tmp_path), torch.device("cpu")).of(images, "a photo of a cat")
    model, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        told = model(
            **processor(
                text=["a photo of a cat"],
                images=[to_pil(i) for i in images],
                return_tensors="pt",
                padding=True,
            )
        )
    torch.testing.assert_close(found, (told.logits_per_text / model.logit_scale.exp())[0])
    with pytest.raises(UsageError, match="--clip_model: .* could not be loaded"):
        TextSimilarity(str(tmp_path / "nowhere"), torch.device("cpu"))
