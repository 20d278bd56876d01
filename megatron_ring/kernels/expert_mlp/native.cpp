// The experts' SwiGLU network on the CPU: torch.ops.megatron_ring.expert_mlp_forward / expert_mlp_backward.
//
// One thread takes one expert at a time and keeps its gate, up and hidden rows in its own cache between the
// products; torch's per-expert products would each split over all threads and stream every intermediate through
// memory. An expert that holds more than a fair share of the rows is done first, alone, with all threads in its
// products. The products themselves are torch's (MKL or oneDNN). Needs torch and OpenMP, nothing else.
//
// Legend: N rows sorted by expert, D model width, F expert width, e local experts. offsets are inclusive cumulative
// row counts; rows past the last offset belong to no expert.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define RING_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RING_CLONES
#endif

namespace {

using at::Tensor;

// rows of one expert that go through the forward pass together, so that z and h of a block stay in the L2 cache
constexpr int64_t kBlockRows = 256;

// multiply-adds below which waking the other threads costs more than they save
constexpr int64_t kParallelWork = int64_t(1) << 20;

// elements of an elementwise pass worth a thread of their own
constexpr int64_t kGrainElements = 1 << 15;

// e^x for |x| <= 87 to 2 ulp in straight-line arithmetic that a compiler can vectorise: 2^n times a polynomial
inline float exp_f32(float x) {
  x = std::min(std::max(x, -87.0f), 87.0f);
  const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

inline double exp_any(double x) { return std::exp(x); }
inline float exp_any(float x) { return exp_f32(x); }

// h = silu(gate) up p
template <typename acc_t>
inline void swiglu_row_body(const acc_t* gate, const acc_t* up, acc_t p, acc_t* h, int64_t F) {
  for (int64_t f = 0; f < F; ++f) {
    h[f] = gate[f] / (acc_t(1) + exp_any(-gate[f])) * up[f] * p;
  }
}

// h = silu(gate) up p and the gradients of gate and up from dh, that of h; returns that of p: <dh, silu(gate) up>
template <typename acc_t>
inline acc_t swiglu_backward_row_body(
    const acc_t* dh, const acc_t* gate, const acc_t* up, acc_t p, acc_t* h, acc_t* dgate, acc_t* dup, int64_t F) {
  constexpr int64_t kLanes = 16;
  acc_t partial[kLanes] = {};
  int64_t f = 0;
  auto step = [&](int64_t i, acc_t& sum) {
    const acc_t g = gate[i];
    const acc_t s = acc_t(1) / (acc_t(1) + exp_any(-g));
    const acc_t silu = g * s;
    const acc_t value = silu * up[i];
    const acc_t scaled = dh[i] * p;
    sum += dh[i] * value;
    h[i] = value * p;
    dup[i] = scaled * silu;
    dgate[i] = scaled * up[i] * (s + silu * (acc_t(1) - s));
  };
  for (; f + kLanes <= F; f += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      step(f + lane, partial[lane]);
    }
  }
  for (; f < F; ++f) {
    step(f, partial[0]);
  }
  acc_t sum = 0;
  for (const acc_t value : partial) {
    sum += value;
  }
  return sum;
}

RING_CLONES void swiglu_row(const float* g, const float* u, float p, float* h, int64_t F) {
  swiglu_row_body(g, u, p, h, F);
}
void swiglu_row(const double* g, const double* u, double p, double* h, int64_t F) { swiglu_row_body(g, u, p, h, F); }

RING_CLONES float swiglu_backward_row(
    const float* dh, const float* g, const float* u, float p, float* h, float* dg, float* du, int64_t F) {
  return swiglu_backward_row_body(dh, g, u, p, h, dg, du, F);
}
double swiglu_backward_row(
    const double* dh, const double* g, const double* u, double p, double* h, double* dg, double* du, int64_t F) {
  return swiglu_backward_row_body(dh, g, u, p, h, dg, du, F);
}

// fp64 computes in fp64, everything else in fp32
template <typename scalar_t>
using acc_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
void widen(const scalar_t* from, acc_of<scalar_t>* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<acc_of<scalar_t>>(from[i]);
  }
}

template <typename scalar_t>
void narrow_to(const acc_of<scalar_t>* from, scalar_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<scalar_t>(from[i]);
  }
}

template <typename scalar_t>
constexpr bool kIsAcc = std::is_same_v<scalar_t, acc_of<scalar_t>>;

// h [n, F] from z [n, 2F]
template <typename scalar_t>
void swiglu_rows(const scalar_t* z, const acc_of<scalar_t>* probs, scalar_t* h, int64_t n, int64_t F) {
  using acc_t = acc_of<scalar_t>;
  at::parallel_for(0, n, kGrainElements / F + 1, [&](int64_t first, int64_t last) {
    std::vector<acc_t> wide(kIsAcc<scalar_t> ? 0 : 3 * F);
    for (int64_t i = first; i < last; ++i) {
      const acc_t p = probs ? probs[i] : acc_t(1);
      if constexpr (kIsAcc<scalar_t>) {
        swiglu_row(z + i * 2 * F, z + i * 2 * F + F, p, h + i * F, F);
      } else {
        acc_t* w = wide.data();
        widen(z + i * 2 * F, w, 2 * F);
        swiglu_row(w, w + F, p, w + 2 * F, F);
        narrow_to(w + 2 * F, h + i * F, F);
      }
    }
  });
}

