"""The page that a run leaves behind: one HTML file that says in plain words what came out."""
