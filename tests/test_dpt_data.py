"""COCO and RefCOCO in their own formats, and the mining of hard negatives.

    pytest tests/test_dpt_data.py

The folders are written here, small, in exactly the published formats.
"""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from discriminative.errors import UsageError, WorkError
from dpt.data.coco import COCO_SOURCE, EXPRESSIONS, REFCOCO_SOURCE, Coco, mine_coco, read_captions
from dpt.data.mine import Caption, Clip, Negatives, PipelineText, mine, read_negatives, write_negatives

# Image id -> width, height, colour, captions.
IMAGES = {
    9: (80, 40, "red", ["A red bus on a road.", "A bus in the street"]),
    25: (40, 60, "green", ["A green tree.", "a tree beside a house"]),
    30: (50, 50, "blue", ["A blue boat at sea.", "A BUS IN THE STREET."]),
    34: (64, 32, "yellow", ["A yellow kite.", "someone flies a kite"]),
}
# Data set -> split -> image, expression, box (x, y, width, height), span.
CORNER = [0, 0, 9, 9]
REFERRED = {
    "refcoco": {
        "train": [(9, "red bus left", [8, 4, 40, 20], [0, 7])],
        "val": [(34, "the kite", CORNER, [0, 8])],
    },
    "refcoco+": {
        "train": [(25, "tree", [0, 0, 20, 30], [0, 4])],
        "val": [(34, "kite", CORNER, [0, 4])],
    },
    "refcocog": {
        "train": [(30, "a boat", [0, 0, 50.6, 50], [2, 6]), (34, "a yellow kite", [1, 1, 5, 5], [0, 13])],
        "val": [(9, "a bus", [8, 4, 40, 20], [0, 5]), (34, "a kite", CORNER, [2, 6])],
    },
}


def words(texts):
    """Counts of four words: alike texts, alike vectors."""
    known = ("bus", "tree", "boat", "kite", "red", "green", "blue", "yellow", "a")
    return torch.tensor([[0.01 + text.lower().split().count(w) for w in known] for text in texts])


def caption_id(image, place):
    return image * 10 + place


@pytest.fixture
def folders(tmp_path):
    """A folder of COCO and one of MDETR's annotations, without negatives."""
    coco = tmp_path / "coco"
    (coco / "train2014").mkdir(parents=True)
    (coco / "annotations").mkdir()
    content = {"info": {}, "licenses": [], "images": [], "annotations": []}
    for image, (width, height, colour, captions) in IMAGES.items():
        name = f"COCO_train2014_{image:012}.jpg"
        Image.new("RGB", (width, height), colour).save(coco / "train2014" / name)
        content["images"].append(
            {"id": image, "file_name": name, "width": width, "height": height, "license": 1}
        )
        content["annotations"] += [
            {"id": caption_id(image, i), "image_id": image, "caption": text}
            for i, text in enumerate(captions)
        ]
    (coco / "annotations" / "captions_train2014.json").write_text(json.dumps(content))
    refcoco = tmp_path / "mdetr"
    refcoco.mkdir()
    for name, splits in REFERRED.items():
        for split, rows in splits.items():
            (refcoco / f"finetune_{name}_{split}.json").write_text(json.dumps(referred(name, rows)))
    return coco, refcoco


def referred(name, rows):
    content = {"info": {}, "licenses": [], "images": [], "annotations": [], "categories": []}
    for i, (image, text, box, span) in enumerate(rows):
        width, height, *_ = IMAGES[image]
        content["images"].append(
            {
                "id": i,
                "file_name": f"COCO_train2014_{image:012}.jpg",
                "original_id": image,
                "caption": text,
                "dataset_name": name,
                "width": width,
                "height": height,
            }
        )
        content["annotations"].append(
            {
                "id": i,
                "image_id": i,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "category_id": 1,
                "tokens_positive": [span],
            }
        )
    return content


@pytest.fixture
def mined(folders):
    coco, refcoco = folders
    write_negatives(coco / "dpt_negatives.json", mine_coco(coco, refcoco, words), "words")
    return folders


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# COCO and RefCOCO.


def test_captions_and_expressions_of_one_image_meet(mined):
    data = Coco(*mined, size=16)
    assert [(e.image, e.text) for e in data.expressions] == [(25, "tree"), (30, "a boat")]
    sample = data[0]
    assert sample.caption in IMAGES[25][3]
    assert sample.grounding.expression == "tree"
    assert sample.kind == "mined"
    assert sample.picture.key == "coco-25-16"


def test_boxes_are_shares_of_the_image_whatever_its_shape(mined):
    data = Coco(*mined, size=16, split="validation")
    [bus] = [i for i, expression in enumerate(data.expressions) if expression.image == 9]
    grounding = data[bus].grounding
    # x 8, y 4, 40x20 in an image of 80x40.
    torch.testing.assert_close(grounding.boxes, torch.tensor([[0.35, 0.35, 0.5, 0.5]]))
    assert grounding.spans == (((0, 5),),)


