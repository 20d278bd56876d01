// The experts' SwiGLU network on the CPU: torch.ops.megatron_ring.expert_mlp_forward / expert_mlp_backward.
//
// Each thread computes one expert at a time and keeps its gate, up and hidden rows in its cache between the products;
// torch's per-expert products would each use all threads and stream every intermediate through memory. An expert with
// more than an equal share of the rows is computed first, alone, with all threads in its products. The products are
// torch's (MKL or oneDNN).
//
// Legend: N rows sorted by expert, D model width, F expert width, e local experts. offsets are inclusive cumulative row
// counts; rows past the last offset belong to no expert.
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "tensors.h"

namespace megatron_ring {
namespace {

// rows of one expert that go through the forward pass together, so that z and h of a block stay in the L2 cache
constexpr int64_t kBlockRows = 256;

// multiply-adds below which waking the other threads costs more than they save
constexpr int64_t kParallelWork = int64_t(1) << 20;

// h [n, F] from z [n, 2F]
template <class S>
void swiglu_rows(const S* z, const arithmetic_t<S>* probs, S* h, int64_t n, int64_t F) {
  at::parallel_for(0, n, row_grain(8 * F), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const S* gate = z + i * 2 * F;
      rows<S>().swiglu(h + i * F, gate, gate + F, probs ? probs[i] : arithmetic_t<S>(1), F);
    }
  });
}

// h [n, F], dz [n, 2F] and, where asked, dprobs [n] from dh [n, F] and z [n, 2F]
template <class S>
void swiglu_backward_rows(const S* dh, const S* z, const arithmetic_t<S>* probs, S* h, S* dz, arithmetic_t<S>* dprobs,
                          int64_t n, int64_t F) {
  at::parallel_for(0, n, row_grain(8 * F), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const S* gate = z + i * 2 * F;
      S* dgate = dz + i * 2 * F;
      const auto p = probs ? probs[i] : arithmetic_t<S>(1);
      const auto dp = rows<S>().swiglu_backward(dh + i * F, gate, gate + F, p, dgate, dgate + F, h + i * F, F);
      if (dprobs) dprobs[i] = dp;
    }
  });
}

struct Span {
  int64_t expert, begin, end;
};

std::vector<Span> spans_of(const Tensor& offsets_e, int64_t rows) {
  const Tensor offsets = offsets_e.to(at::kLong).contiguous();
  const int64_t* at_end = offsets.const_data_ptr<int64_t>();
  std::vector<Span> spans(offsets.numel());
  int64_t begin = 0;
  for (size_t i = 0; i < spans.size(); ++i) {
    TORCH_CHECK(at_end[i] >= begin && at_end[i] <= rows,
                "expert_mlp: offsets must not decrease nor pass the ", rows, " rows, got ", at_end[i]);
    spans[i] = {static_cast<int64_t>(i), begin, at_end[i]};
    begin = at_end[i];
  }
  return spans;
}

// calls work(span) for every expert: those above an equal share one by one, with all threads inside; then the others,
// largest first, one thread each. If there is little work, all of them one by one
template <typename Work>
void for_each_expert(std::vector<Span> spans, int64_t work_per_row, const Work& work) {
  std::stable_sort(spans.begin(), spans.end(),
                   [](const Span& a, const Span& b) { return a.end - a.begin > b.end - b.begin; });
  const int64_t threads = at::get_num_threads();
  int64_t left = 0;
  for (const Span& span : spans) {
    left += span.end - span.begin;
  }
  size_t first = 0;
  while (first < spans.size() &&
         (left * work_per_row < kParallelWork || (spans[first].end - spans[first].begin) * threads > left)) {
    left -= spans[first].end - spans[first].begin;
    work(spans[first++]);
  }
  if (first == spans.size()) {
    return;
  }
  std::atomic<size_t> next{first};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (size_t i = next++; i < spans.size(); i = next++) {
      work(spans[i]);
    }
  });
}

// (y [N, D], z [N, 2F]); z is empty unless keep_z
std::tuple<Tensor, Tensor> forward(
    const Tensor& x_in, const Tensor& w_up_e2FD, const Tensor& w_down_eDF, const Tensor& offsets_e,
    const OptionalTensor& probs_N, bool keep_z) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor x = x_in.contiguous();
  const int64_t N = x.size(0), D = x.size(1), F = w_down_eDF.size(2);
  const Tensor w_up = w_up_e2FD.reshape({-1, 2 * F, D});
  const auto spans = spans_of(offsets_e, N);
  const int64_t rows = spans.empty() ? 0 : spans.back().end;
  Tensor y = at::empty({N, D}, x.options());
  Tensor z = at::empty({keep_z ? N : 0, 2 * F}, x.options());
  y.slice(0, rows).zero_();
  if (keep_z) {
    z.slice(0, rows).zero_();
  }
  const Tensor probs = arithmetic(probs_N, x);
  over_floats(x.scalar_type(), "expert_mlp_forward", [&](auto tag) {
    using S = decltype(tag);
    const auto* p = probs.defined() ? data<arithmetic_t<S>>(probs) : nullptr;
    for_each_expert(spans, 3 * D * F, [&](const Span& span) {
      if (span.begin == span.end) {
        return;
      }
      const int64_t block = at::in_parallel_region() ? kBlockRows : span.end - span.begin;
      const Tensor up_t = w_up.select(0, span.expert).t(), down_t = w_down_eDF.select(0, span.expert).t();
      const int64_t most = std::min(block, span.end - span.begin);
      Tensor h_buffer = at::empty({most, F}, x.options());
      Tensor z_buffer = keep_z ? Tensor() : at::empty({most, 2 * F}, x.options());
      for (int64_t a = span.begin; a < span.end; a += block) {
        const int64_t b = std::min(a + block, span.end), n = b - a;
        Tensor z_block = keep_z ? z.slice(0, a, b) : z_buffer.slice(0, 0, n);
        Tensor h_block = h_buffer.slice(0, 0, n);
        at::mm_out(z_block, x.slice(0, a, b), up_t);
        swiglu_rows(data<S>(z_block), p ? p + a : nullptr, data<S>(h_block), n, F);
        Tensor y_block = y.slice(0, a, b);
        at::mm_out(y_block, h_block, down_t);
      }
    });
  });
  return {y, z};
}

