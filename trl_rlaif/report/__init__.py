"""The report of a run: one HTML file that explains the results in plain words."""