def test_a_box_less_than_a_pixel_outside_is_cut_to_its_image(mined):
    torch.testing.assert_close(Coco(*mined, size=16)[1].grounding.boxes, torch.tensor([[0.5, 0.5, 1.0, 1.0]]))


def test_images_are_squeezed_to_the_models_square_without_a_crop(folders):
    coco, refcoco = folders
    # The left half black, the right half white: so it stays.
    picture = Image.new("RGB", (40, 60), "white")
    picture.paste("black", (0, 0, 20, 60))
    picture.save(coco / "train2014" / "COCO_train2014_000000000025.jpg", quality=95)
    write_negatives(coco / "dpt_negatives.json", mine_coco(coco, refcoco, words), "words")
    image = Coco(coco, refcoco, size=16)[0].picture.image
    assert image.shape == (3, 16, 16)
    assert 0 <= image.min() <= image.max() <= 1
    assert image[:, :, :7].max() < 0.1
    assert image[:, :, 9:].min() > 0.9


def test_training_leaves_out_what_a_validation_file_shows(mined):
    train = Coco(*mined, size=16)
    validation = Coco(*mined, size=16, split="validation")
    # Image 9 is validated by RefCOCOg, image 34 by all three.
    assert {e.image for e in train.expressions} == {25, 30}
    assert {e.image for e in validation.expressions} == {9, 34}
    assert train.left_out == 2
    for negatives in train.negatives.values():
        assert not set(negatives.pictures) & {9, 34}
        assert not {train.coco.captions[text].image for text in negatives.texts} & {9, 34}


def test_negatives_are_of_other_images_and_say_something_else(mined):
    data = Coco(*mined, size=8, split="validation")
    for epoch in range(5):
        data.epoch = epoch  # set_epoch leaves validation as it is
        for index in range(len(data)):
            sample = data[index]
            own = [text.lower().rstrip(".") for text in IMAGES[data.expressions[index].image][3]]
            assert sample.hard_picture.key != sample.picture.key != sample.random_picture.key
            assert sample.hard_caption.lower().rstrip(".") not in own
            assert sample.random_caption.lower().rstrip(".") not in own


def test_an_index_gives_the_same_sample_until_the_epoch_changes(mined):
    def choices(data):
        drawn = [data[i % len(data)] for i in range(len(data))]
        return [(s.caption, s.hard_caption, s.random_caption, s.hard_picture.key) for s in drawn]

    data = Coco(*mined, size=8)
    first = choices(data)
    assert first == choices(data) == choices(Coco(*mined, size=8))
    seen = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        seen.add(tuple(choices(data)))
    assert len(seen) > 1
    validation = Coco(*mined, size=8, split="validation")
    fixed = choices(validation)
    validation.set_epoch(3)
    assert choices(validation) == fixed


def test_samples_of_coco_have_the_models_size(mined):
    data = Coco(*mined, size=8)
    samples = [data[0], data[1]]
    assert {s.picture.image.shape for s in samples} == {s.random_picture.image.shape for s in samples}
    assert samples[0].picture.image.shape == (3, 8, 8)
    assert [s.picture.key for s in samples] == ["coco-25-8", "coco-30-8"]
    assert [s.grounding.boxes.shape for s in samples] == [(1, 4), (1, 4)]


def test_an_expression_may_have_several_boxes(mined):
    coco, refcoco = mined

    def more(content):
        content["annotations"].append({**content["annotations"][0], "id": 7, "bbox": [20, 30, 20, 30]})

    changed(refcoco / "finetune_refcoco+_train.json", more)
    grounding = Coco(coco, refcoco, size=8)[0].grounding
    torch.testing.assert_close(
        grounding.boxes, torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    )
    assert grounding.spans == (((0, 4),), ((0, 4),))


# What can be wrong with the files, in one line.


