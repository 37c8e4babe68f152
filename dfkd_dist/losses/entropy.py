"""How sure a teacher is of each image (``ice``, ``oh``), and how mixed the classes of a batch are (``bce``).

All entropies are at temperature 1 and in nats. Papers that use log10 (DAFL) or log2 (MosaicKD) differ by a
constant factor, which belongs in the recipe's weight.
"""

from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32, entropy_of_probs, log_probs, over_positions


def instance_entropy(logits_NC: Tensor) -> Tensor:
    """``H(softmax(logits))`` per sample, ``[N]``, between 0 and log C (``ice``; DFMF, Eq. 3, second term).

    Of ``[N, C, *positions]`` the mean over positions.
    """
    log_p_NC = log_probs("logits_NC", logits_NC)
    return -over_positions((log_p_NC.exp() * log_p_NC).sum(dim=1))


def one_hot(logits_NC: Tensor) -> Tensor:
    """Cross-entropy to the sample's own argmax, ``[N]`` (``oh``; DAFL); the choice itself has no gradient.

    Of ``[N, C, *positions]`` to each position's own argmax, the mean over positions.
    """
    log_p_NC = log_probs("logits_NC", logits_NC)
    choice_N1 = logits_NC.detach().argmax(dim=1, keepdim=True)
    return -over_positions(log_p_NC.gather(1, choice_N1).squeeze(1))


def summed_probs(logits_NC: Tensor) -> Tensor:
    """The sum over samples of their probabilities, ``[C]``; of ``[N, C, *positions]`` of their means over positions.

    Divided by the number of samples it is what :func:`negative_batch_entropy` wants.
    """
    _checks.class_scores("logits_NC", logits_NC)
    probs_NC = at_least_fp32(logits_NC).softmax(dim=1)
    return (probs_NC if probs_NC.dim() == 2 else probs_NC.flatten(2).mean(dim=2)).sum(dim=0)


def negative_batch_entropy(mean_probs_C: Tensor) -> Tensor:
    """``sum_c p_c log p_c``, a scalar between -log C and 0 (``bce``; DFMF, Eq. 3, third term).

    ``mean_probs_C`` is the mean of softmax outputs over the *global* batch. Minimising the term maximises the
    entropy of that mean, so that all classes appear.
    """
    _checks.dims("mean_probs_C", mean_probs_C, 1)
    return -entropy_of_probs(mean_probs_C)
