"""The Python API: a session learns, evaluates, draws, saves and loads, and leaves what it was given alone."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_classifier, tiny_models
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_folders import LABELS, save_hf_vit, save_sd1, save_timm, save_tiny_vae

from apps import session as sessions
from apps.session import LearnedToken, Session
from classifiers import load_classifier
from discriminative.errors import UsageError
from discriminative.records.layout import RunFolder
from discriminative.records.summary import read as read_summary
from discriminative.tokens.curriculum import Score
from discriminative.tokens.files import read_origin, read_token
from discriminative.tokens.objective import Objective

SHORT = {
    "device": "cpu",
    "mixed_precision": "no",  # the same on every processor
    "num_inference_steps": 3,
    "training_sampler": "dpmsolver++@3",
    "jump_at": "0.5",
    "start": "class",
    "max_epochs": 2,
    "images_per_update": 2,
    "validate_every": 1,
    "stop_validation_accuracy": 0.0,  # both updates
    "test_size": 2,
    "eval_batch_size": 1,  # an image is the same, however many are asked for
}
SMALL_VALIDATION = {"validation_size": 2, "confirm_size": 2}
PROMPT = "A photo of {token} {class}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model's folder, and two classifiers' names."""
    root = tmp_path_factory.mktemp("saved")
    return {
        "model": save_sd1(root / "sd1"),
        "classifier": save_timm(root / "timm"),
        "other": save_hf_vit(root / "vit"),
    }


@pytest.fixture
def start(saved, tmp_path):
    """Makes a session; of the model's folder and the guide by name, where nothing else is given."""

    def make(model=None, classifier=None, **options) -> Session:
        options = SHORT | {"output_path": str(tmp_path / "results")} | options
        return Session(model or saved["model"], classifier or saved["classifier"], **options)

    return make


@pytest.fixture
def session(start):
    return start()


@pytest.fixture
def pipeline():
    return pipeline_of()


def pipeline_of(**changes) -> StableDiffusionPipeline:
    """A pipeline of the parts that are in the folder, too."""
    models = tiny_models(**changes)
    names = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
    parts = {name: getattr(models, name) for name in names}
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def learn(session: Session, class_index: int | str = 1, **options) -> LearnedToken:
    return session.learn(class_index, constants=SMALL_VALIDATION, **options)


def pixels(images: list[Image.Image]) -> list[bytes]:
    """The images, to compare them bit for bit."""
    return [np.asarray(image).tobytes() for image in images]


def file_of_a_token(path, word: str = "newclas", **said: str):
    """A token's file from elsewhere, whose vector is no word's."""
    vector = torch.linspace(-1, 1, 16)[None]
    save_file({word: vector}, path, said)
    return path


def load_count(monkeypatch) -> dict[str, list]:
    """What is loaded from now on, by kind."""
    loaded = {"load_models": [], "load_classifier": []}
    for name, names in loaded.items():
        load = getattr(sessions, name)

        def noted(source, *args, load=load, names=names, **settings):
            names.append(source)
            return load(source, *args, **settings)

        monkeypatch.setattr(sessions, name, noted)
    return loaded


# --- where the models come from


def test_a_pipeline_draws_what_its_folder_draws(start, pipeline, tmp_path):
    path = file_of_a_token(tmp_path / "token.safetensors")
    drawn = []
    for session in (start(), start(pipeline)):
        token = session.load(path, class_index=1)
        drawn.append(pixels(session.draw(token, PROMPT, seeds=[3, 4])))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_a_pipeline_learns_what_its_folder_learns(start, pipeline):
    of_folder = learn(start())
    of_pipeline = learn(start(pipeline), exp_id="of_pipeline")
    assert torch.equal(of_folder.token.vector, of_pipeline.token.vector)
    assert torch.equal(of_folder.training.last_vector, of_pipeline.training.last_vector)
    assert len(of_folder.training.rows) == 2


def test_a_pipeline_of_a_folder_gives_its_name_to_the_records(start, saved):
    pipeline = StableDiffusionPipeline.from_pretrained(saved["model"], safety_checker=None)
    assert start(pipeline).config.model == saved["model"]


