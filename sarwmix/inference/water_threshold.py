"""Water by a threshold, the baseline that a trained model has to beat: VV smoothed by a median, Otsu per image.

Calm water mirrors the radar pulse away and is dark in VV. Otsu's threshold (IEEE Trans. SMC 9, 1979) splits the
histogram of one image so that the variance between the two parts is largest; the darker part is called water.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

BINS = 256


def median_smoothed(image: np.ndarray, size: int = 5) -> np.ndarray:
    """Median over size x size pixels, NaN left out; edges are continued.

    Args:
        image: float32 (H, W), NaN at invalid pixels.
        size: Odd side of the window.

    Returns:
        float32 (H, W); NaN where a window holds no valid pixel.
    """
    half = size // 2
    padded = F.pad(torch.from_numpy(image)[None, None], (half, half, half, half), mode="replicate")[0, 0]
    windows = padded.unfold(0, size, 1).unfold(1, size, 1).flatten(2)  # (H, W, size * size)
    return windows.nanmedian(dim=2).values.numpy()


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold that maximises the variance between the values below and above it.

    Args:
        values: Finite numbers, any shape.
    """
    counts, edges = np.histogram(values, bins=BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    sums = np.cumsum(counts * centres)
    above = counts.sum() - below
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(edges[1:-1][np.nanargmax(between)])


def threshold_water(vv: np.ndarray) -> np.ndarray:
    """Water where the smoothed VV lies below Otsu's threshold of the image.

    Args:
        vv: float32 (H, W) dB, NaN at invalid pixels.

    Returns:
        uint8 (H, W) of 0 and 1; invalid pixels are 0.
    """
    smooth = median_smoothed(vv)
    finite = np.isfinite(smooth)
    if not finite.any():
        return np.zeros(vv.shape, dtype=np.uint8)
    return (np.nan_to_num(smooth, nan=np.inf) < otsu_threshold(smooth[finite])).astype(np.uint8)
