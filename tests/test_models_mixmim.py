"""The MixMIM model: published numbers, the textbook oracle, masking, sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import PARITY, parity_weights
from plain_mixmim import PlainMixMIM
from torch import Tensor

from models_mixmim import (
    MODELS,
    MixMIM,
    MixMIMBlock,
    MixMIMEncoder,
    encoder_config,
    model_config,
)
from sarwmix.window_attention import _GatherRows
from util.errors import UserError
from util.token_order import morton_order, token_order

SMALL: dict = {
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
}


def small(img_size: int = 128, window_size: tuple[int, ...] = (8, 8, 8, 4), **more: bool) -> MixMIM:
    torch.manual_seed(0)
    return MixMIM(img_size=img_size, window_size=window_size, **SMALL, **more)


def relative(a: Tensor, b: np.ndarray) -> float:
    return float((a - torch.from_numpy(b)).abs().max() / np.abs(b).max())


FAST_PATHS = ("as trained", "PyTorch's linear", "activation checkpointing", "compiled")


@pytest.mark.parametrize("path", FAST_PATHS)
@pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["raw", "norm"])
def test_published_small(norm_pix_loss: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = np.load(PARITY / "pretrain_small.npz")
    model = MixMIM(**json.loads(str(recorded["config"])), norm_pix_loss=norm_pix_loss)
    parity_weights(model, int(recorded["salt"]))
    if path == "PyTorch's linear":
        monkeypatch.setattr("util.linear._WANTED", False)
    elif path == "activation checkpointing":
        model.activation_checkpointing = True
    elif path == "compiled":
        torch.compiler.reset()
        model.compile_blocks(backend="aot_eager")  # traced forward and backward graphs, run without a C++ compiler
    x, w, mask = (torch.from_numpy(recorded[key]) for key in ("x", "w", "mask"))
    kind = "norm" if norm_pix_loss else "raw"

    full = model(x, w, mask=mask, return_pred=True)
    assert full.loss.item() == pytest.approx(float(recorded[f"loss_{kind}"]), rel=1e-5)
    assert relative(full.pred.detach(), recorded["pred"]) < 1e-5
    assert torch.equal(full.mask, mask)
    cells = model.prepare_mask(mask)
    latent = model.encode(model.embed(x, cells), cells)
    assert relative(latent.detach(), recorded["latent"]) < 1e-5

    short = model(x, w, mask=mask)  # the training path drops half of the predictions before the last MLP
    assert short.pred is None
    assert short.loss.item() == pytest.approx(float(recorded[f"loss_{kind}"]), rel=1e-5)
    short.loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    expected = json.loads(str(recorded[f"gradnorm_{kind}"]))
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert gradients[name] == pytest.approx(value, rel=1e-5, abs=1e-10), name


def test_published_base() -> None:
    recorded = np.load(PARITY / "pretrain_base.npz")
    rng = np.random.default_rng(int(recorded["seed"]))
    x = torch.from_numpy(rng.standard_normal((2, 2, 128, 128)).astype(np.float32))
    w = torch.from_numpy((1 + rng.random(x.shape) * 1.7).astype(np.float32))
    model = MixMIM(**model_config("mixmim_base"), norm_pix_loss=True)
    parity_weights(model, int(recorded["salt"]))
    mask = torch.from_numpy(recorded["mask"])
    with torch.no_grad():
        out = model(x, w, mask=mask, return_pred=True)
        cells = model.prepare_mask(mask)
        latent = model.encode(model.embed(x, cells), cells)
    assert out.loss.item() == pytest.approx(float(recorded["loss_norm"]), rel=1e-5)
    assert relative(latent[..., :8], recorded["latent_head"]) < 1e-5
    assert relative(out.pred[..., :8], recorded["pred_head"]) < 1e-5
    assert sum(p.numel() for p in model.parameters()) == 113_686_264
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 113_547_000


@pytest.mark.parametrize(
    ("name", "total", "trainable"),
    [("base", 113_686_264, 113_547_000), ("large", 222_270_068, 222_065_268), ("huge", 682_964_778, 682_596_138)],
)
def test_state_dict_keys_and_sizes(name: str, total: int, trainable: int) -> None:
    shapes = json.loads((PARITY / "state_dict_shapes.json").read_text())[f"pretrain_mixmim_{name}"]
    with torch.device("meta"):
        model = MixMIM(**model_config(f"mixmim_{name}"))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_tiny_is_tiny() -> None:
    assert sum(p.numel() for p in MixMIM(**model_config("mixmim_tiny")).parameters()) <= 3_000_000


@pytest.mark.parametrize(
    ("img_size", "windows", "masked"),
    [
        (128, (8, 8, 8, 4), 8),  # sorted stages, equal groups
        (128, (8, 8, 8, 4), 3),  # sorted stages, unequal groups
        (128, (16, 8, 8, 4), 8),  # first window larger than a cell
        (128, (4, 4, 4, 2), 8),  # windows inside cells, then additive masks to the end
        (256, (8, 8, 8, 4), 31),  # several windows in every stage
        (64, (8, 8, 4, 2), 1),
    ],
)
def test_equals_textbook(img_size: int, windows: tuple[int, ...], masked: int) -> None:
    model = small(img_size, windows, norm_pix_loss=True)
    plain = PlainMixMIM(img_size=img_size, window_size=windows, **SMALL, norm_pix_loss=True)
    plain.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(masked)
    x = torch.randn(2, 2, img_size, img_size, generator=generator)
    w = 1 + torch.rand(x.shape, generator=generator)
    mask = torch.zeros(model.num_cells)
    mask[torch.randperm(model.num_cells, generator=generator)[:masked]] = 1

    loss, _, pred = plain(x, w, mask)
    loss.backward()
    out = model(x, w, mask=mask, return_pred=True)
    torch.testing.assert_close(out.pred, pred, rtol=1e-4, atol=1e-5)
    model(x, w, mask=mask).loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0)
    theirs = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-3, atol=1e-7, msg=name)

    with torch.no_grad():  # without a mask: the encoder of fine-tuning
        torch.testing.assert_close(model.encode(model.embed(x)), plain.encode(x, None), rtol=1e-4, atol=1e-5)


def test_z_order_by_hand() -> None:
    assert morton_order(2).tolist() == [0, 2, 1, 3]  # (0,0), (1,0), (0,1), (1,1): patch merging's order
    assert token_order(4, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert sorted(token_order(32, 8).tolist()) == list(range(1024))


def test_mask_has_exact_count() -> None:
    model = small()
    for ratio, count in ((0.5, 8), (0.25, 4), (0.99, 15), (0.07, 1)):
        mask = model.draw_mask(ratio)
        assert mask.shape == (16,)
        assert mask.sum() == count == int(16 * ratio)
    a, b = (model.draw_mask(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, 0.05])
def test_bad_mask_ratio(ratio: float) -> None:
    with pytest.raises(UserError, match="mask ratio"):
        small().draw_mask(ratio)


@pytest.mark.parametrize("masked", [8, 5])
def test_attention_never_crosses_sources(masked: int) -> None:
    """Changing what the partner shows moves only tokens that show the partner."""
    model = small().eval()
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(16)
    mask[torch.randperm(16, generator=generator)[:masked]] = 1
    cells = model.prepare_mask(mask)
    x = torch.randn(2, 2, 128, 128, generator=generator)
    changed = x.clone()
    changed[1] += torch.randn(x[1].shape, generator=generator)  # sample 1 is the partner of sample 0
    with torch.no_grad():
        before, after = (model.encode(model.embed(images, cells), cells)[0] for images in (x, changed))
    moved = (before - after).abs().amax(-1) > 0
    assert not moved[mask == 0].any()
    assert moved[mask == 1].all()


def test_loss_reads_each_cell_where_it_was_hidden() -> None:
    model = small()
    mask = model.draw_mask(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 2, 128, 128)
    out = model(x, mask=mask, return_pred=True)
    target = PlainMixMIM.patchify(x)
    first, second = out.pred.chunk(2)
    expected = torch.stack(
        [
            torch.stack([first[i, c] if mask[c] else second[1 - i, c] for c in range(16)])  # partner of i is 1 - i
            for i in range(2)
        ]
    )
    torch.testing.assert_close(out.loss, ((expected - target) ** 2).mean())
    torch.testing.assert_close(model.images_of(model.cells_of(x)), x)
    torch.testing.assert_close(model.cells_of(x), target)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_invalid_pixels_change_nothing(norm_pix_loss: bool) -> None:
    """Pixels of weight 0 enter neither the loss nor the statistics of their cell, whatever the target is there."""
    model = small(norm_pix_loss=norm_pix_loss)
    mask = model.draw_mask(generator=torch.Generator().manual_seed(1))
    x, rec = torch.randn(2, 2, 128, 128), torch.randn(2, 16, 2048)
    weights = torch.rand(x.shape) + 1
    weights[:, :, 10:20, 40:50] = 0
    weights[1, 0, :32, :32] = 0  # a whole cell of one band
    losses = []
    for value in (0.0, 1e3):
        altered = torch.where(weights > 0, x, torch.full_like(x, value))
        losses.append(model.losses(rec, altered, weights)[0])
    torch.testing.assert_close(losses[0], losses[1])
    if not norm_pix_loss:
        error = (model.images_of(rec) - x) ** 2
        torch.testing.assert_close(losses[0], (weights * error)[weights > 0].mean())
    assert torch.isfinite(model(x, weights, mask=mask).loss)


def test_token_weights_equal_spread_weights() -> None:
    model = small()
    x, rec, tokens = torch.randn(2, 2, 128, 128), torch.randn(2, 16, 2048), torch.rand(2, 16, 2) + 1
    pixels = tokens.transpose(1, 2).reshape(2, 2, 4, 1, 4, 1).expand(2, 2, 4, 32, 4, 32).reshape(x.shape)
    torch.testing.assert_close(model.losses(rec, x, tokens)[0], model.losses(rec, x, pixels)[0], rtol=1e-6, atol=0)


def test_every_trained_parameter_gets_a_gradient() -> None:
    for name in ("mixmim_tiny",):
        model = MixMIM(**model_config(name))
        model(torch.randn(2, 2, 128, 128)).loss.backward()
        for key, p in model.named_parameters():
            if key in ("absolute_pos_embed", "decoder_pos_embed"):
                assert not p.requires_grad, key
            else:
                assert p.grad is not None, key
                assert p.grad.abs().sum() > 0, key


def test_no_mask_tensor_in_stages_1_3_4() -> None:
    """The additive mask exists in stage 2 only; elsewhere windows have one source, or cells are sorted by source."""
    model = small()
    cells = model.prepare_mask(model.draw_mask())
    plans = []
    for index, (stage, tokens) in enumerate(zip(model.layers, (1024, 256, 64, 16), strict=True)):
        sizes, biases = model._attention_plan(stage, tokens, cells, is_sorted=index >= 2)
        plans.append((sizes, [tuple(group[0].shape for group in biases)[0]]))
    assert plans[0][1] == [(1, 1, 64, 64)]  # bias alone, shared by all windows
    assert plans[1][1] == [(4, 2, 64, 64)]  # bias + mask per window
    assert plans[2][1] == [(2, 4, 32, 32)]  # two groups of half the tokens
    assert plans[3][1] == [(2, 8, 8, 8)]


def test_activation_checkpointing_same_gradients() -> None:
    model = small()
    x, mask = torch.randn(2, 2, 128, 128), model.draw_mask()
    gradients = []
    for on in (False, True):
        model.activation_checkpointing = on
        model.zero_grad()
        model(x, mask=mask).loss.backward()
        gradients.append(model.patch_embed.proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_blocks_compile_without_graph_breaks_into_few_graphs() -> None:
    """A graph for each kind of block: 4 stages, 3 mergings, 1 decoder block; the embedding; last block and loss."""
    torch.compiler.reset()
    model = MixMIM(**model_config("mixmim_tiny"))
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_blocks(backend=counter)
    for seed in range(3):  # other masks of the same ratio need no further graph
        mask = model.draw_mask(generator=torch.Generator().manual_seed(seed))
        model(torch.randn(2, 2, 128, 128), mask=mask).loss.backward()
    assert counter.frame_count == 10
    blocks = [model.layers[2].blocks[0], model.layers[0].downsample, model.decoder_blocks[0]]
    sizes, biases = model._attention_plan(model.layers[2], 64, model.prepare_mask(mask), is_sorted=True)
    inputs = [(torch.randn(2, 64, 128), sizes, biases[0]), (torch.randn(2, 1024, 32),), (torch.randn(2, 16, 128),)]
    for block, arguments in zip(blocks, inputs, strict=True):
        assert torch._dynamo.explain(block.__class__.forward)(block, *arguments).graph_break_count == 0


def test_memory_budget_keeps_less_and_changes_nothing() -> None:
    """Half a budget saves less than half of a block's activations for the backward pass; gradients stay."""
    from util.compilation import limit_memory

    block, kept, gradients = small().layers[0].blocks[0], [], []
    x = torch.randn(2, 1024, block.norm1.normalized_shape[0])
    try:
        for share in (1.0, 0.5):
            torch.compiler.reset()
            limit_memory(share)
            compiled = torch.compile(block, backend="aot_eager_decomp_partition")
            sizes: list[int] = []
            count = lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                y = compiled(x, None, (torch.zeros(1, block.attn.num_heads, 64, 64),))
            block.zero_grad()
            y.square().sum().backward()
            kept.append(sum(sizes) - sum(p.numel() for p in block.parameters()))
            gradients.append(block.mlp.fc1.weight.grad.clone())
    finally:
        limit_memory(1.0)
        torch.compiler.reset()
    assert kept[1] < 0.75 * kept[0]
    torch.testing.assert_close(*gradients)


