"""Labelled images as tensors."""
