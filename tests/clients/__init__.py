"""Tests with heavy client libraries, which the extra `clients` installs; skipped without it."""
