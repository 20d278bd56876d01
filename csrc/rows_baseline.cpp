// The rows for any processor (SSE2 on x86-64, NEON on aarch64), and the choice between the instruction sets.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "rows.h"

#pragma GCC diagnostic ignored "-Wpsabi"
#define MR_NAMESPACE baseline
#define MR_BYTES 16
#include "simd_rows.h"

namespace megatron_ring {

#if defined(__x86_64__)
// rows_avx2.cpp
template <class S>
Rows<S> avx2_rows();
template <class A>
Scores<A> avx2_scores();

// MEGATRON_RING_ISA=baseline leaves the vectors narrow, so that a test can run what other processors run
static bool has_avx2() {
  const char* wanted = std::getenv("MEGATRON_RING_ISA");
  if (wanted && std::strcmp(wanted, "baseline") == 0) return false;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

template <class S>
static Rows<S> best_rows() {
  return has_avx2() ? avx2_rows<S>() : baseline::row_table<S>();
}
template <class A>
static Scores<A> best_scores() {
  return has_avx2() ? avx2_scores<A>() : baseline::score_table<A>();
}
const char* instruction_set() { return has_avx2() ? "avx2" : "baseline"; }
#else
template <class S>
static Rows<S> best_rows() {
  return baseline::row_table<S>();
}
template <class A>
static Scores<A> best_scores() {
  return baseline::score_table<A>();
}
const char* instruction_set() { return "baseline"; }
#endif

template <class S>
const Rows<S>& rows() {
  static const Rows<S> table = best_rows<S>();
  return table;
}
template <class A>
const Scores<A>& scores() {
  static const Scores<A> table = best_scores<A>();
  return table;
}

template const Rows<float>& rows<float>();
template const Rows<double>& rows<double>();
template const Rows<bf16>& rows<bf16>();
template const Rows<f16>& rows<f16>();
template const Scores<float>& scores<float>();
template const Scores<double>& scores<double>();

}  // namespace megatron_ring
