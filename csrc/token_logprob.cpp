// token_logprob: per-shard partial sums and the gradient. T tokens, V columns of this shard.
#include <torch/library.h>

#include "tensors.h"

namespace megatron_ring {
namespace {

// [T, 4]: max logit, sum exp(z), sum z exp(z), logit of the target (+inf if not here), z = (logit - max) / temperature.
// local: column of the target, -1 if elsewhere, -2 to skip the row.
Tensor token_logprob_partials(const Tensor& logits, const Tensor& local, int64_t columns, double temperature) {
  const char* op = "token_logprob_partials";
  check_cpu(logits, 2, op, "logits");
  check_int64(local, 1, op, "local");
  TORCH_CHECK(logits.size(0) == local.size(0) && logits.stride(1) == 1 && columns <= logits.size(1), op,
              ": needs one target per row, unit column stride and columns <= V");
  const int64_t tokens = logits.size(0);
  Tensor out = at::empty({tokens, 4}, logits.options().dtype(arithmetic_dtype(logits.scalar_type())));
  const Tensor targets = local.contiguous();
  over_floats(logits.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const A infinity = std::numeric_limits<A>::infinity();
    const S* x = data<S>(logits);
    const int64_t stride = logits.stride(0);
    const int64_t* target = data<int64_t>(targets);
    A* sums = data<A>(out);
    at::parallel_for(0, tokens, row_grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        A* sum = sums + 4 * t;
        sum[0] = -infinity, sum[1] = 0, sum[2] = 0, sum[3] = infinity;
        if (target[t] == -2 || columns == 0) continue;
        TORCH_CHECK(target[t] < columns, op, ": target column ", target[t], " is not below ", columns);
        rows<S>().logprob_partials(x + t * stride, columns, static_cast<A>(1 / temperature), sum);
        if (target[t] >= 0) sum[3] = widen(x[t * stride + target[t]]);
      }
    });
  });
  return out;
}

// the gradient of the logits into out (which may be logits); columns >= `columns` and rows with local -2 get zeros
void token_logprob_gradient(const Tensor& logits, const Tensor& local, int64_t columns, double temperature,
                            const Tensor& max, const Tensor& log_sum, const Tensor& entropy, const Tensor& dlogp,
                            const OptionalTensor& dentropy, const Tensor& out) {
  const char* op = "token_logprob_gradient";
  check_cpu(logits, 2, op, "logits");
  check_int64(local, 1, op, "local");
  TORCH_CHECK(out.sizes() == logits.sizes() && out.scalar_type() == logits.scalar_type() && out.stride(1) == 1 &&
                  logits.stride(1) == 1 && logits.size(0) == local.size(0) && columns <= logits.size(1),
              op, ": out must be like logits, with unit column stride");
  const int64_t tokens = logits.size(0), width = logits.size(1);
  const Tensor targets = local.contiguous();
  const Tensor maxima = arithmetic(max, logits), log_sums = arithmetic(log_sum, logits);
  const Tensor entropies = arithmetic(entropy, logits), dlogps = arithmetic(dlogp, logits);
  const Tensor dentropies = arithmetic(dentropy, logits);
  over_floats(logits.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S* x = data<S>(logits);
    S* dx = data<S>(out);
    const int64_t *target = data<int64_t>(targets), stride = logits.stride(0), out_stride = out.stride(0);
    const A *m = data<A>(maxima), *s = data<A>(log_sums), *h = data<A>(entropies), *dl = data<A>(dlogps);
    const A* dh = dentropies.defined() ? data<A>(dentropies) : nullptr;
    const A inverse = static_cast<A>(1 / temperature);
    at::parallel_for(0, tokens, row_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        S* row = dx + t * out_stride;
        const int64_t kept = target[t] == -2 ? 0 : columns;
        if (kept) {
          TORCH_CHECK(target[t] < columns, op, ": target column ", target[t], " is not below ", columns);
          const A dent = dh ? dh[t] : A(0);
          // before its row may be overwritten
          const A mine = target[t] >= 0 ? widen(x[t * stride + target[t]]) : A(0);
          rows<S>().logprob_gradient(x + t * stride, row, columns, inverse, m[t], s[t], h[t], dl[t], dent);
          if (target[t] >= 0) {
            // 1 - p as -expm1(log p): exact where p is nearly 1
            const A logp = (mine - m[t]) * inverse - s[t], p = std::exp(logp);
            const A spread = p > 0 ? p * (logp + h[t]) : A(0);
            row[target[t]] = narrow<S>((-std::expm1(logp) * dl[t] - spread * dent) * inverse);
          }
        }
        std::memset(static_cast<void*>(row + kept), 0, (width - kept) * sizeof(S));
      }
    });
  });
}

}  // namespace
}  // namespace megatron_ring

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) {
  m.def("token_logprob_partials(Tensor logits, Tensor local, int columns, float temperature) -> Tensor");
  m.def(
      "token_logprob_gradient(Tensor logits, Tensor local, int columns, float temperature, Tensor max, "
      "Tensor log_sum, Tensor entropy, Tensor dlogp, Tensor? dentropy, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("token_logprob_partials", megatron_ring::token_logprob_partials);
  m.impl("token_logprob_gradient", megatron_ring::token_logprob_gradient);
}
