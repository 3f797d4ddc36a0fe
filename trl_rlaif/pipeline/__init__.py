"""Runs a recipe in a folder: stages, their artifacts, and the runner."""
