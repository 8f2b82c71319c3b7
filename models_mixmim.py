"""Swin-MixMIM encoder and masked-autoencoder pretraining for SAR patches.

Sources: MixMAE/MixMIM (arXiv 2205.13137) for the architecture, SAR-W-MixMAE (arXiv 2503.01181) for the weighted loss.

Shape legend (values at 128 x 128 px and the base size)::

    B  batch            C  width of a stage (128, 256, 512, 1024)      h  heads      d  head width
    T  tokens of a stage (32*32 = 1024, 256, 64, 16)                   N  tokens of an attention window (64, 64, 64, 16)
    L  cells: the 32 x 32 px squares that are masked as a whole (4*4 = 16); one token each after the last stage

``mask`` is (L,) over cells in row-major order, shared by the batch: 0 shows the sample's own tokens, 1 the partner's
(the partner of sample i is sample B-1-i).

Token order. Tokens are kept in Z-order (Morton order, row bit lowest) inside square tiles, tiles row by row. In this
order every attention window, every mask cell and every 2 x 2 group that patch merging joins is a contiguous run at
*every* stage, so partitioning and merging are views instead of copies. Weights and state-dict keys do not depend on it:
tables are stored row-major as published and permuted when used. ``tests/plain_mixmim.py`` holds the textbook form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sarwmix.cells import cut, join, weighted_errors
from sarwmix.sizes import CELL_STRIDE, tile_of
from sarwmix.sizes import MODELS as MODELS
from sarwmix.sizes import encoder_config as encoder_config
from sarwmix.sizes import model_config as model_config
from sarwmix.window_attention import gather_rows, window_attention
from util.compilation import compile_methods, compile_modules
from util.drop_path import draw_drop_path
from util.errors import UserError
from util.gelu import gelu
from util.linear import Linear, linear
from util.pos_embed import sincos_table
from util.token_order import morton_order, relative_position_index, token_order


class CellMask(NamedTuple):
    """A mask prepared for the encoder; build it with :meth:`MixMIMEncoder.prepare_mask`.

    Attributes:
        cells: (L,) bool, row-major; True shows the partner.
        z_cells: (L,) bool, the same in the encoder's cell order.
        order: (L,) int64, cells of ``z_cells`` with False first (stable).
        num_own: how many cells show the sample's own content (False); a Python number, so that shapes are static.
    """

    cells: Tensor
    z_cells: Tensor
    order: Tensor
    num_own: int


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned relative-position bias where a window is given."""

    def __init__(self, dim: int, num_heads: int, window: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        if window is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
            self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        if window is not None:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(
        self, x: Tensor, sizes: tuple[int, ...] | None = None, biases: tuple[Tensor | None, ...] = (None,)
    ) -> Tensor:
        """Attend within groups of consecutive tokens.

        Args:
            x: (B, T, C) tokens in the encoder's order.
            sizes: tokens of each group, sum T. A group holds one or more windows. None: one window of all tokens.
            biases: per group (1 or W, h, n, n) with n tokens a window; the group has size / n windows.
        """
        outputs = []
        for qkv, bias in zip(self.qkv(x).split(sizes or (x.shape[1],), dim=1), biases, strict=True):
            window = x.shape[1] if bias is None else bias.shape[-1]
            outputs.append(window_attention(qkv, bias, self.num_heads, window=window))
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))


class Mlp(nn.Module):
    """Linear, GELU, Linear with a hidden width of 4 C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(gelu(self.fc1(x)))


class MixMIMBlock(nn.Module):
    """Pre-norm transformer block; encoder blocks attend in windows, decoder blocks over all tokens."""

    def __init__(self, dim: int, num_heads: int, window: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def attend(self, x: Tensor, *groups: Any, kept: Tensor | None = None) -> Tensor:
        """The first half; `groups` as in :meth:`WindowAttention.forward`."""
        attended = self.attn(self.norm1(x), *groups)
        return x + (attended if kept is None else attended * kept)

    def transform(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """The second half."""
        changed = self.mlp(self.norm2(x))
        return x + (changed if kept is None else changed * kept)

    def forward(
        self,
        x: Tensor,
        sizes: tuple[int, ...] | None = None,
        biases: tuple[Tensor | None, ...] = (None,),
        kept: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Args:
            sizes, biases: as in :meth:`WindowAttention.forward`.
            kept: (2, B, 1, 1), factors of stochastic depth of the two halves; they come from outside, so that one
                compiled graph serves all rates.
        """
        first, second = (None, None) if kept is None else kept.unbind()
        return self.transform(self.attend(x, sizes, biases, kept=first), second)


