"""Imported once, by the server that reading processes are forked from: makes it deaf to a scheduler's signals too."""

from dfkd_dist.data.stream.worker import leave_signals_to_the_rank

leave_signals_to_the_rank()
