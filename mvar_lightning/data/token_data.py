"""The LightningDataModule over a token cache: training without images, without decoding, without the encoder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mvar_lightning.data.image_data import ShardsDataModule, TrainingData
from mvar_lightning.data.index import presence_problem
from mvar_lightning.data.reading.loader import StreamLoader, TrainLoader
from mvar_lightning.data.tokens.cache import CacheSettings, TokenCache, part_files, read_cache
from mvar_lightning.data.tokens.stream import TokenTrainStream, TokenValidationStream
from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from mvar_lightning.tokenizer import MultiScaleTokenizer


class TokenShardsDataModule(TrainingData):
    """Tokens of a cache: batches {"tokens": int64 (B, L), "label": int64 (B,)}.

    Each pass over the cache takes another view of every image; an epoch that is no whole pass goes on where the one
    before it ended.

    Args:
        path: folder written by `mvar tokens make`.
        batch_size: samples a step on one process; a global batch is batch_size x processes x accumulation.
        num_workers: loading processes for each training process; 0 loads in the training process.
        epoch_samples: samples that make an epoch over all processes; default all of the training split.
        shuffle_window: samples that are mixed with one another, in whole parts of the cache.
        seed: of the order of samples.
        images: folder of the image shards that the cache was made of, for what looks at real images at validation
            (sample metrics, reconstructions, the data set's classifier). Training does not read it.
    """

    holds_images = False

    def __init__(
        self,
        path: str,
        batch_size: int = 64,
        num_workers: int = 2,
        epoch_samples: int | None = None,
        shuffle_window: int = 100_000,
        seed: int = 0,
        images: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, epoch_samples, seed)
        self.path, self.shuffle_window, self.images = path, shuffle_window, images

    @cached_property
    def cache(self) -> TokenCache:
        """The index, read on first use. Raises UserError where there is none."""
        return read_cache(self.path)

    @property
    def settings(self) -> CacheSettings:
        return self.cache.settings

    @property
    def num_classes(self) -> int:
        return len(self.cache.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.cache.class_names

    @property
    def tokenizer_hash(self) -> str:
        """Fingerprint of the tokenizer that the tokens belong to."""
        return self.settings.tokenizer_hash

    @property
    def image_size(self) -> int:
        """Side of the images that were encoded."""
        return self.settings.image_size

    @property
    def train_samples(self) -> int:
        return self.cache.samples("train")

    @property
    def val_samples(self) -> int:
        return self.cache.samples("val")

    def check_model(self, tokenizer: MultiScaleTokenizer, tokenizer_hash: str | None = None) -> None:
        """Raise UserError unless the cache was made with this tokenizer."""
        if tokenizer_hash is None:
            raise UserError("data TokenShards: a tokenizer is trained on images; give ShardsDataModule")
        ours = self.settings
        for name, cached, given in (
            ("scales", list(ours.scales), list(tokenizer.pyramid.sides)),
            ("vocab_size", ours.vocab_size, tokenizer.vocab_size),
            ("hash", ours.tokenizer_hash[:12], tokenizer_hash[:12]),
        ):
            if cached != given:
                raise UserError(
                    f"token cache {self.path}: made by a tokenizer of {name} {cached}, model.tokenizer has {given}; "
                    "point model.tokenizer to the one it was made with, or make another cache (mvar tokens make)"
                )

    def image_data(self, who: str) -> ShardsDataModule:
        """The image shards behind the cache, cropped as they were for it. Raises UserError without `images`."""
        if self.images is None:
            raise UserError(
                f"{who}: needs real images, and token cache {self.path} holds none; set data.images to the shard "
                "folder that it was made of, or remove this callback from the recipe"
            )
        self._images.trainer = self.trainer
        return self._images

    @cached_property
    def _images(self) -> ShardsDataModule:
        crops = {name: getattr(self.settings, name) for name in ("image_size", "resize_ratio", "crop", "val_crop")}
        data = ShardsDataModule(
            self.images, batch_size=self.batch_size, num_workers=self.num_workers, seed=self.seed, **crops
        )
        if data.class_names != self.class_names:
            raise UserError(
                f"data.images {self.images}: has other classes than token cache {self.path} "
                f"({data.num_classes} and {self.num_classes}); give the shards that the cache was made of"
            )
        return data

    def prepare_data(self) -> None:
        _ = self.cache

    def setup(self, stage: str) -> None:
        """Every part must be there in full length before the first step, not hours into the run."""
        super().setup(stage)
        for part in self.cache.parts:
            if problem := presence_problem(part, part_files(Path(self.path), part.name)):
                raise UserError(f"token cache {self.path}: {problem}; copy it again or run `mvar tokens make` again")
        if self.images is not None:
            self._images.prepare_data()
            self._images.setup(stage)

    def train_dataloader(self) -> TrainLoader:
        config, batches = self.stream_config(), self.epoch_batches()
        return self.train_loader(TokenTrainStream(self.cache, config, batches, self.shuffle_window))

    def val_dataloader(self) -> StreamLoader:
        return StreamLoader(TokenValidationStream(self.cache, self.stream_config()), self.num_workers)


TokenShards = TokenShardsDataModule
"""The name for recipes."""
