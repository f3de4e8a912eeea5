// Which ops of the noise side have compiled code on a GPU.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CUDA, m) {
  m.impl("philox_normal", TORCH_BOX(&dbkernels::philox_normal_cuda));
  m.impl("philox_uniform", TORCH_BOX(&dbkernels::philox_uniform_cuda));
  m.impl("add_noise_fwd", TORCH_BOX(&dbkernels::add_noise_cuda));
  m.impl("score_loss_fwd", TORCH_BOX(&dbkernels::score_loss_cuda));
}
