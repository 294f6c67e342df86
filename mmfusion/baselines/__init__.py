"""The methods to beat, with the inputs, outputs and guarantees of CMML."""

from mmfusion.baselines.cascade_autoencoder import CascadeAutoencoder
from mmfusion.baselines.expert_bank import ExpertBank
from mmfusion.baselines.late_fusion import LateFusion
from mmfusion.baselines.masked_transformer import MaskedTransformer
from mmfusion.baselines.mean_fill import MeanFill
from mmfusion.baselines.modality_dropout import ModalityDropout
from mmfusion.baselines.retrieve_and_fill import RetrieveAndFill
from mmfusion.baselines.shared_specific import SharedSpecific
from mmfusion.baselines.token_fill import TokenFill
from mmfusion.baselines.zero_fill import ZeroFill

__all__ = [
    "CascadeAutoencoder",
    "ExpertBank",
    "LateFusion",
    "MaskedTransformer",
    "MeanFill",
    "ModalityDropout",
    "RetrieveAndFill",
    "SharedSpecific",
    "TokenFill",
    "ZeroFill",
]
