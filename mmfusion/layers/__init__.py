"""The stages of CMML as modules of their own, and what models share."""

from mmfusion.layers.alignment import ReferenceAlignment
from mmfusion.layers.attention import PresenceAttention
from mmfusion.layers.crta import CRTA, CRTABlock, CRTAOutput
from mmfusion.layers.encoders import ModalityEncoders
from mmfusion.layers.evidence import EvidenceOutput, ModalityEvidence
from mmfusion.layers.gate import ReadoutGate
from mmfusion.layers.head import FusionOutput, Head
from mmfusion.layers.memory import MemoryBank, MemoryReadout
from mmfusion.layers.pooling import ConcatPool, PresencePool
from mmfusion.layers.prototypes import PrototypeMemory
from mmfusion.layers.tokens import AbsentTokens, ContextTokens, ModalityTokens

__all__ = [
    "CRTA",
    "AbsentTokens",
    "CRTABlock",
    "CRTAOutput",
    "ConcatPool",
    "ContextTokens",
    "EvidenceOutput",
    "FusionOutput",
    "Head",
    "MemoryBank",
    "MemoryReadout",
    "ModalityEncoders",
    "ModalityEvidence",
    "ModalityTokens",
    "PresenceAttention",
    "PresencePool",
    "PrototypeMemory",
    "ReadoutGate",
    "ReferenceAlignment",
]
