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

from sarwmix.window_attention import window_attention
from util.compilation import compile_methods, compile_modules
from util.errors import UserError
from util.linear import Linear, gelu_linear, linear, norm_linear
from util.pos_embed import sincos_table

CELL_STRIDE = 32  # pixels per side of a mask cell = stride of the last stage = 4 * 2**3

_WINDOWS = (8, 8, 8, 4)
MODELS: dict[str, dict[str, Any]] = {
    # At most 3 M parameters with its decoder: for tests, the demo and laptops.
    "mixmim_tiny": {
        "embed_dim": 32,
        "depths": (1, 1, 4, 1),
        "num_heads": (2, 4, 8, 16),
        "window_size": _WINDOWS,
        "decoder_dim": 128,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
    },
    "mixmim_base": {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "window_size": _WINDOWS,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_num_heads": 16,
    },
    "mixmim_large": {
        "embed_dim": 192,
        "depths": (2, 2, 18, 2),
        "num_heads": (6, 12, 24, 48),
        "window_size": _WINDOWS,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_num_heads": 16,
    },
    "mixmim_huge": {
        "embed_dim": 352,
        "depths": (2, 2, 18, 2),
        "num_heads": (11, 22, 44, 88),
        "window_size": _WINDOWS,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_num_heads": 16,
    },
}

_ENCODER_KEYS = ("embed_dim", "depths", "num_heads", "window_size")


def model_config(name: str) -> dict[str, Any]:
    """The size table's row for ``name`` (a copy).

    Raises:
        UserError: unknown name; the message lists what exists.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; available: {', '.join(MODELS)}")
    return dict(MODELS[name])


def encoder_config(name: str) -> dict[str, Any]:
    """Only the encoder's arguments of the size table's row, for classifiers."""
    row = model_config(name)
    return {key: row[key] for key in _ENCODER_KEYS}


def morton_order(side: int) -> Tensor:
    """Row-major indices of a ``side`` x ``side`` square in Z-order, row bit lowest.

    The first four entries of any aligned 2 x 2 group are (0,0), (1,0), (0,1), (1,1): the order in which patch merging
    concatenates. ``side`` must be a power of two. Returns int64 (side * side,).
    """
    order = torch.zeros(1, 1, dtype=torch.long)  # maps (row, col) -> z position, built by doubling
    size = 1
    while size < side:
        quarter = size * size
        order = torch.cat(
            [
                torch.cat([order, order + 2 * quarter], dim=1),
                torch.cat([order + quarter, order + 3 * quarter], dim=1),
            ],
            dim=0,
        )
        size *= 2
    return torch.argsort(order.flatten())


def token_order(side: int, tile: int) -> Tensor:
    """Row-major indices of a ``side`` x ``side`` grid, tile by tile, Z-order inside each tile. int64 (side * side,)."""
    grid = torch.arange(side * side).view(side // tile, tile, side // tile, tile).permute(0, 2, 1, 3)
    return grid.reshape(-1, tile * tile)[:, morton_order(tile)].flatten()


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each (query, key) pair of a window, row-major. int64 (window**2, window**2)."""
    rows, cols = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, cols = rows.flatten(), cols.flatten()
    d_row = rows[:, None] - rows[None, :] + window - 1
    d_col = cols[:, None] - cols[None, :] + window - 1
    return d_row * (2 * window - 1) + d_col


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


class _GatherRows(torch.autograd.Function):
    """table[index]; its gradient is a product with a one-hot matrix, whose order of additions is fixed.

    The gradient of an ordinary gather adds with atomics on a GPU: repeats of a step would differ in the last bits.
    """

    @staticmethod
    def forward(table: Tensor, index: Tensor) -> Tensor:
        return table.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.rows = inputs[0].shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        with torch.autocast(grads[0].device.type, enabled=False):
            one_hot = (index == torch.arange(ctx.rows, device=index.device)[:, None]).to(grads[0].dtype)
            return one_hot @ grads[0], None


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned relative-position bias."""

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, norm: nn.LayerNorm, sizes: tuple[int, ...], biases: tuple[Tensor, ...]) -> Tensor:
        """Attend within groups of consecutive tokens.

        Args:
            x: (B, T, C) tokens in the encoder's order.
            norm: applied to them first.
            sizes: tokens of each group, sum T. A group holds one or more windows.
            biases: per group (1 or W, h, n, n) with n tokens a window; the group has size / n windows.
        """
        outputs = []
        for qkv, bias in zip(norm_linear(x, norm, self.qkv).split(sizes, dim=1), biases, strict=True):
            outputs.append(window_attention(qkv, bias, self.num_heads, window=bias.shape[-1]))
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))


class Mlp(nn.Module):
    """Linear, GELU, Linear with a hidden width of 4 C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """(..., C) -> (..., C); ``norm`` is applied first."""
        return gelu_linear(norm_linear(x, norm, self.fc1), self.fc2.weight, self.fc2.bias)


