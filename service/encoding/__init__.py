"""Pixels to bytes; knows no HTTP."""
