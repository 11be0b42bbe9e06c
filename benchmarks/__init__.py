"""Measures artifacts as they ship, dense and expert alike: speed, memory, quality, tasks; and writes the report."""
