"""kipcore: dataset distillation with provable subset selection, in JAX.

The public functions, by the room they live in; the README has a quickstart.
"""

from kipcore.architectures import Architecture, architecture, conv_net, fc, myrtle
from kipcore.artifact import Artifact, ArtifactError, load_artifact, save_artifact
from kipcore.coreset import Coreset, absorb_weights, class_balanced_indices, select_coreset
from kipcore.distill.kip import KIPOptions, kip
from kipcore.distill.loop import (DistillInfo, DistillResult, DistillState, Distiller, Targets, adam, arrange_targets,
                                  distill, distill_init, distill_step)
from kipcore.distill.method import Batch, LossInfo, Method, Sampler
from kipcore.distill.samplers import sampler
from kipcore.evaluate import KRREvaluation, evaluate_krr, evaluate_network
from kipcore.gram import gram, gram_diag, gram_matvec
from kipcore.kernels import from_stax, linear_fn, nngp_fn, ntk_fn, rbf_fn
from kipcore.krr import (KRRFit, KRRLoss, LabelSolution, krr_fit, krr_loss, krr_predict, label_solve,
                         label_solve_rows, relative_ridge)
from kipcore.networks import network
from kipcore.preprocess import Preprocess, fit_preprocess, one_hot_centred
from kipcore.types import NumericalError, Status, Support
from kipcore.version import __version__

__all__ = [
    "Architecture", "Artifact", "ArtifactError", "Batch", "Coreset", "DistillInfo", "DistillResult", "DistillState", "Distiller",
    "KIPOptions", "KRREvaluation", "KRRFit", "KRRLoss", "LabelSolution", "LossInfo", "Method", "NumericalError",
    "Preprocess", "Sampler", "Status", "Support", "Targets", "absorb_weights", "adam", "architecture", "arrange_targets",
    "class_balanced_indices", "conv_net", "distill", "distill_init", "distill_step", "evaluate_krr",
    "evaluate_network", "fc", "fit_preprocess", "from_stax", "gram", "gram_diag", "gram_matvec", "kip", "krr_fit",
    "krr_loss", "krr_predict", "label_solve", "label_solve_rows", "linear_fn", "load_artifact", "myrtle", "network",
    "nngp_fn", "ntk_fn", "one_hot_centred", "rbf_fn", "relative_ridge", "sampler", "save_artifact", "select_coreset", "__version__",
]
