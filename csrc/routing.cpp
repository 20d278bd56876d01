// route, its backward, and the sorted order. T tokens, E experts, K experts per token, N = T * K slots.
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace megatron_ring {
namespace {

// Megatron's guard against a row of sigmoid scores that are all 0
constexpr double kSumEpsilon = 1e-20;
// tokens per partial sum: fixed, so that the statistics do not depend on the number of threads
constexpr int64_t kTokens = 64;

// indices of the k largest of n, best first; ties: the lowest index. i is skipped if only[i / group] is false
template <class A>
void top_k(const A* score, int64_t n, int64_t k, const char* only, int64_t group, int64_t* best) {
  int64_t count = 0;
  A least = 0;
  for (int64_t i = 0; i < n; ++i) {
    const A value = score[i];
    if (count == k && !(value > least)) continue;
    if (only && !only[i / group]) continue;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && value > score[best[at - 1]]; --at) best[at] = best[at - 1];
    best[at] = i;
    least = score[best[count - 1]];
  }
}

template <class A>
struct Select {
  int64_t topk, num_groups, group_topk;
  const A* bias;
  std::vector<A> selection, group_score;
  std::vector<int64_t> best_group;
  std::vector<char> open;

  Select(int64_t experts, int64_t topk, int64_t num_groups, int64_t group_topk, const A* bias)
      : topk(topk),
        num_groups(num_groups),
        group_topk(group_topk),
        bias(bias),
        selection(experts),
        group_score(num_groups),
        best_group(group_topk),
        open(num_groups) {}

  void operator()(const A* base, int64_t experts, int64_t* best) {
    for (int64_t e = 0; e < experts; ++e) selection[e] = bias ? base[e] + bias[e] : base[e];
    if (!num_groups) return top_k(selection.data(), experts, topk, nullptr, 1, best);
    const int64_t size = experts / num_groups;
    for (int64_t g = 0; g < num_groups; ++g) {
      const A* score = selection.data() + g * size;
      int64_t two[2];
      top_k(score, size, std::min<int64_t>(2, size), nullptr, 1, two);
      group_score[g] = size > 1 ? score[two[0]] + score[two[1]] : score[two[0]];
    }
    top_k(group_score.data(), num_groups, group_topk, nullptr, 1, best_group.data());
    std::fill(open.begin(), open.end(), 0);
    for (int64_t g : best_group) open[g] = 1;
    top_k(selection.data(), experts, topk, open.data(), size, best);
  }
};

// weights of the chosen experts of one token; chosen[k] == experts means dropped
template <class A>
void weigh(const A* logit, const A* score, const int64_t* chosen, int64_t topk, int64_t experts, bool sigmoid,
           A scaling, A* weight) {
  if (topk == 1) {
    // divided by its own sum it would always be 1
    *weight = *chosen < experts ? score[*chosen] * scaling : A(0);
    return;
  }
  A max = -std::numeric_limits<A>::infinity(), sum = sigmoid ? A(kSumEpsilon) : A(0);
  for (int64_t k = 0; k < topk; ++k) {
    const int64_t e = chosen[k];
    if (e < experts && logit[e] > max) max = logit[e];
    weight[k] = e < experts ? score[e] : A(0);
    sum += weight[k];
  }
  if (!sigmoid && !(sum > A(1e-6))) {
    // replayed experts may have scores near 0; renormalised softmax equals the softmax of the chosen logits
    sum = 0;
    for (int64_t k = 0; k < topk; ++k) {
      weight[k] = chosen[k] < experts ? std::exp(logit[chosen[k]] - max) : A(0);
      sum += weight[k];
    }
  }
  for (int64_t k = 0; k < topk; ++k) weight[k] = weight[k] > 0 ? weight[k] / sum * scaling : weight[k];
}

// adds to d, for one chosen expert, the gradient of the logits (softmax) or of the scores (sigmoid)
template <class A>
void weigh_one_backward(const A* score, int64_t chosen, int64_t experts, bool sigmoid, A dweight, A* d) {
  if (chosen >= experts) return;
  d[chosen] += sigmoid ? dweight : dweight * score[chosen];
  for (int64_t e = 0; !sigmoid && e < experts; ++e) d[e] -= dweight * score[chosen] * score[e];
}

const bool* flags(const OptionalTensor& valid, int64_t tokens, Tensor& keep) {
  if (!valid.has_value() || !valid->defined()) return nullptr;
  TORCH_CHECK(valid->scalar_type() == at::kBool && valid->numel() == tokens, "valid must be a bool per token");
  keep = valid->contiguous();
  return data<bool>(keep);
}

void check_logits(const Tensor& logits, const char* op) {
  check_cpu(logits, 2, op, "logits");
  TORCH_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble, op,
              ": logits must be fp32 or fp64, got ", logits.scalar_type());
}

