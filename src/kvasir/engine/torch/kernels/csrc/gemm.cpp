// Linear layers for few tokens: each weight is read once, at the speed of memory. And for many tokens by float32's arithmetic,
// where the machine's bf16 dot product is the slower one.
//
//     tiled weight   [ceil(N / width)][K / pair][width][pair]   outputs in lanes, read as it lies (oneDNN's own packing)
//     plain weight   [N][K]                                     K in lanes, summed across lanes at the end
//
// oneDNN's tiles are 64 outputs wide, and 32 where it multiplies bf16 by AMX.
#include <algorithm>
#include <atomic>

#include "amx.h"
#include "pool.h"
#include "vec.h"

namespace kvasir {
namespace {

constexpr int kTileOutputs = 64;  // that are computed together, be they one tile of the weight or two
constexpr int kTileColumns = kTileOutputs / kLanes;
constexpr int kDepth = 32;  // units of K at a time: 8 KiB of weights stay in L1 for all rows
constexpr int kAhead = 32;  // units of K from those in use to those asked for
constexpr int kAmxAhead = 64;   // units of K, by AMX
constexpr int kAmxTokens = 5;   // from so many on AMX is faster than the dot product
constexpr int kMaxTokens = 64;
constexpr int kPlainOutputs = 4;
constexpr int kWideRows = 256;
constexpr int kWideDepth = 32;  // units of K at a time: 16 KiB of widened weights stay in L1 for all rows

// Weights of kTileOutputs outputs: of the first `columns` times 16 of them, the others do not exist. `tile_units` from one tile
// of `width` outputs to the next.
struct Tiled {
    const unit* weight;
    int64_t tile_units;
    int width, columns;
    const unit* column(int c) const { return weight + c * kLanes / width * tile_units + c * kLanes % width; }
    Tiled deeper(int units) const { return {weight + (int64_t)units * width, tile_units, width, columns}; }
};

template <class E, int R, int C> void multiply_tile(float* sums, const unit* x, int64_t x_stride, const Tiled& tiled,
                                                    int first, int units, int ahead) {
    vf acc[R][C];
    const unit* columns[C];
    UNROLL for (int c = 0; c < C; c++) columns[c] = tiled.column(first + c);
    sums += first * kLanes;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) acc[r][c] = load<vf>(sums + r * kTileOutputs + c * kLanes);
    multiply<E, R, C>(acc, x, x_stride, columns, tiled.width, units, (int64_t)ahead * tiled.width);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) store(sums + r * kTileOutputs + c * kLanes, acc[r][c]);
}

// sums[row] += x row . weights, `units` deep. The first rows ask for weights `first_ahead` units on, the others `ahead`.
template <class E> void multiply_rows(float* sums, const unit* x, int64_t x_stride, const Tiled& tiled, int rows, int units,
                                      int first_ahead, int ahead) {
    constexpr int kFewCols = kMaxCols / 2;  // half a tile of 64, or the last of 32
    for (int row = 0, groups = (rows + kMaxRows - 1) / kMaxRows; row < rows; groups--) {
        const int size = (rows - row + groups - 1) / groups;
        with_size<kMaxRows>(size, [&](auto r) {
            constexpr int R = decltype(r)::value;
            const unit* x_rows = x + row * x_stride;
            float* sums_rows = sums + row * kTileOutputs;
            const int asked = row ? ahead : first_ahead;
            int c = 0;
            for (; c + kMaxCols <= tiled.columns; c += kMaxCols)
                multiply_tile<E, R, kMaxCols>(sums_rows, x_rows, x_stride, tiled, c, units, asked);
            for (; c < tiled.columns; c += kFewCols)
                multiply_tile<E, R, kFewCols>(sums_rows, x_rows, x_stride, tiled, c, units, asked);
        });
        row += size;
    }
}

template <class E> void write_outputs(const float* sums, const typename E::scalar* bias, typename E::scalar* out, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        vf v = load<vf>(sums + i);
        E::store16(out + i, bias ? v + E::load16(bias + i) : v);
    }
    for (; i < n; i++) out[i] = E::narrow(sums[i] + (bias ? E::widen(bias[i]) : 0.0f));
}

