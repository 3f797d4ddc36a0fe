"""GPU memory of a run, predicted from its recipe and the model's configuration alone."""

from trl_rlaif.memory.activations import Activations, Precision
from trl_rlaif.memory.counting import Adapter, ModelShape, adapter, weight_bytes
from trl_rlaif.memory.gpus import CARDS, Advice, advise, capacity
from trl_rlaif.memory.plan import CONTEXT_BYTES, MARGIN, MemoryPlan, Part, load_config, plan_memory
from trl_rlaif.memory.table import describe

__all__ = [
    "CARDS",
    "CONTEXT_BYTES",
    "MARGIN",
    "Activations",
    "Adapter",
    "Advice",
    "MemoryPlan",
    "ModelShape",
    "Part",
    "Precision",
    "adapter",
    "advise",
    "capacity",
    "describe",
    "load_config",
    "plan_memory",
    "weight_bytes",
]