// (probs, experts, counts, prob_sum, z_sum); see routing/op.py
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& logits_in, int64_t topk, bool sigmoid,
                                                         const OptionalTensor& bias, int64_t num_groups,
                                                         int64_t group_topk, double scaling,
                                                         const OptionalTensor& valid, const OptionalTensor& replay) {
  check_logits(logits_in, "route");
  const Tensor logits = logits_in.contiguous(), bias_E = arithmetic(bias, logits);
  const int64_t tokens = logits.size(0), experts = logits.size(1), parts = (tokens + kTokens - 1) / kTokens;
  TORCH_CHECK(topk >= 1 && topk <= experts, "route: topk ", topk, " is outside 1..", experts);
  TORCH_CHECK(!num_groups || (experts % num_groups == 0 && group_topk >= 1 && group_topk <= num_groups &&
                              group_topk * (experts / num_groups) >= topk),
              "route: groups do not fit the experts");
  TORCH_CHECK(!bias_E.defined() || bias_E.numel() == experts, "route: one bias per expert");
  Tensor keep_valid, given;
  const bool* is_valid = flags(valid, tokens, keep_valid);
  if (replay.has_value() && replay->defined()) {
    check_int64(*replay, 2, "route", "replay");
    TORCH_CHECK(replay->size(0) == tokens && replay->size(1) == topk, "route: replay must be [T, K]");
    given = replay->contiguous();
  }
  Tensor probs = at::empty({tokens, topk}, logits.options());
  Tensor chosen = at::empty({tokens, topk}, logits.options().dtype(at::kLong));
  Tensor counts = at::zeros({parts, experts}, chosen.options());
  Tensor sums = at::zeros({parts, experts + 1}, logits.options().dtype(at::kDouble));
  over_floats(logits.scalar_type(), "route", [&](auto tag) {
    using A = arithmetic_t<decltype(tag)>;
    const A *logit = data<A>(logits), *add = bias_E.defined() ? data<A>(bias_E) : nullptr;
    const int64_t* fixed = given.defined() ? data<int64_t>(given) : nullptr;
    A* weight = data<A>(probs);
    int64_t *expert = data<int64_t>(chosen), *count = data<int64_t>(counts);
    double* sum = data<double>(sums);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      Select<A> select(experts, topk, num_groups, group_topk, add);
      std::vector<A> score(experts);
      for (int64_t t = begin * kTokens; t < std::min(tokens, end * kTokens); ++t) {
        const int64_t part = t / kTokens;
        const A* row = logit + t * experts;
        int64_t* best = expert + t * topk;
        if (is_valid && !is_valid[t]) {
          std::fill(best, best + topk, experts);
          std::fill(weight + t * topk, weight + (t + 1) * topk, A(0));
          continue;
        }
        const A lse = (sigmoid ? scores<A>().sigmoid : scores<A>().softmax)(row, score.data(), experts);
        if (fixed) {
          for (int64_t k = 0; k < topk; ++k) {
            const int64_t e = fixed[t * topk + k];
            best[k] = e >= 0 && e < experts ? e : experts;
          }
        } else {
          // softmax keeps the order of its logits, and logits do not tie by underflow
          select(sigmoid || add || num_groups ? score.data() : row, experts, best);
        }
        weigh<A>(row, score.data(), best, topk, experts, sigmoid, static_cast<A>(scaling), weight + t * topk);
        for (int64_t k = 0; k < topk; ++k) {
          if (best[k] < experts) ++count[part * experts + best[k]];
        }
        A total = sigmoid ? A(kSumEpsilon) : A(1);
        for (int64_t e = 0; sigmoid && e < experts; ++e) total += score[e];
        const A norm = A(1) / total;
        double* into = sum + part * (experts + 1);
        for (int64_t e = 0; e < experts; ++e) into[e] += score[e] * norm;
        into[experts] += static_cast<double>(lse) * lse;
      }
    });
  });
  Tensor total = sums.sum(0).to(logits.scalar_type());
  return {probs, chosen, counts.sum(0), total.narrow(0, 0, experts).clone(), total[experts].clone()};
}

