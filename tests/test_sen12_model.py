"""The pair model: published numbers, tiling by hand, sizes, symmetry, shared features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import parity_weights

from models_sen12_ft import MixMIMPair
from util.errors import UserError

PARITY = Path(__file__).parent / "parity"
SMALL = {"img_size": 128, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


def recorded() -> dict[str, np.ndarray]:
    with np.load(PARITY / "pair_small.npz") as values:
        return {key: values[key] for key in values.files}


@pytest.mark.parametrize("patch_op", ["avg", "max"])
@pytest.mark.parametrize("legacy", [False, True])
def test_logits_equal_the_published_implementation(patch_op: str, legacy: bool) -> None:
    values = recorded()
    config = json.loads(str(values["config"]))
    for key in ("depths", "num_heads", "window_size"):
        config[key] = tuple(config[key])
    model = MixMIMPair(patch_op=patch_op, legacy_tiling=legacy, **config).eval()
    parity_weights(model, int(values["salt"]))
    with torch.no_grad():
        logits = model(torch.from_numpy(values["x1"]), torch.from_numpy(values["x2"])).numpy()
    wanted = values[f"logits_{patch_op}" + ("_legacy" if legacy else "")]
    assert np.abs(logits - wanted).max() < 1e-5


def test_state_dict_has_the_published_keys_and_shapes() -> None:
    shapes = json.loads((PARITY / "state_dict_shapes.json").read_text())["pair_mixmim_base"]
    with torch.device("meta"):
        model = MixMIMPair()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes


def test_tiles_keep_the_bands_of_a_place_together() -> None:
    model = MixMIMPair(**SMALL)
    image = torch.zeros(1, 2, 256, 384)
    for band in range(2):
        for row in range(2):
            for column in range(3):
                image[0, band, 128 * row : 128 * row + 128, 128 * column : 128 * column + 128] = (
                    100 * band + 10 * row + column
                )
    tiles = model.tiles(image)
    assert tiles.shape == (1, 6, 2, 128, 128)
    assert tiles[0, :, :, 5, 7].tolist() == [[0, 100], [1, 101], [2, 102], [10, 110], [11, 111], [12, 112]]
    model.legacy_tiling = True
    assert model.tiles(image)[0, :, :, 5, 7].tolist() == [[0, 1], [2, 10], [11, 12], [100, 101], [102, 110], [111, 112]]


@pytest.mark.parametrize("legacy", [False, True])
def test_one_tile_is_the_image_itself(legacy: bool) -> None:
    image = torch.randn(2, 2, 128, 128)
    assert torch.equal(MixMIMPair(legacy_tiling=legacy, **SMALL).tiles(image)[:, 0], image)


@pytest.mark.parametrize("size", [(128, 128), (256, 128), (384, 384)])
def test_any_multiple_of_the_tile_works(size: tuple[int, int]) -> None:
    model = MixMIMPair(**SMALL).eval()
    assert model(torch.randn(2, 2, *size), torch.randn(2, 2, *size)).shape == (2, 2)


def test_other_sizes_are_refused_with_advice() -> None:
    model = MixMIMPair(**SMALL)
    with pytest.raises(UserError, match=r"500 x 512 px; expected multiples of the encoder's 128 px, such as 512"):
        model(torch.randn(1, 2, 500, 512), torch.randn(1, 2, 500, 512))
    with pytest.raises(UserError, match="patch_op is 'mean'; expected one of avg, max"):
        MixMIMPair(patch_op="mean", **SMALL)
    with pytest.raises(ValueError, match="shapes"):
        model(torch.randn(1, 2, 128, 128), torch.randn(1, 2, 256, 256))


def test_order_of_the_images_does_not_matter_and_equal_images_give_the_bias() -> None:
    model = MixMIMPair(**SMALL).eval()
    parity_weights(model, 7)
    first, second = torch.randn(2, 2, 128, 256), torch.randn(2, 2, 128, 256)
    with torch.no_grad():
        torch.testing.assert_close(model(first, second), model(second, first), rtol=0, atol=1e-5)
        torch.testing.assert_close(model(first, first), model.head.bias.expand(2, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch_op", ["avg", "max"])
def test_shared_features_give_the_same_logits(patch_op: str) -> None:
    model = MixMIMPair(patch_op=patch_op, **SMALL).eval()
    parity_weights(model, 3)
    images = torch.randn(3, 2, 256, 256)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    with torch.no_grad():
        features = model.encode_image(images)
        assert features.shape == (3, 4, 128)
        shared = model.classify(features[pairs[:, 0]], features[pairs[:, 1]])
        torch.testing.assert_close(shared, model(images[pairs[:, 0]], images[pairs[:, 1]]), rtol=0, atol=1e-5)


def test_both_images_go_through_the_encoder_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MixMIMPair(**SMALL).eval()
    sizes = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda tokens, mask=None: sizes.append(len(tokens)) or encode(tokens, mask))
    model(torch.randn(3, 2, 256, 256), torch.randn(3, 2, 256, 256))
    assert sizes == [2 * 3 * 4]  # 2 images x 3 pairs x 4 tiles


def test_every_parameter_gets_a_gradient() -> None:
    model = MixMIMPair(**SMALL)
    parity_weights(model, 1)
    model(torch.randn(2, 2, 128, 128), torch.randn(2, 2, 128, 128)).square().sum().backward()
    # The last norm's bias cancels in the difference of features.
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent in ([], ["norm.bias"])
