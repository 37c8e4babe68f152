"""The exact N best of scores that are spread over ranks, by radix selection: counts travel, scores never do.

A sample's key has 64 bits: its fp32 score as an unsigned integer of the same order, then its id, so that equal scores
are settled by id and no two keys are equal. Eight passes look at one byte each: all ranks add up how many of their
candidates have which byte, and everybody reads off the same sums in which byte the N-th best key lies. The result does
not depend on how many ranks there are or who holds which sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dfkd_dist.parallel.group import Group

_SHIFTS = (24, 16, 8, 0)
_BLOCK = 1 << 16  # samples at a time: bounds the temporaries

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


def ordered_uint32(scores_n: Floats) -> NDArray[np.uint32]:
    """fp32 numbers as unsigned integers of the same order; -0.0 and 0.0 become the same. NaNs have no place in it."""
    # In integers alone: float arithmetic would take denormals for zeros where the process flushes them.
    sign = np.uint32(1 << 31)
    bits_n = np.ascontiguousarray(scores_n, np.float32).view(np.uint32)
    bits_n = np.where(bits_n == sign, np.uint32(0), bits_n)
    return np.where(bits_n >= sign, ~bits_n, bits_n | sign)


def top_n(scores_n: Floats, ids_n: Integers, count: int, group: Group, *, largest: bool) -> Mask:
    """Which of this rank's samples are among the `count` best of all ranks'; all of them where there are fewer.

    Every rank calls it alike.

    Args:
        scores_n: fp32 `[n]`, this rank's; infinities are allowed.
        ids_n: int64 `[n]` in [0, 2^32), each id once over all ranks; of equal scores the lowest ids win.
        count: N.
        group: who holds the samples.
        largest: whether the largest or the smallest scores are the best.

    Raises:
        ValueError: on all ranks: a score is NaN, an id is out of range or occurs twice.
    """
    labels_n = np.zeros(len(scores_n), np.int64)
    return top_n_balanced(scores_n, ids_n, labels_n, count, 1, group, largest=largest)


def top_n_balanced(
    scores_n: Floats, ids_n: Integers, labels_n: Integers, count: int, classes: int, group: Group, *, largest: bool
) -> Mask:
    """`top_n` with the same number of samples from each class, as far as there are so many (see `quotas`).

    Args:
        scores_n: see `top_n`.
        ids_n: see `top_n`.
        labels_n: int64 `[n]` in [0, classes).
        count: N over all classes.
        classes: C.
        group: see `top_n`.
        largest: see `top_n`.

    Raises:
        ValueError: on all ranks: as `top_n`, or a label is out of range.
    """
    if count < 0 or classes < 1:
        raise ValueError(f"top_n: expected count >= 0 and classes >= 1, found {count} and {classes}")
    _check(scores_n, ids_n, labels_n, classes, group)
    available_C = _summed(np.bincount(labels_n, minlength=classes), group)
    return _Selection(scores_n, ids_n, labels_n, quotas(available_C, count), group, largest).run()


def quotas(available_C: Integers, count: int) -> Integers:
    """`count` spread over classes as evenly as they can give: int64 `[C]`.

    Every class gives the same number, or all it has if that is less; what is then left over (fewer than there are
    classes that could give more) goes one each to the first of those.
    """
    available_C = np.asarray(available_C, np.int64)
    wanted = min(count, int(available_C.sum()))
    low, high = 0, int(available_C.max(initial=0))  # the largest level that does not give too many, by bisection
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(available_C, level).sum() <= wanted else (low, level - 1)
    quota_C = np.minimum(available_C, low)
    able = np.flatnonzero(available_C > low)
    quota_C[able[: wanted - int(quota_C.sum())]] += 1
    return quota_C


class _Selection:
    """The smallest keys of each class, byte by byte.

    A sample is *open* as long as its key begins like its class's threshold. `left_C` is how many of a class's open
    samples are still to be taken.
    """

    def __init__(
        self, scores_n: Floats, ids_n: Integers, labels_n: Integers, quota_C: Integers, group: Group, largest: bool
    ) -> None:
        self.scores_n, self.ids_n, self.labels_n = scores_n, ids_n, labels_n
        self.left_C, self.group, self.largest = quota_C.copy(), group, largest
        self.taken_n, self.open_n = np.zeros(len(ids_n), bool), np.ones(len(ids_n), bool)

    def run(self) -> Mask:
        """All eight passes."""
        for of_score in (True, False):
            for shift in _SHIFTS:
                counts_CB = self._counts(of_score, shift)
                if not self.left_C.any():
                    return self.taken_n
                self._narrow(counts_CB, of_score, shift)
        # Keys are whole now: an open class has one sample left, unless two share an id.
        equal_C = _summed(np.bincount(self.labels_n[self.open_n], minlength=len(self.left_C)), self.group)
        if (equal_C > 1).any():
            raise ValueError(f"top_n: {int(equal_C.max())} samples have the same id; every id must occur once")
        self.taken_n |= self.open_n & (self.left_C[self.labels_n] > 0)
        return self.taken_n

    def _counts(self, of_score: bool, shift: int) -> Integers:
        """`[C, 256]`: over all ranks, how many open samples have which byte."""
        counts = np.zeros(len(self.left_C) * 256, np.int64)
        for at, byte_b in self._bytes(of_score, shift):
            counts += np.bincount(self.labels_n[at] * 256 + byte_b, minlength=len(counts))
        return _summed(counts, self.group).reshape(-1, 256)

    def _narrow(self, counts_CB: Integers, of_score: bool, shift: int) -> None:
        """Take what lies below the byte that holds each class's threshold; keep open what lies on it."""
        upto_CB = counts_CB.cumsum(axis=1)
        limit_C = (upto_CB < self.left_C[:, None]).sum(axis=1)  # the first byte with enough up to it
        for at, byte_b in self._bytes(of_score, shift):
            limit_b = limit_C[self.labels_n[at]]
            wanted_b = self.left_C[self.labels_n[at]] > 0
            self.taken_n[at] = (byte_b < limit_b) & wanted_b
            self.open_n[at] = (byte_b == limit_b) & wanted_b
        below_C = np.where(limit_C > 0, np.take_along_axis(upto_CB, np.maximum(limit_C - 1, 0)[:, None], 1)[:, 0], 0)
        self.left_C -= np.where(self.left_C > 0, below_C, 0)

    def _bytes(self, of_score: bool, shift: int) -> Iterator[tuple[Integers, Integers]]:
        """Positions of open samples and one byte of their keys, block by block."""
        for start in range(0, len(self.ids_n), _BLOCK):
            at = start + np.flatnonzero(self.open_n[start : start + _BLOCK])
            if len(at):
                yield at, (self._words(at, of_score) >> np.uint32(shift)).astype(np.int64) & 255

    def _words(self, at: Integers, of_score: bool) -> NDArray[np.uint32]:
        if not of_score:
            return self.ids_n[at].astype(np.uint32)
        words_b = ordered_uint32(self.scores_n[at])
        return ~words_b if self.largest else words_b


