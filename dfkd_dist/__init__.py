"""Distributed data-free knowledge distillation."""
