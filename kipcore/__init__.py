"""kipcore: dataset distillation with provable subset selection, in JAX.

All public names; the README has a quickstart.
"""

from kipcore.architectures import Architecture, architecture, conv_net, fc, myrtle
from kipcore.augment import random_augmentation
from kipcore.distillation.importance import ImportanceSampler, ImportanceState, importance, sampler
from kipcore.distillation.loop import (
  Distiller,
  DistillInfo,
  DistillResult,
  DistillState,
  distill,
  distill_init,
  distill_step,
)
from kipcore.distillation.method import Batch, Method, Sampler
from kipcore.distillation.methods.characteristic_function import NCFMOptions, ncfm
from kipcore.distillation.methods.closed_form import (
  ClosedForm,
  ClosedFormOptions,
  FeatureKernel,
  FeatureMap,
  draw_map,
  feature_kernel,
  krr_closed_form,
)
from kipcore.distillation.methods.closed_form import Validation as RidgeValidation
from kipcore.distillation.methods.combined import combined
from kipcore.distillation.methods.distribution_matching import DMOptions, dm
from kipcore.distillation.methods.expert_labels import (
  ExpertChoice,
  choose_expert,
  expert_labels,
  expert_losses,
)
from kipcore.distillation.methods.experts import ExpertState, train_expert
from kipcore.distillation.methods.frepo import FRePoOptions, frepo
from kipcore.distillation.methods.gradient_matching import GradientMatchingOptions, dc, dsa
from kipcore.distillation.methods.kip import KIPOptions, kip
from kipcore.distillation.methods.ratbptt import RaTBPTTOptions, rat_bptt
from kipcore.distillation.methods.rcig import RCIGOptions, rcig
from kipcore.distillation.methods.rfad import (
  RFADOptions,
  random_feature_kernel,
  random_features,
  rfad,
)
from kipcore.distillation.methods.trajectory_matching import TrajectoryMatchingOptions, mtt
from kipcore.distillation.optimizers import Optimizer
from kipcore.distillation.snapshot import CheckpointPolicy, Snapshot, scale_learning_rate
from kipcore.distillation.targets import Targets, arrange_targets
from kipcore.evaluation.krr import KRREvaluation, evaluate_krr
from kipcore.evaluation.networks import Tuned as TunedProtocol
from kipcore.evaluation.networks import evaluate_network, tune
from kipcore.evaluation.protocols import Protocol, label_distribution, protocol
from kipcore.evaluation.ranking import (
  EvaluationEntry,
  KernelEvaluator,
  NetworkEvaluator,
  RankingScores,
  evaluation_table,
  ranking_scores,
)
from kipcore.functional import FunctionalNetwork, as_network
from kipcore.io.artifact import Artifact, ArtifactError, load_artifact, save_artifact
from kipcore.io.checkpoint import CheckpointError, Checkpoints
from kipcore.io.export import DistilledSet
from kipcore.io.npz import NpzError
from kipcore.io.published import PublishedError, PublishedSet, load_published
from kipcore.io.torch_files import read_torch_file
from kipcore.io.trajectories import (
  Trajectories,
  TrajectoriesError,
  load_expert_state,
  load_trajectories,
  save_expert_state,
  save_trajectories,
)
from kipcore.kernels import (
  EmpiricalNTK,
  LinearKernel,
  NetworkKernel,
  ProductKernel,
  RBFKernel,
  ScaledKernel,
  SumKernel,
  empirical_ntk_fn,
  from_stax,
  linear_fn,
  nngp_fn,
  ntk_fn,
  rbf_fn,
)
from kipcore.kernels.gram import gram, gram_diag, gram_matvec
from kipcore.kernels.stax import StaxKernel
from kipcore.krr import (
  KRRFit,
  KRRLoss,
  LabelSolution,
  krr_fit,
  krr_loss,
  krr_predict,
  label_solve,
  label_solve_rows,
  relative_ridge,
)
from kipcore.networks import Network, ResNet, network
from kipcore.predictions import (
  GPPosterior,
  GradientFlow,
  gp_log_likelihood,
  gp_posterior,
  gradient_flow,
)
from kipcore.preprocess import Preprocess, fit_preprocess, one_hot_centered
from kipcore.preprocess import Step as PreprocessStep
from kipcore.selection.absorb import absorb_weights
from kipcore.selection.certificate import Certificate, measure_coreset
from kipcore.selection.cholesky import PivotedCholesky, rpcholesky
from kipcore.selection.clustering import (
  KMeansResult,
  Seeds,
  kernel_kmeans_plusplus,
  kmeans,
  kmeans_plusplus,
  nearest_rows,
)
from kipcore.selection.coreset import (
  Coreset,
  auto_candidates,
  class_balanced_indices,
  measured_objective,
  scaled_to_rows,
  select_coreset,
)
from kipcore.selection.crops import random_crops, rded
from kipcore.selection.draws import Plan as SamplingPlan
from kipcore.selection.guarantees import guarantee_at, sample_size
from kipcore.selection.leverage import (
  effective_dimension,
  feature_leverage_scores,
  landmark_leverage_scores,
  ridge_leverage_scores,
)
from kipcore.selection.pursuit import Pursuit, krr_pursuit
from kipcore.selection.representatives import herding, k_center, kernel_herding
from kipcore.selection.rows import select
from kipcore.selection.rows_certificate import RowsCertificate, measure_rows
from kipcore.selection.sampling import (
  MergedSample,
  Sample,
  SystematicSample,
  gumbel_sample,
  importance_sample,
  merge_duplicates,
  sensitivity_sample,
  stratified_sample,
  systematic_sample,
)
from kipcore.selection.score_ridge import (
  DimensionBounds,
  ScoreRidge,
  effective_dimension_bounds,
  landmark_score_ridge,
  score_ridge_for_dimension,
)
from kipcore.selection.sensitivity import (
  Guarantee,
  SensitivityScores,
  approximate_krr_sensitivities,
  blocked_krr_sensitivities,
  feature_krr_sensitivities,
  kmeans_sensitivities,
  krr_sensitivities,
  krr_sensitivity_scores,
  lightweight_sensitivities,
)
from kipcore.selection.streamed_rows import stream_select
from kipcore.selection.streaming import stream_krr_sensitivities
from kipcore.selection.thinning import kernel_thinning
from kipcore.types import (
  DatasetError,
  KernelFn,
  KipcoreError,
  LossInfo,
  NumericalError,
  Status,
  Support,
)
from kipcore.version import __version__

