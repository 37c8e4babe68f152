"""Networks that look: who says which class an image is of (a judge), and whose features are compared."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_dist.data.pixels import to_uint8
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.look.collection import Seen
from dfkd_dist.engine.teachers import reference_classes, teacher_weights
from dfkd_dist.losses.distillation import tempered_mean
from dfkd_dist.models.cards import load_network, read_card
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import FEATURES, LOGITS
from dfkd_dist.models.teacher import class_order
from dfkd_dist.models.weights import WeightsError, load_state
from dfkd_dist.parallel.batchnorm import reading_only

ENSEMBLE, STUDENT = "ensemble", "student"
"""Names beside those of the run's teachers and paths of weights files: AvgPred of the teachers; the run's student."""

INCEPTION_FEATURES = 2048
"""Width of the pool3 layer of Inception-v3, on which FID was defined (Heusel et al. 2017)."""


class FeatureNetwork(nn.Module):
    """Images in image space `[N, C, H, W]` to features `[N, D]` in float64, without gradient.

    Args:
        name: as shown in tables and files.
        extract: from images to features; it may return any floating format.
        dtype: in which it wants its images.
        device: where it wants them.
    """

    def __init__(
        self, name: str, extract: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.name, self.extract, self.device, self.dtype = name, extract, device, dtype

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """See the class.

        Raises:
            ValueError: the features are not finite, or no matrix.
        """
        with torch.no_grad():
            features_ND = self.extract(images_NCHW.to(self.device, self.dtype)).double()
        if features_ND.dim() != 2 or len(features_ND) != len(images_NCHW):
            raise ValueError(f"features of {self.name}: expected [N, D], found {tuple(features_ND.shape)}")
        if not bool(torch.isfinite(features_ND).all()):
            raise ValueError(f"features of {self.name}: found NaN or infinite values")
        return features_ND

    def of(self, seen: Seen) -> Tensor:
        """Features of one batch of a collection."""
        return self(seen.floats(self.device, self.dtype))


class Judge:
    """Says with what probability an image is of each class; what it calls an image is the likeliest class.

    Args:
        name: as shown in tables and files.
        classes: names of its classes.
        ask: images in image space to probabilities `[N, C]`.
        dtype: in which it wants its images.
        device: where it wants them.
    """

    def __init__(
        self,
        name: str,
        classes: list[str],
        ask: Callable[[Tensor], Tensor],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.classes, self.ask, self.device, self.dtype = name, tuple(classes), ask, device, dtype

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """The likeliest class `[N]` int64 of each image of a batch, and its probability `[N]`, on the CPU.

        Raises:
            ValueError: it classifies pixels, not images.
        """
        with torch.no_grad():
            probs_NC = self.ask(seen.floats(self.device, self.dtype)).float().cpu()
        if probs_NC.dim() != 2:
            raise ValueError(f"judge {self.name}: expected one answer for an image, found {tuple(probs_NC.shape)}")
        confidence_N, choice_N = probs_NC.max(dim=1)
        return choice_N, confidence_N


# ------------------------------------------------------------------------------------------ by name


def feature_network(built: Build, name: str | None = None) -> FeatureNetwork:
    """Penultimate features of one network of a run, or of one on disk.

    Args:
        built: the run.
        name: a teacher's name, `student`, or the path of a weights file with its card; None: the first teacher, or the
            student of a run without teachers.

    Raises:
        ValueError: no such network, or one without a linear classifier, before which the features would be.
        WeightsError: the file cannot be used.
    """
    default = built.teachers[0].name if built.teachers else STUDENT
    network = _network(built, name or default, "features", others=())
    if network.taps.classifier is None:
        raise ValueError(f"features of {network.name}: it has no linear layer, so no penultimate features")
    return _features(network, name or default, built.device)


def image_network_features(network: ImageNetwork, device: torch.device, name: str | None = None) -> FeatureNetwork:
    """Penultimate features of any network that takes images in image space."""
    return _features(network, name or network.name, device)


def judge(built: Build, name: str | None = None) -> Judge:
    """Who says which class an image is of.

    Args:
        built: the run, whose class order is kept.
        name: as for `feature_network`, or `ensemble`: the mean of the teachers' probabilities (DFMF Eq. 1); None: the
            ensemble, the only teacher, or the student of a run without teachers.

    Raises:
        ValueError: no such network, or one with other classes.
        WeightsError: the file cannot be used.
    """
    classes = run_classes(built)
    default = (ENSEMBLE if len(built.teachers) > 1 else built.teachers[0].name) if built.teachers else STUDENT
    name = name or default
    if name == ENSEMBLE:
        if not built.teachers:
            raise ValueError(f"judge {ENSEMBLE}: the run has no teachers; allowed: {STUDENT} or a weights file")
        dtype, weights = built.teachers[0].preprocess.mean.dtype, teacher_weights(built.recipe)
        teachers = built.teachers
        return Judge(
            name,
            classes,
            lambda images: tempered_mean([teacher(images).logits_NC for teacher in teachers], weights, 1.0),
            built.device,
            dtype,
        )
    network = _network(built, name, "judge", others=(ENSEMBLE,))
    order = _order(built, name, network)
    return Judge(
        name, classes, lambda images: _probs(network, images, order), built.device, network.preprocess.mean.dtype
    )


def run_classes(built: Build) -> list[str]:
    """Names of a run's classes in its order; numbers where nobody named them."""
    named = reference_classes(built.cards) or built.student_card.classes
    return list(named) if named else [str(c) for c in range(built.recipe.num_classes)]


