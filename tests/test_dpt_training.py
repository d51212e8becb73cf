"""Both stages train what they should and nothing else, in one batch of the UNet, and survive being killed.

pytest tests/test_dpt_training.py
pytest tests/test_dpt_training.py -m slow    # eight scenes by heart, SIGKILL, two processes: minutes
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_models, weight_hashes
from safetensors.torch import load_file

from discriminative.errors import UsageError, WorkError
from dpt.data.samples import Grounding, Picture, Sample
from dpt.files import ADAPTER, LORA, new_reader, read_adapter, tensors_of, write_adapter
from dpt.forward import add_noise, draw_noised, losses_of
from dpt.latents import Latents, Share, Stream
from dpt.probe import probe, standardise
from dpt.settings import AdapterSettings, StageSettings
from dpt.training import CHECKPOINT, LOG, Stage
from dpt.tune import prepare, tune

ROOT = Path(__file__).parent.parent
TINY = AdapterSettings(
    width=16,
    heads=2,
    feedforward=24,
    dropout=0.2,
    matching_queries=3,
    grounding_queries=5,
    slots=15,
    alignment_width=6,
)
ANIMALS = ("tiger", "cat", "bat")
ALL = ("itm", "rec", "mse")
STEPS_BY_HEART = 200


class TinyData:
    """Pictures of noise with captions of the tiny vocabulary."""

    def __init__(self, number=6):
        self.number = number
        self.epoch = 0

    def __len__(self):
        return self.number

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(1000 * self.epoch + index)
        pictures = [
            Picture(f"{self.epoch}-{index}-{i}", torch.rand(3, 16, 16, generator=g)) for i in range(3)
        ]
        names = [ANIMALS[(index + i) % 3] for i in range(3)]
        box = torch.rand(1, 4, generator=g) * 0.3 + 0.3
        grounding = Grounding(f"blue {names[0]}", box, (((5, 5 + len(names[0])),),))
        return Sample(*pictures, *(f"a photo of {name}" for name in names), names[0], grounding)


def tiny_reader(probe_point="up0", **changes):
    torch.manual_seed(5)
    return new_reader(tiny_models("DDIMScheduler"), probe_point, replace(TINY, **changes), "pipeline")


def stage(steps=4, losses=("itm", "rec"), accumulation=1, rate=1e-2, every=2, cosine=False):
    settings = StageSettings(steps, 2, accumulation, rate, cosine=cosine)
    return Stage(settings, losses, seed=3, checkpoint_every=every)


def stream(reader, accumulation=1, number=6, renews=False, batch_size=2):
    share = Share(batch_size, accumulation)
    return Stream(TinyData(number), Latents(reader.models.vae), share, seed=3, renews=renews)


def accelerator():
    return Accelerator(cpu=True)


def run_probe(reader, folder, **changes):
    chosen = stage(**changes)
    with stream(reader, chosen.settings.accumulation) as batches:
        return probe(reader, chosen, batches, folder, accelerator(), "pipeline", "tiny")


def run_tune(reader, folder, only_lora=False, text_encoder=False, **changes):
    trained = prepare(reader, 0, only_lora, text_encoder)
    chosen = stage(**({"losses": ALL, "cosine": True} | changes))
    with stream(reader, chosen.settings.accumulation) as batches:
        return tune(reader, trained, chosen, batches, folder, accelerator(), "pipeline", "tiny")


def rows_and_noise(reader, number=2):
    latents = Latents(reader.models.vae)
    rows = [latents.row(TinyData()[i]) for i in range(number)]
    return rows, draw_noised(reader.models, rows, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("point", ["up0", "all-4-8"])
def test_a_probe_sees_each_channel_at_one_size_whatever_the_unets(tmp_path, point):
    reader = tiny_reader(point)
    rows, noised = rows_and_noise(reader, 4)
    texts = reader.condition.encode([row.captions[0] for row in rows])
    seen = (noised.latents[:, 0], noised.timesteps, texts.states)
    before = reader.features(*seen)
    standardise(reader, stage(), rows, accelerator())
    for block in reader.point.blocks:
        assert (getattr(reader.point, f"mean_{block}") != 0).all()
    features = reader.features(*seen).transpose(0, 1).flatten(1)
    if point == "up0":
        assert before.transpose(0, 1).flatten(1).std(1).max() < 0.5
        torch.testing.assert_close(features.mean(1), torch.zeros(len(features)), rtol=0, atol=0.3)
        torch.testing.assert_close(features.std(1), torch.ones(len(features)), rtol=0.3, atol=0)
    write_adapter(tmp_path, reader, "pipeline", "tiny", {})
    assert torch.equal(read_adapter(tmp_path, reader.models).features(*seen), reader.features(*seen))


# One batch of the UNet.


def batches_through(module):
    """Batch sizes of a module's calls, filled as they come."""
    seen = []
    module.register_forward_hook(lambda m, inputs, output: seen.append(len(inputs[0])))
    return seen


