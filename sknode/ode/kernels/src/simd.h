// Vectors of one register, and the functions that activations need.
//
// Included once for every instruction set, in a namespace of its own. GCC's and
// clang's vector extensions serve, but for some instructions that they do not reach.

// With calls in between, registers would go to memory and back.
#define SKNODE_INLINE static inline __attribute__((always_inline))

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(SKNODE_VECTOR_BYTES), may_alias));
    typedef uint32_t I __attribute__((vector_size(SKNODE_VECTOR_BYTES), may_alias));
};

template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(SKNODE_VECTOR_BYTES), may_alias));
    typedef uint64_t I __attribute__((vector_size(SKNODE_VECTOR_BYTES), may_alias));
};

template <class T>
using Vec = typename Simd<T>::V;

template <class T>
constexpr int width = SKNODE_VECTOR_BYTES / sizeof(T);

template <class T>
SKNODE_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
SKNODE_INLINE void store(T* p, Vec<T> v) {
    *reinterpret_cast<Vec<T>*>(p) = v;
}

template <class T>
SKNODE_INLINE Vec<T> broadcast(T x) {
    return Vec<T>{} + x;
}

template <class T>
SKNODE_INLINE Vec<T> magnitude(Vec<T> x) {
    return x < 0 ? -x : x;
}

// What is not a number stays so.
template <class T>
SKNODE_INLINE Vec<T> larger(Vec<T> x, Vec<T> y) {
    return y > x ? y : x;
}

// exp(x) = scale * (1 + rest), with |rest| < 1/2 and scale a power of two.
template <class T>
struct Exponential {
    Vec<T> scale, rest;
};

// By reduction to |r| <= log(2) / 2 and a polynomial; the relative error is about one
// unit in the last place. Arguments beyond the range give its ends, where neither exp
// nor its inverse is subnormal. What is not a number stays so.
SKNODE_INLINE Exponential<float> exponential_parts(Vec<float> x) {
    const auto lo = broadcast<float>(-87.33f), hi = broadcast<float>(87.33f);
    x = x < lo ? lo : x;
    x = x > hi ? hi : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Vec<float> shifted = x * 1.44269504088896341f + magic;
    Vec<float> n = shifted - magic;
    Vec<float> r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;
    auto bits = (reinterpret_cast<Simd<float>::I&>(shifted) << 23) + (127u << 23);
    return {reinterpret_cast<Vec<float>&>(bits), p};
}

SKNODE_INLINE Exponential<double> exponential_parts(Vec<double> x) {
    const auto lo = broadcast<double>(-708.39), hi = broadcast<double>(708.39);
    x = x < lo ? lo : x;
    x = x > hi ? hi : x;
    const double magic = 6755399441055744.0;  // 1.5 * 2^52
    Vec<double> shifted = x * 1.4426950408889634074 + magic;
    Vec<double> n = shifted - magic;
    Vec<double> r = x - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    Vec<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * (r * r) + r;
    auto bits = (reinterpret_cast<Simd<double>::I&>(shifted) << 52) +
                (static_cast<uint64_t>(1023) << 52);
    return {reinterpret_cast<Vec<double>&>(bits), p};
}

template <class T>
SKNODE_INLINE Vec<T> exponential(Vec<T> x) {
    const auto parts = exponential_parts(x);
    return (parts.rest + T(1)) * parts.scale;
}

// exp(x) - 1, without cancellation for small x.
template <class T>
SKNODE_INLINE Vec<T> exponential_minus_one(Vec<T> x) {
    const auto parts = exponential_parts(x);
    return parts.rest * parts.scale + (parts.scale - T(1));
}

// 1 / x for normal numbers whose inverse is one. What is not a number stays so.
template <class T>
SKNODE_INLINE Vec<T> reciprocal(Vec<T> x) {
#if SKNODE_VECTOR_BYTES == 64
    // a guess of 14 bits and a step of Newton's: a third of the time of a division
    if constexpr (sizeof(T) == 4) {
        const Vec<T> guess = _mm512_rcp14_ps(x);
        return guess + guess * (T(1) - x * guess);
    }
#endif
    return T(1) / x;
}

// 2^u = 2^n * p(u - n), n an integer: p - 1 is r times the polynomial in these
// coefficients, the highest first, through the Chebyshev nodes of |r| <= 1/2.
template <class T>
struct PowerOfTwo;

template <>
struct PowerOfTwo<float> {
    static constexpr float bound = 126, magic = 12582912.0f;  // 1.5 * 2^23
    static constexpr int mantissa = 23;
    static constexpr uint32_t bias = 127;
    static constexpr float coefficients[] = {1.545316295e-4f, 1.339086336e-3f, 9.618082557e-3f,
                                             5.550357114e-2f, 2.402265076e-1f, 6.931471880e-1f};
};

