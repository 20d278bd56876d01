// Matrix products of bfloat16 on a processor that has no instructions for them: in fp32, rounded once.
//
// torch uses oneDNN for such products, which has fast bfloat16 code from AVX-512 on; without it, its plain loop is ten
// times slower than converting both operands and multiplying in fp32. While this is on, torch's matrix products of
// bfloat16 on the CPU do that; other dtypes are not affected. Switching it off restores torch's kernels.
#include <ATen/native/Resize.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include <memory>

#include "tensors.h"

namespace megatron_ring {
namespace {

using at::Scalar;

bool is_bf16(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }

Tensor wide(const Tensor& x) { return x.to(at::kFloat); }

Tensor narrow_like(const Tensor& value, const Tensor& x) { return value.to(x.scalar_type()); }

// out, resized as torch's out variants resize
Tensor& into(Tensor& out, const Tensor& value) {
  at::native::resize_output(out, value.sizes());
  return out.copy_(value);
}

Tensor mm(const Tensor& a, const Tensor& b) {
  return is_bf16(a) && is_bf16(b) ? narrow_like(at::cpu::mm(wide(a), wide(b)), a) : at::cpu::mm(a, b);
}

Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  return is_bf16(a) && is_bf16(b) && is_bf16(out) ? into(out, at::cpu::mm(wide(a), wide(b)))
                                                  : at::cpu::mm_out(out, a, b);
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  return is_bf16(a) && is_bf16(b) ? narrow_like(at::cpu::bmm(wide(a), wide(b)), a) : at::cpu::bmm(a, b);
}

Tensor& bmm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  return is_bf16(a) && is_bf16(b) && is_bf16(out) ? into(out, at::cpu::bmm(wide(a), wide(b)))
                                                  : at::cpu::bmm_out(out, a, b);
}

Tensor wide_addmm(const Tensor& x, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  return at::cpu::addmm(wide(x), wide(a), wide(b), beta, alpha);
}

bool all_bf16(const Tensor& x, const Tensor& a, const Tensor& b) { return is_bf16(x) && is_bf16(a) && is_bf16(b); }

Tensor addmm(const Tensor& x, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  return all_bf16(x, a, b) ? narrow_like(wide_addmm(x, a, b, beta, alpha), x) : at::cpu::addmm(x, a, b, beta, alpha);
}

Tensor& addmm_out(const Tensor& x, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha,
                  Tensor& out) {
  return all_bf16(x, a, b) && is_bf16(out) ? into(out, wide_addmm(x, a, b, beta, alpha))
                                           : at::cpu::addmm_out(out, x, a, b, beta, alpha);
}

Tensor& addmm_(Tensor& x, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  return all_bf16(x, a, b) ? x.copy_(wide_addmm(x, a, b, beta, alpha)) : at::cpu::addmm_(x, a, b, beta, alpha);
}

// torch warns that its kernels are replaced, which is intended here
struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

std::unique_ptr<torch::Library> replaced;

void use_wide_products(bool on) {
  if (!on) {
    replaced.reset();
  } else if (!replaced) {
    Silence silence;
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);
    replaced = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
    replaced->impl("mm", mm).impl("mm.out", mm_out).impl("bmm", bmm).impl("bmm.out", bmm_out);
    replaced->impl("addmm", addmm).impl("addmm.out", addmm_out).impl("addmm_", addmm_);
  }
}

}  // namespace
}  // namespace megatron_ring

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) { m.def("use_wide_products(bool on) -> ()", megatron_ring::use_wide_products); }