def assert_one_line(raised, *parts):
    text = str(raised.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_a_missing_file_is_named_with_its_source(mined):
    coco, refcoco = mined
    for path, flag, source in (
        (refcoco / "finetune_refcocog_val.json", "--refcoco_root", REFCOCO_SOURCE),
        (coco / "annotations" / "captions_train2014.json", "--coco_root", COCO_SOURCE),
    ):
        kept = path.read_text()
        path.unlink()
        with pytest.raises(UsageError) as raised:
            Coco(coco, refcoco, size=8)
        assert_one_line(raised, f"{flag}: {path} is missing", source)
        path.write_text(kept)
    (coco / "train2014" / "COCO_train2014_000000000025.jpg").unlink()
    with pytest.raises(WorkError) as raised:
        Coco(coco, refcoco, size=8)[0]
    assert_one_line(raised, "COCO_train2014_000000000025.jpg", COCO_SOURCE)
    (coco / "train2014").rename(coco / "elsewhere")
    with pytest.raises(UsageError) as raised:
        Coco(coco, refcoco, size=8)
    assert_one_line(raised, "--coco_root", "train2014", COCO_SOURCE)


def test_without_negatives_the_command_that_mines_them_is_told(folders):
    coco, refcoco = folders
    with pytest.raises(UsageError) as raised:
        Coco(coco, refcoco, size=8)
    assert_one_line(raised, "--negatives", "dpt_negatives.json is missing", "python -m dpt mine")
    write_negatives(coco / "dpt_negatives.json", {}, "words")
    with pytest.raises(UsageError) as raised:
        Coco(coco, refcoco, size=8)
    assert_one_line(raised, "--negatives", "holds none", "python -m dpt mine")
    write_negatives(coco / "dpt_negatives.json", {90: Negatives((250,), (25,))}, "words")
    with pytest.raises(UsageError) as raised:
        Coco(coco, refcoco, size=8)
    assert_one_line(raised, "none for any image of the train expressions", "python -m dpt mine")
    write_negatives(coco / "dpt_negatives.json", {250: Negatives((4321,), (9,))}, "words")
    with pytest.raises(UsageError) as raised:
        Coco(coco, refcoco, size=8)
    assert_one_line(raised, "names the caption 4321", "python -m dpt mine")
    (coco / "dpt_negatives.json").write_text("[]")
    with pytest.raises(UsageError) as raised:
        Coco(coco, refcoco, size=8)
    assert_one_line(raised, "holds no mined negatives", "python -m dpt mine")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["annotations"][0].update(bbox=[30, 0, 20, 10]), "the box [30, 0, 20, 10]"),
        (lambda c: c["annotations"][0].update(bbox=[-3, 0, 20, 10]), "in an image of 40x60 pixels"),
        (lambda c: c["annotations"][0].update(bbox=[3, 0, 0, 10]), "the box [3, 0, 0, 10]"),
        (lambda c: c["annotations"][0].update(tokens_positive=[[0, 5]]), "the span [0, 5] in a text of 4"),
        (lambda c: c["annotations"][0].update(tokens_positive=[]), "has no span"),
        (lambda c: c["annotations"][0].update(image_id=77), "annotation 0 of"),
        (lambda c: c["images"][0].update(original_id=77), "has the image 77, which COCO's captions lack"),
        (lambda c: c["annotations"].clear(), "has no box"),
        (lambda c: (c["annotations"].clear(), c["images"].clear()), "holds no expressions"),
        (lambda c: c["images"][0].pop("caption"), "is malformed (there is no 'caption')"),
        (lambda c: c.pop("images"), "is no annotation file of COCO's format"),
    ],
)
def test_a_wrong_annotation_is_told_in_one_line(mined, change, told):
    coco, refcoco = mined
    path = refcoco / "finetune_refcoco+_train.json"
    changed(path, change)
    with pytest.raises(UsageError) as raised:
        Coco(coco, refcoco, size=8)
    assert_one_line(raised, "--refcoco_root: ", str(path), told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["annotations"].clear(), "holds no captions"),
        (lambda c: c["annotations"][0].update(image_id=5), "caption 90"),
        (lambda c: c["images"][0].pop("width"), "is malformed (there is no 'width')"),
    ],
)
def test_a_wrong_caption_file_is_told_in_one_line(folders, change, told):
    coco, _ = folders
    changed(coco / "annotations" / "captions_train2014.json", change)
    with pytest.raises(UsageError) as raised:
        read_captions(coco)
    assert_one_line(raised, "--coco_root: ", told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"size": 0}, "--size: 0 was given; allowed is 1 or more"),
        ({"size": 8, "split": "test"}, "--split: 'test' was given; allowed for coco is train, validation"),
        ({"size": 8, "names": ("flickr",)}, "--expressions: flickr was given"),
        ({"size": 8, "seed": -2}, "--seed: -2 was given"),
    ],
)
def test_a_wrong_argument_is_told_before_any_file_is_read(tmp_path, arguments, told):
    with pytest.raises(UsageError) as raised:
        Coco(tmp_path, tmp_path, **arguments)
    assert_one_line(raised, told)


# Mining.


def captions():
    return [
        Caption(caption_id(image, i), image, text)
        for image, (*_, texts) in IMAGES.items()
        for i, text in enumerate(texts)
    ]


def test_hard_captions_are_the_nearest_of_other_images():
    found = mine(captions(), None, words, texts=2, pictures=1)
    assert found.keys() == {caption.id for caption in captions()}
    for caption in captions():
        hard = [other for other in captions() if other.id in found[caption.id].texts]
        assert len(hard) == 2
        assert all(other.image != caption.image for other in hard)


