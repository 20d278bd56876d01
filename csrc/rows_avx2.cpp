// The row operations with AVX2 and FMA, independent of the build's flags; empty on other processors than x86-64.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <limits>

#include "rows.h"

// after the standard headers: what they define stays runnable on any processor
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#define MR_NAMESPACE avx2
#define MR_BYTES 32
#include "simd_rows.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace megatron_ring {

template <class S>
Rows<S> avx2_rows();
template <class A>
Scores<A> avx2_scores();

template <>
Rows<float> avx2_rows<float>() {
  return avx2::row_table<float>();
}
template <>
Rows<double> avx2_rows<double>() {
  return avx2::row_table<double>();
}
template <>
Rows<bf16> avx2_rows<bf16>() {
  return avx2::row_table<bf16>();
}
template <>
Rows<f16> avx2_rows<f16>() {
  return avx2::row_table<f16>();
}
template <>
Scores<float> avx2_scores<float>() {
  return avx2::score_table<float>();
}
template <>
Scores<double> avx2_scores<double>() {
  return avx2::score_table<double>();
}

}  // namespace megatron_ring
#endif