@pytest.mark.parametrize("model", [object(), 7, torch.nn.Identity()])
def test_what_is_no_pipeline_is_refused_by_its_kind(start, model):
    with pytest.raises(UsageError, match=f"a {type(model).__name__} was given"):
        start(model)


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor of any precision, bit for bit."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state_of(pipeline: StableDiffusionPipeline) -> dict:
    """All of a pipeline that a session might change."""
    encoder = pipeline.text_encoder
    modules = (encoder, pipeline.unet, pipeline.vae)
    return {
        "weights": [bits(t) for m in modules for t in m.state_dict().values()],
        "strides": [p.stride() for m in modules for p in m.parameters()],
        "precision": [p.dtype for m in modules for p in m.parameters()],
        "gradients": [p.grad for m in modules for p in m.parameters()],
        "hooks": [len(m._forward_pre_hooks) for module in modules for m in module.modules()],
        "table": id(encoder.get_input_embeddings()),
        "parts": [id(part) for part in pipeline.components.values()],
        "words": len(pipeline.tokenizer),
        "scheduler": dict(pipeline.scheduler.config),
        "steps": pipeline.scheduler.num_inference_steps,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pipelines_weights_are_bit_for_bit_the_same_afterwards(start, saved, dtype):
    pipeline = pipeline_of(dtype=dtype)
    before = state_of(pipeline)
    precision = {torch.float32: "no", torch.bfloat16: "bf16"}[dtype]
    session = start(pipeline, judge=saved["other"], mixed_precision=precision)
    token = learn(session)
    session.evaluate(token)
    session.draw(token, PROMPT, seeds=[0])
    session.generate(session.plan(1, token.plan.vectors, prompt=PROMPT, num_images=1), token.token)
    assert state_of(pipeline) == before


def test_a_pipeline_draws_its_own_images_as_before(start, pipeline):
    def own() -> bytes:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        image = pipeline("a photo of newclas", num_inference_steps=3, latents=noise, output_type="np")
        return image.images.tobytes()

    pipeline.set_progress_bar_config(disable=True)
    before = own()
    learn(start(pipeline))
    assert own() == before


# --- guides


def test_a_guide_is_the_same_by_name_as_an_object_and_as_a_module(start, saved):
    made = load_classifier(saved["classifier"], torch.device("cpu"), torch.float32)
    by_name = learn(start(), exp_id="name")
    as_object = learn(start(classifier=made), exp_id="object")
    module = start(classifier=made.model, labels=LABELS, recipe=made.recipe)
    as_module = learn(module, exp_id="module")
    for learned in (as_object, as_module):
        assert torch.equal(learned.token.vector, by_name.token.vector)
        assert learned.plan.label == "tiger cat"
        assert [row["loss"] for row in learned.training.rows] == [
            row["loss"] for row in by_name.training.rows
        ]


def test_another_guide_learns_another_token(start, saved):
    first = learn(start(), exp_id="first")
    other = learn(start(classifier=saved["other"]), exp_id="other")
    both = learn(start(classifier=f"{saved['classifier']},{saved['other']}"), exp_id="both")
    vectors = [tuple(found.training.last_vector.flatten().tolist()) for found in (first, other, both)]
    assert len(set(vectors)) == 3
    assert list(both.plan.guides) == [saved["classifier"], saved["other"]]


def test_a_module_is_frozen_and_asked_in_evaluation_mode(start):
    seen = []

    class Noted(torch.nn.Sequential):
        def forward(self, images):
            seen.append((self.training, images.shape[1:], images.min().item(), images.max().item()))
            return super().forward(images)

    module = Noted(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * 16 * 16, 2))
    learned = learn(start(classifier=module, labels=["cat", "bat"]), "bat")
    assert learned.plan.config.class_index == 2
    assert learned.plan.config.classifier == "Noted"
    assert {training for training, *_ in seen} == {False}
    assert {shape for _, shape, *_ in seen} == {(3, 16, 16)}  # images come as they are without a recipe
    assert min(low for *_, low, _ in seen) >= 0
    assert max(high for *_, high in seen) <= 1
    assert not any(p.requires_grad for p in module.parameters())


def test_a_module_without_labels_is_one_usage_error(start):
    with pytest.raises(UsageError, match=r"give labels=\[...\]"):
        start(classifier=torch.nn.Linear(1, 1))


def test_a_module_with_labels_of_another_number_is_told_before_the_training(start):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2))
    with pytest.raises(UsageError, match=r"\(2, 2\) for 2 images and 3 labels"):
        learn(start(classifier=module, labels=["a", "cat", "bat"]))


def test_a_judge_may_be_an_object(start):
    judge = tiny_classifier()
    session = start(judge=judge)
    result = session.evaluate(learn(session))
    assert result["judge"] == "tiny"
    assert result["prompts"][0]["arms"]["token"]["judge"]["accuracy"] in (0, 0.5, 1)


