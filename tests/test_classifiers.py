"""Loading classifiers: the right weights, all of them, or an error that says which are not."""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import tiny_classifier
from safetensors.torch import load_file, save_file
from tiny_folders import LABELS, edit_json, save_hf_convnext, save_hf_vit, save_timm, save_vit_mae

from classifiers import CLASSIFIERS, find, load_classifier, parse_source, read_labels
from discriminative.errors import UsageError, WorkError

CPU = torch.device("cpu")


def load(name: str):
    return load_classifier(name, CPU, torch.float32)


def test_an_unknown_classifier_is_refused_with_the_known_ones():
    with pytest.raises(UsageError) as error:
        parse_source("judge", "resnet")
    assert all(name in str(error.value) for name in CLASSIFIERS)


def test_every_default_judge_is_of_another_family():
    families = {"inet": "vit", "inat": "vit", "miniature": "resnet"}
    for name, family in families.items():
        judge = parse_source("judge", CLASSIFIERS[name].judge)
        architecture = (
            json.loads((Path(judge.place) / "config.json").read_text())["architecture"]
            if name == "miniature"
            else judge.place
        )
        assert family not in architecture


def test_the_papers_guide_resizes_to_256_and_the_default_judge_keeps_timms_recipe():
    """Built without weights: what matters here is the recipe."""
    from discriminative.guides.preprocess import timm_recipe

    data = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(CLASSIFIERS["inet"].place).to_dict()
    )
    recipe = timm_recipe(data, CLASSIFIERS["inet"].crop_pct)
    assert (recipe.resize, recipe.crop, recipe.mean) == ((256, 256), (224, 224), (0.5,) * 3)


@pytest.mark.parametrize("save", [save_timm, save_hf_vit, save_hf_convnext])
def test_logits_are_those_of_the_library(save, tmp_path):
    """The same model loaded the library's own way, on images that need no resizing."""
    name = save(tmp_path)
    classifier = load(name)
    assert classifier.labels == LABELS
    size = 160 if save is save_timm else 32
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels = classifier.recipe(images)
    if save is save_timm:
        theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(pixels)
    else:
        from transformers import AutoModelForImageClassification

        theirs = AutoModelForImageClassification.from_pretrained(tmp_path)(pixels).logits
    torch.testing.assert_close(classifier.logits(images), theirs)


@pytest.mark.parametrize("route", ["file", "registry"])
def test_a_vit_whose_original_weights_are_of_another_format_is_loaded(route, tmp_path, monkeypatch):
    """timm knows the augreg ViTs, the paper's guide among them, as JAX files, and would read a safetensors
    file as one."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert timm.get_pretrained_cfg(name).custom_load
    torch.manual_seed(0)
    model = timm.create_model(name.split(".")[0]).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("discriminative.guides.loaders.fetch", lambda *args: tmp_path / "model.safetensors")
    classifier = load(
        f"timm:{name}" if route == "registry" else f"timm:{name}@{tmp_path / 'model.safetensors'}"
    )
    images = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(classifier.logits(images), model(classifier.recipe(images)))


def test_a_model_whose_missing_weights_timm_would_make_up_is_refused(tmp_path):
    name = save_timm(tmp_path, LABELS, "dla46_c")
    with pytest.raises(UsageError, match="fills in missing weights of 'dla46_c' at random"):
        load(name)


def test_a_checkpoint_file_of_1000_classes_has_imagenets_labels(tmp_path):
    assert load(save_timm(tmp_path, None)).labels == read_labels("inet")


@pytest.mark.parametrize("names", ["old", "new"])
def test_vit_mae_pools_patch_tokens_before_the_norm(names, tmp_path):
    from transformers import AutoModelForImageClassification

    folder = tmp_path / "weights"
    classifier = load(save_vit_mae(folder, names))
    save_hf_vit(tmp_path / "plain")  # the same random weights, with transformers' own pooling
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels, last = classifier.recipe(images), []
    handle = plain.vit.layernorm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    theirs = plain(pixels).logits
    handle.remove()
    expected = plain.classifier(plain.vit.layernorm(last[0][:, 1:].mean(1)))  # without the class token
    torch.testing.assert_close(classifier.logits(images), expected)
    assert not torch.allclose(expected, theirs, atol=1e-3)


def test_the_gradient_reaches_the_image_through_a_vit_mae(tmp_path):
    images = torch.rand(1, 3, 48, 40).requires_grad_()
    load(save_vit_mae(tmp_path, "old")).logits(images).sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "save",
    [save_timm, save_hf_vit, lambda folder: save_vit_mae(folder, "old")],
    ids=["timm", "hf", "vit-mae"],
)
@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_a_missing_or_unexpected_weight_is_an_error_that_names_it(save, fault, tmp_path):
    """Upstream libraries fill in what is missing at random and say so in a warning at most."""
    name, file = save(tmp_path), tmp_path / "model.safetensors"
    weights = load_file(file)
    key = sorted(weights)[0]
    if fault == "missing":
        del weights[key]
    else:
        key, weights["extra.weight"] = "extra.weight", torch.zeros(2)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UsageError) as error:
        load(name)
    assert key.split(".")[-1] in str(error.value)
    assert fault in str(error.value).lower()
    assert "\n" not in str(error.value)


def test_a_head_that_does_not_match_its_labels_is_refused(tmp_path):
    edited = {"timm": save_timm(tmp_path / "timm"), "hf": save_hf_vit(tmp_path / "hf")}
    edit_json(tmp_path / "timm" / "config.json", label_names=LABELS[:3])
    edit_json(tmp_path / "hf" / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(UsageError, match="head has 4 classes, but its config.json names 3 labels"):
        read_labels(edited["timm"])
    with pytest.raises(UsageError, match="classifier"):
        load(edited["hf"])
    edit_json(tmp_path / "timm" / "config.json", label_names=LABELS[:3], num_classes=3)
    find.cache_clear()
    with pytest.raises(UsageError, match="size mismatch for fc.weight"):
        load(edited["timm"])


def test_a_head_without_names_is_refused(tmp_path):
    save_timm(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="4 classes without names; put a config.json with label_names"):
        read_labels(f"timm:test_resnet@{tmp_path / 'model.safetensors'}")


def test_pickled_weights_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="model.pth is no safetensors file; nothing else is read"):
        read_labels(f"timm:test_resnet@{tmp_path / 'model.pth'}")
    save_hf_vit(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    torch.save(weights, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="safetensors"):
        load(f"hf:{tmp_path / 'hf'}")


def test_a_classifier_whose_logits_do_not_fit_its_labels_is_told():
    classifier = tiny_classifier()
    classifier.labels = ["a", "b"]
    with pytest.raises(WorkError, match=r"logits of shape \(1, 3\) for 1 images and 2 labels"):
        classifier.logits(torch.rand(1, 3, 8, 8))
