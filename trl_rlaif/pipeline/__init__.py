"""From a recipe to a run's folder: stages, their artifacts, and the runner."""
