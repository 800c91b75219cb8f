// A step's batch, as kvasir.engine.torch.kernels.batch.BatchLayout packs it into one int32 buffer.
#pragma once

#include <cstdint>

namespace kvasir {

struct Batch {
    int num_seqs, num_tokens;
    const int32_t *query_start, *table_start, *context_len, *positions, *slots, *offsets, *table;

    Batch(const int32_t* ints, int seqs, int tokens) : num_seqs(seqs), num_tokens(tokens) {
        query_start = ints;
        table_start = query_start + seqs + 1;
        context_len = table_start + seqs + 1;
        positions = context_len + seqs;
        slots = positions + tokens;
        offsets = slots + tokens;
        table = offsets + tokens;
    }
};

// One layer of the arena: K and V of a head of a slot, as units of 4 bytes (layout.py draws them).
struct LayerKv {
    char* base;             // byte 0 of this layer in slot 0
    int64_t slot_stride;    // bytes
    int64_t head_bytes;     // K (or V) of one head
    int num_slots, kv_heads, head_dim, block_tokens;

    char* keys(int slot, int head) const { return base + slot * slot_stride + head * head_bytes; }
    char* values(int slot, int head) const { return keys(slot, kv_heads + head); }
};

}  // namespace kvasir
