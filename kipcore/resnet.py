"""A small residual network, to judge distilled sets by: no kernel of ours describes it."""

from typing import Sequence

import jax.numpy as jnp
from flax import linen as nn

from kipcore import linalg
from kipcore.networks import Convolution, average_pool
from kipcore.types import Array


class ResNet(nn.Module):
  """Residual network of basic blocks: `(n, h, w, c) -> (n, num_outputs)`.

      stem: 3x3 convolution, norm, ReLU
      block: x <- ReLU(shortcut(x) + norm(conv(ReLU(norm(conv(x))))));  shortcut is a 1x1 convolution where channels change
      between stages: 2x2 average pool, twice the channels;  end: global average, dense

  Strides are average pools, norms are by instance: batch norm has nothing to average over on ten images.

  Attributes:
    width: channels of the first stage.
    num_outputs: units of the readout.
    blocks: basic blocks of each stage; (2, 2, 2, 2) is the depth of ResNet-18.

  Source: He et al. (CVPR 2016), section 3, figure 5 (left), in the manner of small images.
  """

  width: int = 32
  num_outputs: int = 10
  blocks: Sequence[int] = (1, 1, 1)

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Outputs `(n, num_outputs)` of images `(n, h, w, c)`."""
    with linalg.permissive_promotion():
      x = nn.relu(self._norm("stem_norm", self._convolution("stem", self.width, 3, x)))
      for stage, count in enumerate(self.blocks):
        features = self.width * 2**stage
        if stage and min(x.shape[1:3]) > 1:
          x = average_pool(x, 2)
        for block in range(count):
          x = self._block(f"stage_{stage}_block_{block}", features, x)
      return nn.Dense(self.num_outputs, param_dtype=x.dtype, name="readout")(jnp.mean(x, axis=(1, 2)))

  def _block(self, name: str, features: int, x: Array) -> Array:
    y = nn.relu(self._norm(f"{name}_norm_0", self._convolution(f"{name}_0", features, 3, x)))
    y = self._norm(f"{name}_norm_1", self._convolution(f"{name}_1", features, 3, y))
    if x.shape[-1] != features:
      x = self._convolution(f"{name}_shortcut", features, 1, x)
    return nn.relu(x + y)

  def _convolution(self, name: str, features: int, size: int, x: Array) -> Array:
    return Convolution(features, size, nn.initializers.he_normal(), name=name)(x)

  def _norm(self, name: str, x: Array) -> Array:
    return nn.InstanceNorm(epsilon=1e-5, param_dtype=x.dtype, force_float32_reductions=False, name=name)(x)