__all__ = [
  "Architecture",
  "Artifact",
  "ArtifactError",
  "Batch",
  "Certificate",
  "CheckpointError",
  "CheckpointPolicy",
  "Checkpoints",
  "ClosedForm",
  "ClosedFormOptions",
  "Coreset",
  "DMOptions",
  "DatasetError",
  "DimensionBounds",
  "DistillInfo",
  "DistillResult",
  "DistillState",
  "DistilledSet",
  "Distiller",
  "EmpiricalNTK",
  "EvaluationEntry",
  "ExpertChoice",
  "ExpertState",
  "FRePoOptions",
  "FeatureKernel",
  "FeatureMap",
  "FunctionalNetwork",
  "GPPosterior",
  "GradientFlow",
  "GradientMatchingOptions",
  "Guarantee",
  "ImportanceSampler",
  "ImportanceState",
  "KIPOptions",
  "KMeansResult",
  "KRREvaluation",
  "KRRFit",
  "KRRLoss",
  "KernelEvaluator",
  "KernelFn",
  "KipcoreError",
  "LabelSolution",
  "LinearKernel",
  "LossInfo",
  "MergedSample",
  "Method",
  "NCFMOptions",
  "Network",
  "NetworkEvaluator",
  "NetworkKernel",
  "NpzError",
  "NumericalError",
  "Optimizer",
  "PivotedCholesky",
  "Preprocess",
  "PreprocessStep",
  "Protocol",
  "ProductKernel",
  "PublishedError",
  "PublishedSet",
  "Pursuit",
  "RBFKernel",
  "RCIGOptions",
  "RFADOptions",
  "RaTBPTTOptions",
  "RankingScores",
  "ResNet",
  "RidgeValidation",
  "RowsCertificate",
  "Sample",
  "Sampler",
  "SamplingPlan",
  "ScaledKernel",
  "ScoreRidge",
  "Seeds",
  "SensitivityScores",
  "Snapshot",
  "Status",
  "StaxKernel",
  "SumKernel",
  "Support",
  "SystematicSample",
  "Targets",
  "Trajectories",
  "TrajectoriesError",
  "TrajectoryMatchingOptions",
  "TunedProtocol",
  "absorb_weights",
  "approximate_krr_sensitivities",
  "architecture",
  "arrange_targets",
  "as_network",
  "auto_candidates",
  "blocked_krr_sensitivities",
  "choose_expert",
  "class_balanced_indices",
  "combined",
  "conv_net",
  "dc",
  "distill",
  "distill_init",
  "distill_step",
  "dm",
  "draw_map",
  "dsa",
  "effective_dimension",
  "effective_dimension_bounds",
  "empirical_ntk_fn",
  "evaluate_krr",
  "evaluate_network",
  "evaluation_table",
  "expert_labels",
  "expert_losses",
  "fc",
  "feature_kernel",
  "feature_krr_sensitivities",
  "feature_leverage_scores",
  "fit_preprocess",
  "frepo",
  "from_stax",
  "gp_log_likelihood",
  "gp_posterior",
  "gradient_flow",
  "gram",
  "gram_diag",
  "gram_matvec",
  "guarantee_at",
  "gumbel_sample",
  "herding",
  "importance",
  "importance_sample",
  "k_center",
  "kernel_herding",
  "kernel_kmeans_plusplus",
  "kernel_thinning",
  "kip",
  "kmeans",
  "kmeans_plusplus",
  "kmeans_sensitivities",
  "krr_closed_form",
  "krr_fit",
  "krr_loss",
  "krr_predict",
  "krr_pursuit",
  "krr_sensitivities",
  "krr_sensitivity_scores",
  "label_distribution",
  "label_solve",
  "label_solve_rows",
  "landmark_leverage_scores",
  "landmark_score_ridge",
  "lightweight_sensitivities",
  "linear_fn",
  "load_artifact",
  "load_published",
  "load_expert_state",
  "load_trajectories",
  "measure_coreset",
  "measure_rows",
  "measured_objective",
  "merge_duplicates",
  "mtt",
  "myrtle",
  "nearest_rows",
  "ncfm",
  "network",
  "nngp_fn",
  "ntk_fn",
  "one_hot_centered",
  "protocol",
  "random_augmentation",
  "random_crops",
  "random_feature_kernel",
  "random_features",
  "ranking_scores",
  "rat_bptt",
  "rbf_fn",
  "rcig",
  "rded",
  "read_torch_file",
  "relative_ridge",
  "rfad",
  "ridge_leverage_scores",
  "rpcholesky",
  "sample_size",
  "sampler",
  "save_artifact",
  "save_expert_state",
  "save_trajectories",
  "scale_learning_rate",
  "scaled_to_rows",
  "score_ridge_for_dimension",
  "select",
  "select_coreset",
  "sensitivity_sample",
  "stratified_sample",
  "stream_krr_sensitivities",
  "stream_select",
  "systematic_sample",
  "train_expert",
  "tune",
  "__version__",
]

# Names of the previous version; they keep working for one version.
_OPTIMIZERS = ("adam", "optimizer")
_DEPRECATED = {
  "Keeping": "CheckpointPolicy",
  "one_hot_centred": "one_hot_centered",
  "siamese": "random_augmentation",
  "slowed": "scale_learning_rate",
}


def __getattr__(name: str):
  if name in _DEPRECATED:
    import warnings

    new = _DEPRECATED[name]
    warnings.warn(f"kipcore.{name} is now kipcore.{new}", DeprecationWarning, stacklevel=2)
    return globals()[new]
  if name in _OPTIMIZERS:
    import warnings

    from kipcore.distillation import optimizers

    warnings.warn(
      f"kipcore.{name} is deprecated: use an optax optimizer, such as "
      "optax.adam(optax.cosine_decay_schedule(1e-2, 300))",
      DeprecationWarning,
      stacklevel=2,
    )
    return getattr(optimizers, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