// gradient of the logits from those of probs, prob_sum and z_sum (each may be missing)
Tensor route_backward(const Tensor& logits_in, const Tensor& chosen_in, bool sigmoid, double scaling,
                      const OptionalTensor& valid, const OptionalTensor& dprobs_in, const OptionalTensor& dsum_in,
                      const OptionalTensor& dz_in) {
  check_logits(logits_in, "route_backward");
  check_int64(chosen_in, 2, "route_backward", "experts");
  const Tensor logits = logits_in.contiguous(), chosen = chosen_in.contiguous();
  const Tensor dprobs = arithmetic(dprobs_in, logits), dsum = arithmetic(dsum_in, logits);
  const Tensor dz = arithmetic(dz_in, logits);
  const int64_t tokens = logits.size(0), experts = logits.size(1), topk = chosen.size(1);
  TORCH_CHECK(chosen.size(0) == tokens && (!dprobs.defined() || dprobs.sizes() == chosen.sizes()) &&
                  (!dsum.defined() || dsum.numel() == experts) && (!dz.defined() || dz.numel() == 1),
              "route_backward: shapes do not belong together");
  Tensor keep_valid;
  const bool* is_valid = flags(valid, tokens, keep_valid);
  Tensor out = at::empty_like(logits);
  over_floats(logits.scalar_type(), "route_backward", [&](auto tag) {
    using A = arithmetic_t<decltype(tag)>;
    const A* logit = data<A>(logits);
    const A *dprob = dprobs.defined() ? data<A>(dprobs) : nullptr, *dstat = dsum.defined() ? data<A>(dsum) : nullptr;
    const A dsquare = dz.defined() ? *data<A>(dz) : A(0);
    const int64_t* expert = data<int64_t>(chosen);
    A* dlogit = data<A>(out);
    at::parallel_for(0, tokens, kTokens, [&](int64_t begin, int64_t end) {
      std::vector<A> score(experts), p(experts), weight(topk);
      for (int64_t t = begin; t < end; ++t) {
        const A* row = logit + t * experts;
        const int64_t* best = expert + t * topk;
        A* d = dlogit + t * experts;
        std::fill(d, d + experts, A(0));
        if (is_valid && !is_valid[t]) continue;
        const A lse = scores<A>().softmax(row, p.data(), experts);
        if (sigmoid) scores<A>().sigmoid(row, score.data(), experts);
        const A* s = sigmoid ? score.data() : p.data();
        // from here d collects: softmax, the gradient of the logits; sigmoid, of the scores
        if (dprob && topk == 1) {
          weigh_one_backward<A>(s, *best, experts, sigmoid, dprob[t] * static_cast<A>(scaling), d);
        } else if (dprob) {
          const A* dw = dprob + t * topk;
          weigh<A>(row, s, best, topk, experts, sigmoid, A(1), weight.data());
          A mean = 0, sum = sigmoid ? A(kSumEpsilon) : A(0);
          for (int64_t k = 0; k < topk; ++k) {
            if (best[k] >= experts) continue;
            mean += dw[k] * weight[k];
            sum += s[best[k]];
          }
          for (int64_t k = 0; k < topk; ++k) {
            if (best[k] >= experts) continue;
            const A factor = sigmoid ? A(1) / sum : weight[k];
            d[best[k]] += (dw[k] - mean) * factor * static_cast<A>(scaling);
          }
        }
        if (dstat) {
          A mean = 0, sum = sigmoid ? A(kSumEpsilon) : A(0);
          for (int64_t e = 0; e < experts; ++e) {
            mean += dstat[e] * s[e];
            sum += s[e];
          }
          if (sigmoid) mean /= sum;
          for (int64_t e = 0; e < experts; ++e) d[e] += (dstat[e] - mean) * (sigmoid ? A(1) / sum : s[e]);
        }
        if (sigmoid) {
          for (int64_t e = 0; e < experts; ++e) d[e] *= s[e] * (1 - s[e]);
        }
        const A along = 2 * dsquare * lse;
        for (int64_t e = 0; e < experts; ++e) d[e] += along * p[e];
      }
    });
  });
  return out;
}

