// RMSNorm, the same with a residual added first, and silu(gate) * up: row by row, float32 inside.
#include <algorithm>

#include "pool.h"
#include "vec.h"

namespace kvasir {
namespace {

constexpr int kSerialElements = 1 << 14;  // one core has done these before a second one wakes

inline int rows_at_a_time(int width) { return std::max(1, kSerialElements / width); }

template <class E> void scale_row(const typename E::scalar* x, const typename E::scalar* weight, typename E::scalar* out,
                                  int width, float factor) {
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        alignas(32) typename E::scalar rounded[kLanes];
        E::store16(rounded, E::load16(x + i) * factor);  // to the input's dtype before the weight, as LlamaRMSNorm
        E::store16(out + i, E::load16(rounded) * E::load16(weight + i));
    }
    for (; i < width; i++) out[i] = E::narrow(E::widen(E::narrow(E::widen(x[i]) * factor)) * E::widen(weight[i]));
}

template <class E> float square_sum(const typename E::scalar* x, int width) {
    vf sum = {};
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        vf v = E::load16(x + i);
        sum = v * v + sum;
    }
    float total = sum_of(sum);
    for (; i < width; i++) total += E::widen(x[i]) * E::widen(x[i]);
    return total;
}

template <class E> void add_row(const typename E::scalar* x, typename E::scalar* residual, int width) {
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) E::store16(residual + i, E::load16(residual + i) + E::load16(x + i));
    for (; i < width; i++) residual[i] = E::narrow(E::widen(residual[i]) + E::widen(x[i]));
}

// x and out are [rows][width]; with a residual, residual += x first and the norm is the residual's.
template <class E> void rms_norm(const void* x_, void* residual_, const void* weight_, void* out_, int rows, int width,
                                 float eps, int threads) {
    typedef typename E::scalar scalar;
    auto x = (const scalar*)x_;
    auto residual = (scalar*)residual_;
    auto weight = (const scalar*)weight_;
    auto out = (scalar*)out_;
    parallel_rows(rows, rows_at_a_time(width), threads, [&](int first, int last) {
        for (int r = first; r < last; r++) {
            const scalar* row = x + (int64_t)r * width;
            if (residual) {
                add_row<E>(row, residual + (int64_t)r * width, width);
                row = residual + (int64_t)r * width;
            }
            float factor = 1.0f / std::sqrt(square_sum<E>(row, width) / width + eps);
            scale_row<E>(row, weight, out + (int64_t)r * width, width, factor);
        }
    });
}

template <class E> void silu_mul(const void* gate_up_, void* out_, int rows, int width, int threads) {
    typedef typename E::scalar scalar;
    constexpr float kLog2e = 1.44269504f;
    auto silu = [](vf g) { return g / (exp2<E::exp2_degree>(min(g * -kLog2e, splat(128.0f))) + 1.0f); };
    parallel_rows(rows, rows_at_a_time(width), threads, [&](int first, int last) {
        for (int r = first; r < last; r++) {
            auto gate = (const scalar*)gate_up_ + (int64_t)r * 2 * width;
            auto up = gate + width;
            auto out = (scalar*)out_ + (int64_t)r * width;
            int i = 0;
            for (; i + kLanes <= width; i += kLanes) E::store16(out + i, silu(E::load16(gate + i)) * E::load16(up + i));
            for (; i < width; i++) out[i] = E::narrow(silu(splat(E::widen(gate[i])))[0] * E::widen(up[i]));
        }
    });
}

}  // namespace
}  // namespace kvasir

using namespace kvasir;

extern "C" void kvasir_rms_norm(int is_bf16, const void* x, void* residual, const void* weight, void* out, int rows,
                                int width, float eps, int threads) {
    (is_bf16 ? rms_norm<Bf16> : rms_norm<F32>)(x, residual, weight, out, rows, width, eps, threads);
}

extern "C" void kvasir_silu_mul(int is_bf16, const void* gate_up, void* out, int rows, int width, int threads) {
    (is_bf16 ? silu_mul<Bf16> : silu_mul<F32>)(gate_up, out, rows, width, threads);
}
