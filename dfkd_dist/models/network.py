"""A network together with how it wants its images: image space in, signals out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.signals import BN, FEATURES, LOGITS, MAP, Need, Signals
from dfkd_dist.models.taps import find_taps, listen

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue in grey."""


class Preprocess(nn.Module):
    """Image space to one network's input, differentiably: channels, size, normalisation.

    Args:
        size: side of the network's input in pixels.
        channels: 1 or 3.
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        canonical: side of the images that are brought to `size`; null is `size` itself. It matters to networks that
            classify pixels: these take larger and smaller images too, in the same proportion.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size: int, channels: int, mean: Sequence[float], std: Sequence[float], canonical: int | None = None
    ) -> None:
        super().__init__()
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean and std need {channels} values each (channels), got {list(mean)} and {list(std)}")
        self.size, self.channels, self.canonical = size, channels, canonical or size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images_NCHW: Tensor, size: int | None = None) -> Tensor:
        """`[N, C, H, W]` in image space to `[N, channels, size, size]`; `size` null is the network's own."""
        x, size = images_NCHW, size or self.size
        if x.shape[1] != self.channels:
            x = _to_rgb(x) if self.channels == 3 else to_luma(x)
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        return (x - self.mean) / self.std

    def in_proportion(self, side: int) -> int:
        """The network's side for images of another side than the canonical one."""
        return max(round(side * self.size / self.canonical), 1)


def _to_rgb(grey_N1HW: Tensor) -> Tensor:
    return grey_N1HW.expand(-1, 3, -1, -1)


def to_luma(rgb_N3HW: Tensor) -> Tensor:
    """Grey `[N, 1, H, W]` of colour images, differentiably."""
    red, green, blue = (weight * rgb_N3HW[:, c : c + 1] for c, weight in enumerate(LUMA))
    return red + green + blue


class ImageNetwork(nn.Module):
    """A classifier of images, or of their pixels, that takes images of the canonical image space.

    Args:
        network: `[N, channels, size, size]` to logits `[N, C]`, or for pixels `[N, C, size, size]`. The latter takes
            images of any size in proportion to the canonical one, and its logits come back at their resolution.
        preprocess: from image space to the network's input.
        name: how it is called in metrics and messages.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess, name: str) -> None:
        super().__init__()
        self.network, self.preprocess, self.name = network, preprocess, name
        example = torch.zeros(2, preprocess.channels, preprocess.size, preprocess.size)
        parameter = next(network.parameters())
        try:
            self.taps = find_taps(network, example.to(parameter.device, parameter.dtype))
        except RuntimeError as error:
            shape = f"[N, {preprocess.channels}, {preprocess.size}, {preprocess.size}]"
            raise ValueError(f"network {name} does not take images {shape}: {error}") from error

    def forward(self, images_NCHW: Tensor, need: Need = frozenset({LOGITS}), scaled: bool = False) -> Signals:
        """Signals about the images; gradients reach the images (and the parameters that are not frozen).

        With `scaled`, images of another side than the canonical one come in in proportion to it, as where pixels are
        classified, instead of being brought to the network's own side.
        """
        side = images_NCHW.shape[-1]
        size = self.preprocess.in_proportion(side) if self.dense or scaled else None
        inputs = self.preprocess(images_NCHW, size).to(self.input_dtype(images_NCHW))
        with listen(self.network, self.taps, need) as heard:
            logits_NC = self.network(inputs)
        if self.dense and logits_NC.shape[2:] != images_NCHW.shape[2:]:
            logits_NC = F.interpolate(logits_NC, size=images_NCHW.shape[2:], mode="bilinear", align_corners=False)
        return Signals(logits_NC, heard.features_ND, heard.map_NDHW, heard.bn, heard.maps, heard.means_ND)

    @property
    def dense(self) -> bool:
        """Whether it classifies pixels: logits `[N, C, H, W]`."""
        return self.taps.dense

    def input_dtype(self, images_NCHW: Tensor) -> torch.dtype:
        """The number format in which the network takes its input; autocast does its own conversion."""
        return images_NCHW.dtype

    def shapes(self, size: int, channels: int, need: Need) -> dict[str, tuple[int, ...]]:
        """Shapes (without N) of the per-image signals in `need` that this network has, for the canonical images."""
        has = {FEATURES: self.taps.classifier is not None, MAP: self.taps.map is not None}
        wanted = frozenset(name for name in need if name != BN and has.get(name, True))
        parameter = next(self.network.parameters())
        images = torch.zeros(2, channels, size, size, device=parameter.device, dtype=self.preprocess.mean.dtype)
        was_training = self.training
        with torch.no_grad():
            signals = self.eval()(images, wanted)
        self.train(was_training)
        return {name: tuple(signals.tensor(name).shape[1:]) for name in sorted(wanted)}


def parameter_count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
