"""Whether the student's logits are de-confounded before they are compared with the teachers'."""

from __future__ import annotations

from typing import Literal

from dfkd_dist.config.base import Count, Spec
from dfkd_dist.config.networks import TeacherSpec


class KDCISpec(Spec):
    """KDCI: a dictionary of the confounder's prototypes, and what it adds to the student's logits (Eqs. 3-5)."""

    kind: Literal["kdci"]
    size: Count = 8
    """N: prototypes. The paper: 8 for DAFL and Fast, 32 for CMI and DeepInversion, 128 for DFND and MosaicKD."""
    hidden: Count = 256
    """d_n: width of the additive attention (Eq. 5)."""
    pca: Count = 64
    """Largest number of principal components in which clusters are sought; the paper gives none."""
    every: Count = 1
    """Rounds between two dictionaries where images are made; selected real images give one dictionary, once."""
    proportions: Literal["counts", "uniform", "one"] = "counts"
    """P(z_i): N_i / N_m; without it (Table 4): 1 / N, or 1."""
    attention: Literal["learned", "random"] = "learned"
    """lambda_i: of Eq. 5, or drawn once for every dictionary (Table 4)."""
    prototypes: Literal["clusters", "random"] = "clusters"
    """z_i: cluster means, or normal numbers with the features' mean and variance (Table 4)."""
    detach: bool = False
    """Keep the attention's gradient from the student's logits (the paper does not say)."""
    source: TeacherSpec | None = None
    """Another network than the teachers for the features (Table 5); a learned mapping fits its classes to the run's."""
