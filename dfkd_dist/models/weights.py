"""Read, check, load and write network weights without ever running code from a file.

Files are safetensors, or torch files read with `weights_only=True`. The zoo's parameter names are those of
the public checkpoints of DAFL, CMI, Fast-Datafree, MosaicKD, RepDistiller and SimKD; `RENAMES` does the rest.
"""

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "net")
"""Keys under which training scripts store the state dict beside epochs and optimisers."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

RENAMES: tuple[tuple[str, str, str], ...] = (
    (r"^features\.0\.", "conv1.", "LeNet-5 of CMI and Fast-Datafree"),
    (r"^features\.3\.", "conv2.", "LeNet-5 of CMI and Fast-Datafree"),
    (r"^features\.6\.", "conv3.", "LeNet-5 of CMI and Fast-Datafree"),
    (r"^fc\.0\.", "fc1.", "LeNet-5 of CMI and Fast-Datafree"),
    (r"^fc\.2\.", "fc2.", "LeNet-5 of CMI and Fast-Datafree"),
    (r"^fc\.", "linear.", "ResNet-18/34/50 and ShuffleNets that call the classifier fc"),
    (r"^linear\.", "fc.", "CIFAR and wide ResNets that call the classifier linear"),
    (r"\.downsample\.", ".shortcut.", "ResNet-18/34/50 with torchvision's name of the projection"),
    (r"\.shortcut\.", ".downsample.", "CIFAR ResNets with DAFL's name of the projection"),
)
"""(pattern, replacement, who writes it so). A rule applies to a tensor only if the network lacks the old name
and has the new one. Layouts that differ in more than names (a VGG whose `features` has five poolings) are not
mapped: their tensors may fit while the network computes something else."""

NAMED_PER_ERROR = 8


class WeightsError(ValueError):
    """A file with weights cannot be used; the message names the file and the tensors."""


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a file, on the CPU, with wrappers and wrappers' prefixes removed.

    Raises WeightsError if the file is missing, empty, truncated, holds no tensors, or holds Python objects
    that only code could restore.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file with weights")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    return _strip_prefixes(_tensors_only(_unwrap(content), path), path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata that `save_weights` wrote into a safetensors file ({} if none).

    Raises WeightsError as `load_state` does.
    """
    path = Path(path)
    if not path.is_file() or not _is_safetensors(path):
        raise WeightsError(f"{path}: not a safetensors file, so there is no metadata to read")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: truncated or damaged ({error})") from error


def load_weights(network: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Load a file into `network`; names are matched after `RENAMES`.

    With `strict=False` missing and unexpected tensors are skipped, as long as one fits. A missing
    `num_batches_tracked` is always tolerated. Raises WeightsError naming the tensors that are missing,
    unexpected, of another shape or kind, or that hold NaN or infinity; the network is then unchanged.
    """
    expected = {k: v for k, v in network.state_dict().items() if isinstance(v, Tensor)}
    state = _rename(load_state(path), expected)
    common = [name for name in expected if name in state]
    problems = _list_problems("wrong shape or kind", _misfits(state, expected, common))
    problems += _list_problems("NaN or infinity in", (n for n in common if not _is_finite(state[n])))
    if strict:
        missing = (n for n in expected if n not in state and not n.endswith("num_batches_tracked"))
        problems += _list_problems("missing", missing)
        problems += _list_problems("unexpected", (n for n in state if n not in expected))
    elif not common:
        problems.append(f"none of its {len(state)} tensors has a name that the network knows")
    if problems:
        raise WeightsError(f"{path} does not fit {type(network).__name__}: " + "; ".join(problems))
    network.load_state_dict({name: state[name] for name in common}, strict=False)


def save_weights(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically: aside, flushed to disk, then renamed over `path`.

    Tensors that share memory or are not contiguous are stored as independent copies. Raises WeightsError for
    values that are not tensors and for metadata that is not text.
    """
    path = Path(path)
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise WeightsError(f"{path}: only tensors can be saved; {_list_problems('not tensors', wrong)[0]}")
    for key, text in (metadata or {}).items():
        if not isinstance(text, str):
            raise WeightsError(f"{path}: metadata {key!r} must be text, got {type(text).__name__}")
    copies = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(copies, aside, metadata=dict(metadata or {}))
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _is_safetensors(path: Path) -> bool:
    """A safetensors file starts with eight bytes of length and a JSON object; torch's are zip or pickle."""
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or head[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: truncated or damaged, or not safetensors ({error})") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        offender = _named_offender(str(error), path)
        if offender is None:
            raise WeightsError(f"{path}: truncated or damaged, or not a file with weights") from error
        raise WeightsError(
            f"{path}: refused, because it holds more than tensors and plain containers ({offender}). Code from "
            "a file with weights is never run. If you trust its author, convert it where it may run: "
            "safetensors.torch.save_file("
            "torch.load('FILE', weights_only=False)['state_dict'], 'FILE.safetensors')"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: truncated or damaged, or not a file with weights ({error})") from error


def _named_offender(message: str, path: Path) -> str | None:
    """What torch's long refusal objects to; None where the file is no complete pickle in the first place."""
    found = re.search(r"Trying to [^\n]+|Can only [^\n]+|GLOBAL \S+", message)
    if found:
        return found.group().rstrip(".")
    with open(path, "rb") as file:
        is_newer_pickle = file.read(2) in (b"\x80\x03", b"\x80\x04", b"\x80\x05")
    return "a plain pickle, not written by torch.save" if is_newer_pickle else None


def _unwrap(content: Any) -> Any:
    """The innermost mapping under the usual wrappers."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content
        content = inner
    return content


def _tensors_only(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a mapping of names to tensors")
    others = [f"{k} ({type(v).__name__})" for k, v in content.items() if not isinstance(v, Tensor)]
    if others:
        listed = _list_problems("entries that are not tensors", others)[0]
        looked = ", ".join(WRAPPERS)
        raise WeightsError(f"{path}: {listed}; a state dict is sought at the top level and under {looked}")
    if not content:
        raise WeightsError(f"{path}: holds no tensors")
    return {str(name): tensor for name, tensor in content.items()}


def _strip_prefixes(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove `PREFIXES` while every name has one, in whatever order they were stacked."""
    while True:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _rename(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply `RENAMES`, the first rule that fits, to the tensors that the network does not know."""
    renamed = dict(state)
    for name in state:
        if name in expected:
            continue
        for pattern, replacement, _ in RENAMES:
            candidate = re.sub(pattern, replacement, name)
            if candidate in expected and candidate not in renamed:
                renamed[candidate] = renamed.pop(name)
                break
    return renamed


def _misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Iterable[str]) -> Iterable[str]:
    """Descriptions of the tensors whose shape differs, or that hold integers where the network has floats."""
    for name in names:
        found, wanted = state[name], expected[name]
        if found.shape != wanted.shape:
            yield f"{name} {list(found.shape)} instead of {list(wanted.shape)}"
        elif found.is_floating_point() != wanted.is_floating_point():
            yield f"{name} {found.dtype} instead of {wanted.dtype}"


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _list_problems(title: str, names: Iterable[str]) -> list[str]:
    """[] for no names, else one phrase with the first few of them and the number of the others."""
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - NAMED_PER_ERROR} more" if len(names) > NAMED_PER_ERROR else ""
    return [f"{title}: {', '.join(names[:NAMED_PER_ERROR])}{more}"]
