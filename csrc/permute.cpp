// permute and combine: rows into expert order and back. T tokens, D width, K experts per token, N sorted rows.
#include <torch/library.h>

#include <vector>

#include "tensors.h"

namespace megatron_ring {
namespace {

int64_t rows_in_use(const Tensor& offsets) {
  TORCH_CHECK(offsets.scalar_type() == at::kInt && offsets.dim() == 1 && offsets.device().is_cpu(),
              "offsets must be a one-dimensional int32 CPU tensor");
  return offsets.numel() ? offsets.data_ptr<int>()[offsets.numel() - 1] : 0;
}

// out[n] = x[gather[n]] below offsets[-1], else 0
Tensor permute_rows(const Tensor& x_in, const Tensor& gather, const Tensor& offsets) {
  const char* op = "permute_rows";
  check_cpu(x_in, 2, op, "x");
  check_int64(gather, 1, op, "gather");
  const Tensor x = x_in.contiguous(), index = gather.contiguous();
  const int64_t rows_out = gather.size(0), used = std::min(rows_in_use(offsets), rows_out), tokens = x.size(0);
  const int64_t bytes = x.size(1) * x.element_size();
  Tensor out = at::empty({rows_out, x.size(1)}, x.options());
  const char* from = static_cast<const char*>(x.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const int64_t* row = data<int64_t>(index);
  at::parallel_for(0, rows_out, row_grain(x.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (n < used) {
        TORCH_CHECK(row[n] >= 0 && row[n] < tokens, op, ": row ", row[n], " is outside 0..", tokens - 1);
        std::memcpy(to + n * bytes, from + row[n] * bytes, bytes);
      } else {
        std::memset(to + n * bytes, 0, bytes);
      }
    }
  });
  return out;
}

void check_position(const Tensor& position, const OptionalTensor& weights, const char* op) {
  check_int64(position, 2, op, "position");
  TORCH_CHECK(!weights.has_value() || !weights->defined() || weights->sizes() == position.sizes(), op,
              ": weights must have the shape of position");
}

// out[t] = sum over k of weights[t, k] * y[position[t, k]]; -1 adds nothing
Tensor combine_rows(const Tensor& y_in, const Tensor& position, const OptionalTensor& weights) {
  const char* op = "combine_rows";
  check_cpu(y_in, 2, op, "y");
  check_position(position, weights, op);
  const Tensor y = y_in.contiguous(), slots = position.contiguous(), w = arithmetic(weights, y);
  const int64_t tokens = position.size(0), topk = position.size(1), width = y.size(1), num_rows = y.size(0);
  Tensor out = at::empty({tokens, width}, y.options());
  over_floats(y.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S* from = data<S>(y);
    S* to = data<S>(out);
    const int64_t* slot = data<int64_t>(slots);
    const A* weight = w.defined() ? data<A>(w) : nullptr;
    at::parallel_for(0, tokens, row_grain(width * topk), [&](int64_t begin, int64_t end) {
      std::vector<const S*> row(topk);
      std::vector<A> factor(topk);
      for (int64_t t = begin; t < end; ++t) {
        int64_t kept = 0;
        for (int64_t k = 0; k < topk; ++k) {
          const int64_t n = slot[t * topk + k];
          if (n < 0) continue;
          TORCH_CHECK(n < num_rows, op, ": position ", n, " is not below ", num_rows);
          row[kept] = from + n * width;
          factor[kept++] = weight ? weight[t * topk + k] : A(1);
        }
        rows<S>().weighted_sum(to + t * width, row.data(), factor.data(), kept, width);
      }
    });
  });
  return out;
}

// dy[position[t, k]] = weights[t, k] * dout[t]; with y also dweights[t, k] = <dout[t], y[position[t, k]]>;
// rows of dy past offsets[-1] are zero
std::tuple<Tensor, Tensor> combine_rows_backward(const Tensor& dout_in, const Tensor& position,
                                                 const Tensor& offsets, const OptionalTensor& weights, const OptionalTensor& y_in,
                                                 int64_t num_rows) {
  const char* op = "combine_rows_backward";
  check_cpu(dout_in, 2, op, "dout");
  check_position(position, weights, op);
  const Tensor dout = dout_in.contiguous(), slots = position.contiguous(), w = arithmetic(weights, dout);
  const Tensor y = y_in.has_value() && y_in->defined() ? y_in->contiguous() : Tensor();
  const int64_t tokens = position.size(0), topk = position.size(1), width = dout.size(1);
  TORCH_CHECK(!y.defined() || (w.defined() && y.scalar_type() == dout.scalar_type() && y.size(0) == num_rows &&
                               y.size(1) == width),
              op, ": y must be [num_rows, D] of dout's dtype, and comes with weights");
  Tensor dy = at::empty({num_rows, width}, dout.options());
  Tensor dw = y.defined() ? at::zeros_like(w) : Tensor();
  const int64_t used = rows_in_use(offsets);
  TORCH_CHECK(used <= num_rows, op, ": offsets end at row ", used, " of ", num_rows);
  over_floats(dout.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S *from = data<S>(dout), *value = y.defined() ? data<S>(y) : nullptr;
    S* to = data<S>(dy);
    const int64_t* slot = data<int64_t>(slots);
    const A* weight = w.defined() ? data<A>(w) : nullptr;
    A* dweight = dw.defined() ? data<A>(dw) : nullptr;
    at::parallel_for(0, tokens, row_grain(width * topk), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t k = 0; k < topk; ++k) {
          const int64_t i = t * topk + k, n = slot[i];
          if (n < 0) continue;
          TORCH_CHECK(n < num_rows, op, ": position ", n, " is not below ", num_rows);
          rows<S>().scale(to + n * width, from + t * width, weight ? weight[i] : A(1), width);
          if (dweight) dweight[i] = rows<S>().dot(from + t * width, value + n * width, width);
        }
      }
    });
    // rows of dropped slots
    std::memset(static_cast<void*>(to + used * width), 0, (num_rows - used) * width * sizeof(S));
  });
  if (dw.defined()) dw = dw.to(weights->scalar_type());
  return {dy, dw};
}

}  // namespace
}  // namespace megatron_ring

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) {
  m.def("permute_rows(Tensor x, Tensor gather, Tensor offsets) -> Tensor");
  m.def("combine_rows(Tensor y, Tensor position, Tensor? weights) -> Tensor");
  m.def(
      "combine_rows_backward(Tensor dout, Tensor position, Tensor offsets, Tensor? weights, Tensor? y, int num_rows) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("permute_rows", megatron_ring::permute_rows);
  m.impl("combine_rows", megatron_ring::combine_rows);
  m.impl("combine_rows_backward", megatron_ring::combine_rows_backward);
}