def inception_features(weights: Path, device: torch.device) -> FeatureNetwork:
    """The pool3 features of Inception-v3 on which FID was defined; images are resized to 299 x 299 inside.

    Args:
        weights: a file with the tensors of torch-fidelity's network (`pt_inception-2015-12-05-6726825d.pth`); nothing
            is downloaded, and no code in the file is run.
        device: where it runs.

    Raises:
        ImportError: torch-fidelity is not installed.
        WeightsError: there is no such file, or its tensors are not those of the network.
    """
    if find_spec("torch_fidelity") is None:
        raise ImportError(
            "FID under Inception's features needs torch-fidelity: pip install 'dfkd-dist[metrics]' torch-fidelity"
        )
    network = _inception(weights).to(device)

    def extract(images_NCHW: Tensor) -> Tensor:
        pixels = to_uint8(images_NCHW)
        return network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)[0]

    return FeatureNetwork("inception-v3", extract, device)


def _inception(weights: Path) -> nn.Module:
    """torch-fidelity unpickles whatever it is given, so it gets a copy of the tensors alone."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state = load_state(weights)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pt"
        torch.save(state, copy)
        try:
            return FeatureExtractorInceptionV3("inception-v3-compat", [str(INCEPTION_FEATURES)], str(copy))
        except RuntimeError as error:
            raise WeightsError(f"{weights} does not fit torch-fidelity's Inception-v3: {error}") from error


# ---------------------------------------------------------------------------------------- from names to networks


def _features(network: ImageNetwork, name: str, device: torch.device) -> FeatureNetwork:
    def extract(images_NCHW: Tensor) -> Tensor:
        with reading_only(network, "eval"):
            features_ND = network(images_NCHW, frozenset({LOGITS, FEATURES})).features_ND
        assert features_ND is not None
        # What classifies pixels has features of each place: an image's are their mean.
        return features_ND if features_ND.dim() == 2 else features_ND.flatten(2).mean(dim=2)

    return FeatureNetwork(name, extract, device, network.preprocess.mean.dtype)


def _probs(network: ImageNetwork, images_NCHW: Tensor, order: Tensor | None) -> Tensor:
    with reading_only(network, "eval"):
        probs_NC = tempered_mean([network(images_NCHW).logits_NC], [1.0], 1.0)
    return probs_NC if order is None else probs_NC[:, order]


def _network(built: Build, name: str, option: str, others: tuple[str, ...]) -> ImageNetwork:
    if name == STUDENT:
        return built.side.network
    for teacher in built.teachers:
        if teacher.name == name:
            return teacher
    path = Path(name)
    if path.is_dir():
        path = path / "student.safetensors"
    if path.is_file():
        return load_network(path).to(built.device)
    allowed = ", ".join([*(teacher.name for teacher in built.teachers), STUDENT, *others])
    raise ValueError(f"{option} {name!r}: no such network; allowed: {allowed}, a weights file with its card, or a run")


def _order(built: Build, name: str, network: ImageNetwork) -> Tensor | None:
    """How a network from a file has its classes brought into the run's order; those of the run have it already."""
    if network is built.side.network or network in built.teachers:
        return None
    path = Path(name) / "student.safetensors" if Path(name).is_dir() else Path(name)
    card: dict[str, Any] = read_card(path)
    if card["num_classes"] != built.recipe.num_classes:
        raise ValueError(f"judge {name}: has {card['num_classes']} classes, the run has {built.recipe.num_classes}")
    reference = reference_classes(built.cards) or built.student_card.classes
    order = class_order(card.get("classes"), reference, name)
    return None if order is None else torch.tensor(order, device=built.device)
