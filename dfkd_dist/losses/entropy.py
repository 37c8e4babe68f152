"""How sure a teacher is of each image (``ice``, ``oh``), and how mixed the classes of a batch are (``bce``).

All entropies are at temperature 1 and in nats. Papers that use log10 (DAFL) or log2 (MosaicKD) differ by a
constant factor, which belongs in the recipe's weight.
"""

from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import entropy_of_probs, log_probs
from dfkd_dist.losses.distillation import cross_entropy


def instance_entropy(logits_NC: Tensor) -> Tensor:
    """``H(softmax(logits))`` per sample, ``[N]``, between 0 and log C (``ice``; DFMF, Eq. 3, second term)."""
    log_p_NC = log_probs("logits_NC", logits_NC)
    return -(log_p_NC.exp() * log_p_NC).sum(dim=1)


def one_hot(logits_NC: Tensor) -> Tensor:
    """Cross-entropy to the sample's own argmax, ``[N]`` (``oh``; DAFL); the choice itself has no gradient."""
    _checks.dims("logits_NC", logits_NC, 2)
    return cross_entropy(logits_NC, logits_NC.detach().argmax(dim=1))


def negative_batch_entropy(mean_probs_C: Tensor) -> Tensor:
    """``sum_c p_c log p_c``, a scalar between -log C and 0 (``bce``; DFMF, Eq. 3, third term).

    ``mean_probs_C`` is the mean of softmax outputs over the *global* batch. Minimising the term maximises the
    entropy of that mean, so that all classes appear.
    """
    _checks.dims("mean_probs_C", mean_probs_C, 1)
    return -entropy_of_probs(mean_probs_C)