# --- learn


def test_on_update_is_called_once_an_update_with_its_row_and_images(session):
    calls = []
    learned = learn(session, on_update=lambda row, images: calls.append((row, images)))
    assert [row["epoch"] for row, _ in calls] == [1, 2]
    assert [row for row, _ in calls] == learned.training.rows
    for number, (_, images) in enumerate(calls, start=1):
        assert images.shape == (2, 3, 16, 16)
        strip = learned.plan.folder.train_images / f"epoch_{number:03d}.png"
        with Image.open(strip) as picture:
            first = np.asarray(picture)[:, :16]
        assert np.array_equal(first, (images[0].permute(1, 2, 0) * 255).round().byte().numpy())


def test_learning_writes_the_token_and_its_record(session, tmp_path):
    learned = learn(session, seed=3)
    folder = RunFolder(str(tmp_path / "results"), "0001_tiger_cat", "default")
    assert learned.path == folder.token
    assert torch.equal(read_token(folder.token)[1], learned.token.vector)
    record = json.loads(folder.config.read_text())
    assert (record["config"]["seed"], record["training"]["updates"]) == (3, 2)
    assert record["constants"]["validation_size"] == 2
    assert record["training"]["sureness"] == learned.training.sureness > 0
    assert torch.equal(learned.plan.vectors, learned.token.vector)


@pytest.mark.parametrize(
    ("gains", "is_there"), [((1.0, 1.1, 1.2, 1.3), True), ((1.0, -1.1, 1.2, -1.0), False)]
)
def test_the_record_says_what_was_gained_over_the_word_in_the_tokens_place(
    session, tmp_path, monkeypatch, gains, is_there
):
    """And where that is nothing for sure, the token's file holds that word."""
    monkeypatch.setattr(Objective, "compare", lambda self, vector, other: list(gains))
    scores = map(Score, (0.1, 0.5, 0.4), ((-3.0,) * 2, (-1.0,) * 2, (-2.0,) * 2))
    monkeypatch.setattr(Objective, "validate", lambda self, beats: next(scores))
    learned = learn(session)
    folder = RunFolder(str(tmp_path / "results"), "0001_tiger_cat", "default")
    training = json.loads(folder.config.read_text())["training"]
    assert training["gain"] == {
        "log_probability": pytest.approx(sum(gains) / 4),
        "p_value": learned.training.gain.p_value,
        "noises": 4,
    }
    assert (training["gain"]["p_value"] < 0.1) is is_there
    assert training["kept_after_updates"] == (1 if is_there else 0)
    word = learned.token.start_vector("initializer", "tiger cat")
    assert torch.equal(read_token(folder.token)[1], word) is not is_there
    assert torch.equal(learned.token.vector, word) is not is_there


def test_the_record_of_a_token_of_the_lowest_loss_has_no_gain(session, tmp_path):
    learn(session, choose_by="loss")
    folder = RunFolder(str(tmp_path / "results"), "0001_tiger_cat", "default")
    assert json.loads(folder.config.read_text())["training"]["gain"] is None


def test_constants_and_options_reach_the_training_of_one_class_alone(session):
    steps = []
    step = torch.optim.AdamW.step

    def noted(self, *args):
        steps.append(self.param_groups[0]["lr"])
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noted)
        session.learn(1, constants=SMALL_VALIDATION | {"relative_rate": 0.5})
        session.learn(1, constants=SMALL_VALIDATION | {"relative_rate": 0.1}, max_epochs=1)
        session.learn(1, constants=SMALL_VALIDATION)
    assert len(steps) == 2 + 1 + 2
    assert steps[0] == pytest.approx(5 * steps[2])
    assert steps[2] == pytest.approx(2 * steps[3])
    assert session.config.max_epochs == 2


def test_a_preset_gives_its_values_and_options_go_before_them(start):
    session = start(preset="paper", max_epochs=1)
    assert (session.config.gradient_mode, session.config.choose_by) == ("last:2", "loss")
    assert (session.config.exp_id, session.config.max_epochs) == ("paper", 1)
    assert learn(session).training.stopped_by == "max_epochs"


def test_models_and_classifiers_are_loaded_once_for_two_classes(start, saved, monkeypatch):
    loaded = load_count(monkeypatch)
    session = start(judge=saved["other"])
    assert loaded == {"load_models": [], "load_classifier": []}
    first = learn(session, 1)
    second = learn(session, "bat")
    for learned in (first, second):
        session.evaluate(learned)
        session.draw(learned, PROMPT, seeds=[0])
    assert loaded["load_models"] == [saved["model"]]
    assert sorted(loaded["load_classifier"]) == sorted([saved["classifier"], saved["other"]])


