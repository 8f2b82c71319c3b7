"""The single images of a data set of pairs, for statistics and checks: each image once, in dB."""

from __future__ import annotations

import numpy as np
import torch

from sarwmix.data.base import SarDataset, UnreadableSample, finish_image
from sarwmix.datasets.sen12flood import PairDataset, power_to_db
from sarwmix.sen12flood.metadata import parse_pair_name


class PairImages(SarDataset):
    """Images of pairs, (2, S, S) in dB; an image that several pairs share appears once.

    Args:
        pairs: Pairs in linear power.
    """

    def __init__(self, pairs: PairDataset) -> None:
        places: dict[str, tuple[int, int]] = {}
        for index in range(len(pairs)):
            folder, first, second, _ = parse_pair_name(pairs.names[index])
            for time, acquisition in enumerate((first, second)):
                places.setdefault(f"{folder}/{acquisition}", (index, time))
        super().__init__(pairs.spec, pairs.split, pairs.statistics, list(places), None, source=pairs.source)
        self.pairs = pairs
        self.places = np.array(list(places.values()), dtype=np.int64)  # (N, 2): pair, first or second image

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pairs.shape

    def read_into(self, index: int, out: np.ndarray) -> None:
        pair, time = (int(value) for value in self.places[index])
        both = np.empty((2, *self.shape), dtype=np.float32)
        try:
            self.pairs.read_into(pair, both)
        except UnreadableSample as error:
            raise UnreadableSample(self.names[index], error.path, error.reason) from error
        out[...] = power_to_db(torch.from_numpy(both[time])).numpy()
        finish_image(out, self.names[index], self.source, self.spec.bands)


def single_images(dataset: SarDataset) -> SarDataset:
    """The data set itself, or the single images when it holds pairs."""
    return PairImages(dataset) if isinstance(dataset, PairDataset) else dataset
