// Which ops of the noise side have compiled code on a CPU; library.cu says it of a GPU. The schemas
// are written in Python, where each op is.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dbkernels_compiled, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&dbkernels::philox_normal_cpu));
  m.impl("philox_uniform", TORCH_BOX(&dbkernels::philox_uniform_cpu));
  m.impl("add_noise_fwd", TORCH_BOX(&dbkernels::add_noise_cpu));
  m.impl("score_loss_fwd", TORCH_BOX(&dbkernels::score_loss_cpu));
}
