"""Labelled image sets, splits between parties and augmentation: all that reads or reshapes real data."""