def test_a_step_of_stage_1_is_one_batch_of_six_a_sample_that_ends_at_the_probe(tmp_path):
    reader = tiny_reader("mid")
    begun = batches_through(reader.models.unet.conv_in)
    behind = batches_through(reader.models.unet.up_blocks[0])
    run_probe(reader, tmp_path, steps=1)
    assert begun == [2, 12]  # one look at the pictures, by which features are scaled
    assert behind == []


def test_in_stage_2_one_sixth_goes_through_the_whole_unet(tmp_path):
    reader = tiny_reader("mid")
    begun = batches_through(reader.models.unet.conv_in)
    ended = batches_through(reader.models.unet.conv_out)
    run_tune(reader, tmp_path, steps=1)
    assert begun == [10, 2]
    assert ended == [2]


def test_the_six_forwards_are_those_that_one_would_run_singly():
    reader = tiny_reader("up0", dropout=0.0)
    rows, noised = rows_and_noise(reader)
    parts = losses_of(reader, rows, noised, ALL)
    scores = []
    for picture, text in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0)):
        encoded = reader.condition.encode([row.captions[text] for row in rows])
        latents = noised.latents[:, picture]
        scores.append(reader.score(latents, noised.timesteps, encoded.states, encoded.pooled))
    scale = reader.adapter.logit_scale.exp()
    for name, chosen in (("i2t", (0, 1, 2)), ("t2i", (0, 3, 4))):
        logits = scale * torch.stack([scores[i] for i in chosen], dim=1)
        wanted = torch.nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.long))
        torch.testing.assert_close(parts[name], wanted, rtol=1e-4, atol=1e-5)


def test_a_sample_has_one_noise_and_one_t_and_the_posteriors_spread():
    reader = tiny_reader()
    rows, noised = rows_and_noise(reader, 3)
    still = [row._replace(latents=tuple(torch.stack([x[0], 0 * x[1]]) for x in row.latents)) for row in rows]
    same = draw_noised(reader.models, still, torch.Generator().manual_seed(0))
    assert torch.equal(same.timesteps, noised.timesteps) and len(set(noised.timesteps.tolist())) > 1
    alpha_bar = reader.models.scheduler.alphas_cumprod[noised.timesteps].view(-1, 1, 1, 1, 1)
    mean = torch.stack([torch.stack(row.latents)[:, 0] for row in rows])
    clean = mean * reader.models.vae.config.scaling_factor
    noise = (same.latents - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
    for picture in range(3):
        torch.testing.assert_close(noise[:, picture], same.target, rtol=1e-3, atol=1e-3)
    assert (noise[0, 0] - noise[1, 0]).abs().max() > 0.1
    assert not torch.equal(noised.latents, same.latents)


def test_a_model_of_velocity_is_taught_velocity():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type="v_prediction")
    clean, noise = torch.randn(2, 2, 4, 8, 8).unbind(0)
    t = torch.tensor([10, 900])
    noisy, target = add_noise(scheduler, clean, noise, t)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, t))
    torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, t))


def test_a_power_above_one_draws_little_noise_more_often():
    reader = tiny_reader()
    row = rows_and_noise(reader, 1)[0]

    def drawn(power):
        generator = torch.Generator().manual_seed(0)
        return draw_noised(reader.models, row * 2000, generator, power).timesteps.double()

    uniform, early = drawn(1), drawn(2)
    for t in (uniform, early):
        assert t.min() >= 0 and 950 < t.max() <= 999
    assert uniform.mean().item() == pytest.approx(499.5, abs=25)
    assert early.mean().item() == pytest.approx(1000 / 3, abs=25)


# What learns.


