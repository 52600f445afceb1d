"""HAT layers, maskers, task-indexed modules and the payload: what converted and hand-written networks are made of."""

from hatify.modules.config import HATConfig
from hatify.modules.context import TaskContext
from hatify.modules.layers import (
    HATGRU,
    HATLSTM,
    HATRNN,
    HATConv1d,
    HATConv2d,
    HATConv3d,
    HATConvTranspose1d,
    HATConvTranspose2d,
    HATConvTranspose3d,
    HATEmbedding,
    HATLayer,
    HATLinear,
    hat_class,
)
from hatify.modules.masker import Masker
from hatify.modules.masking import LiveMask, Mask
from hatify.modules.payload import HATPayload
from hatify.modules.recurrent import HATRecurrent
from hatify.modules.task_indexed import (
    TaskIndexed,
    TaskIndexedBatchNorm1d,
    TaskIndexedBatchNorm2d,
    TaskIndexedBatchNorm3d,
    TaskIndexedGroupNorm,
    TaskIndexedLayerNorm,
    TaskIndexedParameter,
    task_indexed_class,
)

__all__ = [
    "HATConfig", "HATConv1d", "HATConv2d", "HATConv3d", "HATConvTranspose1d", "HATConvTranspose2d", "HATConvTranspose3d",
    "HATEmbedding", "HATGRU", "HATLSTM", "HATLayer", "HATLinear", "HATPayload", "HATRNN", "HATRecurrent", "LiveMask", "Mask", "Masker",
    "TaskContext", "TaskIndexed", "TaskIndexedBatchNorm1d", "TaskIndexedBatchNorm2d", "TaskIndexedBatchNorm3d",
    "TaskIndexedGroupNorm", "TaskIndexedLayerNorm", "TaskIndexedParameter", "hat_class", "task_indexed_class",
]  # fmt: skip
