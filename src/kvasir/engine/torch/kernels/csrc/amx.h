// AMX: products of bf16 in tiles of 16 rows x 16 columns, 32 deep, summed in float32. K, V and packed weights already lie as
// it wants its second operand: pairs that are next to each other in depth, the columns in lanes.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define KVASIR_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvasir {

constexpr int kAmxRows = 16;
constexpr int kAmxDepth = 32;  // bf16; half as many units

#if defined(KVASIR_AMX)

// Asks the kernel, once in a process, whether its threads may have the tiles' state.
inline bool has_amx() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    static const bool is_granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return is_granted;
}

// Compilers do not know that a tile is loaded from memory: to be called between writing there and loading.
inline void amx_reads(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// While it lives, the thread's tiles are rows of 64 bytes, 16 of them; `rows` in the sums, tiles 0 to 3, and in tile 4, the
// first operand.
class AmxTiles {
  public:
    explicit AmxTiles(int rows = kAmxRows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = tile < 5 ? rows : kAmxRows;
        amx_reads(&config);
        _tile_loadconfig(&config);
    }
    ~AmxTiles() { _tile_release(); }
    AmxTiles(const AmxTiles&) = delete;
};

// Sums are R blocks of 16 rows by C blocks of 16 columns: 1 by 4, 1 by 2, or 2 by 2, which reads each column half as often.
// sums += rows x columns b[c], one tile deep. Strides are in units.
template <int R, int C>
inline __attribute__((always_inline)) void amx_multiply(const unit* a, int64_t a_stride, const unit* const (&b)[C],
                                                        int64_t b_stride) {
    static_assert(C == 2 || (R == 1 && C == 4));
    const int64_t below = kAmxRows * a_stride;
    a_stride *= sizeof(unit), b_stride *= sizeof(unit);
    _tile_loadd(4, a, a_stride);
    _tile_loadd(6, b[0], b_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b[1], b_stride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2) {
        _tile_loadd(5, a + below, a_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    } else if constexpr (C == 4) {
        _tile_loadd(5, b[2], b_stride);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, b[3], b_stride);
        _tile_dpbf16ps(3, 4, 6);
    }
}

template <int R, int C> inline void amx_zero() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (R * C == 4) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

// Of the sums 2 and 3, the first float in [16 * R][stride].
template <int R> inline int64_t amx_second(int64_t stride) { return R == 2 ? kAmxRows * stride : 2 * kLanes; }

template <int R, int C> inline void amx_load_sums(const float* sums, int64_t stride) {
    _tile_loadd(0, sums, stride * sizeof(float));
    _tile_loadd(1, sums + kLanes, stride * sizeof(float));
    if constexpr (R * C == 4) {
        _tile_loadd(2, sums + amx_second<R>(stride), stride * sizeof(float));
        _tile_loadd(3, sums + amx_second<R>(stride) + kLanes, stride * sizeof(float));
    }
}
template <int R, int C> inline void amx_store_sums(float* sums, int64_t stride) {
    _tile_stored(0, sums, stride * sizeof(float));
    _tile_stored(1, sums + kLanes, stride * sizeof(float));
    if constexpr (R * C == 4) {
        _tile_stored(2, sums + amx_second<R>(stride), stride * sizeof(float));
        _tile_stored(3, sums + amx_second<R>(stride) + kLanes, stride * sizeof(float));
    }
}

#else

inline bool has_amx() { return false; }

#endif

}  // namespace kvasir