def test_stage_1_leaves_all_models_bit_identical_and_changes_the_adapter(tmp_path):
    reader = tiny_reader()
    models = (reader.models.unet, reader.models.vae, reader.models.text_encoder)
    before = weight_hashes(*models)
    adapter = weight_hashes(reader.adapter)
    run_probe(reader, tmp_path)
    assert weight_hashes(*models) == before
    assert sum(a != b for a, b in zip(weight_hashes(reader.adapter), adapter, strict=True)) == len(adapter)
    assert json.loads((tmp_path / "adapter.json").read_text())["training"]["updates"] == 4


def gradients(losses):
    """Gradient of every LoRA matrix B of a UNet probed at bottom1, by name; None where it has none."""
    reader = tiny_reader("bottom1", dropout=0.0)
    trained = prepare(reader, 0)
    rows, noised = rows_and_noise(reader)
    sum(losses_of(reader, rows, noised, losses).values()).backward()
    return {name: p.grad for name, p in trained.items() if "lora_B" in name}


def test_lora_behind_the_probe_gets_its_gradient_from_mse_alone():
    judged, denoised, both = gradients(("itm", "rec")), gradients(("mse",)), gradients(ALL)
    behind = [name for name in both if name.startswith(("unet.mid", "unet.up"))]
    before = [name for name in both if name.startswith("unet.down")]
    assert behind and before
    for name in behind:
        assert judged[name] is None
        torch.testing.assert_close(both[name], denoised[name], rtol=1e-3, atol=1e-6)
    for name in before:
        assert judged[name].abs().max() > 0
        torch.testing.assert_close(both[name], judged[name] + denoised[name], rtol=1e-3, atol=1e-5)


def test_only_train_lora_leaves_the_adapter_and_the_base_bit_identical(tmp_path):
    reader = tiny_reader()
    adapter = weight_hashes(reader.adapter)
    base = {name: p.clone() for name, p in reader.models.unet.named_parameters()}
    run_tune(reader, tmp_path, only_lora=True)
    assert weight_hashes(reader.adapter) == adapter
    after = {name.replace(".base_layer", ""): p for name, p in reader.models.unet.named_parameters()}
    assert all(torch.equal(p, after[name]) for name, p in base.items())
    lora = load_file(tmp_path / LORA)
    assert all(t.abs().max() > 0 for name, t in lora.items() if "lora_B" in name)


def test_a_lora_of_denoising_alone_sees_no_other_loss_and_is_told_of_after_each_update(tmp_path):
    """The control of the experiment: anything else in its loss would be counted as what tuning brings."""
    reader = tiny_reader()
    before = weight_hashes(reader.adapter)
    trained = prepare(reader, 0, only_lora=True)
    told = []
    with stream(reader) as batches:
        where = (tmp_path, accelerator(), "pipeline", "tiny", told.append)
        rows = tune(reader, trained, stage(steps=3, losses=("mse",)), batches, *where)
    assert set(rows[0]) == {"step", "loss", "mse", "gradient_norm"}
    assert rows[0]["loss"] == rows[0]["mse"]
    assert told == [1, 2, 3] and weight_hashes(reader.adapter) == before


def test_the_text_encoders_lora_learns_where_it_is_asked_for(tmp_path):
    run_tune(tiny_reader(), tmp_path, text_encoder=True)
    lora = load_file(tmp_path / LORA)
    moved = [
        n for n, t in lora.items() if n.startswith("text_encoder.") and "lora_B" in n and t.abs().max() > 0
    ]
    assert len(moved) == 2 * 4  # two layers of four matrices


def test_the_text_encoder_learns_through_what_the_unet_is_told_not_through_its_target():
    reader = tiny_reader()
    assert not reader.condition.encode(["a cat"]).states.requires_grad
    prepare(reader, 0, text_encoder=True)
    encoded = reader.condition.encode(["a cat"])
    assert encoded.states.requires_grad and not encoded.pooled.requires_grad
    assert not reader.side.tokens(["a cat"])[0].requires_grad


def test_accumulated_batches_average_their_gradients(tmp_path, monkeypatch):
    """Two batches that are one and the same are worth one."""
    monkeypatch.setattr("dpt.training.seed_of", lambda *where: 7)
    told = []
    for accumulation in (1, 2):
        reader = tiny_reader(dropout=0.0)
        chosen = stage(steps=1, accumulation=accumulation)
        with stream(reader, accumulation, number=1, batch_size=1) as batches:
            folder = tmp_path / str(accumulation)
            told += probe(reader, chosen, batches, folder, accelerator(), "pipeline", "tiny")
    assert told[0] == pytest.approx(told[1], rel=1e-4)


