"""Flood or no flood from two images of one place: a shared encoder on tiles, difference of features, linear layer.

Shape legend: B pairs, C bands (VH, VV), H x W pixels of an image, S = img_size pixels of a tile (128),
T = H / S * W / S tiles, D = 8 * embed_dim features, K classes.

    tiles of both images -> encoder -> mean over final tokens: f1, f2 (B, T, D) -> |f1 - f2| -> avg or max -> head
"""

from __future__ import annotations

import torch
from torch import Tensor

from models_mixmim_ft import MixMIMClassifier
from util.errors import UserError

PATCH_OPS = ("avg", "max")


class MixMIMPair(MixMIMClassifier):
    """Pair classifier on the shared encoder.

    Args:
        num_classes: K; 2: no flood, flood.
        patch_op: how the differences of the tiles become one vector, ``"avg"`` or ``"max"``.
        legacy_tiling: cut tiles as the published code does, which its released checkpoint needs; see :meth:`tiles`.
        drop_path_rate: stochastic depth of the last block.
        img_size: S, side of a tile; images may have any multiple of it.
        patch_size, in_chans, embed_dim, depths, num_heads, window_size: see `MixMIMEncoder`.
        drop_rate: dropout before the last layer.
    """

    def __init__(
        self,
        num_classes: int = 2,
        patch_op: str = "avg",
        legacy_tiling: bool = False,
        drop_path_rate: float = 0.0,
        img_size: int = 128,
        patch_size: int = 4,
        in_chans: int = 2,
        embed_dim: int = 128,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (4, 8, 16, 32),
        window_size: tuple[int, ...] = (8, 8, 8, 4),
        drop_rate: float = 0.0,
    ) -> None:
        if patch_op not in PATCH_OPS:
            raise UserError(f"patch_op is {patch_op!r}; expected one of {', '.join(PATCH_OPS)}")
        super().__init__(
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            drop_rate=drop_rate,
        )
        self.patch_op = patch_op
        self.legacy_tiling = legacy_tiling

    @property
    def feature_settings(self) -> str:
        """What features depend on beyond the weights; names cached features."""
        return f" patch_op={self.patch_op} legacy_tiling={self.legacy_tiling}"

    def tiles(self, images: Tensor) -> Tensor:
        """Cut images into tiles, row by row.

        A tile holds all bands of one square. With ``legacy_tiling`` the squares of all bands are counted through, band
        by band, and each C consecutive squares make one "tile": for 4 squares and bands VH, VV the tiles are (VH 0,
        VH 1), (VH 2, VH 3), (VV 0, VV 1), (VV 2, VV 3). The published code does that by reshaping without moving the
        band axis.

        Args:
            images: (B, C, H, W); H and W multiples of S.

        Returns:
            (B, T, C, S, S).

        Raises:
            UserError: a size that is no multiple of S.
        """
        side = self.img_size
        batch, bands, height, width = images.shape
        if height % side or width % side or not height or not width:
            raise UserError(
                f"images have {height} x {width} px; expected multiples of the encoder's {side} px, such as "
                f"{max(1, round(height / side)) * side}: choose --input_size accordingly"
            )
        rows, columns = height // side, width // side
        squares = images.reshape(batch, bands, rows, side, columns, side)
        if self.legacy_tiling:
            order = squares.permute(0, 1, 2, 4, 3, 5)  # (B, C, rows, columns, S, S)
        else:
            order = squares.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, S, S)
        return order.reshape(batch, rows * columns, bands, side, side)

    def encode_image(self, images: Tensor) -> Tensor:
        """Features of each tile: (B, C, H, W) standardised -> (B, T, D). An image of many pairs needs this once."""
        tiles = self.tiles(images)
        features = super().forward_features(tiles.flatten(0, 1))  # (B * T, D)
        return features.view(*tiles.shape[:2], -1)

    def compare(self, features1: Tensor, features2: Tensor) -> Tensor:
        """Tile features of two images, (B, T, D) each -> (B, D), what the head is applied to."""
        difference = (features1 - features2).abs()
        return difference.mean(dim=1) if self.patch_op == "avg" else difference.amax(dim=1)

    def classify(self, features1: Tensor, features2: Tensor) -> Tensor:
        """Tile features of two images, (B, T, D) each -> logits (B, K)."""
        return self.apply_head(self.compare(features1, features2))

    def forward_features(self, image1: Tensor, image2: Tensor) -> Tensor:  # type: ignore[override]
        """Two images (B, C, H, W), standardised, as one batch through the encoder -> (B, D)."""
        if image1.shape != image2.shape:
            raise ValueError(f"images of a pair have shapes {tuple(image1.shape)} and {tuple(image2.shape)}")
        both, count = self.encode_image(torch.cat([image1, image2])), image1.shape[0]
        return self.compare(both[:count], both[count:])  # chunk(2) would keep torch.export from free batch sizes

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:  # type: ignore[override]
        """Two images (B, C, H, W), standardised -> logits (B, K). Which image comes first does not matter."""
        return super().forward(image1, image2)
