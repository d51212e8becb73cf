"""What fits in memory, and what is done where it does not."""

from dataclasses import replace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from apps.plan import Sources, make_plan
from config import RunConfig
from discriminative.diffusion.inspect import SD_1_4, Size, text_encoder_bytes
from discriminative.diffusion.memory import SETTINGS, WEIGHTS, Batches, choose, estimate
from experiments.speed.footprint import needs

CPU, CUDA, HALF = torch.device("cpu"), torch.device("cuda"), torch.float16


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "max"])
def test_each_setting_stays_below_the_card_that_it_is_named_after(name):
    assert estimate(SETTINGS[name], SD_1_4, CUDA, HALF) < float(name.removesuffix("gb")) * 1e9


@pytest.mark.slow
@pytest.mark.parametrize("tiny_vae", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_table_holds_what_is_counted(name, tiny_vae):
    counted, setting = needs(SETTINGS[name], images=5, tiny_vae=tiny_vae), SETTINGS[name]
    assert counted["update"] == pytest.approx(
        setting.needs_with_tiny_vae if tiny_vae else setting.needs, rel=0.02
    )
    assert counted["drawing"] < counted["update"]
    assert counted["weights"] == pytest.approx(WEIGHTS, rel=0.01)


def test_small_images_do_not_make_weights_small():
    assert estimate(SETTINGS["max"], Size(0.25, 1.0), CUDA, HALF) > WEIGHTS + 0.24 * (
        SETTINGS["max"].needs - WEIGHTS
    )


def test_a_text_encoder_is_counted_as_large_as_it_is_and_what_judges_beside_it(tmp_path):
    """Stable Diffusion 2's is 2.8 times as large as 1.4's, and float32 in whatever precision."""
    sizes = {}
    for width, layers, heads in ((768, 12, 12), (1024, 23, 16)):
        text = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
        text.save_pretrained(tmp_path / str(width))
        with torch.device("meta"):
            sizes[width] = 4 * sum(p.numel() for p in CLIPTextModel(text).parameters())
        read = CLIPTextConfig.from_pretrained(tmp_path / str(width))
        assert text_encoder_bytes(read) == sizes[width]
    assert sizes[768] == pytest.approx(SD_1_4.text_encoder, rel=1e-3)
    larger = SD_1_4._replace(text_encoder=sizes[1024], others=1e9)
    for dtype in (HALF, torch.float32):
        more = estimate(SETTINGS["8gb"], larger, CUDA, dtype) - estimate(SETTINGS["8gb"], SD_1_4, CUDA, dtype)
        assert more == pytest.approx(sizes[1024] - SD_1_4.text_encoder + 1e9)


def test_auto_takes_the_roomiest_setting_that_fits(monkeypatch):
    for gigabytes, expected in (
        (6, "8gb"),
        (8.2, "8gb"),
        (12.5, "12gb"),
        (16.5, "16gb"),
        (24.5, "24gb"),
        (80, "max"),
    ):
        monkeypatch.setattr(
            "discriminative.diffusion.memory.room", lambda device, g=gigabytes: 0.95 * g * 1e9
        )
        assert choose(SD_1_4, CUDA, HALF) == expected
        assert choose(Size(0.01, 0.02), CPU, torch.float32) == "max"
    monkeypatch.setattr("discriminative.diffusion.memory.room", lambda device: 0.95 * 12.5e9)
    assert sources_of(CUDA, tiny_vae="taesd", train=True).memory["memory"] == "max"
    # An evaluation decodes with the VAE.
    assert sources_of(CUDA, tiny_vae="taesd", evaluate=True).memory["memory"] == "12gb"


def sources_of(device: torch.device, **options) -> Sources:
    """Sources of Stable Diffusion 1.4 in half precision, of which no file is read."""
    config = replace(RunConfig(), dry_run=True, judge="none", **options)
    sources = Sources(config)
    assert sources.size == SD_1_4
    sources.device = device
    sources.dtype = HALF
    return sources


def test_what_the_user_gave_beats_the_setting():
    sources = sources_of(CPU, memory="8gb")
    assert sources.memory == {"memory": "8gb", "decode_batch_size": 1, "eval_batch_size": 4}
    assert sources.checkpointed == ("unet", "vae")
    given = {"decode_batch_size": 3, "eval_batch_size": 9, "gradient_checkpointing": False}
    sources = sources_of(CPU, memory="8gb", **given)
    assert sources.memory == {"memory": "8gb", "decode_batch_size": 3, "eval_batch_size": 9}
    assert sources.checkpointed == ()
    sources = sources_of(CPU, memory="max", gradient_checkpointing=True)
    assert sources.checkpointed == ("unet", "vae")


def test_what_the_setting_stands_for_is_what_a_class_is_planned_and_learned_with(tmp_path):
    config = replace(
        RunConfig(), class_index=2, train=True, model="miniature", memory="8gb", output_path=str(tmp_path)
    )
    plan = make_plan(config, Sources(config))
    assert (plan.config.decode_batch_size, plan.config.eval_batch_size) == (1, 4)
    settings = plan.config.learning()
    assert (settings.sampler.decode_batch_size, settings.eval_batch_size) == (1, 4)


def test_an_updates_images_go_through_the_models_together_unless_fewer_are_asked_for():
    config = replace(RunConfig(), images_per_update=7)
    assert config.learning().batch_size is None  # all of them
    assert config.learning(batch_size=2).batch_size == 2


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_done_twice(capsys):
    tried = []

    def work(part):
        tried.append((part.start, part.stop))
        if part.stop - part.start > 2 and part.start >= 5:
            raise torch.OutOfMemoryError
        return list(range(part.start, part.stop))

    batches = Batches(5)
    assert sum(batches.over(12, work), []) == list(range(12))
    assert tried == [(0, 5), (5, 10), (5, 7), (7, 9), (9, 11), (11, 12)]
    assert batches.size == 2  # the next update does not try again
    assert "5 images at once do not fit in memory; going on with 2" in capsys.readouterr().out


def test_what_cudas_libraries_say_of_memory_is_understood_and_other_errors_are_not_swallowed():
    told = [
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
    ]

    def work(part):
        if part.stop - part.start > 1:
            raise RuntimeError(told.pop())
        return part.start

    assert Batches(4).over(4, work) == [0, 1, 2, 3]
    assert not told
    with pytest.raises(RuntimeError, match="shapes"):
        Batches(4).over(3, lambda part: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))


def test_where_one_image_does_not_fit_it_is_an_error():
    def full(part):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Batches(None).over(3, full)
