// RMSNorm over the last dimension: y = x * r * weight, r = 1 / sqrt(mean(x^2) + eps). T rows, D width.
#include <torch/library.h>

#include "tensors.h"

namespace megatron_ring {
namespace {

// partial sums of the weight's gradient: a fixed number, so that it does not depend on the number of threads
constexpr int64_t kParts = 16;

// (y, r [T])
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps) {
  const char* op = "rms_norm";
  check_cpu(x_in, 2, op, "x");
  TORCH_CHECK(weight_in.numel() == x_in.size(1), op, ": one weight per column of x");
  const Tensor x = x_in.contiguous(), weight = weight_in.to(x.scalar_type()).contiguous();
  const int64_t tokens = x.size(0), width = x.size(1);
  Tensor y = at::empty_like(x);
  Tensor r = at::empty({tokens}, x.options().dtype(arithmetic_dtype(x.scalar_type())));
  over_floats(x.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S *from = data<S>(x), *w = data<S>(weight);
    S* to = data<S>(y);
    A* inverse = data<A>(r);
    at::parallel_for(0, tokens, row_grain(2 * width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        inverse[t] = rows<S>().rms_norm(to + t * width, from + t * width, w, static_cast<A>(eps), width);
      }
    });
  });
  return {y, r};
}

// (dx, dweight)
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in,
                                             const Tensor& r_in) {
  const char* op = "rms_norm_backward";
  check_cpu(x_in, 2, op, "x");
  TORCH_CHECK(dy_in.sizes() == x_in.sizes() && dy_in.scalar_type() == x_in.scalar_type() &&
                  weight_in.numel() == x_in.size(1) && r_in.numel() == x_in.size(0),
              op, ": dy must be like x, with one r per row and one weight per column");
  const Tensor dy = dy_in.contiguous(), x = x_in.contiguous(), r = arithmetic(r_in, x);
  const Tensor weight = weight_in.to(x.scalar_type()).contiguous();
  const int64_t tokens = x.size(0), width = x.size(1), part = std::max<int64_t>(16, (tokens + kParts - 1) / kParts);
  const int64_t parts = (tokens + part - 1) / part;
  Tensor dx = at::empty_like(x), dweight = at::zeros({parts, width}, r.options());
  over_floats(x.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S *grad = data<S>(dy), *from = data<S>(x), *w = data<S>(weight);
    S* to = data<S>(dx);
    const A* inverse = data<A>(r);
    A* sums = data<A>(dweight);
    at::parallel_for(0, parts, std::max<int64_t>(1, 32768 / (part * width)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * part; t < std::min(tokens, end * part); ++t) {
        rows<S>().rms_norm_backward(grad + t * width, from + t * width, w, inverse[t],
                                    to + t * width, sums + t / part * width, width);
      }
    });
  });
  return {dx, dweight.sum(0).to(weight_in.scalar_type())};
}

}  // namespace
}  // namespace megatron_ring

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor r) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("rms_norm", megatron_ring::rms_norm);
  m.impl("rms_norm_backward", megatron_ring::rms_norm_backward);
}
