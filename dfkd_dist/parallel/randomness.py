"""Random numbers that depend on *what* is drawn, never on which rank or batch draws it.

Every draw is a pure function of (seed, purpose, owner, round, step, global sample index, element): the counter-based
generator Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in
vectorised int64 arithmetic. Sample 17 is the same on 1, 2 and 64 ranks, in any slice of a batch and after any resume,
and there is no generator state to save. Integer draws are bit-equal on every device; the transcendental functions in
normals and Betas may differ in the last bit between a CPU and a GPU.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Blocks per pass: keeps the dozen int64 temporaries inside a CPU's cache, and a GPU busy, at a bounded memory.
_CHUNK_CPU, _CHUNK_CUDA = 1 << 15, 1 << 22


def philox4x32(counter: Sequence[int | Tensor], key: tuple[int, int]) -> list[int | Tensor]:
    """Philox4x32-10: four 32-bit words of a counter and two of a key to four random 32-bit words.

    Words are integers in [0, 2^32), held in Python ints or int64 tensors that broadcast. A product of two words may
    wrap around in int64; its low and high halves are still right, because the shift is made logical by the mask.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product_1 >> 32) & _MASK) ^ c1 ^ k0, ((product_0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product_1 & _MASK, product_0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


@lru_cache(maxsize=4096)
def _key(seed: int, purpose: str, owner: str, kind: str) -> tuple[int, int]:
    # JSON keeps the parts apart ("a" + "bc" is not "ab" + "c"); the kind keeps a uniform and a normal that share a
    # purpose independent of one another.
    digest = hashlib.blake2b(json.dumps([seed, purpose, owner, kind]).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _unit(word_hi: Tensor, word_lo: Tensor) -> Tensor:
    """Two 32-bit words to float64 in [0, 1): 53 random bits, every value exact."""
    return (((word_hi >> 5) << 26) | (word_lo >> 6)).double() * 2.0**-53


def _two_uniforms(words: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _unit(words[0], words[1]), _unit(words[2], words[3])


def _two_normals(words: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Box and Muller (1958). 1 - u lies in (0, 1], so the logarithm is finite; |normal| <= 8.6."""
    u, v = _two_uniforms(words)
    radius, angle = (-2.0 * (1.0 - u).log()).sqrt(), (2.0 * math.pi) * v
    return radius * angle.cos(), radius * angle.sin()


def _two_keys(words: list[Tensor]) -> tuple[Tensor, Tensor]:
    return (words[0] << 32) | words[1], (words[2] << 32) | words[3]


_Pair = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Randomness:
    """All random draws of a run, from one integer seed (any size or sign).

    Every method takes the *purpose* of the draw (a name such as ``"latents"``), the ``owner`` (a teacher's name, or
    ``""``), ``round`` and ``step``, all of which select independent streams; and ``indices_N``, the int64 *global*
    sample indices, on whose device the result lies. Round, step and indices must be in [0, 2^32): ValueError
    otherwise (indices on a GPU are not checked, since that would wait for it).
    """

    seed: int

    def uniform(
        self, purpose: str, indices_N: Tensor, shape: Sequence[int] = (), *, owner: str = "", round: int = 0,
        step: int = 0, dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        """Uniform on [0, 1), of shape [N, *shape]; made in float64 from 53 bits, cast, and still below 1 after it."""
        key = _key(self.seed, purpose, owner, "uniform")
        draws = _draw(key, indices_N, math.prod(shape), round, step, _two_uniforms, torch.float64)
        largest_below_1 = 1.0 - torch.finfo(dtype).eps / 2
        return draws.clamp_(max=largest_below_1).to(dtype).reshape(-1, *shape)

    def normal(
        self, purpose: str, indices_N: Tensor, shape: Sequence[int] = (), *, owner: str = "", round: int = 0,
        step: int = 0, dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        """Standard normal of shape [N, *shape], made in float64 by Box-Muller, then cast."""
        key = _key(self.seed, purpose, owner, "normal")
        draws = _draw(key, indices_N, math.prod(shape), round, step, _two_normals, torch.float64)
        return draws.to(dtype).reshape(-1, *shape)

    def integers(
        self, purpose: str, indices_N: Tensor, high: int, shape: Sequence[int] = (), *, owner: str = "",
        round: int = 0, step: int = 0,
    ) -> Tensor:  # fmt: skip
        """Integers uniform on [0, high), int64 [N, *shape]. The bias of the remainder is below high / 2^63."""
        if not 1 <= high <= 2**62:
            raise ValueError(f"integers({purpose!r}): high must be between 1 and 2^62, got {high}")
        key = _key(self.seed, purpose, owner, "integers")
        bits = _draw(key, indices_N, math.prod(shape), round, step, _two_keys, torch.int64)
        return ((bits & (2**63 - 1)) % high).reshape(-1, *shape)

    def permutation(
        self, purpose: str, n: int, *, owner: str = "", round: int = 0, step: int = 0,
        device: torch.device | str = "cpu",
    ) -> Tensor:  # fmt: skip
        """A uniformly random order of 0..n-1, int64 [n]: the stable argsort of n 64-bit keys."""
        if n < 0:
            raise ValueError(f"permutation({purpose!r}): n must not be negative, got {n}")
        key = _key(self.seed, purpose, owner, "permutation")
        origin = torch.zeros(1, dtype=torch.int64, device=device)
        return _draw(key, origin, n, round, step, _two_keys, torch.int64)[0].argsort(stable=True)

    def beta(
        self, purpose: str, indices_N: Tensor, alpha: float, beta: float, *, owner: str = "", round: int = 0,
        step: int = 0,
    ) -> Tensor:  # fmt: skip
        """Beta(alpha, beta) on [0, 1], float64 [N]; exact for any alpha, beta > 0.

        A / (A + B) of two Gamma draws, kept as logarithms so that tiny shapes do not become 0 / 0.
        """
        if not (0 < alpha < math.inf and 0 < beta < math.inf):
            raise ValueError(f"beta({purpose!r}): alpha and beta must be positive and finite, got {alpha}, {beta}")
        keys = [_key(self.seed, purpose, owner, kind) for kind in ("beta.a", "beta.b")]
        log_a, log_b = (
            _log_gamma_draws(key, indices_N, float(shape), round, step)
            for key, shape in zip(keys, (alpha, beta), strict=True)
        )
        return torch.sigmoid(log_a - log_b)


def _draw(
    key: tuple[int, int], indices_N: Tensor, count: int, round: int, step: int, pair: _Pair, dtype: torch.dtype,
    first_block: int = 0,
) -> Tensor:  # fmt: skip
    """Draw [N, count] numbers; element e of a sample is half e % 2 of its block first_block + e // 2."""
    indices_N = _checked_indices(indices_N)
    _check_word("round", round)
    _check_word("step", step)
    blocks = (count + 1) // 2
    _check_word("number of elements per sample / 2", first_block + blocks)
    out = torch.empty(len(indices_N) * blocks, 2, dtype=dtype, device=indices_N.device)
    chunk = _CHUNK_CUDA if indices_N.is_cuda else _CHUNK_CPU
    for start in range(0, len(out), chunk):
        part = out[start : start + chunk]
        flat = torch.arange(start, start + len(part), device=indices_N.device)
        words = philox4x32([flat % blocks + first_block, indices_N[flat // blocks], round, step], key)
        part[:, 0], part[:, 1] = pair(words)  # type: ignore[arg-type]
    return out.reshape(len(indices_N), 2 * blocks)[:, :count]


def _log_gamma_draws(key: tuple[int, int], indices_N: Tensor, shape: float, round: int, step: int) -> Tensor:
    """Logarithms of Gamma(shape, 1) draws, float64 [N], by Marsaglia and Tsang (ACM TOMS 26(3), 2000).

    Attempt j of a sample reads its blocks 2j and 2j+1, and only samples that were rejected try again, so a sample's
    value does not depend on its neighbours. A shape below 1 is raised by one and multiplied by U^(1/shape).
    """
    raised = shape + 1.0 if shape < 1.0 else shape
    d = raised - 1.0 / 3.0
    out = torch.empty(len(indices_N), dtype=torch.float64, device=indices_N.device)
    if out.is_meta:
        return out  # without data no attempt would ever be accepted
    todo = torch.arange(len(indices_N), device=indices_N.device)
    attempt = 0
    while len(todo) > 0:
        u = _draw(key, indices_N[todo], 4, round, step, _two_uniforms, torch.float64, first_block=2 * attempt)
        normal = (-2.0 * (1.0 - u[:, 0]).log()).sqrt() * ((2.0 * math.pi) * u[:, 1]).cos()
        cube = (1.0 + normal / math.sqrt(9.0 * d)) ** 3
        log_cube = cube.log()  # NaN where the cube is negative: such a comparison is false, a rejection
        accepted = (1.0 - u[:, 2]).log() < 0.5 * normal**2 + d * (1.0 - cube + log_cube)
        values = math.log(d) + log_cube
        if shape < 1.0:
            values = values + (1.0 - u[:, 3]).log() / shape
        out[todo[accepted]] = values[accepted]
        todo, attempt = todo[~accepted], attempt + 1
    return out


def _checked_indices(indices_N: Tensor) -> Tensor:
    if indices_N.ndim != 1 or indices_N.dtype != torch.int64:
        raise ValueError(f"indices must be int64 of shape [N], got {indices_N.dtype} of shape {tuple(indices_N.shape)}")
    if not indices_N.is_cuda and len(indices_N) > 0:
        for index in (int(indices_N.min()), int(indices_N.max())):
            _check_word("sample index", index)
    return indices_N


def _check_word(name: str, value: int) -> None:
    if not 0 <= value <= _MASK:
        raise ValueError(f"{name} must be in [0, 2^32), got {value}")
