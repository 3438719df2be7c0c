// SPDX-License-Identifier: Apache-2.0
// The parallel loop of every kernel. Included by .cpp files, after TORCH_TARGET_VERSION.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

namespace fastrec {
namespace {

// What `work` throws is thrown again behind the loop, with its type and its message: torch's loop
// makes "torch_parallel_for API call failed" of both.
template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  std::exception_ptr error;
  std::once_flag first;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      work(from, to);
    } catch (...) {
      std::call_once(first, [&] { error = std::current_exception(); });
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace
}  // namespace fastrec
