"""Proximal policy optimization in short, overridable steps."""
