// From the attention's fused projection to queries, keys and values: head norms and rotary positions, and back.
//
// Legend: T tokens, G key/value heads, R query heads that share one, M = R + 2, C channels per head.
#include <torch/library.h>

#include <vector>

#include "tensors.h"

namespace megatron_ring {
namespace {

// partial sums of the weights' gradients: a fixed number, so that they do not depend on the number of threads
constexpr int64_t kParts = 16;

struct Shape {
  int64_t T, G, R, C, half;
  int64_t item() const { return (R + 2) * C; }
};

Shape checked(const Tensor& mixed, const Tensor& rotary, const OptionalTensor& q_weight, const OptionalTensor& k_weight) {
  const char* op = "qk_norm_rope";
  check_cpu(mixed, 4, op, "mixed");
  check_cpu(rotary, 3, op, "rotary");
  const Shape s{mixed.size(0), mixed.size(1), mixed.size(2) - 2, mixed.size(3), rotary.size(2)};
  TORCH_CHECK(s.R >= 1 && rotary.size(0) == 2 && rotary.size(1) == s.T && 2 * s.half <= s.C &&
                  rotary.scalar_type() == at::kFloat,
              op, ": needs a query, key and value per group, and cos and sin (fp32) of every token");
  TORCH_CHECK(q_weight.has_value() == k_weight.has_value() &&
                  (!q_weight.has_value() || (q_weight->numel() == s.C && k_weight->numel() == s.C)),
              op, ": one weight per channel for queries and for keys, or none");
  return s;
}

Tensor weight_like(const OptionalTensor& weight, const Tensor& x) {
  return weight.has_value() ? weight->to(x.scalar_type()).contiguous() : Tensor();
}

// (q [T, G * R, C], k [T, G, C], v [T, G, C])
std::tuple<Tensor, Tensor, Tensor> qk_norm_rope(const Tensor& mixed_in, const Tensor& rotary_in,
                                                const OptionalTensor& q_weight_in, const OptionalTensor& k_weight_in,
                                                double eps) {
  const Shape s = checked(mixed_in, rotary_in, q_weight_in, k_weight_in);
  const Tensor mixed = mixed_in.contiguous(), rotary = rotary_in.contiguous();
  const Tensor q_weight = weight_like(q_weight_in, mixed), k_weight = weight_like(k_weight_in, mixed);
  Tensor q = at::empty({s.T, s.G * s.R, s.C}, mixed.options());
  Tensor k = at::empty({s.T, s.G, s.C}, mixed.options()), v = at::empty_like(k);
  over_floats(mixed.scalar_type(), "qk_norm_rope", [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S* from = data<S>(mixed);
    S *queries = data<S>(q), *keys = data<S>(k), *values = data<S>(v);
    const S* q_scale = q_weight.defined() ? data<S>(q_weight) : nullptr;
    const S* k_scale = k_weight.defined() ? data<S>(k_weight) : nullptr;
    const float *cos = data<float>(rotary), *sin = cos + s.T * s.half;
    at::parallel_for(0, s.T * s.G, row_grain(4 * s.item()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t angle = i / s.G * s.half;
        const S* x = from + i * s.item();
        for (int64_t m = 0; m <= s.R; ++m, x += s.C) {
          S* to = m < s.R ? queries + (i * s.R + m) * s.C : keys + i * s.C;
          const S* weight = m < s.R ? q_scale : k_scale;
          if (weight) {
            rows<S>().rms_norm(to, x, weight, static_cast<A>(eps), s.C);
          } else {
            std::memcpy(static_cast<void*>(to), x, s.C * sizeof(S));
          }
          rows<S>().rotate(to, cos + angle, sin + angle, A(1), s.half);
        }
        std::memcpy(static_cast<void*>(values + i * s.C), x, s.C * sizeof(S));
      }
    });
  });
  return {q, k, v};
}

// (dmixed, dweights [2, C] of queries and keys)
std::tuple<Tensor, Tensor> qk_norm_rope_backward(const Tensor& dq_in, const Tensor& dk_in, const Tensor& dv_in,
                                                 const Tensor& mixed_in, const Tensor& rotary_in,
                                                 const OptionalTensor& q_weight_in, const OptionalTensor& k_weight_in,
                                                 double eps) {
  const Shape s = checked(mixed_in, rotary_in, q_weight_in, k_weight_in);
  const auto dtype = mixed_in.scalar_type();
  TORCH_CHECK(dq_in.numel() == s.T * s.G * s.R * s.C && dk_in.numel() == s.T * s.G * s.C && dv_in.sizes() == dk_in.sizes() &&
                  dq_in.scalar_type() == dtype && dk_in.scalar_type() == dtype && dv_in.scalar_type() == dtype,
              "qk_norm_rope_backward: gradients must be like the outputs");
  const Tensor dq = dq_in.contiguous(), dk = dk_in.contiguous(), dv = dv_in.contiguous();
  const Tensor mixed = mixed_in.contiguous(), rotary = rotary_in.contiguous();
  const Tensor q_weight = weight_like(q_weight_in, mixed), k_weight = weight_like(k_weight_in, mixed);
  const int64_t items = s.T * s.G, part = std::max<int64_t>(16, (items + kParts - 1) / kParts);
  const int64_t parts = (items + part - 1) / part;
  Tensor dmixed = at::empty_like(mixed);
  Tensor dweights = at::zeros({parts, 2, s.C}, mixed.options().dtype(arithmetic_dtype(dtype)));
  over_floats(dtype, "qk_norm_rope_backward", [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S *from = data<S>(mixed), *queries = data<S>(dq), *keys = data<S>(dk), *values = data<S>(dv);
    S* out = data<S>(dmixed);
    A* sums = data<A>(dweights);
    const S* q_scale = q_weight.defined() ? data<S>(q_weight) : nullptr;
    const S* k_scale = k_weight.defined() ? data<S>(k_weight) : nullptr;
    const float *cos = data<float>(rotary), *sin = cos + s.T * s.half;
    at::parallel_for(0, parts, std::max<int64_t>(1, 32768 / (4 * part * s.item())), [&](int64_t begin, int64_t end) {
      std::vector<S> turned(s.C);
      for (int64_t i = begin * part; i < std::min(items, end * part); ++i) {
        const int64_t angle = i / s.G * s.half;
        const S* x = from + i * s.item();
        S* to = out + i * s.item();
        for (int64_t m = 0; m <= s.R; ++m, x += s.C, to += s.C) {
          const S* weight = m < s.R ? q_scale : k_scale;
          S* back = weight ? turned.data() : to;
          std::memcpy(static_cast<void*>(back), m < s.R ? queries + (i * s.R + m) * s.C : keys + i * s.C,
                      s.C * sizeof(S));
          rows<S>().rotate(back, cos + angle, sin + angle, A(-1), s.half);
          if (weight) {
            const A r = A(1) / std::sqrt(rows<S>().dot(x, x, s.C) / static_cast<A>(s.C) + static_cast<A>(eps));
            rows<S>().rms_norm_backward(back, x, weight, r, to, sums + (i / part * 2 + (m < s.R ? 0 : 1)) * s.C, s.C);
          }
        }
        std::memcpy(static_cast<void*>(to), values + i * s.C, s.C * sizeof(S));
      }
    });
  });
  return {dmixed, dweights.sum(0)};
}

}  // namespace
}  // namespace megatron_ring

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) {
  m.def("qk_norm_rope(Tensor mixed, Tensor rotary, Tensor? q_weight, Tensor? k_weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor mixed, Tensor rotary, Tensor? q_weight, "
      "Tensor? k_weight, float eps) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("qk_norm_rope", megatron_ring::qk_norm_rope);
  m.impl("qk_norm_rope_backward", megatron_ring::qk_norm_rope_backward);
}
