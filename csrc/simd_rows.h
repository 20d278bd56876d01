// The row loops, in namespace MR_NAMESPACE with vectors of MR_BYTES bytes (GCC and clang vector extensions).
// Included by rows_baseline.cpp and rows_avx2.cpp after <cmath>, <cstring>, <limits> and rows.h.

namespace megatron_ring {
namespace MR_NAMESPACE {

#define MR_INLINE inline __attribute__((always_inline))

constexpr int kFloats = MR_BYTES / 4;
constexpr int kDoubles = MR_BYTES / 8;
typedef float vfloat __attribute__((vector_size(MR_BYTES)));
typedef int32_t vint __attribute__((vector_size(MR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(MR_BYTES)));
typedef double vdouble __attribute__((vector_size(MR_BYTES)));
typedef int64_t vlong __attribute__((vector_size(MR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(MR_BYTES / 2)));

template <class To, class From>
MR_INLINE To cast_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
MR_INLINE T load_bits(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

// loads and stores

template <class S>
struct Lane;

template <>
struct Lane<float> {
  using V = vfloat;
  static constexpr int n = kFloats;
  static MR_INLINE V load(const float* p) { return load_bits<V>(p); }
  static MR_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static MR_INLINE float narrow(float v) { return v; }
};

template <>
struct Lane<double> {
  using V = vdouble;
  static constexpr int n = kDoubles;
  static MR_INLINE V load(const double* p) { return load_bits<V>(p); }
  static MR_INLINE void store(double* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static MR_INLINE double narrow(double v) { return v; }
};

template <>
struct Lane<bf16> {
  using V = vfloat;
  static constexpr int n = kFloats;
  static MR_INLINE V load(const bf16* p) {
    return cast_bits<V>(__builtin_convertvector(load_bits<vhalf>(p), vuint) << 16);
  }
  static MR_INLINE void store(bf16* p, V v) {
    vuint bits = cast_bits<vuint>(v);
    vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // the addition would carry a NaN into infinity
    vint is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    rounded = is_nan ? (vuint{} + 0x7fc0u) : rounded;
    vhalf out = __builtin_convertvector(rounded, vhalf);
    std::memcpy(p, &out, sizeof(out));
  }
};

template <>
struct Lane<f16> {
  using V = vfloat;
  static constexpr int n = kFloats;
  static MR_INLINE V load(const f16* p) {
    vuint half = __builtin_convertvector(load_bits<vhalf>(p), vuint);
    vuint magnitude = (half & 0x7fffu) << 13;
    // 2^112 moves the exponent's bias from 15 to 127, subnormals included
    vuint bits = cast_bits<vuint>(cast_bits<V>(magnitude) * 0x1p112f);
    vint special = magnitude >= (0x7c00u << 13);
    bits = special ? (magnitude | 0x7f800000u) : bits;
    return cast_bits<V>(bits | ((half & 0x8000u) << 16));
  }
  static MR_INLINE void store(f16* p, V v) {
    for (int i = 0; i < n; ++i) p[i].bits = from_float(v[i]);
  }
  static MR_INLINE uint16_t from_float(float v) {
    uint32_t bits = cast_bits<uint32_t>(v);
    uint32_t sign = bits & 0x80000000u;
    bits ^= sign;
    uint32_t out;
    if (bits >= 0x47800000u) {
      out = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (bits < 0x38800000u) {
      // adding 0.5 lets the processor round a subnormal to nearest even
      out = cast_bits<uint32_t>(cast_bits<float>(bits) + 0.5f) - 0x3f000000u;
    } else {
      out = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    }
    return static_cast<uint16_t>(out | (sign >> 16));
  }
};

template <class S>
MR_INLINE typename Lane<S>::V load_tail(const S* p, int64_t count, typename Lane<S>::V fill) {
  S buffer[Lane<S>::n];
  Lane<S>::store(buffer, fill);
  std::memcpy(buffer, p, count * sizeof(S));
  return Lane<S>::load(buffer);
}

template <class S>
MR_INLINE void store_tail(S* p, typename Lane<S>::V v, int64_t count) {
  S buffer[Lane<S>::n];
  Lane<S>::store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(S));
}

// arithmetic

template <class V>
MR_INLINE V largest(V a, V b) {
  return a > b ? a : b;
}

// exp to 2 ulp (Cephes expf); 0 below -87.3; saturates above 88.3; NaN stays NaN
MR_INLINE vfloat exponential(vfloat x) {
  vfloat clamped = x > 88.3f ? (vfloat{} + 88.3f) : x;
  clamped = clamped < -87.3f ? (vfloat{} - 87.3f) : clamped;
  // adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits
  vfloat shifted = clamped * 1.44269504088896341f + 12582912.0f;
  vint power = cast_bits<vint>(shifted) - 0x4b400000;
  vfloat n = shifted - 12582912.0f;
  vfloat r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vfloat y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  y = y * cast_bits<vfloat>((power + 127) << 23);
  return x < -87.3f ? vfloat{} : y;
}

MR_INLINE vdouble exponential(vdouble x) {
  for (int i = 0; i < kDoubles; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
MR_INLINE auto total(V v) {
  auto sum = v[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

// log-probability

// columns whose maximum is found before they are exponentiated: 4 KiB of floats, in the first cache
constexpr int64_t kBlock = 1024;

template <class S>
void logprob_partials(const S* x, int64_t n, arithmetic_t<S> inv_temperature, arithmetic_t<S>* sum) {
  using L = Lane<S>;
  using V = typename L::V;
  using A = arithmetic_t<S>;
  const A lowest = -std::numeric_limits<A>::infinity();
  A max = lowest;
  double mass = 0, moment = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const S* block = x + start;
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    const int64_t whole = count / L::n * L::n;
    V high_v = V{} + lowest;
    for (int64_t i = 0; i < whole; i += L::n) high_v = largest(high_v, L::load(block + i));
    V tail_v = V{} + lowest;
    if (whole < count) {
      tail_v = load_tail<S>(block + whole, count - whole, tail_v);
      high_v = largest(high_v, tail_v);
    }
    A high = high_v[0];
    for (int i = 1; i < L::n; ++i) high = high > high_v[i] ? high : high_v[i];
    if (high > max) {
      if (max != lowest) {
        const double shift = (static_cast<double>(max) - high) * inv_temperature;
        const double factor = std::exp(shift);
        moment = factor * (moment + shift * mass);
        mass *= factor;
      }
      max = high;
    }
    // a block of -inf alone adds nothing; 0 keeps -inf - max from being NaN
    const A centre = max == lowest ? A(0) : max;
    V mass_v = V{}, moment_v = V{};
    auto add = [&](V v) __attribute__((always_inline)) {
      V z = (v - centre) * inv_temperature;
      V e = exponential(z);
      mass_v += e;
      // where exp underflows z may be -inf, and 0 * -inf is not 0
      moment_v += e * largest(z, V{} + A(-1e4));
    };
    for (int64_t i = 0; i < whole; i += L::n) add(L::load(block + i));
    if (whole < count) add(tail_v);
    mass += total(mass_v);
    moment += total(moment_v);
  }
  sum[0] = max;
  sum[1] = static_cast<A>(mass);
  sum[2] = static_cast<A>(moment);
}

template <class S>
void logprob_gradient(const S* x, S* out, int64_t n, arithmetic_t<S> inv_temperature, arithmetic_t<S> max,
                      arithmetic_t<S> log_sum, arithmetic_t<S> entropy, arithmetic_t<S> dlogp,
                      arithmetic_t<S> dentropy) {
  using L = Lane<S>;
  using V = typename L::V;
  using A = arithmetic_t<S>;
  const A constant = -dlogp * inv_temperature, slope = -dentropy * inv_temperature;
  auto gradient = [&](V v) __attribute__((always_inline)) {
    V logp = (v - max) * inv_temperature - log_sum;
    V p = exponential(logp);
    V centred = logp + entropy;
    centred = centred < A(-1e4) ? (V{} + A(-1e4)) : centred;
    return p * (centred * slope + constant);
  };
  const int64_t whole = n / L::n * L::n;
  for (int64_t i = 0; i < whole; i += L::n) L::store(out + i, gradient(L::load(x + i)));
  if (whole < n) store_tail<S>(out + whole, gradient(load_tail<S>(x + whole, n - whole, V{} + max)), n - whole);
}

// rows of the experts

template <class S>
void weighted_sum(S* out, const S* const* row, const arithmetic_t<S>* weight, int64_t count, int64_t n) {
  using L = Lane<S>;
  using V = typename L::V;
  const int64_t whole = n / L::n * L::n;
  int64_t i = 0;
  // four vectors at a time hide the latency of the additions
  for (; i + 4 * L::n <= whole; i += 4 * L::n) {
    V s0 = V{}, s1 = V{}, s2 = V{}, s3 = V{};
    for (int64_t j = 0; j < count; ++j) {
      const S* p = row[j] + i;
      s0 += L::load(p) * weight[j];
      s1 += L::load(p + L::n) * weight[j];
      s2 += L::load(p + 2 * L::n) * weight[j];
      s3 += L::load(p + 3 * L::n) * weight[j];
    }
    L::store(out + i, s0);
    L::store(out + i + L::n, s1);
    L::store(out + i + 2 * L::n, s2);
    L::store(out + i + 3 * L::n, s3);
  }
  for (; i < whole; i += L::n) {
    V sum = V{};
    for (int64_t j = 0; j < count; ++j) sum += L::load(row[j] + i) * weight[j];
    L::store(out + i, sum);
  }
  if (i < n) {
    V sum = V{};
    for (int64_t j = 0; j < count; ++j) sum += load_tail<S>(row[j] + i, n - i, V{}) * weight[j];
    store_tail<S>(out + i, sum, n - i);
  }
}

template <class S>
void scale(S* out, const S* x, arithmetic_t<S> weight, int64_t n) {
  using L = Lane<S>;
  using V = typename L::V;
  const int64_t whole = n / L::n * L::n;
  for (int64_t i = 0; i < whole; i += L::n) L::store(out + i, L::load(x + i) * weight);
  if (whole < n) store_tail<S>(out + whole, load_tail<S>(x + whole, n - whole, V{}) * weight, n - whole);
}

template <class S>
arithmetic_t<S> dot(const S* x, const S* y, int64_t n) {
  using L = Lane<S>;
  using V = typename L::V;
  const int64_t whole = n / L::n * L::n;
  V even = V{}, odd = V{};
  int64_t i = 0;
  for (; i + 2 * L::n <= whole; i += 2 * L::n) {
    even += L::load(x + i) * L::load(y + i);
    odd += L::load(x + i + L::n) * L::load(y + i + L::n);
  }
  for (; i < whole; i += L::n) even += L::load(x + i) * L::load(y + i);
  if (i < n) odd += load_tail<S>(x + i, n - i, V{}) * load_tail<S>(y + i, n - i, V{});
  return total(even + odd);
}

template <class S>
void swiglu(S* h, const S* gate, const S* up, arithmetic_t<S> p, int64_t n) {
  using L = Lane<S>;
  using V = typename L::V;
  auto apply = [&](V g, V u) __attribute__((always_inline)) { return g / (exponential(-g) + 1) * u * p; };
  const int64_t whole = n / L::n * L::n;
  for (int64_t i = 0; i < whole; i += L::n) L::store(h + i, apply(L::load(gate + i), L::load(up + i)));
  if (whole < n) {
    const int64_t rest = n - whole;
    store_tail<S>(h + whole, apply(load_tail<S>(gate + whole, rest, V{}), load_tail<S>(up + whole, rest, V{})), rest);
  }
}

template <class S>
arithmetic_t<S> swiglu_backward(const S* dh, const S* gate, const S* up, arithmetic_t<S> p, S* dgate, S* dup, S* h,
                                int64_t n) {
  using L = Lane<S>;
  using V = typename L::V;
  V dp = V{};
  for (int64_t i = 0; i < n; i += L::n) {
    const bool tail = n - i < L::n;
    const int64_t rest = n - i;
    const V g = tail ? load_tail<S>(gate + i, rest, V{}) : L::load(gate + i);
    const V u = tail ? load_tail<S>(up + i, rest, V{}) : L::load(up + i);
    const V d = tail ? load_tail<S>(dh + i, rest, V{}) : L::load(dh + i);
    const V s = 1 / (exponential(-g) + 1);
    const V silu = g * s;
    const V value = silu * u;
    const V dp_i = d * p;
    dp += d * value;
    const V out_h = value * p;
    const V out_up = dp_i * silu;
    // d silu = s (1 + g (1 - s)) = s + silu (1 - s)
    const V out_gate = dp_i * u * (s + silu * (1 - s));
    if (tail) {
      store_tail<S>(h + i, out_h, rest);
      store_tail<S>(dup + i, out_up, rest);
      store_tail<S>(dgate + i, out_gate, rest);
    } else {
      L::store(h + i, out_h);
      L::store(dup + i, out_up);
      L::store(dgate + i, out_gate);
    }
  }
  return total(dp);
}

// norm

template <class S>
arithmetic_t<S> rms_norm(S* y, const S* x, const S* weight, arithmetic_t<S> eps, int64_t n) {
  using L = Lane<S>;
  using V = typename L::V;
  using A = arithmetic_t<S>;
  const A r = A(1) / std::sqrt(dot<S>(x, x, n) / static_cast<A>(n) + eps);
  const int64_t whole = n / L::n * L::n;
  for (int64_t i = 0; i < whole; i += L::n) {
    L::store(y + i, L::load(x + i) * r * L::load(weight + i));
  }
  if (whole < n) {
    const int64_t rest = n - whole;
    V scaled = load_tail<S>(x + whole, rest, V{}) * r * load_tail<S>(weight + whole, rest, V{});
    store_tail<S>(y + whole, scaled, rest);
  }
  return r;
}

// with u = dy weight: dx = r (u - x r^2 mean(u x))
template <class S>
void rms_norm_backward(const S* dy, const S* x, const S* weight, arithmetic_t<S> r, S* dx,
                       arithmetic_t<S>* dweight, int64_t n) {
  using L = Lane<S>;
  using V = typename L::V;
  using A = arithmetic_t<S>;
  V sum = V{};
  for (int64_t i = 0; i < n; i += L::n) {
    const bool tail = n - i < L::n;
    const V d = tail ? load_tail<S>(dy + i, n - i, V{}) : L::load(dy + i);
    const V v = tail ? load_tail<S>(x + i, n - i, V{}) : L::load(x + i);
    const V w = tail ? load_tail<S>(weight + i, n - i, V{}) : L::load(weight + i);
    sum += d * w * v;
    const V dw = d * v * r;
    if (tail) {
      store_tail<A>(dweight + i, load_tail<A>(dweight + i, n - i, V{}) + dw, n - i);
    } else {
      Lane<A>::store(dweight + i, Lane<A>::load(dweight + i) + dw);
    }
  }
  const A along = total(sum) / static_cast<A>(n) * r * r;
  for (int64_t i = 0; i < n; i += L::n) {
    const bool tail = n - i < L::n;
    const V d = tail ? load_tail<S>(dy + i, n - i, V{}) : L::load(dy + i);
    const V v = tail ? load_tail<S>(x + i, n - i, V{}) : L::load(x + i);
    const V w = tail ? load_tail<S>(weight + i, n - i, V{}) : L::load(weight + i);
    const V out = (d * w - v * along) * r;
    if (tail) {
      store_tail<S>(dx + i, out, n - i);
    } else {
      L::store(dx + i, out);
    }
  }
}

// scores of the router

template <class A>
A softmax(const A* x, A* out, int64_t n) {
  using L = Lane<A>;
  using V = typename L::V;
  const int64_t whole = n / L::n * L::n;
  V high = V{} - std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < whole; i += L::n) high = largest(high, L::load(x + i));
  A max = high[0];
  for (int i = 1; i < L::n; ++i) max = high[i] > max ? high[i] : max;
  for (int64_t i = whole; i < n; ++i) max = x[i] > max ? x[i] : max;
  V sum = V{};
  for (int64_t i = 0; i < whole; i += L::n) {
    V e = exponential(L::load(x + i) - max);
    sum += e;
    L::store(out + i, e);
  }
  A mass = total(sum);
  if (whole < n) {
    V e = exponential(load_tail<A>(x + whole, n - whole, V{} - std::numeric_limits<A>::infinity()) - max);
    mass += total(e);
    store_tail<A>(out + whole, e, n - whole);
  }
  const A inverse = A(1) / mass;
  for (int64_t i = 0; i < n; ++i) out[i] *= inverse;
  return max + std::log(mass);
}

template <class A>
A sigmoid(const A* x, A* out, int64_t n) {
  using L = Lane<A>;
  using V = typename L::V;
  const A lse = softmax<A>(x, out, n);
  const int64_t whole = n / L::n * L::n;
  for (int64_t i = 0; i < whole; i += L::n) L::store(out + i, 1 / (exponential(-L::load(x + i)) + 1));
  if (whole < n) {
    store_tail<A>(out + whole, 1 / (exponential(-load_tail<A>(x + whole, n - whole, V{})) + 1), n - whole);
  }
  return lse;
}

// rotary positions

template <class S>
void rotate(S* x, const float* cos, const float* sin, arithmetic_t<S> sign, int64_t half) {
  using L = Lane<S>;
  using V = typename L::V;
  if constexpr (std::is_same_v<S, double>) {
    for (int64_t i = 0; i < half; ++i) {
      const double first = x[i], second = x[i + half], s = sign * sin[i];
      x[i] = first * cos[i] - second * s;
      x[i + half] = second * cos[i] + first * s;
    }
  } else {
    for (int64_t i = 0; i < half; i += L::n) {
      const int64_t rest = half - i;
      const bool tail = rest < L::n;
      const V first = tail ? load_tail<S>(x + i, rest, V{}) : L::load(x + i);
      const V second = tail ? load_tail<S>(x + half + i, rest, V{}) : L::load(x + half + i);
      const V c = tail ? load_tail<float>(cos + i, rest, V{}) : Lane<float>::load(cos + i);
      const V s = (tail ? load_tail<float>(sin + i, rest, V{}) : Lane<float>::load(sin + i)) * sign;
      if (tail) {
        store_tail<S>(x + i, first * c - second * s, rest);
        store_tail<S>(x + half + i, second * c + first * s, rest);
      } else {
        L::store(x + i, first * c - second * s);
        L::store(x + half + i, second * c + first * s);
      }
    }
  }
}

// attention of one token over a cache

// as total, in log2 steps: what is short enough to wait for it
template <class V, class A>
MR_INLINE A quick_total(V v, A) {
  constexpr int n = sizeof(V) / sizeof(A);
  A part[n];
  std::memcpy(part, &v, sizeof(v));
  for (int width = n / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

template <class S>
void attend(const S* q, int64_t heads, const S* k, const S* v, int64_t stride, int64_t count, arithmetic_t<S> scale,
            arithmetic_t<S>* scratch, S* out, int64_t C) {
  using L = Lane<S>;
  using V = typename L::V;
  using A = arithmetic_t<S>;
  const int64_t whole = C / L::n * L::n, rest = C - whole;
  for (int64_t r = 0; r < heads; ++r, q += C, out += C) {
    for (int64_t i = 0; i < count; ++i) {
      const S* row = k + i * stride;
      V even = V{}, odd = V{};
      int64_t c = 0;
      for (; c + 2 * L::n <= whole; c += 2 * L::n) {
        even += L::load(q + c) * L::load(row + c);
        odd += L::load(q + c + L::n) * L::load(row + c + L::n);
      }
      if (c < whole) even += L::load(q + c) * L::load(row + c);
      if (rest) odd += load_tail<S>(q + whole, rest, V{}) * load_tail<S>(row + whole, rest, V{});
      scratch[i] = quick_total(even + odd, A{}) * scale;
    }
    softmax<A>(scratch, scratch, count);
    int64_t c = 0;
    for (; c + 4 * L::n <= whole; c += 4 * L::n) {
      V s0 = V{}, s1 = V{}, s2 = V{}, s3 = V{};
      for (int64_t i = 0; i < count; ++i) {
        const S* row = v + i * stride + c;
        const A weight = scratch[i];
        s0 += L::load(row) * weight;
        s1 += L::load(row + L::n) * weight;
        s2 += L::load(row + 2 * L::n) * weight;
        s3 += L::load(row + 3 * L::n) * weight;
      }
      L::store(out + c, s0);
      L::store(out + c + L::n, s1);
      L::store(out + c + 2 * L::n, s2);
      L::store(out + c + 3 * L::n, s3);
    }
    for (; c < whole; c += L::n) {
      V sum = V{};
      for (int64_t i = 0; i < count; ++i) sum += L::load(v + i * stride + c) * scratch[i];
      L::store(out + c, sum);
    }
    if (rest) {
      V sum = V{};
      for (int64_t i = 0; i < count; ++i) sum += load_tail<S>(v + i * stride + c, rest, V{}) * scratch[i];
      store_tail<S>(out + c, sum, rest);
    }
  }
}

template <class S>
Rows<S> row_table() {
  return {logprob_partials<S>, logprob_gradient<S>, weighted_sum<S>,    scale<S>,   dot<S>,
          swiglu<S>,           swiglu_backward<S>,  rms_norm<S>, rms_norm_backward<S>, rotate<S>,
          attend<S>};
}

template <class A>
Scores<A> score_table() {
  return {softmax<A>, sigmoid<A>};
}

#undef MR_INLINE

}  // namespace MR_NAMESPACE
}  // namespace megatron_ring
