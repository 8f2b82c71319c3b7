"""torch.hub: our encoders and trained models, without installing the package.

import torch

encoder = torch.hub.load("FOLDER_OR_REPOSITORY", "encoder", checkpoint="checkpoint_64.pth", source="local")
features = encoder(images)  # (B, 2, 128, 128) z-score -> (B, 8 * embed_dim)
model = torch.hub.load("FOLDER_OR_REPOSITORY", "trained", "checkpoint_best.pth", source="local")
scores = model.scores(images_db)  # (B, bands, H, W) dB -> (B, K)
"""

from typing import Any

dependencies = ["torch", "numpy"]


def encoder(checkpoint: str = "", size: str = "mixmim_base", img_size: int = 128, in_chans: int = 2) -> Any:
    """A MixMIM encoder, `models_mixmim.MixMIMEncoder`.

    Args:
        checkpoint: pretraining or fine-tuning checkpoint whose encoder is loaded; "": random weights.
        size: name of the size, where there is no checkpoint that says it.
        img_size: side of the images, px.
        in_chans: bands.

    Raises:
        UserError: weights that do not fit.
    """
    from models_mixmim import MixMIMEncoder, encoder_config
    from sarwmix.inference.model import open_model

    if checkpoint:
        opened = open_model(checkpoint)
        if not isinstance(opened.model, MixMIMEncoder):
            raise ValueError(f"{checkpoint} holds a {type(opened.model).__name__}, no MixMIM encoder; use `trained`")
        return opened.model
    return MixMIMEncoder(img_size=img_size, in_chans=in_chans, **encoder_config(size))


def trained(checkpoint: str, device: str = "cpu") -> Any:
    """A trained model with its preprocessing, `sarwmix.open_model`.

    Args:
        checkpoint: file, or folder of an export.
        device: where it computes.
    """
    from sarwmix.inference.model import open_model

    return open_model(checkpoint).to(device)