// A group's sums, [rows][kTileOutputs], to its columns of out [rows][n].
template <class E> void write_group(const float* sums, const typename E::scalar* bias, typename E::scalar* out, int rows, int n,
                                    int group) {
    const int first = group * kTileOutputs, outputs = std::min(kTileOutputs, n - first);
    for (int r = 0; r < rows; r++)
        write_outputs<E>(sums + r * kTileOutputs, bias ? bias + first : nullptr, out + (int64_t)r * n + first, outputs);
}

// Outputs [64 * group, 64 * group + 64) of a weight that is `units` deep.
inline Tiled tiles_of(const void* weight, int width, int units, int n, int group) {
    const int64_t tile_units = (int64_t)units * width;
    const int first = group * kTileOutputs, outputs = std::min(kTileOutputs, (n + width - 1) / width * width - first);
    return {(const unit*)weight + first / width * tile_units, tile_units, width, outputs / kLanes};
}

// x [tokens][K], out [tokens][N], tokens <= kMaxTokens, K a multiple of the pair.
template <class E> void linear_tiled(const void* x_, const void* weight_, int width, const void* bias_, void* out_,
                                     int tokens, int n, int k, int threads) {
    typedef typename E::scalar scalar;
    auto x = (const unit*)x_;
    auto bias = (const scalar*)bias_;
    auto out = (scalar*)out_;
    const int units = k / E::pair, tiles = (n + kTileOutputs - 1) / kTileOutputs;
    parallel_for(tiles, threads, [&](int tile) {
        alignas(64) float sums[kMaxTokens * kTileOutputs];
        memset(sums, 0, sizeof(float) * tokens * kTileOutputs);
        const Tiled tiled = tiles_of(weight_, width, units, n, tile);
        for (int depth = 0; depth < units; depth += kDepth) {
            const int size = std::min(kDepth, units - depth);
            multiply_rows<E>(sums, x + depth, units, tiled.deeper(depth), tokens, size, kAhead, kDepth);
        }
        write_group<E>(sums, bias, out, tokens, n, tile);
    });
}

#if defined(KVASIR_AMX)
constexpr int kAmxWidth = 32;

// sums [rows][kTileOutputs] = x rows . weights, for C times 16 outputs. The first rows ask for weights ahead.
template <int C> void multiply_amx(float* sums, const unit* x, const Tiled& tiled, int units, bool is_first) {
    const unit* columns[C];
    UNROLL for (int c = 0; c < C; c++) columns[c] = tiled.column(c);
    amx_zero<1, C>();
    for (int u = 0; u < units; u += kAmxDepth / 2) {
        for (int c = 0; is_first && c < C; c += kAmxWidth / kLanes)
            for (int line = 0; line < kAmxDepth; line++) __builtin_prefetch(columns[c] + kAmxAhead * kAmxWidth + line * kLanes);
        amx_multiply<1, C>(x + u, units, columns, kAmxWidth);
        UNROLL for (int c = 0; c < C; c++) columns[c] += kAmxDepth / 2 * kAmxWidth;
    }
    amx_store_sums<1, C>(sums, kTileOutputs);
}

// As linear_tiled of bf16, for a weight in tiles of 32 outputs, K a multiple of 32.
void linear_amx(const void* x_, const void* weight, const void* bias_, void* out_, int tokens, int n, int k, int threads) {
    auto x = (const unit*)x_;
    auto bias = (const uint16_t*)bias_;
    auto out = (uint16_t*)out_;
    const int units = k / 2, tiles = (n + kTileOutputs - 1) / kTileOutputs;
    amx_reads(x_);
    parallel_for(tiles, threads, [&](int tile) {
        alignas(64) float sums[kMaxTokens * kTileOutputs];
        const Tiled tiled = tiles_of(weight, kAmxWidth, units, n, tile);
        for (int row = 0, groups = (tokens + kAmxRows - 1) / kAmxRows; row < tokens; groups--) {
            const int size = (tokens - row + groups - 1) / groups;
            const AmxTiles registers(size);
            (tiled.columns == kTileColumns ? multiply_amx<4> : multiply_amx<2>)(
                sums + row * kTileOutputs, x + (int64_t)row * units, tiled, units, row == 0);
            row += size;
        }
        write_group<Bf16>(sums, bias, out, tokens, n, tile);
    });
}
#endif