def test_the_learning_rate_is_constant_or_falls_as_a_cosine():
    assert [stage().learning_rate(i) for i in (0, 3)] == [1e-2, 1e-2]
    cosine = stage(cosine=True)
    assert [round(cosine.learning_rate(i), 6) for i in (0, 2, 4)] == [1e-2, 5e-3, 0]


# Files and checkpoints.


@pytest.mark.parametrize("point", ["up0", "all-4-8"])
def test_an_adapter_survives_its_file_with_mixers_and_logit_scale(tmp_path, point):
    reader = tiny_reader(point)
    with torch.no_grad():
        reader.adapter.logit_scale.fill_(3.25)
    write_adapter(tmp_path, reader, "pipeline", "tiny", {})
    again = read_adapter(tmp_path, reader.models)
    assert again.adapter.logit_scale.item() == 3.25
    kept, found = tensors_of(reader), tensors_of(again)
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    assert (len(again.point.mixers) > 0) == (point != "up0")


class Killed(BaseException):
    pass


def test_an_adapter_keeps_what_its_matching_aims_at_and_one_of_before_aims_at_the_end(tmp_path):
    reader = tiny_reader()
    reader.condition.target = "words"
    write_adapter(tmp_path, reader, "pipeline", "tiny", {})
    assert read_adapter(tmp_path, reader.models).condition.target == "words"
    record = json.loads((tmp_path / "adapter.json").read_text())
    del record["matching_target"]
    (tmp_path / "adapter.json").write_text(json.dumps(record))
    assert read_adapter(tmp_path, reader.models).condition.target == "end"


def killed_at(monkeypatch, step):
    """Batches break off at an update, as a killed process does."""
    ask = Stream.batch

    def batch(self, at, part=0):
        if at == step:
            raise Killed
        return ask(self, at, part)

    monkeypatch.setattr(Stream, "batch", batch)


