// Helpers for all ops: dispatch over stored types, typed pointers, argument checks.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "rows.h"

namespace megatron_ring {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class S>
S* data(const Tensor& tensor) {
  return static_cast<S*>(tensor.data_ptr());
}

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bf16 v) { return at::BFloat16(v.bits, at::BFloat16::from_bits()); }
inline float widen(f16 v) { return at::Half(v.bits, at::Half::from_bits()); }

template <class S>
S narrow(arithmetic_t<S> v) {
  if constexpr (std::is_same_v<S, bf16>) {
    return {at::BFloat16(v).x};
  } else if constexpr (std::is_same_v<S, f16>) {
    return {at::Half(v).x};
  } else {
    return v;
  }
}

// call f with a value of the stored type that belongs to dtype
template <class F>
auto over_floats(at::ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(bf16{});
    case at::kHalf:
      return f(f16{});
    default:
      TORCH_CHECK(false, "megatron_ring::", op, ": dtype ", dtype, " is not a float type (fp64, fp32, bf16, fp16)");
  }
}

inline at::ScalarType arithmetic_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// contiguous, in the type that arithmetic on `like` runs in; undefined stays undefined
inline Tensor arithmetic(const OptionalTensor& tensor, const Tensor& like) {
  if (!tensor.has_value() || !tensor->defined()) return Tensor();
  return tensor->to(arithmetic_dtype(like.scalar_type())).contiguous();
}

inline void check_cpu(const Tensor& tensor, int64_t dim, const char* op, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.dim() == dim, "megatron_ring::", op, ": ", name, " must be a ", dim,
              "-dimensional CPU tensor, got ", tensor.dim(), " dimensions on ", tensor.device());
}

inline void check_int64(const Tensor& tensor, int64_t dim, const char* op, const char* name) {
  check_cpu(tensor, dim, op, name);
  TORCH_CHECK(tensor.scalar_type() == at::kLong, "megatron_ring::", op, ": ", name, " must be int64, got ",
              tensor.scalar_type());
}

// rows per parallel task: at least 32768 elements, so that small tensors stay on one thread
inline int64_t row_grain(int64_t row_elements) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_elements)); }

}  // namespace megatron_ring
