"""Suites: tasks, their samples, and scorers."""
