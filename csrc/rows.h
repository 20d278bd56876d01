// Operations on single rows, without torch: every inner loop of the extension. The code is in simd_rows.h; it is
// compiled once per instruction set (rows_*.cpp) and selected at run time, so one binary runs on any x86-64 or aarch64.
//
// S is the stored type; A, the arithmetic type, is float for 16-bit and 32-bit floats and double for double.
#pragma once

#include <cstdint>

namespace megatron_ring {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class S>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class S>
using arithmetic_t = typename Arithmetic<S>::type;

template <class S>
struct Rows {
  using A = arithmetic_t<S>;

  // sum[0] = max x, sum[1] = sum exp(z), sum[2] = sum z exp(z), with z = (x - max) / temperature; n >= 1
  void (*logprob_partials)(const S* x, int64_t n, A inv_temperature, A* sum);
  // out = p (-dlogp - dentropy (log p + entropy)) / temperature with log p = (x - max) / temperature - log_sum;
  // the caller adds dlogp / temperature at the target. out may be x.
  void (*logprob_gradient)(const S* x, S* out, int64_t n, A inv_temperature, A max, A log_sum, A entropy, A dlogp,
                           A dentropy);
  // out[i] = sum over j < count of weight[j] * row[j][i]; count may be 0
  void (*weighted_sum)(S* out, const S* const* row, const A* weight, int64_t count, int64_t n);
  // out[i] = weight * x[i]
  void (*scale)(S* out, const S* x, A weight, int64_t n);
  // <x, y>
  A (*dot)(const S* x, const S* y, int64_t n);
  // h = silu(gate) * up * p
  void (*swiglu)(S* h, const S* gate, const S* up, A p, int64_t n);
  // from dh: dgate, dup and h again; returns <dh, silu(gate) * up>
  A (*swiglu_backward)(const S* dh, const S* gate, const S* up, A p, S* dgate, S* dup, S* h, int64_t n);
  // y = x * r * weight, returns r = 1 / sqrt(mean(x^2) + eps)
  A (*rms_norm)(S* y, const S* x, const S* weight, A eps, int64_t n);
  // dx, and dweight += dy * x * r (dweight in arithmetic type)
  void (*rms_norm_backward)(const S* dy, const S* x, const S* weight, A r, S* dx, A* dweight, int64_t n);
  // turns the first 2 half channels of x by their angles, in place: channel i with i + half; sign -1 turns back
  void (*rotate)(S* x, const float* cos, const float* sin, A sign, int64_t half);
  // out [heads, C] = softmax(scale * q k^T) v of q [heads, C] over count rows of k and v, stride apart; scratch [count]
  void (*attend)(const S* q, int64_t heads, const S* k, const S* v, int64_t stride, int64_t count, A scale, A* scratch,
                 S* out, int64_t C);
};

// exponentials of a row in arithmetic precision
template <class A>
struct Scores {
  // out = softmax(x); returns logsumexp(x)
  A (*softmax)(const A* x, A* out, int64_t n);
  // out = sigmoid(x); returns logsumexp(x)
  A (*sigmoid)(const A* x, A* out, int64_t n);
};

// tables of the best instruction set this processor has
template <class S>
const Rows<S>& rows();
template <class A>
const Scores<A>& scores();
// "avx2" or "baseline"
const char* instruction_set();

}  // namespace megatron_ring
