"""The adapter has the paper's parts and sizes, puts position where it belongs, and tells what it should.

pytest tests/test_dpt_adapter.py
"""

import math
from dataclasses import replace

import pytest
import torch

from dpt.adapter import DiscriminativeAdapter, similarity, sine_position
from dpt.settings import MINIATURE_ADAPTER, AdapterSettings, LossWeights

SMALL = AdapterSettings(
    width=16,
    heads=2,
    feedforward=24,
    dropout=0.5,
    matching_queries=3,
    grounding_queries=5,
    slots=7,
    alignment_width=6,
)


def small(**changes):
    torch.manual_seed(0)
    return DiscriminativeAdapter(replace(SMALL, **changes), channels=4, text_width=10, token_width=9)


def features(batch=2, height=3, width=5):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(2))


TIMES = torch.tensor([20, 700])


def numbers(*modules):
    """Trainable parameters."""
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)


# Sizes.


@pytest.mark.parametrize(("width", "head", "total"), [(768, 263_168, 4_303_237), (1024, 328_960, 4_369_029)])
def test_the_papers_adapters_have_the_papers_parameters(width, head, total):
    adapter = DiscriminativeAdapter(AdapterSettings(), channels=1280, text_width=width, token_width=768)
    parts = {
        "transformer": numbers(adapter.encoder, adapter.decoder),
        "timestep": numbers(adapter.timestep_sinusoid, adapter.timestep_mlp),
        "input": numbers(adapter.input_projection),
        "matching": numbers(adapter.matching_head),
        "boxes": numbers(adapter.box_head),
        "class": numbers(adapter.class_head),
        "alignment": numbers(adapter.query_projection, adapter.token_projection),
        "queries": numbers(adapter.queries),
        "scale": adapter.logit_scale.numel(),
    }
    assert parts == {
        "transformer": 2_894_336,
        "timestep": 525_568,
        "input": 327_936,
        "matching": head,
        "boxes": 132_612,
        "class": 65_792,
        "alignment": 65_664,
        "queries": 28_160,
        "scale": 1,
    }
    assert numbers(adapter) == sum(parts.values()) == total


@pytest.mark.parametrize(("channels", "total"), [(160, 697_445), (96, 689_253)])
def test_the_miniatures_adapter_has_about_700_thousand_parameters(channels, total):
    adapter = DiscriminativeAdapter(MINIATURE_ADAPTER, channels, text_width=128, token_width=128)
    print(numbers(adapter))
    assert numbers(adapter) == total


def test_the_readout_has_the_told_shapes_and_ranges():
    readout = small()(features(), TIMES)
    assert readout.matching.shape == (2, 3, 10)
    assert readout.logits.shape == (2, 5, 8)
    assert readout.boxes.shape == (2, 5, 4)
    assert readout.boxes.min() > 0
    assert readout.boxes.max() < 1
    assert readout.alignment.shape == (2, 5, 6)
    assert torch.allclose(readout.alignment.norm(dim=2), torch.ones(2, 5))
    tokens = small().project_tokens(torch.randn(2, 11, 9))
    assert tokens.shape == (2, 11, 6)
    assert torch.allclose(tokens.norm(dim=2), torch.ones(2, 11))


# The transformer.


def test_position_is_sines_of_y_then_of_x():
    position = sine_position(2, 3, 8).view(2, 3, 8)
    for y in range(2):
        for x in range(3):
            expected = []
            for coordinate in ((y + 1) / 2 * 2 * math.pi, (x + 1) / 3 * 2 * math.pi):
                for k in range(2):
                    angle = coordinate / 10000 ** (2 * k / 4)
                    expected += [math.sin(angle), math.cos(angle)]
            assert position[y, x].tolist() == pytest.approx(expected, abs=1e-6)


def test_without_position_the_encoder_is_torchs_post_norm_layer():
    encoder = small(dropout=0.0).encoder
    twin = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
    twin.self_attn.load_state_dict(encoder.attend.attention.state_dict())
    twin.norm1.load_state_dict(encoder.attend.norm.state_dict())
    twin.linear1.load_state_dict(encoder.feed.wide.state_dict())
    twin.linear2.load_state_dict(encoder.feed.narrow.state_dict())
    x = torch.randn(2, 6, 16)
    assert torch.allclose(encoder(x, torch.zeros_like(x)), twin(x), atol=1e-5)


def test_position_and_timestep_are_never_added_to_values():
    adapter = small().eval()
    x = torch.randn(1, 1, 16).expand(-1, 6, -1)  # alike at all places
    position = torch.randn(1, 6, 16)
    assert torch.allclose(adapter.encoder(x, position), adapter.encoder(x, 0 * position), atol=1e-5)
    queries = torch.randn(1, 4, 16)
    assert torch.allclose(
        adapter.decoder(queries, x, position), adapter.decoder(queries, x, 0 * position), atol=1e-5
    )


