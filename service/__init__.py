"""Serve exported generators over HTTP."""