def test_classifiers_with_drop_path_compile_in_training_and_evaluation() -> None:
    """Rates differ from block to block, and the last batch of an evaluation is smaller: every block stays compiled."""
    torch.compiler.reset()
    config = {**encoder_config("mixmim_tiny"), "depths": (2, 2, 18, 2)}
    model = MixMIMEncoder(**config, drop_path_rate=0.1)
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_blocks(backend=counter)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            model.train()
            model(torch.randn(4, 2, 128, 128)).sum().backward()
            model.eval()
            with torch.no_grad():
                for batch in (4, 3):
                    model(torch.randn(batch, 2, 128, 128))
    # training: 4 stages, the first also without drop path (its first block), 3 mergings, the embedding
    # evaluation: 4 + 3 + 1, twice
    assert counter.frame_count == 5 + 3 + 1 + 2 * 8
    assert not torch._dynamo.config.optimize_ddp


def test_planned_biases_have_the_strides_of_the_fused_kernels() -> None:
    """The bias of every block, as planned: a last stride other than 1 costs float32 products on a GPU, in silence."""
    seen = []
    model = small()
    for block in (module for module in model.modules() if isinstance(module, MixMIMBlock)):
        block.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[2]) if len(inputs) > 2 else None)
    model(torch.randn(2, 2, 128, 128), mask=model.draw_mask())
    assert len(seen) == sum(SMALL["depths"])
    assert all(bias.stride(-1) == 1 for bias in seen)