// one expert's weight gradient a^T b, into its place in fresh or added to its place in main_grad
void weight_gradient(
    Tensor& fresh, const OptionalTensor& main_grad, int64_t expert, const Tensor& a, const Tensor& b) {
  if (!main_grad.has_value()) {
    Tensor out = fresh.select(0, expert);
    at::mm_out(out, a.t(), b);
    return;
  }
  Tensor out = main_grad->select(0, expert).view({a.size(1), b.size(1)});
  if (out.scalar_type() == a.scalar_type()) {
    out.addmm_(a.t(), b);
  } else {
    out.add_(at::mm(a.t(), b));
  }
}

// (dx, dw_up, dw_down, dprobs); a gradient that is not needed, or that was added to a main_grad, is an empty tensor
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& w_up_e2FD, const Tensor& w_down_eDF,
    const Tensor& offsets_e, const OptionalTensor& probs_N, const Tensor& z, bool needs_x, bool needs_up,
    bool needs_down, const OptionalTensor& up_main, const OptionalTensor& down_main) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor dy = dy_in.contiguous(), x = x_in.contiguous();
  const int64_t N = x.size(0), D = x.size(1), F = w_down_eDF.size(2);
  const Tensor w_up = w_up_e2FD.reshape({-1, 2 * F, D});
  const int64_t e = w_up.size(0);
  const auto spans = spans_of(offsets_e, N);
  const int64_t rows = spans.empty() ? 0 : spans.back().end;
  Tensor dx = at::empty({needs_x ? N : 0, D}, x.options());
  Tensor dw_up = at::empty({needs_up && !up_main ? e : 0, 2 * F, D}, x.options());
  Tensor dw_down = at::empty({needs_down && !down_main ? e : 0, D, F}, x.options());
  const Tensor probs = arithmetic(probs_N, x);
  Tensor dprobs = at::empty({probs.defined() ? N : 0}, (probs.defined() ? probs : x).options());
  if (needs_x) {
    dx.slice(0, rows).zero_();
  }
  if (probs.defined()) {
    dprobs.slice(0, rows).zero_();
  }
  over_floats(x.scalar_type(), "expert_mlp_backward", [&](auto tag) {
    using S = decltype(tag);
    const auto* p = probs.defined() ? data<arithmetic_t<S>>(probs) : nullptr;
    auto* dp = probs.defined() ? data<arithmetic_t<S>>(dprobs) : nullptr;
    for_each_expert(spans, 6 * D * F, [&](const Span& span) {
      const int64_t n = span.end - span.begin;
      if (n == 0) {
        if (dw_up.size(0)) {
          dw_up.select(0, span.expert).zero_();
        }
        if (dw_down.size(0)) {
          dw_down.select(0, span.expert).zero_();
        }
        return;
      }
      const Tensor up = w_up.select(0, span.expert), down = w_down_eDF.select(0, span.expert);
      const Tensor dy_i = dy.slice(0, span.begin, span.end), x_i = x.slice(0, span.begin, span.end);
      const Tensor dh = at::mm(dy_i, down);
      Tensor h = at::empty({n, F}, x.options()), dz = at::empty({n, 2 * F}, x.options());
      swiglu_backward_rows(data<S>(dh), data<S>(z) + span.begin * 2 * F, p ? p + span.begin : nullptr, data<S>(h),
                           data<S>(dz), dp ? dp + span.begin : nullptr, n, F);
      if (needs_x) {
        Tensor dx_i = dx.slice(0, span.begin, span.end);
        at::mm_out(dx_i, dz, up);
      }
      if (needs_up) {
        weight_gradient(dw_up, up_main, span.expert, dz, x_i);
      }
      if (needs_down) {
        weight_gradient(dw_down, down_main, span.expert, dy_i, h);
      }
    });
  });
  return {dx, dw_up, dw_down, dprobs};
}

}  // namespace
}  // namespace megatron_ring

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) {
  m.def(
      "expert_mlp_forward(Tensor x, Tensor w_up, Tensor w_down, Tensor offsets, Tensor? probs, bool keep_z) "
      "-> (Tensor, Tensor)");
  m.def(
      "expert_mlp_backward(Tensor dy, Tensor x, Tensor w_up, Tensor w_down, Tensor offsets, Tensor? probs, Tensor z, "
      "bool needs_x, bool needs_up, bool needs_down, Tensor(a!)? up_main, Tensor(b!)? down_main) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("expert_mlp_forward", megatron_ring::forward);
  m.impl("expert_mlp_backward", megatron_ring::backward);
}
