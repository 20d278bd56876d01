// One decoding step: attention of one query token per sequence over its cached keys and values, and sampling.
//
// Legend: T query tokens, H query heads, G key/value heads, C channels, S cache rows, L positions, V vocabulary.
#include <torch/library.h>

#include <vector>

#include "tensors.h"

namespace megatron_ring {
namespace {

// mixed [T, G, R + 2, C]: R queries, key and value of every group. Key and value are written to the cache at (row,
// position); the queries attend over positions 0 to their own: [T, G * R, C]
Tensor decode_attention(const Tensor& mixed_in, const Tensor& rotary_in, const Tensor& keys, const Tensor& values,
                        const Tensor& rows_in, const Tensor& positions_in, double scale, const OptionalTensor& q_weight,
                        const OptionalTensor& k_weight, double eps) {
  const char* op = "decode_attention";
  check_cpu(mixed_in, 4, op, "mixed");
  check_cpu(keys, 4, op, "keys");
  check_cpu(rotary_in, 3, op, "rotary");
  check_int64(rows_in, 1, op, "rows");
  check_int64(positions_in, 1, op, "positions");
  const Tensor mixed = mixed_in.contiguous(), rotary = rotary_in.contiguous();
  const int64_t T = mixed.size(0), G = mixed.size(1), M = mixed.size(2), C = mixed.size(3), R = M - 2;
  const int64_t slots = keys.size(0), L = keys.size(1), half = rotary.size(2);
  const auto dtype = mixed.scalar_type();
  TORCH_CHECK(keys.size(2) == G && keys.size(3) == C && values.sizes() == keys.sizes() && R >= 1 &&
                  keys.scalar_type() == dtype && values.scalar_type() == dtype && keys.is_contiguous() &&
                  values.is_contiguous(),
              op, ": keys and values must be alike, contiguous, and of mixed's dtype, groups and channels");
  TORCH_CHECK(rotary.size(0) == 2 && rotary.size(1) == T && 2 * half <= C && rotary.scalar_type() == at::kFloat &&
                  rows_in.size(0) == T && positions_in.size(0) == T,
              op, ": needs cos and sin (fp32), a row and a position for every token");
  const Tensor row_of = rows_in.contiguous(), position_of = positions_in.contiguous();
  auto norm = [&](const OptionalTensor& weight) {
    return weight.has_value() && weight->defined() ? weight->to(dtype).contiguous() : Tensor();
  };
  const Tensor q_norm = norm(q_weight), k_norm = norm(k_weight);
  Tensor out = at::empty({T, G * R, C}, mixed.options());
  over_floats(dtype, op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S* from = data<S>(mixed);
    S *kept_keys = data<S>(keys), *kept_values = data<S>(values), *context = data<S>(out);
    const S* q_scale = q_norm.defined() ? data<S>(q_norm) : nullptr;
    const S* k_scale = k_norm.defined() ? data<S>(k_norm) : nullptr;
    const float *cos = data<float>(rotary), *sin = cos + T * half;
    const int64_t *row = data<int64_t>(row_of), *position = data<int64_t>(position_of);
    auto ready = [&](S* to, const S* x, const S* weight, int64_t t) {
      if (weight) {
        rows<S>().rms_norm(to, x, weight, static_cast<A>(eps), C);
      } else {
        std::memcpy(static_cast<void*>(to), x, C * sizeof(S));
      }
      rows<S>().rotate(to, cos + t * half, sin + t * half, A(1), half);
    };
    at::parallel_for(0, T * G, 8, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(L);
      std::vector<S> queries(R * C);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t t = item / G, g = item % G, n = position[t] + 1;
        TORCH_CHECK(row[t] >= 0 && row[t] < slots && n >= 1 && n <= L, op, ": row ", row[t], " or position ", n - 1,
                    " is outside the cache");
        const S* x = from + item * M * C;
        const int64_t base = (row[t] * L * G + g) * C, stride = G * C, own = base + (n - 1) * stride;
        for (int64_t r = 0; r < R; ++r) ready(queries.data() + r * C, x + r * C, q_scale, t);
        ready(kept_keys + own, x + R * C, k_scale, t);
        std::memcpy(static_cast<void*>(kept_values + own), x + (R + 1) * C, C * sizeof(S));
        rows<S>().attend(queries.data(), R, kept_keys + base, kept_values + base, stride, n, static_cast<A>(scale),
                         scratch.data(), context + item * R * C, C);
      }
    });
  });
  return out;
}

// (tokens, log p); threshold is the smallest allowed logit of each row
std::tuple<Tensor, Tensor> sample_token(const Tensor& logits, const Tensor& uniform, double temperature,
                                        const OptionalTensor& threshold) {
  const char* op = "sample_token";
  check_cpu(logits, 2, op, "logits");
  check_cpu(uniform, 1, op, "uniform");
  const int64_t T = logits.size(0), V = logits.size(1), stride = logits.stride(0);
  TORCH_CHECK(uniform.size(0) == T && V > 0 && logits.stride(1) == 1 && temperature > 0, op,
              ": needs one uniform number per row, unit column stride and a temperature above 0");
  const Tensor numbers = uniform.to(at::kDouble).contiguous(), lowest = arithmetic(threshold, logits);
  Tensor tokens = at::empty({T}, logits.options().dtype(at::kLong));
  Tensor logp = at::empty({T}, logits.options().dtype(arithmetic_dtype(logits.scalar_type())));
  over_floats(logits.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S* x = data<S>(logits);
    const double* u = data<double>(numbers);
    const A* least = lowest.defined() ? data<A>(lowest) : nullptr;
    int64_t* token = data<int64_t>(tokens);
    A* log_p = data<A>(logp);
    at::parallel_for(0, T, row_grain(2 * V), [&](int64_t begin, int64_t end) {
      std::vector<A> z(V), p(V);
      for (int64_t t = begin; t < end; ++t) {
        const S* row = x + t * stride;
        for (int64_t i = 0; i < V; ++i) z[i] = widen(row[i]) * static_cast<A>(1 / temperature);
        const A log_sum = scores<A>().softmax(z.data(), p.data(), V);
        if (least) {
          for (int64_t i = 0; i < V; ++i) p[i] = widen(row[i]) < least[t] ? A(0) : p[i];
        }
        double total = 0;
        for (int64_t i = 0; i < V; ++i) total += p[i];
        const double target = u[t] * total;
        double mass = 0;
        int64_t taken = 0;
        for (int64_t i = 0; i < V; ++i) {
          if (p[i] > 0) taken = i;
          mass += p[i];
          if (mass > target) break;
        }
        token[t] = taken;
        log_p[t] = z[taken] - log_sum;
      }
    });
  });
  return {tokens, logp};
}

}  // namespace
}  // namespace megatron_ring

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) {
  m.def(
      "decode_attention(Tensor mixed, Tensor rotary, Tensor(a!) keys, Tensor(b!) values, Tensor rows, Tensor positions, "
      "float scale, Tensor? q_weight, Tensor? k_weight, float eps) -> Tensor");
  m.def("sample_token(Tensor logits, Tensor uniform, float temperature, Tensor? threshold) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("decode_attention", megatron_ring::decode_attention);
  m.impl("sample_token", megatron_ring::sample_token);
}
