"""Exports a run's models as adapters or merged models, with a model card, to a folder or the Hub."""

from trl_rlaif.export.export import ExportOptions, export_model

__all__ = ["ExportOptions", "export_model"]
