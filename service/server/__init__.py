"""Sockets, connections and processes; knows no image."""
