// Managed memory for optimizer states, and AdamW over many tensors whose states may lie in it: what
// the next launch needs is on its way to the device while this one runs.
#pragma once
#include <vector>

#include "adamw.h"

namespace qlk::cuda {

// One step of all tensors, in as many launches as it takes; of `group` everything but the tensors
// is given. With `prefetch` their states are fetched to the device (managed memory; a hint, so that
// its failure is none) on a stream of this file's, one launch ahead, unless the stream is being
// captured or the device does not share managed memory with the host while it works (Windows).
//
// `captured`: a step that a graph may replay, whose scalars are made on the device; group.step is
// not read.
struct AdamWCaptured {
  AdamWClock clock;       // everything but the tensors' t
  std::vector<float*> t;  // of each tensor
  AdamWStep* steps;       // device memory: one for each
};
cudaError_t run_adamw(AdamWGroup group, const std::vector<AdamWTensor>& tensors,
                      const AdamWCaptured* captured, bool prefetch, int device,
                      cudaStream_t stream);

}  // namespace qlk::cuda