@pytest.mark.parametrize("run", [run_probe, run_tune])
def test_a_training_that_was_killed_ends_bit_for_bit_as_one_that_was_not(tmp_path, monkeypatch, run):
    whole = run(tiny_reader(), tmp_path / "whole", steps=5)
    with monkeypatch.context() as patched:
        killed_at(patched, 3)
        with pytest.raises(Killed):
            run(tiny_reader(), tmp_path / "killed", steps=5)
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {CHECKPOINT, LOG}
    assert run(tiny_reader(), tmp_path / "killed", steps=5) == whole
    for name in (ADAPTER, LOG):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if run is run_tune:
        # diffusers writes two entries of metadata, in a random order.
        one, other = (load_file(tmp_path / name / LORA) for name in ("killed", "whole"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert not (tmp_path / "killed" / CHECKPOINT).exists()


def test_a_checkpoint_of_another_training_is_refused_in_one_line(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        killed_at(patched, 3)
        with pytest.raises(Killed):
            run_probe(tiny_reader(), tmp_path, steps=5)
    with pytest.raises(UsageError, match="learning_rate 0.01 there, 0.5 here") as raised:
        run_probe(tiny_reader(), tmp_path, steps=5, rate=0.5)
    assert "\n" not in str(raised.value)


def test_a_loss_that_is_not_finite_ends_the_training_with_nothing_written(tmp_path):
    reader = tiny_reader()
    with torch.no_grad():
        reader.adapter.box_head[0].weight.fill_(torch.nan)
    with pytest.raises(WorkError, match="not finite at update 1") as raised:
        run_probe(reader, tmp_path)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# The stream.


def test_samples_follow_from_seed_and_step_and_come_once_an_epoch():
    reader = tiny_reader()
    with stream(reader) as one, stream(reader) as other:
        kinds = [[row.grounding.boxes.sum().item() for row in one.batch(step)] for step in range(6)]
        assert [row.grounding.boxes.sum().item() for row in other.batch(4)] == kinds[4]
    first, second = sum(kinds[:3], []), sum(kinds[3:], [])
    assert sorted(first) == sorted(second) and len(set(first)) == 6
    assert first != second


def test_what_renews_draws_anew_in_each_epoch():
    reader = tiny_reader()
    with stream(reader, renews=True) as batches:
        first, second = (
            {r.grounding.boxes.sum().item() for s in steps for r in batches.batch(s)}
            for steps in ((0, 1, 2), (3, 4, 5))
        )
    assert not first & second


def test_processes_share_a_step_without_overlap():
    shares = [Share(2, 3, rank, 2) for rank in (0, 1)]
    taken = [
        p for step in (0, 1) for share in shares for part in range(3) for p in share.positions(step, part)
    ]
    assert sorted(taken) == list(range(24))


def test_a_picture_is_encoded_once_while_there_is_room():
    reader = tiny_reader()
    calls = batches_through(reader.models.vae.encoder)
    kept, bounded = Latents(reader.models.vae), Latents(reader.models.vae, most=0)
    picture = TinyData()[0].picture
    for latents, number in ((kept, 1), (bounded, 2)):
        calls.clear()
        assert torch.equal(latents.of(picture), latents.of(picture))
        assert len(calls) == number


def test_empty_data_is_refused():
    reader = tiny_reader()
    with pytest.raises(UsageError, match="no samples"):
        Stream(TinyData(0), Latents(reader.models.vae), Share(2), seed=0)


# Minutes.


@pytest.mark.slow
def test_eight_scenes_are_learned_by_heart(tmp_path):
    from discriminative.diffusion.models import load_models
    from dpt.data.scenes import Miniature
    from dpt.evaluate import figures, outcomes
    from dpt.settings import MINIATURE_ADAPTER

    models = load_models("miniature", torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    reader = new_reader(models, "up0", replace(MINIATURE_ADAPTER, dropout=0.0), "pipeline")
    latents = Latents(models.vae)
    data = Miniature("train", 8)
    chosen = Stage(StageSettings(STEPS_BY_HEART, 8, 1, 1e-3), ("itm", "rec"), 0, 10_000)
    with Stream(data, latents, Share(8), seed=0) as batches:
        rows = probe(reader, chosen, batches, tmp_path, accelerator(), "pipeline", "miniature")
    print(rows[-1])
    found = figures(list(outcomes(reader, [latents.row(data[i]) for i in range(8)], 1, 0)))
    assert found["itm"]["text"]["share"] == found["itm"]["picture"]["share"] == 1
    assert found["rec"]["hit@1_iou"]["share"] == 1


def command(folder, *more):
    flags = ["--model", "miniature", "--device", "cpu", "--output_path", str(folder), "--samples", "8"]
    flags += ["--batch_size", "2", "--checkpoint_every", "3", "--steps", "30"]
    return [sys.executable, "-m", "dpt", "probe", *flags, *more]


@pytest.mark.slow
def test_after_sigkill_the_same_command_gives_the_same_adapter(tmp_path):
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "killed"), cwd=ROOT, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "probe" / CHECKPOINT
    for _ in range(3000):
        if checkpoint.exists():
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.exists()
    again = subprocess.run(command(tmp_path / "killed"), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "goes on after" in again.stdout
    whole, killed = (tmp_path / name / "probe" / ADAPTER for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from accelerate.utils import gather_object
from test_dpt_training import Latents, Share, Stream, TinyData, accelerator, probe, stage, tiny_reader
from dpt.training import average_gradients, mean_boxes
from dpt.files import tensors_of

a = accelerator()
assert a.num_processes == 2
one = torch.nn.Parameter(torch.zeros(3))
one.grad = torch.full((3,), float(a.process_index + 1))
average_gradients([one], a)
assert one.grad.tolist() == [1.5] * 3
assert mean_boxes(3 + 2 * a.process_index, a) == 4

reader = tiny_reader()
share = Share(2, 1, a.process_index, 2)
with Stream(TinyData(8), Latents(reader.models.vae), share, seed=3) as batches:
    own = [row.grounding.expression + str(row.grounding.boxes.sum()) for row in batches.batch(0)]
    probe(reader, stage(steps=3), batches, Path(sys.argv[1]), a, "pipeline", "tiny")
assert len(set(gather_object(own))) == 4
sums = gather_object([float(sum(t.double().abs().sum() for t in tensors_of(reader).values()))])
assert sums[0] == sums[1]
a.wait_for_everyone()
a.end_training()
print("two agree")
"""


@pytest.mark.slow
def test_two_processes_average_gradients_and_boxes_and_stay_alike(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    # accelerate launch starts several processes on GPUs alone.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [*launch, str(tmp_path / "out")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("two agree") == 2
    assert (tmp_path / "out" / ADAPTER).exists()