// As linear_tiled of bf16, for any number of tokens: `wide` [tokens][K] is room for x in float32, each part of the weight is
// widened once for many rows.
void linear_widened(const void* x_, float* wide, const void* weight_, const void* bias_, void* out_, int tokens, int n, int k,
                    int threads) {
    auto x = (const unit*)wide;
    auto bias = (const uint16_t*)bias_;
    auto out = (uint16_t*)out_;
    const int groups = (tokens + kMaxRows - 1) / kMaxRows;
    parallel_for(groups, threads, [&](int group) {
        const int64_t end = (int64_t)std::min(tokens, (group + 1) * kMaxRows) * k;
        int64_t i = (int64_t)group * kMaxRows * k;
        for (; i + kLanes <= end; i += kLanes) store(wide + i, Bf16::load16((const uint16_t*)x_ + i));
        for (; i < end; i++) wide[i] = Bf16::widen(((const uint16_t*)x_)[i]);
    });
    const int units = k / 2, tiles = (n + kTileOutputs - 1) / kTileOutputs, blocks = (tokens + kWideRows - 1) / kWideRows;
    parallel_for(tiles * blocks, threads, [&](int item) {
        static thread_local struct {
            alignas(64) float sums[kWideRows * kTileOutputs];
            alignas(64) float part[2 * kWideDepth * kTileOutputs];
        } s;
        const int tile = item / blocks, begin = item % blocks * kWideRows, rows = std::min(kWideRows, tokens - begin);
        memset(s.sums, 0, sizeof(float) * rows * kTileOutputs);
        auto weight = (const unit*)weight_ + (int64_t)tile * units * kTileOutputs;
        for (int depth = 0; depth < units; depth += kWideDepth) {
            const int size = std::min(kWideDepth, units - depth);
            for (int u = 0; u < size; u++)
                UNROLL for (int c = 0; c < kTileColumns; c++) {
                    const unit* place = weight + (int64_t)(depth + u) * kTileOutputs + c * kLanes;
                    __builtin_prefetch(place + kWideDepth * kTileOutputs);  // the next part
                    vu pair = load<vu>(place);
                    store(s.part + (2 * u) * kTileOutputs + c * kLanes, low_half(pair));
                    store(s.part + (2 * u + 1) * kTileOutputs + c * kLanes, high_half(pair));
                }
            const Tiled part{(const unit*)s.part, 0, kTileOutputs, kTileColumns};
            multiply_rows<F32>(s.sums, x + (int64_t)begin * k + 2 * depth, k, part, rows, 2 * size, 0, 0);
        }
        write_group<Bf16>(s.sums, bias, out + (int64_t)begin * n, rows, n, tile);
    });
}

