"""Classifier on the shared encoder: mean over the final tokens, one linear layer.

Shape legend: B batch, K classes, D = 8 * embed_dim features, L final tokens (16 at 128 x 128 px).
"""

from __future__ import annotations

from torch import Tensor

from models_mixmim import MixMIMEncoder
from sarwmix.heads import Classifier, make_head


class MixMIMClassifier(Classifier, MixMIMEncoder):
    """Encoder without mask, mean pooling, head.

    Args:
        num_classes: K, width of the head.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        img_size, patch_size, in_chans, embed_dim, depths, num_heads, window_size: see `MixMIMEncoder`.
        head: name of the head, see `sarwmix.heads.make_head`; None: one linear layer.
        drop_rate: dropout before the last layer.
    """

    def __init__(
        self,
        num_classes: int = 19,
        drop_path_rate: float = 0.0,
        img_size: int = 128,
        patch_size: int = 4,
        in_chans: int = 2,
        embed_dim: int = 128,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (4, 8, 16, 32),
        window_size: tuple[int, ...] = (8, 8, 8, 4),
        head: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            drop_path_rate=drop_path_rate,
        )
        self.num_classes = num_classes
        self.head = make_head(self.num_features, num_classes, name=head, drop_rate=drop_rate)

    def last_blocks(self, images: Tensor) -> list[Tensor]:
        """What heads on the last blocks of an encoder take; of a hierarchical one these are the stages."""
        return self.feature_pyramid(images)
