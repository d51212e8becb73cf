"""Samples as their latents: encoded once, kept in memory, and read ahead of the training."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from discriminative.errors import UsageError
from dpt.data.samples import Grounding, Picture, Sample, Samples
from dpt.settings import CACHED_BYTES, LOADING_THREADS

ORDER_STREAM = 31  # of the order of samples


class Row(NamedTuple):
    """A sample without its pixels.

    Args:
        latents: of picture, hard picture and random picture; each (2, C, h, w), mean and standard
            deviation of the VAE's posterior, not scaled.
        captions: true of the picture, hard, random.
        kind: how the hard negative differs.
        grounding: a referring expression for the picture.
    """

    latents: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    captions: tuple[str, str, str]
    kind: str
    grounding: Grounding


class Latents:
    """What a VAE makes of pictures, each encoded once and alone, so that no batch changes its bits.

    Args:
        vae: a frozen AutoencoderKL.
        most: bytes that are kept; what comes later is encoded each time.
    """

    def __init__(self, vae: torch.nn.Module, most: float = CACHED_BYTES):
        self.vae = vae
        self.most = most
        self.kept: dict[str, torch.Tensor] = {}
        self.bytes = 0

    @torch.no_grad()
    def of(self, picture: Picture) -> torch.Tensor:
        """Mean and standard deviation (2, C, h, w) of a picture's posterior, float32 on the CPU."""
        if picture.key in self.kept:
            return self.kept[picture.key]
        pixels = picture.image[None].to(self.vae.device, self.vae.dtype) * 2 - 1  # (1, 3, H, W) in [-1, 1]
        posterior = self.vae.encode(pixels).latent_dist
        found = torch.cat([posterior.mean, posterior.std]).float().cpu()  # (2, C, h, w)
        if self.bytes + found.nbytes <= self.most:
            self.kept[picture.key] = found
            self.bytes += found.nbytes
        return found

    def row(self, sample: Sample) -> Row:
        """A sample without its pixels."""
        pictures = (sample.picture, sample.hard_picture, sample.random_picture)
        captions = (sample.caption, sample.hard_caption, sample.random_caption)
        return Row(tuple(self.of(picture) for picture in pictures), captions, sample.kind, sample.grounding)


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of a step.

    Args:
        batch_size: samples at once.
        accumulation: batches in a step.
        rank: which process, from 0.
        processes: how many there are.
    """

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    processes: int = 1

    def positions(self, step: int, part: int) -> range:
        """Places, in the endless row of all samples, of one batch of this process."""
        first = ((step * self.accumulation + part) * self.processes + self.rank) * self.batch_size
        return range(first, first + self.batch_size)


class Stream:
    """Batches of a training: which samples they hold follows from seed and step alone.

    Each epoch goes once through the data in an order of its own. The next batch's pictures are read, or
    drawn, by threads while this one is learned from.

    Args:
        data: the samples.
        latents: that encode them.
        share: of this process.
        seed: of the order.
        renews: each epoch draws other captions and negatives; else samples are read once and kept.

    Raises:
        UsageError: there are no samples.
    """

    def __init__(self, data: Samples, latents: Latents, share: Share, seed: int, renews: bool = False):
        if not len(data):
            raise UsageError("--data: it holds no samples; needed is one at least")
        self.data = data
        self.latents = latents
        self.share = share
        self.seed = seed
        self.renews = renews
        self.pool = ThreadPoolExecutor(LOADING_THREADS)
        self.rows: dict[int, Row] = {}
        self.coming: dict[tuple[int, int], Future] = {}
        self.orders: dict[int, np.ndarray] = {}
        self.epochs: dict[int, Samples] = {}

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int, part: int = 0) -> list[Row]:
        """The samples of one batch of this process."""
        last = part == self.share.accumulation - 1
        self._order_ahead(step + 1 if last else step, 0 if last else part + 1)
        return [self._row(*self._place(position)) for position in self.share.positions(step, part)]

    def _place(self, position: int) -> tuple[int, int]:
        """Epoch and index of the sample at a position."""
        epoch = position // len(self.data)
        if epoch not in self.orders:
            rng = np.random.default_rng([ORDER_STREAM, self.seed, epoch])
            # Two are at hand: a batch may begin in one and end in the next.
            self.orders = {e: o for e, o in self.orders.items() if e >= epoch - 1}
            self.orders[epoch] = rng.permutation(len(self.data))
        return epoch if self.renews else 0, int(self.orders[epoch][position % len(self.data)])

    def _order_ahead(self, step: int, part: int) -> None:
        for place in map(self._place, self.share.positions(step, part)):
            if place not in self.coming and place[1] not in self.rows:
                self.coming[place] = self.pool.submit(self._of_epoch(place[0]).__getitem__, place[1])

    def _row(self, epoch: int, index: int) -> Row:
        if index in self.rows:
            return self.rows[index]
        future = self.coming.pop((epoch, index), None)
        row = self.latents.row(future.result() if future else self._of_epoch(epoch)[index])
        if not self.renews:
            self.rows[index] = row
        return row

    def _of_epoch(self, epoch: int) -> Samples:
        """The data in an epoch; one object for each, as threads read it."""
        if epoch not in self.epochs:
            self.epochs = {e: d for e, d in self.epochs.items() if e >= epoch - 1}
            self.epochs[epoch] = copy.copy(self.data)
            self.epochs[epoch].set_epoch(epoch)
        return self.epochs[epoch]
