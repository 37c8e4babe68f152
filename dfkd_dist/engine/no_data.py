"""Tensors that have shapes but no values: real code runs on them in no memory and almost no time.

The tensors are those of torch's device `meta`. Two things are added. A question about a value (is the loss finite?)
is answered by one, or yes, where torch would raise. And the shapes that an operation gives are remembered, because
torch derives them in Python, at a tenth of a millisecond a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")

_aten = torch.ops.aten
_YES = (_aten.allclose.default, _aten.equal.default, _aten.is_nonzero.default)

_SHAPES: dict[Any, Any] = {}
"""Operation and shapes of its arguments to shapes of its result: never changes, so it is kept."""

Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Sizes, strides and type of a tensor."""


@contextmanager
def without_data() -> Iterator[None]:
    """New tensors have shapes but no values, and no question about values fails."""
    with META, _NoData():
        yield


class _NoData(TorchDispatchMode):
    """Answers questions about values, and remembers shapes."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[Any, Any] = _SHAPES

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return func(*args, **kwargs)
        first: Tensor = args[0]
        if func is _aten._local_scalar_dense.default:
            return torch.ones((), dtype=first.dtype, device="cpu").item()
        if func in _YES:
            return True
        to = kwargs.get("device")
        if func is _aten._to_copy.default and to is not None and to.type != "meta":
            return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype, device=to)
        if func is _aten.upsample_nearest2d.default and first.numel() == 0:
            # torch's own rule for tensors without data trips over a batch of no images; its kernels do not.
            return first.new_empty(*first.shape[:2], *args[1])
        if func is _aten.index.Tensor and _is_mask(args[1]):
            return first  # every image is valid
        if torch.Tag.pointwise in func.tags and func._schema.name.endswith("_"):
            return first  # in place: nothing to do
        return self._remembering(func, args, kwargs)

    def _remembering(self, func: Any, args: Any, kwargs: Any) -> Any:
        if any(a.alias_info is not None for a in func._schema.arguments):
            return func(*args, **kwargs)  # a view, or in place
        try:
            key = (func, _key(args), _key(kwargs))
            known = self._shapes.get(key)
        except TypeError:  # an argument that cannot be hashed
            return func(*args, **kwargs)
        if known is None:
            out = func(*args, **kwargs)
            self._shapes[key] = _fresh_shapes(out, (args, kwargs))
            return out
        if known == ():
            return func(*args, **kwargs)
        made = [None if shape is None else _empty(shape) for shape in known[1]]
        return known[0](made) if known[0] is not None else made[0]


def _is_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


def _empty(shape: Shape) -> Tensor:
    return torch.empty_strided(shape[0], shape[1], dtype=shape[2], device=META)


def _key(value: Any) -> Any:
    """Equal for arguments that give equal shapes (types matter: 1 and 1.0 do not promote alike)."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        keys = {id(item): _key(item) for item in {id(item): item for item in value}.values()}
        return tuple(keys[id(item)] for item in value)  # a thousand ranks' parts may be one and the same tensor
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return type(value), value


def _fresh_shapes(out: Any, given: Any) -> Any:
    """(container, shapes) of an operation's output; () where it cannot be made again from shapes alone."""
    parts = list(out) if isinstance(out, list | tuple) else [out]
    if not all(part is None or (isinstance(part, Tensor) and part.is_meta) for part in parts):
        return ()
    old = {t.untyped_storage()._cdata for t in tree_leaves(given) if isinstance(t, Tensor)}
    if any(part is not None and part.untyped_storage()._cdata in old for part in parts):
        return ()
    container = type(out) if isinstance(out, list | tuple) else None
    return container, [None if part is None else (part.shape, part.stride(), part.dtype) for part in parts]