class PatchMerging(nn.Module):
    """Join 2 x 2 tokens: (B, T, C) -> (B, T / 4, 2 C). In Z-order the four are neighbours, so joining is a view."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return self.reduction(self.norm(x.reshape(batch, tokens // 4, 4 * width)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches -> tokens. ``proj`` is stored as a convolution; on ready patches it is one product."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T, in_chans * patch**2), channel-major as a convolution kernel -> (B, T, C)."""
        embedded = linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        # The residual stream has the type of the linear layers' results (bfloat16 under autocast) in every stage and in
        # the decoder; norms, softmax and the loss compute in float32 all the same.
        return self.norm(embedded).to(embedded.dtype)


class Stage(nn.Module):
    """Blocks of one resolution and the merging to the next."""

    z_position_index: Tensor

    def __init__(self, dim: int, depth: int, num_heads: int, window: int, downsample: bool) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(MixMIMBlock(dim, num_heads, window) for _ in range(depth))
        self.downsample = PatchMerging(dim) if downsample else None
        z = morton_order(window)
        index = relative_position_index(window)[z][:, z]
        self.register_buffer("z_position_index", index.flatten(), persistent=False)

    def relative_bias(self) -> Tensor:
        """Bias of all blocks at once, tokens of a window in Z-order: (depth, h, N, N).

        One gather for the stage: its backward adds rows of depth * h values instead of single numbers.
        """
        tables = torch.cat([cast(MixMIMBlock, block).attn.relative_position_bias_table for block in self.blocks], dim=1)
        n = self.window**2
        rows = gather_rows(tables, self.z_position_index)  # (N * N, depth * h)
        # Contiguous: the fused kernels ask for a last stride of 1 and fall back to float32 products in silence.
        return rows.t().contiguous().view(len(self.blocks), -1, n, n)