def draw_drop_path(x: Tensor, rate: float) -> Tensor:
    """Factors of stochastic depth (arXiv 1603.09382), (B, 1, ...): 0 with probability ``rate``, else 1 / (1 - rate)."""
    keep = 1.0 - rate
    return torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)


class MixMIMBlock(nn.Module):
    """Pre-norm transformer block with window attention."""

    def __init__(self, dim: int, window: int, num_heads: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.drop_path_rate = drop_path_rate

    def draw_drop_path(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Factors of the two residuals in training; outside of `forward`, whose graph then serves all rates."""
        if self.drop_path_rate == 0.0 or not self.training:
            return None
        return draw_drop_path(x, self.drop_path_rate), draw_drop_path(x, self.drop_path_rate)

    def forward(
        self,
        x: Tensor,
        sizes: tuple[int, ...],
        biases: tuple[Tensor, ...],
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Args:
            sizes, biases: as in :meth:`WindowAttention.forward`.
            kept: factors of :meth:`draw_drop_path`.
        """
        attended = self.attn(x, self.norm1, sizes, biases)
        x = x + (attended if kept is None else attended * kept[0])
        changed = self.mlp(x, self.norm2)
        return x + (changed if kept is None else changed * kept[1])


class PatchMerging(nn.Module):
    """Join 2 x 2 tokens: (B, T, C) -> (B, T / 4, 2 C). In Z-order the four are neighbours, so joining is a view."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return norm_linear(x.reshape(batch, tokens // 4, 4 * width), self.norm, self.reduction)


class PatchEmbed(nn.Module):
    """Non-overlapping patches -> tokens. ``proj`` is stored as a convolution; on ready patches it is one Linear."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T, in_chans * patch**2), channel-major as a convolution kernel -> (B, T, C)."""
        return self.norm(linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class Stage(nn.Module):
    """Blocks of one resolution and the merging to the next."""

    z_position_index: Tensor

    def __init__(
        self, dim: int, depth: int, num_heads: int, window: int, drop_path_rates: list[float], downsample: bool
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(MixMIMBlock(dim, window, num_heads, rate) for rate in drop_path_rates[:depth])
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
        index = self.z_position_index
        rows = _GatherRows.apply(tables, index) if tables.is_cuda else tables.index_select(0, index)  # (N*N, depth*h)
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
        self.tile = self._check_sizes(img_size, patch_size, depths, num_heads, window_size, embed_dim)
        self.activation_checkpointing = False
        self.num_features = embed_dim * 2 ** (len(depths) - 1)

        grid = img_size // patch_size
        self.grid = grid
        self.num_cells = (img_size // CELL_STRIDE) ** 2
        self.absolute_pos_embed = nn.Parameter(sincos_table(embed_dim, grid), requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            self.layers.append(
                Stage(
                    embed_dim * 2**i,
                    depth,
                    num_heads[i],
                    window_size[i],
                    rates[first : first + depth],
                    downsample=i < len(depths) - 1,
                )
            )
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

    @staticmethod
    def _check_sizes(
        img_size: int,
        patch_size: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window_size: tuple[int, ...],
        embed_dim: int,
    ) -> int:
        if patch_size * 2 ** (len(depths) - 1) != CELL_STRIDE:
            raise UserError(
                f"patch_size {patch_size} with {len(depths)} stages has stride {patch_size * 2 ** (len(depths) - 1)}; "
                f"the mask cells of the method are {CELL_STRIDE} px: use patch_size 4 and 4 stages"
            )
        if not len(depths) == len(num_heads) == len(window_size):
            raise UserError(
                f"depths {depths}, num_heads {num_heads} and window_size {window_size} must have one entry per stage"
            )
        for stage, (window, heads) in enumerate(zip(window_size, num_heads, strict=True)):
            if window < 1 or window & (window - 1):
                raise UserError(
                    f"window_size[{stage}] is {window}; windows must be powers of two (1, 2, 4, 8, 16, ...)"
                )
            if (embed_dim * 2**stage) % heads:
                raise UserError(f"width {embed_dim * 2**stage} of stage {stage} is not divisible by its {heads} heads")
        # A tile is the smallest square, in tokens of stage 0, that holds whole windows and whole cells at each stage.
        tile = max([window * 2**stage for stage, window in enumerate(window_size)] + [CELL_STRIDE // patch_size])
        if img_size <= 0 or img_size % (tile * patch_size):
            raise UserError(
                f"input size {img_size} px does not fit: windows {tuple(window_size)} need a multiple of "
                f"{tile * patch_size} px ({tile} tokens of {patch_size} px hold whole windows at every stage); "
                f"choose --input_size {tile * patch_size} or a multiple of it"
            )
        return tile

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
        return self.patch_embed(patches) + self.absolute_pos_embed.index_select(1, self.z_tokens)

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

    def forward(self, images: Tensor) -> Tensor:
        """Same as :meth:`forward_features`; subclasses replace it."""
        return self.forward_features(images)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """torch.compile each block in place: a handful of distinct graphs (one per stage) instead of one huge one."""
        blocks = [module for module in self.modules() if isinstance(module, MixMIMBlock | PatchMerging | DecoderBlock)]
        compile_modules(blocks, backend)

    # ------------------------------------------------------------------ stages

    def _run_stages(self, x: Tensor, mask: CellMask | None, maps: list[Tensor] | None) -> Tensor:
        """All stages; returns (B, L, 8C) row-major. ``maps`` collects the outputs of all but the last stage."""
        is_sorted = False
        stages = [cast(Stage, stage) for stage in self.layers]
        for index, stage in enumerate(stages):
            cell_tokens = x.shape[1] // self.num_cells
            single_window = all(later.window == self.grid // 2 ** (index + i) for i, later in enumerate(stages[index:]))
            if mask is not None and not is_sorted and single_window and 0 < mask.num_own < self.num_cells:
                # From here on one window spans the image: sort cells by source once, then attend per source.
                x = x.view(x.shape[0], self.num_cells, cell_tokens, -1).index_select(1, mask.order).flatten(1, 2)
                is_sorted = True
            sizes, biases = self._attention_plan(stage, x.shape[1], mask, is_sorted)
            for block, block_biases in zip(stage.blocks, biases, strict=True):
                kept = cast(MixMIMBlock, block).draw_drop_path(x)
                if self.activation_checkpointing and self.training:
                    x = checkpoint(block, x, sizes, block_biases, kept, use_reentrant=False)
                else:
                    x = block(x, sizes, block_biases, kept)
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


class DecoderAttention(nn.Module):
    """Plain multi-head self-attention over all cells."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """(B, L, C) -> (B, L, C); ``norm`` is applied first."""
        return self.proj(window_attention(norm_linear(x, norm, self.qkv), None, self.num_heads, window=x.shape[1]))


class DecoderBlock(nn.Module):
    """Pre-norm ViT block. ``attend`` and ``transform`` are its two halves."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = DecoderAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def attend(self, x: Tensor) -> Tensor:
        return x + self.attn(x, self.norm1)

    def transform(self, x: Tensor) -> Tensor:
        return x + self.mlp(x, self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(self.attend(x))


class MixMIMOutput(NamedTuple):
    """Result of :meth:`MixMIM.forward`.

    Attributes:
        loss: scalar, mean of weight * squared error (z-score units, or cell-standardised with ``norm_pix_loss``).
        mask: (L,) float, the mask that was used.
        pred: (2B, L, 32 * 32 * in_chans), last axis ordered row, column, band; None unless asked for.
    """

    loss: Tensor
    mask: Tensor
    pred: Tensor | None


class MixMIM(MixMIMEncoder):
    """Mixed masked autoencoder (arXiv 2205.13137, Section 3) with weighted reconstruction (arXiv 2503.01181).

    Args:
        img_size, patch_size, in_chans, embed_dim, depths, num_heads, window_size: see :class:`MixMIMEncoder`.
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        decoder_num_heads: heads of each.
        norm_pix_loss: standardise each 32 x 32 x bands cell of the target (mean, unbiased variance, eps 1e-6).
    """

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
        super().__init__(img_size, patch_size, in_chans, embed_dim, depths, num_heads, window_size)
        self.norm_pix_loss = norm_pix_loss
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_dim, img_size // CELL_STRIDE), requires_grad=False)
        self.decoder_embed = Linear(self.num_features, decoder_dim)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(decoder_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = Linear(decoder_dim, CELL_STRIDE**2 * in_chans)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """The encoder's and the decoder's blocks, and the loss, which is many small passes over the pixels."""
        super().compile_blocks(backend)
        compile_methods(self, ("reconstruction_loss",), backend)

    def draw_mask(self, mask_ratio: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
        """One random mask on the CPU: (L,) float with exactly ``int(L * mask_ratio)`` ones.

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
        batch, bands, height, width = images.shape
        rows, cols = height // CELL_STRIDE, width // CELL_STRIDE
        grid = images.reshape(batch, bands, rows, CELL_STRIDE, cols, CELL_STRIDE)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * cols, -1)

    def images_of(self, cells: Tensor) -> Tensor:
        """Inverse of :meth:`cells_of`."""
        batch = cells.shape[0]
        side = self.img_size // CELL_STRIDE
        grid = cells.reshape(batch, side, side, CELL_STRIDE, CELL_STRIDE, self.in_chans)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.in_chans, self.img_size, self.img_size)

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
        batch = latent.shape[0]
        hidden = mask.cells[None, :, None]
        x = self.decoder_embed(latent)
        token = self.mask_token.to(x.dtype)
        x = torch.cat([torch.where(hidden, token, x), torch.where(hidden, x, token)]) + self.decoder_pos_embed
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        last = cast(DecoderBlock, self.decoder_blocks[-1])
        x = last.attend(x)
        if not both:
            x = torch.where(hidden, x[:batch], x[batch:].flip(0))
        return self.decoder_pred(self.decoder_norm(last.transform(x)))

    def merge_prediction(self, pred: Tensor, mask: Tensor) -> Tensor:
        """Both halves of a full prediction (2B, L, P) -> each sample's reconstruction (B, L, P)."""
        hidden = (mask > 0.5).to(pred.device)[None, :, None]
        first, second = pred.chunk(2)
        return torch.where(hidden, first, second.flip(0))

    def normalise_cells(self, target: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Standardise each cell: (normalised, mean, standard deviation).

        Args:
            target: (B, L, P).
            valid: (B, L, P) bool; invalid values do not enter mean and variance.
        """
        if valid is None:
            mean = target.mean(dim=-1, keepdim=True)
            var = target.var(dim=-1, keepdim=True)
        else:
            count = valid.sum(dim=-1, keepdim=True)
            mean = (target * valid).sum(dim=-1, keepdim=True) / count.clamp(min=1)
            var = (((target - mean) * valid) ** 2).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
        std = (var + 1e-6).sqrt()
        return (target - mean) / std, mean, std

    def reconstruction_loss(self, rec: Tensor, images: Tensor, weights: Tensor | None) -> Tensor:
        """Weighted squared error of reconstructed cells.

        Args:
            rec: (B, L, P) predictions.
            images: (B, bands, H, W) standardised input.
            weights: None, (B, bands, H, W) or (B, L, bands); 0 marks invalid pixels, which count in neither numerator
                nor denominator.
        """
        target = self.cells_of(images)
        if weights is not None and weights.ndim == 3:
            weights = weights.repeat(1, 1, CELL_STRIDE**2)  # last axis ordered row, column, band
        elif weights is not None:
            weights = self.cells_of(weights)
        valid = None if weights is None else weights > 0
        if self.norm_pix_loss:
            target, _, _ = self.normalise_cells(target, valid)
        error = (rec - target) ** 2
        if weights is None or valid is None:
            return error.mean()
        return (weights * error).sum() / valid.sum().clamp(min=1)

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        weights: Tensor | None = None,
        *,
        mask: Tensor | CellMask | None = None,
        mask_ratio: float = 0.5,
        return_pred: bool = False,
    ) -> MixMIMOutput:
        """One pretraining step's loss.

        Args:
            images: (B, bands, H, W), z-score.
            weights: loss weights, same shape or per cell (B, L, bands); 0 = invalid pixel. None: plain MixMAE.
            mask: (L,) of 0/1, row-major, or prepared by :meth:`prepare_mask`; drawn when None.
            mask_ratio: share of masked cells when drawn.
            return_pred: also return all 2B predictions.
        """
        if mask is None:
            mask = self.draw_mask(mask_ratio)
        cell_mask = mask if isinstance(mask, CellMask) else self.prepare_mask(mask)
        latent = self.encode(self.embed(images, cell_mask), cell_mask)
        pred = self.decode(latent, cell_mask, both=return_pred)
        rec = self.merge_prediction(pred, cell_mask.cells) if return_pred else pred
        loss = self.reconstruction_loss(rec, images, weights)
        return MixMIMOutput(loss, cell_mask.cells.to(images.dtype), pred if return_pred else None)