def _check(scores_n: Floats, ids_n: Integers, labels_n: Integers, classes: int, group: Group) -> None:
    """Agreed on by all ranks, so that none waits for a rank that gave up."""
    if not len(scores_n) == len(ids_n) == len(labels_n) or scores_n.dtype != np.float32:
        found = f"{scores_n.dtype} [{len(scores_n)}], [{len(ids_n)}] and [{len(labels_n)}]"
        raise ValueError(f"top_n: expected float32 scores, ids and labels of one length, found {found}")
    strange_n = (ids_n < 0) | (ids_n >= 2**32)
    unknown_n = (labels_n < 0) | (labels_n >= classes)
    found_3 = _summed(np.array([np.isnan(scores_n).sum(), strange_n.sum(), unknown_n.sum()]), group)
    if found_3[0]:
        raise ValueError(f"top_n: {found_3[0]} scores are NaN, which have no place in an order")
    if found_3[1]:
        raise ValueError(f"top_n: {found_3[1]} sample ids are outside [0, 2^32)")
    if found_3[2]:
        raise ValueError(f"top_n: {found_3[2]} labels are outside [0, {classes})")


def _summed(counts: NDArray[np.int64], group: Group) -> NDArray[np.int64]:
    """The sum over the group of integers; exact."""
    if group.size == 1:
        return counts.astype(np.int64)
    tensor = torch.from_numpy(counts.astype(np.int64)).to(group.device_type)
    return group.sum_(tensor).cpu().numpy()
