"""Integration tests: real guests under TCG."""