class MixMIMEncoder(nn.Module):
    """Hierarchical window-attention encoder without shifted windows.

    Args:
        img_size: side of the square input in pixels; a multiple of the tile (128 px for the published windows).
        patch_size: side of a token of the first stage in pixels; 4 (cells of 32 px are part of the method).
        in_chans: bands.
        embed_dim: width of the first stage; doubles with each stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        window_size: window side per stage in tokens; powers of two.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.

    Raises:
        UserError: sizes that do not fit, with the reason.
    """

    z_tokens: Tensor
    z_cells: Tensor
    cell_position: Tensor
    patch_pixels: Tensor

    def __init__(
        self,
        img_size: int = 128,
        patch_size: int = 4,
        in_chans: int = 2,
        embed_dim: int = 128,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (4, 8, 16, 32),
        window_size: tuple[int, ...] = (8, 8, 8, 4),
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.in_chans, self.embed_dim = img_size, patch_size, in_chans, embed_dim
        self.window_size = tuple(window_size)
        self.tile = tile_of(img_size, patch_size, depths, num_heads, window_size, embed_dim)
        self.activation_checkpointing = False
        self.num_features = embed_dim * 2 ** (len(depths) - 1)

        grid = img_size // patch_size
        self.grid = grid
        self.num_cells = (img_size // CELL_STRIDE) ** 2
        self.absolute_pos_embed = nn.Parameter(sincos_table(embed_dim, grid), requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.layers = nn.ModuleList(
            Stage(embed_dim * 2**i, depth, num_heads[i], window_size[i], downsample=i < len(depths) - 1)
            for i, depth in enumerate(depths)
        )
        self.drop_path_rate = drop_path_rate
        self.norm = nn.LayerNorm(self.num_features)

        # Constant permutations; row-major is what users and state dicts see, Z-order what the blocks work on.
        z_tokens = token_order(grid, self.tile)
        z_cells = token_order(img_size // CELL_STRIDE, max(1, self.tile * patch_size // CELL_STRIDE))
        pixels = torch.arange(in_chans * img_size * img_size).view(in_chans, grid, patch_size, grid, patch_size)
        patches = pixels.permute(1, 3, 0, 2, 4).reshape(grid * grid, -1)[z_tokens]
        self.register_buffer("z_tokens", z_tokens, persistent=False)
        self.register_buffer("z_cells", z_cells, persistent=False)
        self.register_buffer("cell_position", torch.argsort(z_cells), persistent=False)
        self.register_buffer("patch_pixels", patches.flatten(), persistent=False)
        for i in range(len(depths) - 1):  # row-major positions of the tokens of a stage, for maps of features
            back = torch.argsort(token_order(grid // 2**i, self.tile // 2**i))
            self.register_buffer(f"map_tokens_{i}", back, persistent=False)
        self.apply(init_linear)

    # ------------------------------------------------------------------ pieces

    def prepare_mask(self, mask: Tensor) -> CellMask:
        """Check a cell mask and precompute what the stages need.

        Args:
            mask: (L,) of 0 and 1, row-major. On a GPU this costs one host synchronisation; masks that live on the CPU
                (as drawn by :meth:`MixMIM.draw_mask`) cost none.
        """
        if mask.shape != (self.num_cells,):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected ({self.num_cells},): one value per cell")
        cells = mask > 0.5
        num_own = int((~cells).sum())
        device = self.z_cells.device
        cells = cells.to(device, non_blocking=True)
        z_cells = cells[self.z_cells]
        order = torch.argsort(z_cells.to(torch.uint8), stable=True)
        return CellMask(cells, z_cells, order, num_own)

    def patchify(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, T, in_chans * patch**2) pixels of each token, tokens in the encoder's order."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (self.in_chans, self.img_size, self.img_size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (B, {self.in_chans}, {self.img_size}, "
                f"{self.img_size}): bands first, resized to the model's input size"
            )
        width = self.in_chans * self.patch_size**2
        return images.flatten(1).index_select(1, self.patch_pixels).view(images.shape[0], -1, width)

    def embed(self, images: Tensor, mask: CellMask | None = None) -> Tensor:
        """Images -> tokens of the first stage with positions, (B, T, C) in the encoder's order.

        With ``mask``, cells that are 1 show the partner's pixels. Mixing pixels before the embedding equals mixing
        tokens after it, because embedding and norm act on each token alone.
        """
        patches = self.patchify(images)
        if mask is not None:
            shown = mask.z_cells.repeat_interleave(patches.shape[1] // self.num_cells, output_size=patches.shape[1])
            patches = torch.where(shown[None, :, None], patches.flip(0), patches)
        tokens = self.patch_embed(patches)
        return tokens + self.absolute_pos_embed.index_select(1, self.z_tokens).to(tokens.dtype)

    def encode(self, tokens: Tensor, mask: CellMask | None = None) -> Tensor:
        """Tokens of :meth:`embed` -> (B, L, 8 * embed_dim), cells row-major, after the last norm.

        With ``mask`` a token attends only to tokens of its window that come from the same source image.
        """
        return self.norm(self._run_stages(tokens, mask, None))

    def feature_pyramid(self, images: Tensor) -> list[Tensor]:
        """Output of each stage as a map: four tensors (B, C_s, H / s, W / s) at strides 4, 8, 16, 32."""
        maps: list[Tensor] = []
        last = self.norm(self._run_stages(self.embed(images), None, maps))
        side = self.img_size // CELL_STRIDE
        return [*maps, last.transpose(1, 2).reshape(images.shape[0], -1, side, side)]

    def forward_features(self, images: Tensor) -> Tensor:
        """Pooled features: (B, 8 * embed_dim), the mean over the final tokens."""
        return self.encode(self.embed(images)).mean(dim=1)

    forward = forward_features  # subclasses replace it

    def recompute_blocks(self) -> None:
        """Keep only the encoder blocks' inputs for the backward pass, which computes the rest again."""
        self.activation_checkpointing = True

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """torch.compile each block in place: a handful of distinct graphs (one per stage) instead of one huge one."""
        blocks = [module for module in self.modules() if isinstance(module, MixMIMBlock | PatchMerging)]
        compile_modules(blocks, backend)
        compile_methods(self, ("embed",), backend)

    # ------------------------------------------------------------------ stages

    def _run_stages(self, x: Tensor, mask: CellMask | None, maps: list[Tensor] | None) -> Tensor:
        """All stages; returns (B, L, 8C) row-major. ``maps`` collects the outputs of all but the last stage."""
        is_sorted = False
        stages = [cast(Stage, stage) for stage in self.layers]
        blocks = sum(len(stage.blocks) for stage in stages)
        kept = iter(draw_drop_path(x, blocks, self.drop_path_rate if self.training else 0.0))
        for index, stage in enumerate(stages):
            cell_tokens = x.shape[1] // self.num_cells
            single_window = all(later.window == self.grid // 2 ** (index + i) for i, later in enumerate(stages[index:]))
            if mask is not None and not is_sorted and single_window and 0 < mask.num_own < self.num_cells:
                # From here on one window spans the image: sort cells by source once, then attend per source.
                x = x.view(x.shape[0], self.num_cells, cell_tokens, -1).index_select(1, mask.order).flatten(1, 2)
                is_sorted = True
            sizes, biases = self._attention_plan(stage, x.shape[1], mask, is_sorted)
            for block, block_biases in zip(stage.blocks, biases, strict=True):
                if self.activation_checkpointing and self.training:  # blocks draw nothing: no generator to save
                    arguments = (x, sizes, block_biases, next(kept))
                    x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, sizes, block_biases, next(kept))
            if stage.downsample is not None:
                if maps is not None:
                    maps.append(self._as_map(x, index))
                x = stage.downsample(x)
        position = self.cell_position
        if is_sorted:
            assert mask is not None
            position = torch.argsort(mask.order).index_select(0, position)
        return x.index_select(1, position)

    def _attention_plan(
        self, stage: Stage, tokens: int, mask: CellMask | None, is_sorted: bool
    ) -> tuple[tuple[int, ...], list[tuple[Tensor, ...]]]:
        """Group sizes of a stage and, per block, the additive bias of each group."""
        bias = stage.relative_bias()  # (depth, h, N, N)
        n = stage.window**2
        cell_tokens = tokens // self.num_cells
        if is_sorted:
            assert mask is not None
            runs = mask.order[:, None] * cell_tokens + torch.arange(cell_tokens, device=mask.order.device)
            index = runs.flatten()  # window position of each sorted token
            own = mask.num_own * cell_tokens
            own_bias, partner_bias = (
                bias.index_select(2, group).index_select(3, group) for group in (index[:own], index[own:])
            )
            if 2 * own == tokens:  # the usual case, mask ratio 0.5: both groups as one batch of two windows
                return (tokens,), [(pair,) for pair in torch.stack([own_bias, partner_bias], dim=1)]
            return (own, tokens - own), [(a[None], b[None]) for a, b in zip(own_bias, partner_bias, strict=True)]
        if mask is None or n <= cell_tokens:  # a window inside one cell has a single source
            return (tokens,), [(b[None],) for b in bias]
        source = mask.z_cells.repeat_interleave(cell_tokens, output_size=tokens).view(-1, n)  # (W, N)
        crossing = source[:, :, None] != source[:, None, :]
        blocked = torch.zeros(crossing.shape, dtype=bias.dtype, device=bias.device)
        # Large and finite: every token sees at least itself, so exp() of it is exactly 0 in any precision.
        blocked = blocked.masked_fill(crossing, -1e4)
        return (tokens,), [(b[None] + blocked[:, None],) for b in bias]

    def _as_map(self, x: Tensor, stage: int) -> Tensor:
        side = self.grid // 2**stage
        return (
            x.index_select(1, self.get_buffer(f"map_tokens_{stage}"))
            .transpose(1, 2)
            .reshape(x.shape[0], -1, side, side)
        )


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers and the patch embedding, as in MAE."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------- pretraining


class MixMIMOutput(NamedTuple):
    """Result of :meth:`MixMIM.forward`.

    Attributes:
        loss: scalar, mean of weight * squared error (z-score units, or cell-standardised with ``norm_pix_loss``).
        mask: (L,) float, the mask that was used.
        pred: (2B, L, 32 * 32 * in_chans), last axis ordered row, column, band; None unless asked for.
        losses: (4,) the loss again, then the errors of :mod:`sarwmix.plain_errors`; see :meth:`MixMIM.losses`.
    """

    loss: Tensor
    mask: Tensor
    pred: Tensor | None
    losses: Tensor


class MixMIM(MixMIMEncoder):
    """Mixed masked autoencoder (arXiv 2205.13137, Section 3) with weighted reconstruction (arXiv 2503.01181).

    Args:
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        decoder_num_heads: heads of each.
        norm_pix_loss: standardise each 32 x 32 x bands cell of the target (mean, unbiased variance, eps 1e-6).
        encoder: see :class:`MixMIMEncoder`.
    """

    def __init__(
        self,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        **encoder: Any,
    ) -> None:
        super().__init__(**encoder)
        self.norm_pix_loss = norm_pix_loss
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_table(decoder_dim, self.img_size // CELL_STRIDE), requires_grad=False
        )
        self.decoder_embed = Linear(self.num_features, decoder_dim)
        self.decoder_blocks = nn.ModuleList(MixMIMBlock(decoder_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = Linear(decoder_dim, CELL_STRIDE**2 * self.in_chans)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """The encoder's and the decoder's blocks, and all that follows the decoder's last but one, down to the loss."""
        super().compile_blocks(backend)
        compile_methods(self, ("predict_cells", "finish"), backend)

    def draw_mask(self, mask_ratio: float = 0.5, generator: torch.Generator | None = None, samples: int = 1) -> Tensor:
        """One random mask on the CPU for all samples: (L,) float with exactly ``int(L * mask_ratio)`` ones.

        Raises:
            UserError: a ratio that hides nothing or everything.
        """
        count = int(self.num_cells * mask_ratio)
        if not 0.0 < mask_ratio < 1.0 or not 0 < count < self.num_cells:
            raise UserError(
                f"mask ratio {mask_ratio} masks {count} of {self.num_cells} cells; it must be inside (0, 1) and leave "
                f"both kinds: at least {1 / self.num_cells:.4f} here (0.5 is the published value)"
            )
        mask = torch.zeros(self.num_cells)
        mask[torch.randperm(self.num_cells, generator=generator)[:count]] = 1.0
        return mask

    def cells_of(self, images: Tensor) -> Tensor:
        """(B, bands, H, W) -> (B, L, 32 * 32 * bands), cells row-major, last axis ordered row, column, band."""
        return cut(images, CELL_STRIDE)

    def images_of(self, cells: Tensor) -> Tensor:
        """Inverse of :meth:`cells_of`."""
        return join(cells, CELL_STRIDE, self.in_chans)

    def decode(self, latent: Tensor, mask: CellMask, *, both: bool) -> Tensor:
        """Predict cell contents.

        The decoder reads 2B sequences: in the first B the masked cells are replaced by the mask token, in the second B
        the visible ones. Each sample is rebuilt only where its tokens were hidden in the sequence that is read.

        Args:
            latent: (B, L, 8C) of :meth:`encode`.
            mask: the mask that mixed the input.
            both: True returns all 2B sequences; False only the B x L tokens the loss reads, in (B, L, ...): the other
                half is dropped before the last block's MLP, since nothing after it mixes tokens.
        """
        return self.predict_cells(self._decode_all_but_last(latent, mask), mask.cells, both=both)

    def _decode_all_but_last(self, latent: Tensor, mask: CellMask) -> Tensor:
        """(B, L, 8C) -> (2B, L, decoder_dim), the last block's input."""
        hidden = mask.cells[None, :, None]
        x = self.decoder_embed(latent)
        token = self.mask_token.to(x.dtype)
        x = torch.cat([torch.where(hidden, token, x), torch.where(hidden, x, token)])
        x = x + self.decoder_pos_embed.to(x.dtype)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return x

    def predict_cells(self, x: Tensor, cells: Tensor, *, both: bool) -> Tensor:
        """The decoder's last block, norm and projection; arguments as in :meth:`decode`."""
        batch = x.shape[0] // 2
        last = cast(MixMIMBlock, self.decoder_blocks[-1])
        x = last.attend(x)
        if not both:
            x = torch.where(cells[None, :, None], x[:batch], x[batch:].flip(0))
        return self.decoder_pred(self.decoder_norm(last.transform(x)))

    def finish(self, x: Tensor, cells: Tensor, images: Tensor, weights: Tensor | None) -> Tensor:
        """From the last decoder block's input to the :meth:`losses`."""
        return self.losses(self.predict_cells(x, cells, both=False), images, weights)

    def merge_prediction(self, pred: Tensor, mask: Tensor) -> Tensor:
        """Both halves of a full prediction (2B, L, P) -> each sample's reconstruction (B, L, P)."""
        hidden = (mask > 0.5).to(pred.device)[None, :, None]
        first, second = pred.chunk(2)
        return torch.where(hidden, first, second.flip(0))

    def losses(self, rec: Tensor, images: Tensor, weights: Tensor | None) -> Tensor:
        """Squared errors of reconstructed cells: (4,) the weighted loss, then
        :data:`sarwmix.plain_errors.NAMES`, which carry no gradient.

        Args:
            rec: (B, L, P) predictions.
            images: (B, bands, H, W) what they should be, standardised.
            weights: None, (B, bands, H, W) or (B, L, bands); 0 marks invalid pixels, which count in neither numerator
                nor denominator.
        """
        if weights is not None and weights.ndim == 3:
            weights = weights.repeat(1, 1, CELL_STRIDE**2)  # last axis ordered row, column, band
        elif weights is not None:
            weights = self.cells_of(weights)
        return weighted_errors(rec, self.cells_of(images), weights, standardise=self.norm_pix_loss)

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        weights: Tensor | None = None,
        *,
        mask: Tensor | CellMask | None = None,
        mask_ratio: float = 0.5,
        return_pred: bool = False,
        target: Tensor | None = None,
    ) -> MixMIMOutput:
        """One pretraining step's loss.

        Args:
            images: (B, bands, H, W), z-score.
            weights: loss weights, same shape or per cell (B, L, bands); 0 = invalid pixel. None: plain MixMAE.
            mask: (L,) of 0/1, row-major, or prepared by :meth:`prepare_mask`; drawn when None.
            mask_ratio: share of masked cells when drawn.
            return_pred: also return all 2B predictions.
            target: what to reconstruct, (B, bands, H, W) standardised; None: the images.
        """
        if mask is None:
            mask = self.draw_mask(mask_ratio)
        cell_mask = mask if isinstance(mask, CellMask) else self.prepare_mask(mask)
        goal = images if target is None else target
        decoded = self._decode_all_but_last(self.encode(self.embed(images, cell_mask), cell_mask), cell_mask)
        shown = cell_mask.cells.to(images.dtype)
        if not return_pred:
            losses = self.finish(decoded, cell_mask.cells, goal, weights)
            return MixMIMOutput(losses[0], shown, None, losses)
        pred = self.predict_cells(decoded, cell_mask.cells, both=True)
        losses = self.losses(self.merge_prediction(pred, cell_mask.cells), goal, weights)
        return MixMIMOutput(losses[0], shown, pred, losses)