template <>
struct PowerOfTwo<double> {
    static constexpr double bound = 1022, magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr int mantissa = 52;
    static constexpr uint64_t bias = 1023;
    static constexpr double coefficients[] = {
        4.45496059818651839e-10, 7.0725859692492237e-9,   1.01780624458457735e-7,
        1.32154425879216897e-6,  1.52527338298361184e-5,  1.54035304417360502e-4,
        1.33335581464169353e-3,  9.61812910760688853e-3,  5.55041086648215943e-2,
        2.40226506959100982e-1,  6.93147180559945309e-1};
};

// u = n + rest, n the nearest integer, for p(rest) * 2^n + 1: `power` is n or 2^n, as
// `one_plus` wants it. Where 2^u would be infinite or, but for AVX-512, subnormal, u is
// taken to be at the bound. What is not a number stays so.
template <class T>
struct Split {
    Vec<T> power, rest;
};

template <class T>
SKNODE_INLINE Split<T> split(Vec<T> u) {
    using P = PowerOfTwo<T>;
    const auto hi = broadcast<T>(P::bound);
#if SKNODE_VECTOR_BYTES == 64
    // of two operands, a minimum is the second one if one is not a number
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
    if constexpr (sizeof(T) == 4) {
        const Vec<T> x = _mm512_min_ps(hi, u), rest = _mm512_reduce_ps(x, nearest);
        return {x - rest, rest};
    } else {
        const Vec<T> x = _mm512_min_pd(hi, u), rest = _mm512_reduce_pd(x, nearest);
        return {x - rest, rest};
    }
#else
    const auto lo = broadcast<T>(-P::bound);
    u = u < lo ? lo : u;
    u = u > hi ? hi : u;
    const Vec<T> shifted = u + P::magic;
    const auto bits = (reinterpret_cast<const typename Simd<T>::I&>(shifted) << P::mantissa) +
                      (P::bias << P::mantissa);
    return {reinterpret_cast<const Vec<T>&>(bits), u - (shifted - P::magic)};
#endif
}

template <class T>
SKNODE_INLINE Vec<T> one_plus(Vec<T> p, Vec<T> power) {
#if SKNODE_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return _mm512_scalef_ps(p, power) + T(1);
    else
        return _mm512_scalef_pd(p, power) + T(1);
#else
    return p * power + T(1);
#endif
}

// 1 / (1 + 2^u): arguments that are made for it need no reduction by multiples of log(2).
// N registers at once: one alone would wait for each of its operations.
template <class T, int N>
SKNODE_INLINE void logistic_of_power(const Vec<T>* u, Vec<T>* out) {
    using P = PowerOfTwo<T>;
    Split<T> parts[N];
    Vec<T> p[N];
    for (int i = 0; i < N; ++i) {
        parts[i] = split<T>(u[i]);
        p[i] = broadcast<T>(P::coefficients[0]);
    }
    for (size_t k = 1; k < std::size(P::coefficients); ++k)
        for (int i = 0; i < N; ++i) p[i] = p[i] * parts[i].rest + P::coefficients[k];
    for (int i = 0; i < N; ++i) p[i] = p[i] * parts[i].rest + T(1);
    for (int i = 0; i < N; ++i) p[i] = one_plus<T>(p[i], parts[i].power);
    for (int i = 0; i < N; ++i) out[i] = reciprocal<T>(p[i]);
}

template <class T>
SKNODE_INLINE Vec<T> logistic_of_power(Vec<T> u) {
    Vec<T> out;
    logistic_of_power<T, 1>(&u, &out);
    return out;
}

constexpr double LOG2_E = 1.44269504088896340736;

template <class T>
SKNODE_INLINE Vec<T> logistic(Vec<T> x) {
    return logistic_of_power<T>(x * T(-LOG2_E));
}

// log(1 + u) for u in [0, 1], by the series of the inverse hyperbolic tangent.
template <class T>
SKNODE_INLINE Vec<T> log_one_plus(Vec<T> u) {
    const Vec<T> zero{};
    auto high = u > T(0.41421356237309505);
    Vec<T> f = high ? (u - T(1)) * T(0.5) : u;
    Vec<T> s = f / (T(2) + f), z = s * s;
    Vec<T> p;
    if (sizeof(T) == 4) {
        p = z * T(1.0 / 11) + T(1.0 / 9);
    } else {
        p = z * T(1.0 / 23) + T(1.0 / 21);
        p = p * z + T(1.0 / 19);
        p = p * z + T(1.0 / 17);
        p = p * z + T(1.0 / 15);
        p = p * z + T(1.0 / 13);
        p = p * z + T(1.0 / 11);
        p = p * z + T(1.0 / 9);
    }
    p = p * z + T(1.0 / 7);
    p = p * z + T(1.0 / 5);
    p = p * z + T(1.0 / 3);
    p = p * z + T(1);
    return T(2) * s * p + (high ? zero + T(0.69314718055994530942) : zero);
}

