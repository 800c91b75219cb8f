// Split fused qkv, normalise q and k per head, rotate them, and write K and V to their places in the arena.
#include "batch.h"
#include "pool.h"
#include "vec.h"

namespace kvasir {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int kTokensAtATime = 16;

struct Rotary {
    const float *cos, *sin;  // [max_position][half]
    int half;                // rotary_dim / 2
};

// One head of one token in float32, normalised (weight may be null) and rotated.
template <class E> void read_head(const typename E::scalar* x, int head_dim, const typename E::scalar* weight, float eps,
                                  const Rotary& rotary, int position, float* out) {
    for (int i = 0; i < head_dim; i += kLanes) store(out + i, E::load16(x + i));
    if (weight) {
        vf sum = {};
        for (int i = 0; i < head_dim; i += kLanes) sum += load<vf>(out + i) * load<vf>(out + i);
        float factor = 1.0f / std::sqrt(sum_of(sum) / head_dim + eps);
        for (int i = 0; i < head_dim; i++)
            out[i] = E::widen(E::narrow(E::widen(E::narrow(out[i] * factor)) * E::widen(weight[i])));
    }
    const float* cos = rotary.cos + (int64_t)position * rotary.half;
    const float* sin = rotary.sin + (int64_t)position * rotary.half;
    float* second = out + rotary.half;
    for (int i = 0; i < rotary.half; i++) {
        float a = out[i], b = second[i];
        out[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i] + a * sin[i];
    }
}

template <class E> void write_key(typename E::scalar* keys, const LayerKv& kv, int offset, const float* x) {
    for (int d = 0; d < kv.head_dim; d += E::pair) {
        typename E::scalar* place = keys + (int64_t)d * kv.block_tokens + offset * E::pair;
        for (int i = 0; i < E::pair; i++) place[i] = E::narrow(x[d + i]);
    }
}

template <class E> void write_value(typename E::scalar* values, const LayerKv& kv, int offset,
                                    const typename E::scalar* x) {
    typename E::scalar* place = values + (int64_t)(offset / E::pair) * E::pair * kv.head_dim + offset % E::pair;
    for (int d = 0; d < kv.head_dim; d++) place[d * E::pair] = x[d];
}

// qkv is [tokens][heads + 2 * kv_heads][head_dim], q_out [tokens][heads][head_dim].
template <class E> void rope_and_store(const void* qkv_, void* q_out_, const Batch& batch, const LayerKv& kv, int heads,
                                       const Rotary& rotary, const void* q_norm, const void* k_norm, float eps,
                                       int threads) {
    typedef typename E::scalar scalar;
    const int dim = kv.head_dim;
    parallel_rows(batch.num_tokens, kTokensAtATime, threads, [&](int first, int last) {
        for (int t = first; t < last; t++) {
            alignas(64) float head[kMaxHeadDim];
            const int position = batch.positions[t], slot = batch.slots[t], offset = batch.offsets[t];
            auto x = (const scalar*)qkv_ + (int64_t)t * (heads + 2 * kv.kv_heads) * dim;
            auto q_out = (scalar*)q_out_ + (int64_t)t * heads * dim;
            for (int h = 0; h < heads; h++, x += dim) {
                read_head<E>(x, dim, (const scalar*)q_norm, eps, rotary, position, head);
                for (int i = 0; i < dim; i += kLanes) E::store16(q_out + h * dim + i, load<vf>(head + i));
            }
            for (int h = 0; h < kv.kv_heads; h++, x += dim) {
                read_head<E>(x, dim, (const scalar*)k_norm, eps, rotary, position, head);
                write_key<E>((scalar*)kv.keys(slot, h), kv, offset, head);
            }
            for (int h = 0; h < kv.kv_heads; h++, x += dim) write_value<E>((scalar*)kv.values(slot, h), kv, offset, x);
        }
    });
}

}  // namespace
}  // namespace kvasir

using namespace kvasir;

// 0, or 1 when a token's slot is outside the arena or its position outside the tables (nothing is written then).
extern "C" int kvasir_rope_and_store(int is_bf16, const void* qkv, void* q_out, const int32_t* ints, int num_seqs,
                                     int num_tokens, char* kv_base, int64_t slot_stride, int num_slots, int heads,
                                     int kv_heads, int head_dim, int block_tokens, const float* cos, const float* sin,
                                     int half, int max_position, const void* q_norm, const void* k_norm, float eps,
                                     int threads) {
    Batch batch(ints, num_seqs, num_tokens);
    for (int t = 0; t < num_tokens; t++)
        if ((unsigned)batch.slots[t] >= (unsigned)num_slots || (unsigned)batch.positions[t] >= (unsigned)max_position)
            return 1;
    int64_t head_bytes = (int64_t)head_dim * block_tokens * (is_bf16 ? 2 : 4);
    LayerKv kv{kv_base, slot_stride, head_bytes, num_slots, kv_heads, head_dim, block_tokens};
    Rotary rotary{cos, sin, half};
    (is_bf16 ? rope_and_store<Bf16> : rope_and_store<F32>)(qkv, q_out, batch, kv, heads, rotary, q_norm, k_norm, eps,
                                                           threads);
    return 0;
}
