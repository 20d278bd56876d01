// One decoding step: attention of one query token per sequence over its cached keys and values, and sampling.
//
// Legend: T query tokens, H query heads, G key/value heads, C channels, S cache rows, L positions, V vocabulary.
#include <torch/library.h>

#include <vector>

#include "tensors.h"

namespace megatron_ring {
namespace {

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_rows,
                        const Tensor& lengths, double scale) {
  const char* op = "decode_attention";
  check_cpu(q, 3, op, "q");
  check_cpu(k, 4, op, "k");
  check_int64(cache_rows, 1, op, "rows");
  check_int64(lengths, 1, op, "lengths");
  const int64_t T = q.size(0), H = q.size(1), C = q.size(2), S = k.size(0), L = k.size(1), G = k.size(2);
  TORCH_CHECK(v.sizes() == k.sizes() && k.size(3) == C && G > 0 && H % G == 0 && cache_rows.size(0) == T &&
                  lengths.size(0) == T && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
              op, ": k and v must be alike, of q's dtype and channels, with one row and length per token");
  TORCH_CHECK(q.is_contiguous() && k.is_contiguous() && v.is_contiguous(), op, ": needs contiguous tensors");
  const Tensor row_of = cache_rows.contiguous(), length_of = lengths.contiguous();
  Tensor out = at::empty_like(q);
  const int64_t R = H / G;
  over_floats(q.scalar_type(), op, [&](auto tag) {
    using S_ = decltype(tag);
    using A = arithmetic_t<S_>;
    const S_ *queries = data<S_>(q), *keys = data<S_>(k), *values = data<S_>(v);
    S_* context = data<S_>(out);
    const int64_t *row = data<int64_t>(row_of), *length = data<int64_t>(length_of);
    at::parallel_for(0, T * G, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scores(L), weights(L);
      std::vector<const S_*> places(L);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t t = item / G, g = item % G, n = length[t];
        TORCH_CHECK(row[t] >= 0 && row[t] < S && n >= 1 && n <= L, op, ": row ", row[t], " or length ", n,
                    " is outside the cache");
        const int64_t base = (row[t] * L * G + g) * C, stride = G * C;
        for (int64_t i = 0; i < n; ++i) places[i] = values + base + i * stride;
        for (int64_t r = 0; r < R; ++r) {
          const int64_t at = (t * H + g * R + r) * C;
          for (int64_t i = 0; i < n; ++i) {
            scores[i] = rows<S_>().dot(queries + at, keys + base + i * stride, C) * static_cast<A>(scale);
          }
          megatron_ring::scores<A>().softmax(scores.data(), weights.data(), n);
          rows<S_>().weighted_sum(context + at, places.data(), weights.data(), n, C);
        }
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
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor lengths, float scale) -> Tensor");
  m.def("sample_token(Tensor logits, Tensor uniform, float temperature, Tensor? threshold) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("decode_attention", megatron_ring::decode_attention);
  m.impl("sample_token", megatron_ring::sample_token);
}
