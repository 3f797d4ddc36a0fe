"""Models that leave a run's folder: as adapters or as whole models, with a model card, into a folder or to the Hub."""

from trl_rlaif.export.export import ExportOptions, export_model

__all__ = ["ExportOptions", "export_model"]