def test_one_classs_token_knows_nothing_of_the_next_ones(session):
    first = learn(session, 1)
    vector = first.token.vector.detach().clone()
    drawn = pixels(session.draw(first, PROMPT, seeds=[0]))
    words = len(session.models.tokenizer)
    second = learn(session, 2)
    assert second.plan.class_name == "bat"
    assert torch.equal(first.token.vector, vector)
    assert pixels(session.draw(first, PROMPT, seeds=[0])) == drawn
    assert pixels(session.draw(second, PROMPT, seeds=[0])) != drawn
    assert len(session.models.tokenizer) == words


# --- evaluate


def test_an_evaluation_gives_its_verdict_and_what_its_file_holds(session, tmp_path):
    learned = learn(session)
    result = session.evaluate(learned, test_size=3)
    assert result["verdict"].startswith("tiger cat: guide ")
    assert result["test_size"] == 3
    folder = learned.plan.folder
    assert json.loads(folder.result.read_text()) == json.loads(json.dumps(result))
    assert len(list(folder.eval_images.glob("token_*.png"))) == 3
    (row,) = read_summary(str(tmp_path / "results"))
    assert (row["class_name"], row["test_size"], row["updates"]) == ("tiger cat", "3", "2")
    assert row["guide_with"] == str(result["prompts"][0]["arms"]["token"]["guide"]["accuracy"])


def test_an_evaluations_images_are_those_that_are_drawn_from_its_seeds(session):
    learned = learn(session)
    session.evaluate(learned)
    files = sorted(learned.plan.folder.eval_images.glob("token_*.png"))
    images = []
    for path in files:
        with Image.open(path) as picture:
            images.append(picture.copy())
    assert pixels(images) == pixels(session.draw(learned, PROMPT, seeds=[0, 1]))


def test_a_token_is_evaluated_under_the_word_that_it_was_learned_with(session):
    learned = learn(session, placeholder_token="otherword")
    result = session.evaluate(learned)
    assert result["prompts"][0]["arms"]["token"]["prompt"] == "A photo of otherword tiger cat"


# --- draw


def files_of(session: Session, plan) -> dict[int, bytes]:
    """What ``Session.generate`` writes of a plan: seed -> pixels."""
    (folder,) = session.generate(plan, session.token(plan))
    found = {}
    for path in folder.glob("[0-9]*.png"):
        with Image.open(path) as picture:
            found[int(path.stem)] = np.asarray(picture).tobytes()
    return found


def test_drawn_images_are_those_that_generate_writes_of_the_same_seeds(session):
    learned = learn(session)
    plan = session.plan(1, learned.plan.vectors, prompt=PROMPT, seed=5, num_images=3)
    written = files_of(session, plan)
    assert sorted(written) == [5, 6, 7]
    drawn = session.draw(learned, PROMPT, seeds=[7, 5])
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in drawn)
    assert pixels(drawn) == [written[7], written[5]]
    assert len(set(written.values())) == 3


def test_four_images_are_drawn_where_no_seeds_are_given(session, tmp_path):
    token = session.load(file_of_a_token(tmp_path / "token.safetensors"), 1)
    drawn = pixels(session.draw(token, PROMPT))
    assert drawn == pixels(session.draw(token, PROMPT, seeds=[0, 1, 2, 3]))


def test_a_drawn_image_follows_the_prompt_and_the_token(session, tmp_path):
    token = session.load(file_of_a_token(tmp_path / "token.safetensors"), 1)
    prompts = ("a photo of {token}", "a photo of a", "a photo of {class}", "a photo of tiger cat")
    with_token, without, of_class, spelled = (pixels(session.draw(token, p, seeds=[0])) for p in prompts)
    assert with_token != without
    assert of_class == spelled
    assert of_class not in (with_token, without)


def test_a_drawing_has_the_size_and_the_steps_of_the_learning_unless_others_are_given(session):
    learned = learn(session, width=32, num_inference_steps=4)
    (wide,) = session.draw(learned, PROMPT, seeds=[0])
    assert wide.size == (32, 16)
    (given,) = session.draw(learned, PROMPT, seeds=[0], num_inference_steps=4)
    (other,) = session.draw(learned, PROMPT, seeds=[0], num_inference_steps=3)
    assert pixels([wide]) == pixels([given])
    assert pixels([wide]) != pixels([other])
    (small,) = session.draw(learned, PROMPT, seeds=[0], width=16)
    assert small.size == (16, 16)


