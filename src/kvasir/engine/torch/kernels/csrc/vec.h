// Sixteen float lanes, their loads and stores in float32 and bf16, exp2, and the multiply-add that all kernels share.
//
// Written with the compilers' vector extension: one source for AVX-512, AVX2 and NEON. Only the bf16 dot product and the
// rounding to bf16 have an intrinsic where the machine has an instruction for them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Tiles live in registers only if their loops are gone by the time registers are given out.
#define UNROLL _Pragma("GCC unroll 8")

namespace kvasir {

constexpr int kLanes = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

// Register tile of a product: kMaxRows x kMaxCols accumulators of 16 lanes, for 32 registers of 64 bytes or for fewer.
#if defined(__AVX512F__)
constexpr int kMaxRows = 6, kMaxCols = 4;
#else
constexpr int kMaxRows = 3, kMaxCols = 2;
#endif

// A unit is the 4 bytes that lie together in K, V and packed weights: one float, or a pair of bf16.
typedef uint32_t unit;

template <class V> inline V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class V> inline void store(void* p, V v) { memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }

inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
inline vf min(vf a, vf b) { return a < b ? a : b; }
inline float max_of(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}
inline float sum_of(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < kLanes; i++) s += v[i];
    return s;
#endif
}

// 2^x for finite x <= 128; 0 far below. Minimax polynomials on [-1/2, 1/2]: degree 6 has a
// relative error below 1e-7 in float32, degree 4 below 3e-6, enough where the result is rounded to bf16.
constexpr float kExp2Degree6[] = {1.0f,           0.693147206f,   0.240226469f,  0.0555032878f,
                                  0.00961848896f, 0.00133999314f, 0.00015345812f};
constexpr float kExp2Degree4[] = {0.999999261f, 0.693121815f, 0.240247448f, 0.0559178618f, 0.00957010188f};

template <int degree> inline vf exp2(vf x) {
    const float* term = degree == 6 ? kExp2Degree6 : kExp2Degree4;
#if defined(__AVX512F__)
    vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = x - whole;
#else
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
    vf shifted = max(x, splat(-127.0f)) + kRound;
    vf f = max(x, splat(-127.0f)) - (shifted - kRound);
#endif
    vf p = splat(term[degree]);
    UNROLL for (int i = degree - 1; i >= 0; i--) p = p * f + term[i];
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    vi exponent = ((vi)shifted + 127) << 23;
    return p * (vf)exponent;
#endif
}

struct F32 {
    typedef float scalar;
    static constexpr int pair = 1;
    static constexpr int exp2_degree = 6;
    static vf load16(const scalar* p) { return load<vf>(p); }
    static void store16(scalar* p, vf v) { store(p, v); }
    static float widen(scalar x) { return x; }
    static scalar narrow(float x) { return x; }
    static vf multiply_add(vf acc, vu a, vu b) { return (vf)a * (vf)b + acc; }
};

// A pair of bf16 in each lane as two floats: exact.
inline vf low_half(vu pair) { return (vf)(pair << 16); }
inline vf high_half(vu pair) { return (vf)(pair & 0xffff0000u); }

struct Bf16 {
    typedef uint16_t scalar;
    static constexpr int pair = 2;
    static constexpr int exp2_degree = 4;
    static vf load16(const scalar* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
    static void store16(scalar* p, vf v) {
#if defined(__AVX512BF16__)
        store(p, _mm512_cvtneps_pbh((__m512)v));
#else
        vu u = (vu)v;
        store(p, __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, vh));
#endif
    }
    static float widen(scalar x) {
        uint32_t u = (uint32_t)x << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
    static scalar narrow(float x) {
        uint32_t u;
        memcpy(&u, &x, 4);
        return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    }
    // acc + a.low * b.low + a.high * b.high in each lane
    static vf multiply_add(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
        acc = low_half(a) * low_half(b) + acc;
        return high_half(a) * high_half(b) + acc;
#endif
    }
};

// acc[r][c] += sum over k of a[r * a_stride + k] * b[c][k * b_stride + lane]: rows broadcast, columns in lanes.
// With `ahead` (in units) the columns' data that far ahead is asked for meanwhile: hardware stops at each page's end.
template <class E, int R, int C>
inline __attribute__((always_inline)) void multiply(vf (&acc)[R][C], const unit* a, int64_t a_stride,
                                                    const unit* const (&b)[C], int64_t b_stride, int n,
                                                    int64_t ahead = 0) {
    for (int k = 0; k < n; k++) {
        vu col[C];
        UNROLL for (int c = 0; c < C; c++) col[c] = load<vu>(b[c] + k * b_stride);
        if (ahead) {
            UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(b[c] + k * b_stride + ahead);
        }
        UNROLL for (int r = 0; r < R; r++) {
            vu row = vu{} + a[r * a_stride + k];
            UNROLL for (int c = 0; c < C; c++) acc[r][c] = E::multiply_add(acc[r][c], row, col[c]);
        }
    }
}

// f(integral_constant<n>) for the n at hand, 1 <= n <= Max: turns a tile's size into a compile-time one.
template <int N> struct Size {
    static constexpr int value = N;
};
template <int Max, class F> inline void with_size(int n, F&& f) {
    if constexpr (Max == 1) {
        f(Size<1>{});
    } else {
        if (n == Max) f(Size<Max>{});
        else with_size<Max - 1>(n, f);
    }
}

}  // namespace kvasir
