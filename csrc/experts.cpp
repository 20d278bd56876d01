// The element-wise middle of an expert: h = silu(gate) * up * p, with z = [gate, up]. N rows, F expert width.
#include "tensors.h"

namespace megatron_ring {

static void check_swiglu(const Tensor& z, const OptionalTensor& probs, const char* op) {
  check_cpu(z, 2, op, "z");
  TORCH_CHECK(z.size(1) % 2 == 0, op, ": z must have an even width (gate, then up), got ", z.size(1));
  TORCH_CHECK(!probs.has_value() || !probs->defined() || (probs->dim() == 1 && probs->size(0) == z.size(0)), op,
              ": probs must have one value per row of z");
}

Tensor swiglu(const Tensor& z_in, const OptionalTensor& probs) {
  const char* op = "swiglu";
  check_swiglu(z_in, probs, op);
  const Tensor z = z_in.contiguous(), p = arithmetic(probs, z);
  const int64_t num_rows = z.size(0), width = z.size(1) / 2;
  Tensor h = at::empty({num_rows, width}, z.options());
  over_floats(z.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S* from = data<S>(z);
    S* to = data<S>(h);
    const A* prob = p.defined() ? data<A>(p) : nullptr;
    at::parallel_for(0, num_rows, row_grain(8 * width), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const S* gate = from + n * 2 * width;
        rows<S>().swiglu(to + n * width, gate, gate + width, prob ? prob[n] : A(1), width);
      }
    });
  });
  return h;
}

// (dz, h, dprobs); h is computed again because the weight gradient of the down projection needs it
std::tuple<Tensor, Tensor, Tensor> swiglu_backward(const Tensor& dh_in, const Tensor& z_in,
                                                   const OptionalTensor& probs) {
  const char* op = "swiglu_backward";
  check_swiglu(z_in, probs, op);
  check_cpu(dh_in, 2, op, "dh");
  const int64_t num_rows = z_in.size(0), width = z_in.size(1) / 2;
  TORCH_CHECK(dh_in.size(0) == num_rows && dh_in.size(1) == width && dh_in.scalar_type() == z_in.scalar_type(), op,
              ": dh must be [N, F] of z's dtype");
  const Tensor dh = dh_in.contiguous(), z = z_in.contiguous(), p = arithmetic(probs, z);
  Tensor dz = at::empty_like(z), h = at::empty_like(dh);
  Tensor dp = p.defined() ? at::empty_like(p) : Tensor();
  over_floats(z.scalar_type(), op, [&](auto tag) {
    using S = decltype(tag);
    using A = arithmetic_t<S>;
    const S *from = data<S>(z), *grad = data<S>(dh);
    S *to_z = data<S>(dz), *to_h = data<S>(h);
    const A* prob = p.defined() ? data<A>(p) : nullptr;
    A* dprob = dp.defined() ? data<A>(dp) : nullptr;
    at::parallel_for(0, num_rows, row_grain(8 * width), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t at = n * width;
        const A inner = rows<S>().swiglu_backward(grad + at, from + 2 * at, from + 2 * at + width,
                                                  prob ? prob[n] : A(1), to_z + 2 * at, to_z + 2 * at + width,
                                                  to_h + at, width);
        if (dprob) dprob[n] = inner;
      }
    });
  });
  if (dp.defined()) dp = dp.to(probs->scalar_type());
  return {dz, h, dp};
}

}  // namespace megatron_ring