// h [n, F], dz [n, 2F] and, where asked, dprobs [n] from dh [n, F] and z [n, 2F]
template <typename scalar_t>
void swiglu_backward_rows(
    const scalar_t* dh, const scalar_t* z, const acc_of<scalar_t>* probs, scalar_t* h, scalar_t* dz,
    acc_of<scalar_t>* dprobs, int64_t n, int64_t F) {
  using acc_t = acc_of<scalar_t>;
  at::parallel_for(0, n, kGrainElements / F + 1, [&](int64_t first, int64_t last) {
    std::vector<acc_t> wide(kIsAcc<scalar_t> ? 0 : 6 * F);
    for (int64_t i = first; i < last; ++i) {
      const acc_t p = probs ? probs[i] : acc_t(1);
      acc_t dp;
      if constexpr (kIsAcc<scalar_t>) {
        const scalar_t* row = z + i * 2 * F;
        scalar_t* out = dz + i * 2 * F;
        dp = swiglu_backward_row(dh + i * F, row, row + F, p, h + i * F, out, out + F, F);
      } else {
        acc_t* w = wide.data();
        widen(z + i * 2 * F, w, 2 * F);
        widen(dh + i * F, w + 2 * F, F);
        dp = swiglu_backward_row(w + 2 * F, w, w + F, p, w + 3 * F, w + 4 * F, w + 5 * F, F);
        narrow_to(w + 3 * F, h + i * F, F);
        narrow_to(w + 4 * F, dz + i * 2 * F, 2 * F);
      }
      if (dprobs) {
        dprobs[i] = dp;
      }
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

// calls work(span) for every expert: those above a fair share one by one with all threads inside, then the rest, the
// largest first, one thread each; all of them one by one when there is little to do
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


template <typename scalar_t>
const acc_of<scalar_t>* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<acc_of<scalar_t>>() : nullptr;
}

std::optional<Tensor> in_accumulator_dtype(const std::optional<Tensor>& probs_N, const Tensor& like) {
  if (!probs_N.has_value()) {
    return std::nullopt;
  }
  return probs_N->to(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

// (y [N, D], z [N, 2F]); z is empty unless keep_z
std::tuple<Tensor, Tensor> forward(
    const Tensor& x_in, const Tensor& w_up_e2FD, const Tensor& w_down_eDF, const Tensor& offsets_e,
    const std::optional<Tensor>& probs_N, bool keep_z) {
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
  const auto probs = in_accumulator_dtype(probs_N, x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "expert_mlp_forward", [&] {
    const auto* p = pointer_or_null<scalar_t>(probs);
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
        swiglu_rows(z_block.const_data_ptr<scalar_t>(), p ? p + a : nullptr, h_block.data_ptr<scalar_t>(), n, F);
        Tensor y_block = y.slice(0, a, b);
        at::mm_out(y_block, h_block, down_t);
      }
    });
  });
  return {y, z};
}

// one expert's weight gradient a^T b, into its place in fresh or added to its place in main_grad
void weight_gradient(
    Tensor& fresh, const std::optional<Tensor>& main_grad, int64_t expert, const Tensor& a, const Tensor& b) {
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

// (dx, dw_up, dw_down, dprobs); a gradient that is not asked for, or that was added to a main_grad, is an empty tensor
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& w_up_e2FD, const Tensor& w_down_eDF,
    const Tensor& offsets_e, const std::optional<Tensor>& probs_N, const Tensor& z, bool needs_x, bool needs_up,
    bool needs_down, const std::optional<Tensor>& up_main, const std::optional<Tensor>& down_main) {
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
  const auto probs = in_accumulator_dtype(probs_N, x);
  Tensor dprobs = probs ? at::empty({N}, probs->options()) : at::empty({0}, x.options());
  if (needs_x) {
    dx.slice(0, rows).zero_();
  }
  if (probs) {
    dprobs.slice(0, rows).zero_();
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "expert_mlp_backward", [&] {
    const auto* p = pointer_or_null<scalar_t>(probs);
    auto* dp = probs ? dprobs.data_ptr<acc_of<scalar_t>>() : nullptr;
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
      swiglu_backward_rows(
          dh.const_data_ptr<scalar_t>(), z.const_data_ptr<scalar_t>() + span.begin * 2 * F, p ? p + span.begin : nullptr,
          h.data_ptr<scalar_t>(), dz.data_ptr<scalar_t>(), dp ? dp + span.begin : nullptr, n, F);
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

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) {
  m.def(
      "expert_mlp_forward(Tensor x, Tensor w_up, Tensor w_down, Tensor offsets, Tensor? probs, bool keep_z) "
      "-> (Tensor, Tensor)");
  m.def(
      "expert_mlp_backward(Tensor dy, Tensor x, Tensor w_up, Tensor w_down, Tensor offsets, Tensor? probs, Tensor z, "
      "bool needs_x, bool needs_up, bool needs_down, Tensor(a!)? up_main, Tensor(b!)? down_main) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("expert_mlp_forward", forward);
  m.impl("expert_mlp_backward", backward);
}
