"""Plain masked autoencoders (arXiv 2111.06377) with timm's ViTs, under the weighted loss of this project.

A control for studies of the weighting: does what holds for Swin-MixMIM hold for the encoder that most of the field
pretrains? The encoder is timm's, with its names, so that ``main_finetune.py --model mae_vit_small`` (or timm's own
``vit_small_patch16_224``) takes the weights. As in MixMIM the loss counts each hidden patch's valid pixels by their
weight; other than there, visible patches are not predicted at all, and each sample has a mask of its own.

Shape legend: B samples, N patches of 16 px (64 at 128 px), n of them visible, D and E widths of encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models_mixmim import MixMIMOutput, init_linear
from sarwmix.cells import cut, join, spread, weighted_errors
from sarwmix.models.backbones import create_encoder
from sarwmix.models.settings import ModelSettings
from sarwmix.sizes import CELL_STRIDE, MAE_VITS
from util.compilation import compile_modules
from util.errors import UserError
from util.pos_embed import sincos_table

PATCH = 16


class PatchMask(NamedTuple):
    """Masks of a batch, or one for all samples (B = 1), on the model's device.

    Attributes:
        order: (B, N) patches of each sample, visible ones first.
        back: (B, N) its inverse.
        hidden: (B, N) bool.
        visible: n, a Python number, so that shapes are static.
    """

    order: Tensor
    back: Tensor
    hidden: Tensor
    visible: int


class MaskedViT(nn.Module):
    """A ViT that sees some patches, and a small one that predicts the others.

    Args:
        name: of `sarwmix.sizes.MAE_VITS`.
        img_size: side of the input in pixels, a multiple of 32.
        in_chans: bands.
        norm_pix_loss: standardise each 16 x 16 x bands patch of the target.

    Raises:
        UserError: another name or size.
    """

    def __init__(self, name: str, img_size: int = 128, in_chans: int = 2, norm_pix_loss: bool = False) -> None:
        super().__init__()
        if img_size % CELL_STRIDE:
            raise UserError(f"--input_size {img_size} is no multiple of {CELL_STRIDE} px, which {name} needs")
        self.name, self.img_size, self.in_chans, self.norm_pix_loss = name, img_size, in_chans, norm_pix_loss
        size = MAE_VITS[name]
        self.encoder: Any = create_encoder(ModelSettings(size["timm"], img_size, in_chans))
        width, side = int(self.encoder.embed_dim), img_size // PATCH
        self.num_cells = side**2
        from timm.models.vision_transformer import Block

        decoder, heads = size["decoder_dim"], size["decoder_num_heads"]
        self.decoder_embed = nn.Linear(width, decoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder))
        self.decoder_pos_embed = nn.Parameter(_with_class_token(sincos_table(decoder, side)), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder, heads, qkv_bias=True) for _ in range(size["decoder_depth"]))
        self.decoder_norm = nn.LayerNorm(decoder)
        self.decoder_pred = nn.Linear(decoder, PATCH**2 * in_chans)
        self.apply(init_linear)
        # As published: fixed sine and cosine positions, which timm keeps as a parameter.
        with torch.no_grad():
            self.encoder.pos_embed.copy_(_with_class_token(sincos_table(width, side)))
        self.encoder.pos_embed.requires_grad_(False)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    # The same calls as of MixMIM, so that one engine trains both.

    def draw_mask(self, mask_ratio: float = 0.75, generator: torch.Generator | None = None, samples: int = 1) -> Tensor:
        """A mask a sample on the CPU: (samples, N) float with exactly ``int(N * mask_ratio)`` ones each.

        Raises:
            UserError: a ratio that hides nothing or everything.
        """
        count = int(self.num_cells * mask_ratio)
        if not 0.0 < mask_ratio < 1.0 or not 0 < count < self.num_cells:
            raise UserError(
                f"mask ratio {mask_ratio} masks {count} of {self.num_cells} patches; it must be inside (0, 1) and "
                "leave both kinds (0.75 is MAE's value)"
            )
        drawn = torch.rand(samples, self.num_cells, generator=generator)
        return torch.zeros(samples, self.num_cells).scatter_(1, drawn.argsort(dim=1)[:, :count], 1.0)

    def prepare_mask(self, mask: Tensor) -> PatchMask:
        """(B, N) or (N,) of 0 and 1 (hidden) -> what the model needs; every row hides as many patches."""
        mask = mask.view(-1, self.num_cells) > 0.5
        visible = int((~mask[0]).sum())
        if bool(((~mask).sum(dim=1) != visible).any()):
            raise ValueError("each sample must show as many patches as the others")
        mask = mask.to(self.mask_token.device, non_blocking=True)
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        return PatchMask(order, order.argsort(dim=1), mask, visible)

    def recompute_blocks(self) -> None:
        """Keep only the encoder blocks' inputs for the backward pass, which computes the rest again."""
        self.encoder.set_grad_checkpointing(True)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """torch.compile each block in place."""
        compile_modules([*self.encoder.blocks, *self.decoder_blocks], backend)

    def cells_of(self, images: Tensor) -> Tensor:
        """(B, bands, H, W) -> (B, N, 16 * 16 * bands), patches row-major, last axis ordered row, column, band."""
        return cut(images, PATCH)

    def images_of(self, cells: Tensor) -> Tensor:
        """Inverse of :meth:`cells_of`."""
        return join(cells, PATCH, self.in_chans)

    def encode(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, bands, H, W) -> (B, 1 + n, D): class token and visible patches, after the last norm."""
        encoder = self.encoder
        tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        shown = mask.order[:, : mask.visible].expand(len(images), -1)
        tokens = tokens.gather(1, shown[:, :, None].expand(-1, -1, tokens.shape[-1]))
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = encoder.norm_pre(torch.cat([first.to(tokens.dtype), tokens], dim=1))
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x)

    def decode(self, latent: Tensor, mask: PatchMask) -> Tensor:
        """(B, 1 + n, D) -> (B, N, 16 * 16 * bands) predictions of all patches, row-major."""
        x = self.decoder_embed(latent)
        hidden = self.mask_token.to(x.dtype).expand(len(x), self.num_cells - mask.visible, -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        back = mask.back.expand(len(x), -1)[:, :, None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, :1], patches.gather(1, back)], dim=1) + self.decoder_pos_embed.to(x.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def losses(self, rec: Tensor, images: Tensor, weights: Tensor | None, hidden: Tensor) -> Tensor:
        """As `models_mixmim.MixMIM.losses`, over the hidden patches: (4,).

        Args:
            rec: (B, N, 16 * 16 * bands).
            images: (B, bands, H, W) what they should be, standardised.
            weights: None, (B, bands, H, W), or (B, cells of 32 px, bands); 0 marks invalid pixels.
            hidden: (B, N) or (1, N) bool; the others count in nothing.
        """
        target = self.cells_of(images)
        counted = hidden[:, :, None].expand_as(target).to(target.dtype)
        if weights is not None and weights.ndim == 3:
            weights = spread(weights, CELL_STRIDE)
        if weights is not None:
            counted = counted * self.cells_of(weights)
        return weighted_errors(rec, target, counted, standardise=self.norm_pix_loss)

    def forward(
        self,
        images: Tensor,
        weights: Tensor | None = None,
        *,
        mask: Tensor | PatchMask | None = None,
        mask_ratio: float = 0.75,
        return_pred: bool = False,
        target: Tensor | None = None,
    ) -> MixMIMOutput:
        """One pretraining step's loss; arguments as of `models_mixmim.MixMIM.forward`, ``pred`` is (B, N, ...)."""
        if mask is None:
            mask = self.draw_mask(mask_ratio, samples=len(images))
        prepared = mask if isinstance(mask, PatchMask) else self.prepare_mask(mask)
        pred = self.decode(self.encode(images, prepared), prepared)
        losses = self.losses(pred, images if target is None else target, weights, prepared.hidden)
        return MixMIMOutput(losses[0], prepared.hidden.to(images.dtype), pred if return_pred else None, losses)


def _with_class_token(table: Tensor) -> Tensor:
    """(1, N, D) -> (1, 1 + N, D) with zeros for the class token."""
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