def test_another_classs_token_may_stand_in_the_prompt(session):
    first = learn(session, 1)
    prompt = "a photo of {token} on {token:2}"
    with pytest.raises(UsageError, match="there is no token at"):
        session.draw(first, prompt)
    learn(session, 2, seed=7, choose_by="loss")  # a gain by chance is not kept
    both = pixels(session.draw(first, prompt, seeds=[0]))
    assert both == pixels(session.draw(first, prompt, seeds=[0]))
    assert both != pixels(session.draw(first, "a photo of {token} on {token}", seeds=[0]))


def test_a_file_of_prompts_is_drawn_prompt_by_prompt(session, tmp_path):
    token = session.load(file_of_a_token(tmp_path / "token.safetensors"), 1)
    (tmp_path / "prompts.txt").write_text("a {token}\na photo of {token}\n")
    drawn = pixels(session.draw(token, f"@{tmp_path / 'prompts.txt'}", seeds=[0, 1]))
    first = pixels(session.draw(token, "a {token}", seeds=[0, 1]))
    assert drawn == first + pixels(session.draw(token, "a photo of {token}", seeds=[0, 1]))


# --- save and load


def test_a_saved_token_is_loaded_with_the_same_vector_and_read_by_read_token(session, start, tmp_path):
    learned = learn(session, 2, num_vectors=2)
    path = tmp_path / "elsewhere" / "bat.safetensors"
    session.save(learned, path)
    assert list(load_file(path)) == ["newclas"]
    word, vectors = read_token(path)
    assert word == "newclas"
    assert torch.equal(vectors, learned.token.vector)
    for other in (session, start(output_path=str(tmp_path / "other"))):
        loaded = other.load(path)
        assert torch.equal(loaded.token.vector, learned.token.vector)
        assert (loaded.plan.config.class_index, loaded.plan.label, loaded.training) == (2, "bat", None)
        assert pixels(other.draw(loaded, PROMPT, [0])) == pixels(session.draw(learned, PROMPT, [0]))


def test_a_saved_token_says_what_it_is_of(session, saved, tmp_path):
    session.save(learn(session, 2, seed=3), tmp_path / "bat.safetensors")
    said = read_origin(tmp_path / "bat.safetensors")
    assert (said["class_index"], said["class_name"]) == ("2", "bat")
    assert said["classifier"] == saved["classifier"]
    assert json.loads(said["hyperparameters"])["seed"] == 3


def test_diffusers_reads_a_saved_token(session, pipeline, tmp_path):
    learned = learn(session)
    session.save(learned, tmp_path / "token.safetensors")
    pipeline.load_textual_inversion(tmp_path / "token.safetensors")
    number = pipeline.tokenizer.convert_tokens_to_ids("newclas")
    read = pipeline.text_encoder.get_input_embeddings().weight[number]
    assert torch.equal(read, learned.token.vector[0])


def test_a_file_that_does_not_say_its_class_is_loaded_for_the_one_that_is_given(session, tmp_path):
    path = file_of_a_token(tmp_path / "token.safetensors")
    with pytest.raises(UsageError, match="give class_index"):
        session.load(path)
    assert session.load(path, "blue cat").plan.config.class_index == 3


def test_a_class_that_is_given_goes_before_what_the_file_says(session, tmp_path):
    path = file_of_a_token(tmp_path / "token.safetensors", class_index="2")
    assert session.load(path).plan.label == "bat"
    assert session.load(path, 4).plan.label == "tiger"


def test_a_token_of_another_width_is_refused(session, tmp_path):
    save_file({"newclas": torch.ones(1, 24)}, tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match="24 wide"):
        session.load(tmp_path / "wide.safetensors", 1)


def test_a_loaded_token_can_be_evaluated(session, tmp_path):
    token = session.load(file_of_a_token(tmp_path / "token.safetensors"), 2)
    assert session.evaluate(token)["class_name"] == "bat"


