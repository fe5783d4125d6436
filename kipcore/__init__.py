"""kipcore: dataset distillation with provable subset selection, in JAX.

The public functions, by the room they live in; the README has a quickstart.
"""

from kipcore.absorb import absorb_weights
from kipcore.architectures import Architecture, architecture, conv_net, fc, myrtle
from kipcore.artifact import Artifact, ArtifactError, load_artifact, save_artifact
from kipcore.certificate import Certificate, measure_coreset
from kipcore.cholesky import rpcholesky
from kipcore.clustering import kernel_kmeans_plusplus, kmeans, kmeans_plusplus, nearest_rows
from kipcore.coreset import Coreset, auto_candidates, class_balanced_indices, measured_objective, select_coreset
from kipcore.distill.kip import KIPOptions, kip
from kipcore.distill.loop import (DistillInfo, DistillResult, DistillState, Distiller, adam, distill, distill_init,
                                  distill_step)
from kipcore.distill.method import Batch, LossInfo, Method, Sampler
from kipcore.distill.targets import Targets, arrange_targets
from kipcore.distill.importance import importance, sampler
from kipcore.evaluate import KRREvaluation, evaluate_krr, evaluate_network
from kipcore.gram import gram, gram_diag, gram_matvec
from kipcore.guarantees import guarantee_at, sample_size
from kipcore.kernels import from_stax, linear_fn, nngp_fn, ntk_fn, rbf_fn
from kipcore.krr import (KRRFit, KRRLoss, LabelSolution, krr_fit, krr_loss, krr_predict, label_solve,
                         label_solve_rows, relative_ridge)
from kipcore.leverage import (effective_dimension, feature_leverage_scores, landmark_leverage_scores,
                              ridge_leverage_scores)
from kipcore.networks import network
from kipcore.preprocess import Preprocess, fit_preprocess, one_hot_centred
from kipcore.pursuit import krr_pursuit
from kipcore.sampling import (gumbel_sample, importance_sample, merge_duplicates, sensitivity_sample,
                              stratified_sample, systematic_sample)
from kipcore.score_ridge import effective_dimension_bounds, landmark_score_ridge, score_ridge_for_dimension
from kipcore.sensitivity import (SensitivityScores, approximate_krr_sensitivities, blocked_krr_sensitivities,
                                 feature_krr_sensitivities, kmeans_sensitivities, krr_sensitivities,
                                 krr_sensitivity_scores, lightweight_sensitivities)
from kipcore.streaming import stream_krr_sensitivities
from kipcore.types import NumericalError, Status, Support
from kipcore.version import __version__

__all__ = [
    "Architecture", "Artifact", "ArtifactError", "Batch", "Certificate", "Coreset", "DistillInfo", "DistillResult",
    "DistillState", "Distiller", "KIPOptions", "KRREvaluation", "KRRFit", "KRRLoss", "LabelSolution", "LossInfo",
    "Method", "NumericalError", "Preprocess", "Sampler", "SensitivityScores", "Status", "Support", "Targets",
    "absorb_weights", "adam", "approximate_krr_sensitivities", "architecture", "arrange_targets", "auto_candidates",
    "blocked_krr_sensitivities", "class_balanced_indices", "conv_net", "distill", "distill_init", "distill_step",
    "effective_dimension", "effective_dimension_bounds", "evaluate_krr", "evaluate_network", "fc",
    "feature_krr_sensitivities", "feature_leverage_scores", "fit_preprocess", "from_stax", "gram", "gram_diag",
    "gram_matvec", "guarantee_at", "gumbel_sample", "importance", "importance_sample", "kernel_kmeans_plusplus",
    "kip", "kmeans", "kmeans_plusplus", "kmeans_sensitivities", "krr_fit", "krr_loss", "krr_predict", "krr_pursuit",
    "krr_sensitivities", "krr_sensitivity_scores", "label_solve", "label_solve_rows", "landmark_leverage_scores",
    "landmark_score_ridge", "lightweight_sensitivities", "linear_fn", "load_artifact", "measure_coreset",
    "measured_objective", "merge_duplicates", "myrtle", "nearest_rows", "network", "nngp_fn", "ntk_fn",
    "one_hot_centred", "rbf_fn", "relative_ridge", "ridge_leverage_scores", "rpcholesky", "sample_size", "sampler",
    "save_artifact", "score_ridge_for_dimension", "select_coreset", "sensitivity_sample", "stratified_sample",
    "stream_krr_sensitivities", "systematic_sample", "__version__",
]
