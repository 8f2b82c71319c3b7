"""The preparation in the most straightforward way: the oracle of the tests and the yardstick of the benchmark.

Tiles are warped one by one into GeoTIFFs, every pair is read from them and written, all pairs are read again, and those
with few enough zeros are copied to their place. No processes, no checks, no resuming.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from sarwmix.sen12flood.metadata import S1LIST, SPLITS, make_pairs, pair_name, read_s1list, resolve_split

MAX_ZEROS = 0.25


def prepare_straightforward(raw: Path, work: Path, out: Path, *, size: int = 512) -> int:
    """Prepare ``raw`` into ``out/{train,test}/*.npy`` and return the number of pairs kept."""
    import rasterio
    from rasterio.warp import Resampling, reproject

    catalogue = read_s1list(raw / S1LIST)
    split = resolve_split(catalogue, None, None)
    kept = 0
    for name in SPLITS:
        for folder in split.folders[name]:
            aligned = work / "aligned" / folder
            aligned.mkdir(parents=True)
            reference = min((raw / folder).glob("S2_*_B04.tif"))
            for tile in sorted((raw / folder).glob("S1*_corrected_V?.tif")):
                with rasterio.open(reference) as grid, rasterio.open(tile) as source:
                    target = np.zeros((grid.height, grid.width), dtype=np.float32)
                    reproject(
                        source.read(1),
                        target,
                        src_transform=source.transform,
                        src_crs=source.crs,
                        dst_transform=grid.transform,
                        dst_crs=grid.crs,
                        resampling=Resampling.nearest,
                    )
                    profile = {**grid.profile, "dtype": "float32", "count": 1}
                with rasterio.open(aligned / tile.name, "w", **profile) as output:
                    output.write(target, 1)
    pairs = work / "pairs"
    for name in SPLITS:
        (pairs / name).mkdir(parents=True)
        for folder in split.folders[name]:
            frames = catalogue.sequences[folder].frames
            for first, second, label in make_pairs([frame.flooding for frame in frames]):
                images = [_read_image(work / "aligned" / folder, frames[i].product) for i in (first, second)]
                if all(image.shape == (2, size, size) for image in images):
                    file = f"{pair_name(folder, frames[first].product, frames[second].product, label)}.npy"
                    np.save(pairs / name / file, np.stack(images))
    for name in SPLITS:
        (out / name).mkdir(parents=True)
        for path in sorted((pairs / name).iterdir()):
            if ((np.load(path) == 0).mean(axis=(2, 3)) < MAX_ZEROS).all():
                shutil.copy(path, out / name / path.name)
                kept += 1
    return kept


def _read_image(folder: Path, product: str) -> np.ndarray:
    """(2, H, W): VH, VV."""
    import rasterio

    bands = []
    for band in ("VH", "VV"):
        with rasterio.open(folder / f"{product}_corrected_{band}.tif") as source:
            bands.append(source.read(1))
    return np.stack(bands)