// Activations, up to constants that are in the weights: see `Network`. `activate` gives
// what the next layer gets, `slope` the derivative, from the value where that is enough,
// else from the argument, which is then kept.
template <Activation A>
constexpr bool keeps_argument = A == Activation::softplus || A == Activation::silu;

template <Activation A, class T>
SKNODE_INLINE Vec<T> activate(Vec<T> z) {
    if constexpr (A == Activation::sigmoid || A == Activation::tanh) {
        return logistic_of_power<T>(z);  // the rest is in the weights
    } else if constexpr (A == Activation::softplus) {
        Vec<T> u = exponential<T>(z < 0 ? z : -z);
        return z > T(20) ? z : (z < 0 ? Vec<T>{} : z) + log_one_plus<T>(u);
    } else if constexpr (A == Activation::silu) {
        return z * logistic<T>(z);
    } else if constexpr (A == Activation::elu) {
        return z > 0 ? z : exponential_minus_one<T>(z);
    } else {
        return z < 0 ? Vec<T>{} : z;
    }
}

template <Activation A, class T>
SKNODE_INLINE Vec<T> slope(Vec<T> x) {
    const Vec<T> zero{}, one = zero + T(1);
    if constexpr (A == Activation::sigmoid || A == Activation::tanh) {
        return x * (one - x);
    } else if constexpr (A == Activation::softplus) {
        return x > T(20) ? one : logistic<T>(x);
    } else if constexpr (A == Activation::silu) {
        Vec<T> s = logistic<T>(x);
        return s * (one + x * (one - s));
    } else if constexpr (A == Activation::elu) {
        return x > 0 ? one : x + one;
    } else {
        return x > 0 ? one : zero;
    }
}

// An activation with its first two derivatives.
template <class T>
struct Jet {
    Vec<T> value, slope, bend;
};

template <Activation A, class T>
SKNODE_INLINE Jet<T> jet(Vec<T> z) {
    const Vec<T> zero{}, one = zero + T(1);
    if constexpr (A == Activation::sigmoid) {
        const Vec<T> s = logistic<T>(z), p = s * (one - s);
        return {s, p, p * (one - T(2) * s)};
    } else if constexpr (A == Activation::tanh) {
        const Vec<T> v = T(2) * logistic<T>(T(2) * z) - one, p = one - v * v;
        return {v, p, T(-2) * v * p};
    } else if constexpr (A == Activation::softplus) {
        const Vec<T> s = logistic<T>(z);
        return {activate<A, T>(z), s, s * (one - s)};
    } else if constexpr (A == Activation::silu) {
        const Vec<T> s = logistic<T>(z), v = z * s, rest = one - s;
        return {v, s + v * rest, s * rest * (T(2) + z * (rest - s))};
    } else if constexpr (A == Activation::elu) {
        const Vec<T> v = activate<A, T>(z);
        return {v, z > 0 ? one : v + one, z > 0 ? zero : v + one};
    } else {
        return {activate<A, T>(z), z > 0 ? one : zero, zero};
    }
}

// Call `action` with the activation as a constant.
template <class Action>
SKNODE_INLINE auto with_activation(Activation activation, const Action& action) {
    switch (activation) {
#define SKNODE_CASE(NAME) \
    case Activation::NAME: \
        return action(std::integral_constant<Activation, Activation::NAME>{})
        SKNODE_CASE(sigmoid);
        SKNODE_CASE(tanh);
        SKNODE_CASE(softplus);
        SKNODE_CASE(silu);
        SKNODE_CASE(elu);
#undef SKNODE_CASE
        default: return action(std::integral_constant<Activation, Activation::relu>{});
    }
}

// log(x) of positive normal numbers.
SKNODE_INLINE Vec<float> logarithm(Vec<float> x) {
    const auto bits = reinterpret_cast<Simd<float>::I&>(x);
    auto mantissa = (bits & 0x7fffffu) | 0x3f800000u;
    auto exponent = (bits >> 23) | 0x4b000000u;  // 2^23 + the biased exponent
    return log_one_plus<float>(reinterpret_cast<Vec<float>&>(mantissa) - 1.0f) +
           (reinterpret_cast<Vec<float>&>(exponent) - (8388608.0f + 127.0f)) *
               0.69314718055994530942f;
}

SKNODE_INLINE Vec<double> logarithm(Vec<double> x) {
    const auto bits = reinterpret_cast<Simd<double>::I&>(x);
    auto mantissa = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    auto exponent = (bits >> 52) | 0x4330000000000000ull;  // 2^52 + the biased exponent
    return log_one_plus<double>(reinterpret_cast<Vec<double>&>(mantissa) - 1.0) +
           (reinterpret_cast<Vec<double>&>(exponent) - (4503599627370496.0 + 1023.0)) *
               0.69314718055994530942;
}
