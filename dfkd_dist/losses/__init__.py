"""Pure loss functions: tensors in, tensors out.

Nothing here knows of ranks, files, recipes, hooks or learnable weights. Two shapes of function:

* per-sample terms return a vector ``[N]``; where the scores are those of pixels, ``[N, C, *positions]`` (also called
  ``NC`` here), it holds each sample's mean over its positions; the caller divides its masked sum by the *global* count
  (:func:`dfkd_dist.losses.weighted.global_mean`), so that the answer does not depend on how a batch is dealt
  to ranks;
* batch-coupled terms take sufficient statistics of the global batch and return a scalar.

Names repeat between families on purpose (``distillation.kl`` is minimised by a student, ``adversarial.kl`` by
a generator), so import the module, not the function.
"""