def test_gradient_of_the_bias_rows_in_a_fixed_order() -> None:
    """The gather whose gradient is a matrix product: the same rows, gradient and second gradient as an index."""
    table = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 4, 4, 8, 2, 0, 4])
    weight = torch.randn(7, 3, dtype=torch.float64)
    rows = _GatherRows.apply(table, index)
    torch.testing.assert_close(rows, table[index])
    (found,) = torch.autograd.grad((rows * weight).sum(), table)
    (expected,) = torch.autograd.grad((table[index] * weight).sum(), table)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradgradcheck(lambda t: _GatherRows.apply(t, index), table)


def test_bfloat16_is_close() -> None:
    """Stated tolerance of bf16 autocast: 1 % of the loss."""
    model = small(norm_pix_loss=True)
    x, mask = torch.randn(4, 2, 128, 128), model.draw_mask()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, mask=mask).loss
    assert low.item() == pytest.approx(model(x, mask=mask).loss.item(), rel=1e-2)


def test_feature_pyramid() -> None:
    model = MixMIMEncoder(**encoder_config("mixmim_tiny")).eval()
    x = torch.randn(2, 2, 128, 128)
    maps = model.feature_pyramid(x)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 32, 32), (2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)]
    torch.testing.assert_close(maps[-1].mean((2, 3)), model.forward_features(x))
    moved = x.clone()
    moved[:, :, :32, 96:] += 1.0  # top right cell: only windows that hold it may move in the first stage
    change = (model.feature_pyramid(moved)[0] - maps[0]).abs().amax(1) > 0
    assert change[:, :8, 24:].all()
    assert not change[:, 8:, :].any()
    assert not change[:, :, :24].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 200}, "multiple of 128"),
        ({"img_size": 0}, "input size 0"),
        ({"window_size": (7, 7, 7, 7)}, "powers of two"),
        ({"patch_size": 8}, "stride"),
        ({"num_heads": (3, 8, 16, 32)}, "heads"),
        ({"window_size": (8, 8, 8)}, "one entry per stage"),
    ],
)
def test_sizes_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        MixMIM(**arguments)