// (offsets int32 [E], gather [N], position [T, K]): a counting sort of the slots, stable; ids outside [0, E) are dropped
std::tuple<Tensor, Tensor, Tensor> route_index(const Tensor& experts_in, int64_t experts) {
  check_int64(experts_in, 2, "route_index", "experts");
  TORCH_CHECK(experts >= 1 && experts_in.numel() < std::numeric_limits<int32_t>::max(),
              "route_index: needs at least one expert and fewer than 2^31 slots");
  const Tensor ids = experts_in.contiguous();
  const int64_t topk = std::max<int64_t>(1, ids.size(1)), slots = ids.numel();
  const int64_t part = std::max<int64_t>(2048, slots / 64), parts = (slots + part - 1) / part;
  Tensor offsets = at::empty({experts}, ids.options().dtype(at::kInt));
  Tensor gather = at::zeros({slots}, ids.options());
  Tensor position = at::empty(ids.sizes(), ids.options());
  const int64_t* id = data<int64_t>(ids);
  int64_t *token = data<int64_t>(gather), *row = data<int64_t>(position);
  // start[part * E + e]: first the part's count of e, then the row of its first slot
  std::vector<int64_t> start(parts * experts, 0);
  at::parallel_for(0, parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * part; i < std::min(slots, end * part); ++i) {
      if (id[i] >= 0 && id[i] < experts) ++start[i / part * experts + id[i]];
    }
  });
  int64_t next = 0;
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t count = start[p * experts + e];
      start[p * experts + e] = next;
      next += count;
    }
    offsets.data_ptr<int>()[e] = static_cast<int>(next);
  }
  at::parallel_for(0, parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = p * part; i < std::min(slots, (p + 1) * part); ++i) {
        if (id[i] < 0 || id[i] >= experts) {
          row[i] = -1;
          continue;
        }
        row[i] = start[p * experts + id[i]]++;
        token[row[i]] = i / topk;
      }
    }
  });
  return {offsets, gather, position};
}

}  // namespace
}  // namespace megatron_ring

TORCH_LIBRARY_FRAGMENT(megatron_ring, m) {
  m.def(
      "route(Tensor logits, int topk, bool sigmoid, Tensor? bias, int num_groups, int group_topk, float scaling, "
      "Tensor? valid, Tensor? replay) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "route_backward(Tensor logits, Tensor experts, bool sigmoid, float scaling, Tensor? valid, Tensor? dprobs, "
      "Tensor? dprob_sum, Tensor? dz_sum) -> Tensor");
  m.def("route_index(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("route", megatron_ring::route);
  m.impl("route_backward", megatron_ring::route_backward);
  m.impl("route_index", megatron_ring::route_index);
}