def test_place_and_time_change_the_readout():
    adapter = small().eval()
    first = adapter(features(), TIMES).matching
    assert not torch.allclose(first, adapter(features().flip(3), TIMES).matching, atol=1e-5)
    assert not torch.allclose(first, adapter(features(), TIMES + 100).matching, atol=1e-5)


def test_one_timestep_serves_the_whole_batch():
    adapter = small().eval()
    one = adapter(features(), torch.tensor(500)).matching
    assert torch.equal(one, adapter(features(), torch.tensor([500, 500])).matching)


def test_images_of_a_batch_do_not_see_each_other():
    adapter = small().eval()
    both = adapter(features(), TIMES)
    alone = adapter(features()[1:], TIMES[1:])
    for one, other in zip(both, alone, strict=True):
        assert torch.allclose(one[1:], other, atol=1e-5)


def test_matrices_of_the_transformer_start_xavier_uniform():
    adapter = DiscriminativeAdapter(MINIATURE_ADAPTER, 96, 128, 128)
    for name, p in [*adapter.encoder.named_parameters(), *adapter.decoder.named_parameters()]:
        if p.dim() > 1:
            bound = math.sqrt(6 / sum(p.shape))
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_dropout_is_there_in_training_and_not_in_evaluation():
    adapter = small().train()
    assert not torch.equal(adapter(features(), TIMES).matching, adapter(features(), TIMES).matching)
    adapter.eval()
    assert torch.equal(adapter(features(), TIMES).matching, adapter(features(), TIMES).matching)


def test_every_parameter_gets_a_gradient_and_so_do_the_features():
    adapter = small()
    x = features().requires_grad_()
    readout = adapter(x, TIMES)
    tokens = adapter.project_tokens(torch.randn(2, 4, 9))
    (sum(part.square().sum() for part in readout) + tokens.sum() + adapter.logit_scale.exp()).backward()
    assert [name for name, p in adapter.named_parameters() if p.grad is None] == []
    assert x.grad.abs().max() > 0


def test_half_precision_features_are_read_in_float32():
    readout = small()(features().half(), TIMES)
    assert {part.dtype for part in readout} == {torch.float32}


def test_state_holds_the_scale_which_starts_as_clips():
    adapter = small()
    assert adapter.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        adapter.logit_scale.fill_(3.5)
    fresh = small()
    fresh.load_state_dict(adapter.state_dict())
    assert fresh.logit_scale.item() == 3.5


# Similarity.


def test_similarity_is_the_best_querys_cosine():
    matching = torch.randn(3, 4, 10)
    pooled = torch.randn(3, 10)
    for b, score in enumerate(similarity(matching, pooled).tolist()):
        cosines = []
        for query in matching[b].tolist():
            dot = sum(x * y for x, y in zip(query, pooled[b].tolist(), strict=True))
            cosines.append(dot / math.hypot(*query) / math.hypot(*pooled[b].tolist()))
        assert score == pytest.approx(max(cosines), abs=1e-5)


def test_with_words_similarity_is_the_mean_of_the_best_cosines_and_padding_does_not_count():
    matching = torch.randn(2, 4, 10)
    words = torch.randn(2, 3, 10)
    words[1, 2] = 0
    found = similarity(matching, words)
    one_by_one = torch.stack([similarity(matching, words[:, i]) for i in range(3)], dim=1)  # (2, 3)
    assert torch.allclose(found, torch.stack([one_by_one[0].mean(), one_by_one[1, :2].mean()]))


def test_similarity_is_float32_under_autocast():
    matching = torch.randn(2, 4, 10)
    pooled = torch.randn(2, 10)
    with torch.autocast("cpu", torch.bfloat16):
        halved = similarity(matching, pooled)
    assert halved.dtype == torch.float32
    assert torch.equal(halved, similarity(matching, pooled))
    assert similarity(matching.bfloat16(), pooled).dtype == torch.float32


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "width: 18 was given; allowed is a multiple of 4"),
        ({"heads": 3}, "width: 16 was given; allowed is a multiple of 3 heads"),
        ({"dropout": 1.0}, "dropout: 1.0 was given; allowed is 0 to below 1"),
        ({"dropout": -0.1}, "dropout: -0.1 was given; allowed is 0 to below 1"),
        ({"slots": 0}, "slots: 0 was given; allowed is 1 or more"),
        ({"grounding_queries": -1}, "grounding_queries: -1 was given; allowed is 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_weight_below_zero_is_refused():
    with pytest.raises(ValueError, match="giou: -1 was given; allowed is 0 or more"):
        LossWeights(giou=-1)
    with pytest.raises(ValueError, match="mse: nan was given"):
        LossWeights(mse=math.nan)
