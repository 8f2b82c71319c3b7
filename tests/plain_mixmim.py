"""The textbook form of Swin-MixMIM: row-major tokens, window copies, explicit masked softmax, patch merging by slices.

Oracle of tests/test_models_mixmim.py and the baseline of scripts/benchmark.py. It loads the state dict of
``models_mixmim.MixMIM`` unchanged. Written from arXiv 2205.13137 for clarity, not speed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.pos_embed import sincos_table


def window_partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window**2, C)."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, c)


def window_reverse(windows: Tensor, window: int, side: int) -> Tensor:
    """Inverse of :func:`window_partition`."""
    b = windows.shape[0] // (side // window) ** 2
    x = windows.view(b, side // window, side // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, side, side, -1)


class PlainAttention(nn.Module):
    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        at = [(r, c) for r in range(window) for c in range(window)]
        index = [[(r - s + window - 1) * (2 * window - 1) + c - d + window - 1 for s, d in at] for r, c in at]
        self.register_buffer("relative_position_index", torch.tensor(index))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``x`` (windows, N, C); ``mask`` (windows, N, 1) of 0/1 source values."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = scores + bias.view(n, n, self.heads).permute(2, 0, 1)[None]
        if mask is not None:
            same = mask @ mask.transpose(-2, -1) + (1 - mask) @ (1 - mask).transpose(-2, -1)
            scores = scores - 1e30 * (1 - same)[:, None]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class PlainMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PlainBlock(nn.Module):
    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp, self.window = PlainAttention(dim, window, heads), PlainMlp(dim), window

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, c = x.shape
        side = int(t**0.5)
        windows = window_partition(self.norm1(x).view(b, side, side, c), self.window)
        if mask is not None:
            mask = window_partition(mask.repeat(b, 1, 1).view(b, side, side, 1), self.window)
        x = x + window_reverse(self.attn(windows, mask), self.window, side).view(b, t, c)
        return x + self.mlp(self.norm2(x))


class PlainMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        x = x.view(b, int(t**0.5), int(t**0.5), c)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, -1).view(b, -1, 4 * c)))


class PlainStage(nn.Module):
    def __init__(self, dim: int, depth: int, window: int, heads: int, downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(dim, window, heads) for _ in range(depth))
        self.downsample = PlainMerging(dim) if downsample else None


class PlainPatchEmbed(nn.Module):
    def __init__(self, patch: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_chans, dim, patch, patch), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class PlainDecoderAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class PlainDecoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = PlainDecoderAttention(dim, heads), PlainMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainMixMIM(nn.Module):
    """Same arguments, keys and result as ``models_mixmim.MixMIM``, computed the obvious way."""

    def __init__(
        self,
        img_size: int = 128,
        patch_size: int = 4,
        in_chans: int = 2,
        embed_dim: int = 128,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (4, 8, 16, 32),
        window_size: tuple[int, ...] = (8, 8, 8, 4),
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.absolute_pos_embed = nn.Parameter(sincos_table(embed_dim, img_size // patch_size), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_dim, img_size // 32), requires_grad=False)
        self.patch_embed = PlainPatchEmbed(patch_size, in_chans, embed_dim)
        self.layers = nn.ModuleList(
            PlainStage(embed_dim * 2**i, depths[i], window_size[i], num_heads[i], i < 3) for i in range(4)
        )
        self.norm = nn.LayerNorm(embed_dim * 8)
        self.decoder_embed = nn.Linear(embed_dim * 8, decoder_dim)
        self.decoder_blocks = nn.ModuleList(
            PlainDecoderBlock(decoder_dim, decoder_num_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, 32 * 32 * in_chans)

    def encode(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` (L,) of 0/1 or None -> (B, L, 8C)."""
        x = self.patch_embed(images)
        side = int(x.shape[1] ** 0.5)
        stage_masks: list[Tensor | None] = [None] * 4
        if mask is not None:
            cells = int(mask.numel() ** 0.5)
            grid = mask.view(1, 1, cells, cells)
            for i in range(4):
                scaled = F.interpolate(grid, size=(side >> i, side >> i), mode="nearest")
                stage_masks[i] = scaled.reshape(1, -1, 1)
            m = stage_masks[0]
            assert m is not None
            x = x * (1 - m) + x.flip(0) * m
        x = x + self.absolute_pos_embed
        for stage, stage_mask in zip(self.layers, stage_masks, strict=True):
            for block in stage.blocks:
                x = block(x, stage_mask)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return self.norm(x)

    def decode(self, latent: Tensor, mask: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        m = mask.view(1, -1, 1)
        x = torch.cat([x * (1 - m) + self.mask_token * m, x * m + self.mask_token * (1 - m)])
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    @staticmethod
    def patchify(images: Tensor) -> Tensor:
        b, c, h, w = images.shape
        x = images.reshape(b, c, h // 32, 32, w // 32, 32)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(b, (h // 32) * (w // 32), 32 * 32 * c)

    def forward(self, images: Tensor, weights: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, latent, pred); ``weights`` (B, C, H, W)."""
        latent = self.encode(images, mask)
        pred = self.decode(latent, mask)
        target = self.patchify(images)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        first, second = pred.chunk(2)
        m = mask.view(1, -1, 1)
        rec = first * m + second.flip(0) * (1 - m)
        w = torch.ones_like(target) if weights is None else self.patchify(weights)
        return (w * (rec - target) ** 2).mean(), latent, pred