// sums[r][c] = x row r . weight row c
template <class E, int R, int C> void dot_rows(const typename E::scalar* x, const typename E::scalar* weight, int k,
                                               float (&sums)[R][C]) {
    constexpr int kStep = kLanes * E::pair;
    vf acc[R][C] = {};
    int i = 0;
    for (; i + kStep <= k; i += kStep) {
        vu w[C];
        UNROLL for (int c = 0; c < C; c++) w[c] = load<vu>(weight + (int64_t)c * k + i);
        UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(weight + (int64_t)(c + C) * k + i);  // the next rows
        UNROLL for (int r = 0; r < R; r++) {
            vu v = load<vu>(x + (int64_t)r * k + i);
            UNROLL for (int c = 0; c < C; c++) acc[r][c] = E::multiply_add(acc[r][c], v, w[c]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) {
            float sum = sum_of(acc[r][c]);
            for (int j = i; j < k; j++) sum += E::widen(x[(int64_t)r * k + j]) * E::widen(weight[(int64_t)c * k + j]);
            sums[r][c] = sum;
        }
}

template <class E> void linear_plain(const void* x_, const void* weight_, const void* bias_, void* out_, int tokens, int n,
                                     int k, int threads) {
    typedef typename E::scalar scalar;
    auto x = (const scalar*)x_;
    auto weight = (const scalar*)weight_;
    auto bias = (const scalar*)bias_;
    auto out = (scalar*)out_;
    const int strips = (n + kTileOutputs - 1) / kTileOutputs;
    parallel_for(strips, threads, [&](int strip) {
        const int end = std::min(n, (strip + 1) * kTileOutputs);
        for (int o = strip * kTileOutputs; o < end; o += kPlainOutputs)
            with_size<kPlainOutputs>(std::min(kPlainOutputs, end - o), [&](auto columns) {
                constexpr int C = decltype(columns)::value;
                for (int row = 0; row < tokens; row += kMaxRows)
                    with_size<kMaxRows>(std::min(kMaxRows, tokens - row), [&](auto rows) {
                        constexpr int R = decltype(rows)::value;
                        float sums[R][C];
                        dot_rows<E, R, C>(x + (int64_t)row * k, weight + (int64_t)o * k, k, sums);
                        for (int r = 0; r < R; r++)
                            for (int c = 0; c < C; c++)
                                out[(int64_t)(row + r) * n + o + c] =
                                    E::narrow(sums[r][c] + (bias ? E::widen(bias[o + c]) : 0.0f));
                    });
            });
    });
}

// Whether `tiled` holds exactly `plain` [N][K] in the order that linear_tiled reads.
template <class E> bool is_tiled(const void* plain_, const void* tiled_, int width, int n, int k, int threads) {
    typedef typename E::scalar scalar;
    auto plain = (const scalar*)plain_;
    auto tiled = (const scalar*)tiled_;
    std::atomic<bool> is_same{true};
    parallel_for(n, threads, [&](int o) {
        const scalar* place = tiled + (int64_t)(o / width) * width * k + o % width * E::pair;
        bool is_row_same = true;
        for (int i = 0; i < k; i++)
            is_row_same &= memcmp(place + (int64_t)(i / E::pair) * width * E::pair + i % E::pair,
                                  plain + (int64_t)o * k + i, sizeof(scalar)) == 0;
        if (!is_row_same) is_same = false;
    });
    return is_same;
}

}  // namespace
}  // namespace kvasir

using namespace kvasir;

// `width`: outputs of a tile; 0 where the weight is plain. With `uses_amx`, bf16 is multiplied by AMX where that is faster.
extern "C" void kvasir_linear(int is_bf16, int uses_amx, int width, const void* x, const void* weight, const void* bias,
                              void* out, int tokens, int n, int k, int threads) {
#if defined(KVASIR_AMX)
    if (is_bf16 && uses_amx && has_amx() && width == kAmxWidth && k % kAmxDepth == 0 && tokens >= kAmxTokens)
        return linear_amx(x, weight, bias, out, tokens, n, k, threads);
#endif
    if (width)
        (is_bf16 ? linear_tiled<Bf16> : linear_tiled<F32>)(x, weight, width, bias, out, tokens, n, k, threads);
    else
        (is_bf16 ? linear_plain<Bf16> : linear_plain<F32>)(x, weight, bias, out, tokens, n, k, threads);
}

// Of a weight in tiles of 64.
extern "C" void kvasir_linear_widened(const void* x, void* wide, const void* weight, const void* bias, void* out, int tokens,
                                      int n, int k, int threads) {
    linear_widened(x, (float*)wide, weight, bias, out, tokens, n, k, threads);
}

extern "C" int kvasir_is_tiled(int is_bf16, const void* plain, const void* tiled, int width, int n, int k, int threads) {
    return (is_bf16 ? is_tiled<Bf16> : is_tiled<F32>)(plain, tiled, width, n, k, threads);
}
