"""Ranks, groups and everything that talks over them."""
