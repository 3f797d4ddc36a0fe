"""The stages of a run, one thin file each: a function of the run's context to its final numbers."""