def test_wrong_shapes_and_names() -> None:
    with pytest.raises(ValueError, match="expected \\(B, 2, 128, 128\\)"):
        small()(torch.zeros(2, 2, 120, 120))
    with pytest.raises(ValueError, match="expected \\(16,\\)"):
        small()(torch.zeros(2, 2, 128, 128), mask=torch.zeros(4))
    with pytest.raises(UserError, match="mixmim_tiny, mixmim_base"):
        model_config("mixmim_gigantic")
    with pytest.raises(TypeError):
        MixMIM(embed_dims=128)  # type: ignore[call-arg]
    assert list(MODELS) == ["mixmim_tiny", "mixmim_base", "mixmim_large", "mixmim_huge"]


def test_errors_beside_the_loss_by_hand() -> None:
    """The darkest and brightest tenth of 16 cells are two; weights do not enter, except that 0 leaves out."""
    model = MixMIM(**model_config("mixmim_tiny"))
    images = torch.zeros(1, 2, 128, 128)  # 16 cells of 32 x 32 px, 2 bands: a tenth is two of them
    images[..., :32, :32], images[..., 96:, 96:] = -3.0, -2.0
    images[..., :32, 32:64], images[..., 32:64, :32] = 4.0, 5.0
    weights = torch.full_like(images, 0.5)
    weights[..., :16, :32] = 0.0  # half of the darkest cell is invalid, and holds nonsense
    images[..., :16, :32] = -999.0
    rec = torch.zeros(1, 16, 2048)
    loss, plain, dark, bright = model.losses(rec, images, weights).tolist()
    assert plain == pytest.approx(2048 * (9 / 2 + 4 + 16 + 25) / (16 * 2048 - 1024), rel=1e-6)
    assert loss == pytest.approx(plain / 2, rel=1e-6)
    assert dark == pytest.approx((9 * 1024 + 4 * 2048) / (1024 + 2048), rel=1e-6)
    assert bright == pytest.approx((16 + 25) / 2, rel=1e-6)
    weights[..., 96:, 96:] = 0.0  # a cell without a valid pixel is not dark: the next one is, at 0
    assert model.losses(rec, images, weights).tolist()[2] == pytest.approx(9 * 1024 / (1024 + 2048), rel=1e-6)


def test_errors_carry_no_gradient() -> None:
    model = MixMIM(**model_config("mixmim_tiny"))
    out = model(torch.randn(2, 2, 128, 128), torch.rand(2, 2, 128, 128))
    gradient = torch.autograd.grad(out.losses.sum(), model.decoder_pred.weight, retain_graph=True)[0]
    assert torch.equal(gradient, torch.autograd.grad(out.loss, model.decoder_pred.weight)[0])
    assert out.losses.shape == (4,)
    assert torch.equal(out.losses[0], out.loss)