def test_near_duplicates_are_no_negatives_whichever_caption_shares_them():
    found = mine(captions(), None, words)
    # "A BUS IN THE STREET." of image 30 is a caption of image 9, and the other way round.
    assert caption_id(30, 1) not in found[caption_id(9, 0)].texts
    assert caption_id(30, 1) not in found[caption_id(9, 1)].texts
    assert caption_id(9, 1) not in found[caption_id(30, 0)].texts
    assert caption_id(9, 0) in found[caption_id(30, 0)].texts


def test_without_pictures_the_hard_images_are_those_of_the_hard_captions():
    of_caption = {caption.id: caption.image for caption in captions()}
    for negatives in mine(captions(), None, words, pictures=2).values():
        in_order = list(dict.fromkeys(of_caption[text] for text in negatives.texts))
        assert list(negatives.pictures) == in_order[:2]


def test_with_pictures_the_hard_images_are_the_nearest(folders):
    coco, _ = folders
    paths = {image: read_captions(coco).images[image].path for image in IMAGES}

    def colours(pictures):
        names = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue", (255, 255, 0): "yellow"}
        near = [
            min(names, key=lambda c: sum(abs(a - b) for a, b in zip(c, p.getpixel((4, 4)), strict=True)))
            for p in pictures
        ]
        return words([names[colour] for colour in near])

    asked = [Caption(1, 9, "a blue bus"), Caption(2, 25, "x"), Caption(3, 30, "y"), Caption(4, 34, "z")]
    found = mine(asked, paths, words, colours, pictures=2)
    assert found[1].pictures[0] == 30
    assert len(found[1].pictures) == 2
    assert 9 not in found[1].pictures
    # An image that shares a caption is true of it.
    shared = [*asked, Caption(5, 30, "A blue bus!")]
    assert 30 not in mine(shared, paths, words, colours, pictures=4)[1].pictures


def test_chunks_and_batches_change_nothing(monkeypatch):
    whole = mine(captions(), None, words, texts=3)
    monkeypatch.setattr("dpt.data.mine.CHUNK", 3)
    monkeypatch.setattr("dpt.data.mine.BATCH", 2)
    assert mine(captions(), None, words, texts=3) == whole


def test_what_was_mined_survives_its_file(tmp_path):
    found = mine(captions(), None, words)
    write_negatives(tmp_path / "negatives.json", found, "words")
    assert read_negatives(tmp_path / "negatives.json") == found
    assert json.loads((tmp_path / "negatives.json").read_text())["embedding"] == "words"
    assert [path.name for path in tmp_path.iterdir()] == ["negatives.json"]


def test_mining_needs_two_images_and_a_number():
    with pytest.raises(UsageError, match="needed are two images"):
        mine([Caption(1, 9, "a"), Caption(2, 9, "b")], None, words)
    with pytest.raises(UsageError, match="--texts: 0 was given"):
        mine(captions(), None, words, texts=0)


def test_only_images_with_an_expression_are_mined(folders):
    coco, refcoco = folders
    found = mine_coco(coco, refcoco, words, names=("refcoco",))
    assert {number // 10 for number in found} == {9, 34}
    everything = mine_coco(coco, refcoco, words, names=EXPRESSIONS)
    assert Counter(number // 10 for number in everything) == dict.fromkeys(IMAGES, 2)


def test_the_pipelines_own_text_encoder_embeds():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from discriminative.hub import MINIATURE

    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "model" / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    embed = PipelineText(tokenizer, CLIPTextModel(config).eval())
    both = embed(["a red car", "two frogs"])
    assert both.shape == (2, 16)
    torch.testing.assert_close(both[1:], embed(["two frogs"]))
    assert len(mine(captions(), None, embed, texts=2)) == len(captions())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP model with the miniature's tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    from discriminative.hub import MINIATURE

    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "model" / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    vision = {**small, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_a_clip_model_embeds_texts_and_pictures_in_one_space(clip_folder, folders):
    coco, refcoco = folders
    clip = Clip(str(clip_folder), torch.device("cpu"))
    assert clip.text(["a red car", "a frog"]).shape == (2, 8)
    assert clip.image([Image.new("RGB", (40, 30), "red")]).shape == (1, 8)
    found = mine_coco(coco, refcoco, clip.text, clip.image, pictures=2)
    assert all(len(negatives.pictures) == 2 for negatives in found.values() if negatives.texts)


def test_a_clip_model_that_cannot_be_loaded_is_told_in_one_line(tmp_path, clip_folder):
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    # Pickled weights are not read.
    (tmp_path / "pytorch_model.bin").write_bytes(b"no")
    with pytest.raises(UsageError) as raised:
        Clip(str(tmp_path), torch.device("cpu"))
    assert_one_line(raised, f"--clip_model: '{tmp_path}' could not be loaded")