# --- what is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stepps": 3}, "no option is called 'stepps'"),
        ({"num_inference_steps": 0}, "--num_inference_steps: 0 was given; allowed is 1 or more"),
        ({"jump_at": "x"}, "--jump_at: 'x' was given"),
        ({"classifier": "nothing"}, "--classifier: 'nothing' was given"),
        ({"device": "gpu"}, "--device: 'gpu' was given"),
    ],
)
def test_an_option_that_is_not_known_or_not_allowed_is_one_usage_error(start, options, told):
    with pytest.raises(UsageError) as caught:
        start(**options)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_epochs": 0}, "--max_epochs: 0 was given"),
        ({"class_index": 9}, "--class_index: 9 was given; allowed is 1 to 4"),
        ({"class_index": "horse"}, "--class_index: 'horse' was given"),
        ({"width": 18}, "--width: 18 was given; allowed is a multiple of 4"),
        ({"gradient_mode": "last:9"}, "--gradient_mode: 'last:9' was given; allowed is 1 to 3 steps"),
    ],
)
def test_a_calls_options_are_checked_like_the_first_ones(session, tmp_path, options, told):
    session.load(file_of_a_token(tmp_path / "token.safetensors"), 1)  # another plan before
    with pytest.raises(UsageError) as caught:
        learn(session, **options)
    assert told in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_a_prompt_that_is_too_long_is_refused_before_it_is_drawn(session, tmp_path):
    token = session.load(file_of_a_token(tmp_path / "token.safetensors"), 1)
    with pytest.raises(UsageError, match="takes 22 tokens; allowed are at most 16"):
        session.draw(token, "cat " * 20)


def test_a_session_may_hold_options_of_work_that_is_to_come(start, tmp_path):
    (tmp_path / "prompts.txt").write_text("a {token} {class}\n")
    session = start(eval_prompts=str(tmp_path / "prompts.txt"))
    result = session.evaluate(learn(session))
    assert [prompt["template"] for prompt in result["prompts"]] == [PROMPT, "a {token} {class}"]


# --- known faults of apps/session.py; each mark goes with its fault


@pytest.mark.parametrize("options", [{"stepps": 3}, {"jump_at": "x"}, {"gradient_mode": "first"}])
def test_a_calls_option_that_is_not_known_or_not_readable_is_one_usage_error(session, options):
    with pytest.raises(UsageError):
        learn(session, **options)


def test_a_preset_that_is_not_known_is_one_usage_error(start):
    with pytest.raises(UsageError):
        start(preset="papr")


def test_a_pipeline_draws_with_the_scheduler_that_is_named(start, pipeline, tmp_path):
    path = file_of_a_token(tmp_path / "token.safetensors")
    drawn = []
    for session in (start(scheduler="ddim"), start(pipeline, scheduler="ddim")):
        token = session.load(path, class_index=1)
        drawn.append(pixels(session.draw(token, PROMPT, seeds=[3])))
    assert drawn[0] == drawn[1]


def test_a_call_learns_with_the_small_decoder_that_it_names(start, tmp_path):
    first = save_tiny_vae(tmp_path / "first")
    decoder = AutoencoderTiny.from_pretrained(first)
    torch.manual_seed(6)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    decoder.save_pretrained(tmp_path / "second")
    second = str(tmp_path / "second")
    expected = learn(start(), exp_id="alone", tiny_vae=second, choose_by="loss")
    session = start()
    learn(session, tiny_vae=first, choose_by="loss")
    assert torch.equal(learn(session, tiny_vae=second, choose_by="loss").token.vector, expected.token.vector)


def test_class_0_is_refused_whatever_the_file_says(session, tmp_path):
    path = file_of_a_token(tmp_path / "token.safetensors", class_index="2")
    with pytest.raises(UsageError, match="--class_index: 0 was given"):
        session.load(path, 0)


@pytest.mark.parametrize(("name", "value"), [("mixed_precision", "bf16"), ("gradient_checkpointing", True)])
def test_what_a_pipeline_brings_is_not_chosen_anew(start, name, value):
    with pytest.raises(UsageError, match=f"{name}: .* was given with a pipeline, which has its own"):
        start(pipeline_of(), **{name: value})


@pytest.mark.parametrize("name", ["model", "classifier", "eval_batch_size"])
def test_what_is_loaded_once_is_no_option_of_one_call(start, name):
    with pytest.raises(UsageError, match=f"{name}: is the whole session's"):
        learn(start(), **{name: "x" if name != "eval_batch_size" else 1})


def test_a_token_of_another_classifier_is_not_taken_by_its_number(session, tmp_path):
    path = file_of_a_token(tmp_path / "token.safetensors", class_index="2", classifier="inet")
    with pytest.raises(UsageError, match="does not say of which class"):
        session.load(path)
    assert session.load(path, 2).plan.label == "bat"
