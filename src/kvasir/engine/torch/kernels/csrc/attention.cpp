// Causal attention over the blocks of the arena in place: flash-style tiles, online softmax in float32.
//
// Work is cut into items: one KV head of one sequence, a tile of its queries, a range of its keys.
//
//     rows of an item      query 0 head 0, query 0 head 1, ... query 1 head 0, ...   all query heads of the KV head
//     keys of an item      [begin, end), walked kTileKeys at a time
//
// KV and queries are of type S, arithmetic is of type E: the same, or for bf16, where enough rows share a tile of keys, AMX, or
// float32, where the machine's bf16 dot product is the slower one.
//
// Only a lone query tile (decode) has its keys cut into several items, kSplitKeys each, whatever the number of
// threads; their results are merged afterwards. Longest items come first, so that the cores finish together.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "batch.h"
#include "pool.h"
#include "vec.h"

namespace kvasir {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int kTileRows = 96;
constexpr int kTileKeys = 512;
constexpr int kSplitKeys = 1024;
constexpr int kFewRows = 16;            // K and V come from memory at their own speed: ask for them early
constexpr int kAhead = 64 / kLanes;     // from the tokens in use to those asked for, in 16s
constexpr float kHidden = -1e30f;     // a score that no key has: finite, so that differences of two are numbers
constexpr float kNoKeyYet = -1e20f;   // a maximum below this is of hidden keys only

struct Shape {
    LayerKv kv;
    int heads, group;  // group: query heads of one KV head
    int window;        // keys that a query sees at most, itself included; 0: all
    float scale_log2;  // > 0; softmax(scale * s) is proportional to 2^(scale_log2 * s - max)
};

struct Item {
    int seq, kv_head;
    int first_head, num_heads;  // of the group
    int first_query, num_queries, first_position;
    int begin, end;  // keys; begin is the start of a block
    int partial;     // where an item with a part of the keys leaves its sums; -1: it has all keys, and writes the output
};

struct Merge {
    Item whole;
    int first_partial, num_partials;
};

// Running softmax of one row: sum of exp2(s - max) * v so far, and of exp2(s - max).
struct Running {
    float max, sum;
};

// float32 whose results are rounded to bf16.
struct Wide : F32 {
    static constexpr int exp2_degree = Bf16::exp2_degree;
};

// bf16 by AMX, 32 rows at a time.
struct Amx : Bf16 {};
template <class E> constexpr int kRowsAtOnce = std::is_same_v<E, Amx> ? 2 * kAmxRows : kMaxRows;

// A tile of keys and values in float32: 16 tokens of all dimensions, [dim][16] of keys and [16][dim] of values, after another.
struct Widened {
    alignas(64) float keys[kTileKeys * kMaxHeadDim];
    alignas(64) float values[kTileKeys * kMaxHeadDim];
};

template <class E> struct Scratch {
    static constexpr int kQueryStride = kMaxHeadDim / E::pair + 8;  // units; off a power of two for the cache's sets
    static constexpr int kWeightStride = kTileKeys / E::pair;
    alignas(64) unit queries[kTileRows * kQueryStride];
    alignas(64) float out[kTileRows * kMaxHeadDim];
    alignas(64) float scores[kRowsAtOnce<E> * kTileKeys];
    alignas(64) unit weights[kRowsAtOnce<E> * kWeightStride];
    Running running[kTileRows];
    const unit* keys[kTileKeys / kLanes + kAhead];  // of each 16 tokens of the tile and of some after it
    const unit* values[kTileKeys / kLanes + kAhead];
    int key_stride;  // units from one unit of K to the next
    int num_ahead;   // how many of these may be asked for early, from 0 on
};

// scores[r][0 .. 16 * columns) = q.k of `R` rows against the tile's keys, 16 in a column.
template <class E, int R> void score_rows(Scratch<E>& s, const Shape& shape, const unit* queries, int columns) {
    const int units = shape.kv.head_dim / E::pair;
    auto tile = [&](int column, auto size) {
        constexpr int C = decltype(size)::value;
        const unit* keys[C];
        UNROLL for (int c = 0; c < C; c++) keys[c] = s.keys[column + c];
        vf acc[R][C] = {};
        const int64_t ahead = column + kAhead < s.num_ahead ? s.keys[column + kAhead] - keys[0] : 0;
        multiply<E, R, C>(acc, queries, Scratch<E>::kQueryStride, keys, s.key_stride, units, ahead);
        float* scores = s.scores + column * kLanes;
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++) store(scores + r * kTileKeys + c * kLanes, acc[r][c]);
    };
    int column = 0;
    for (; column + kMaxCols <= columns; column += kMaxCols) tile(column, Size<kMaxCols>{});
    if (column < columns) with_size<kMaxCols>(columns - column, [&](auto size) { tile(column, size); });
}

// Hide all but the keys [low, high) of a row.
inline void hide(float* row, int columns, int low, int high) {
    vi lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    for (int c = 0; c < columns; c++) {
        vi key = lane + c * kLanes;
        vf score = load<vf>(row + c * kLanes);
        vi is_seen = (key >= low) & (key < high);
        store(row + c * kLanes, is_seen ? score : splat(kHidden));
    }
}

// Softmax weights of one row over the tile, relative to the running maximum; returns what the sums so far shrink by.
template <class E> float weigh_row(const float* row, int columns, float scale, unit* weights_,
                                   Running& running) {
    auto weights = (typename E::scalar*)weights_;
    constexpr int kChains = 4;  // a maximum has to wait for the one before
    vf tops[kChains];
    UNROLL for (int i = 0; i < kChains; i++) tops[i] = load<vf>(row + std::min(i, columns - 1) * kLanes);
    int done = kChains;
    for (; done + kChains <= columns; done += kChains)
        UNROLL for (int i = 0; i < kChains; i++) tops[i] = max(tops[i], load<vf>(row + (done + i) * kLanes));
    for (; done < columns; done++) tops[0] = max(tops[0], load<vf>(row + done * kLanes));
    const vf top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    const float new_max = std::max(running.max, max_of(top) * scale);
    const float reference = new_max < kNoKeyYet ? 0.0f : new_max;
    vf sum = {};
    for (int c = 0; c < columns; c++) {
        vf weight = exp2<E::exp2_degree>(load<vf>(row + c * kLanes) * scale - reference);
        sum += weight;
        E::store16(weights + c * kLanes, weight);
    }
    const float shrink = running.max == new_max ? 1.0f : exp2<6>(splat(running.max - reference))[0];
    running.sum = running.sum * shrink + sum_of(sum);
    running.max = new_max;
    return shrink;
}

// out[r] = out[r] * shrink[r] + weights . V over the first `tokens` tokens of the tile.
template <class E, int R> void mix_rows(Scratch<E>& s, const Shape& shape, float* out, const float* shrink, int tokens) {
    constexpr int kStep = kLanes / E::pair;  // units of 16 tokens
    const int dim = shape.kv.head_dim;
    auto tile = [&](int first, auto size) {
        constexpr int C = decltype(size)::value;
        vf acc[R][C];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++) acc[r][c] = load<vf>(out + r * kMaxHeadDim + first + c * kLanes) * shrink[r];
        for (int t = 0; t < tokens; t += kLanes) {
            const unit* values[C];
            UNROLL for (int c = 0; c < C; c++) values[c] = s.values[t / kLanes] + first + c * kLanes;
            const unit* weights = s.weights + t / kLanes * kStep;
            const int whole = std::min(kLanes, tokens - t) / E::pair;
            const int64_t ahead = t / kLanes + kAhead < s.num_ahead ? s.values[t / kLanes + kAhead] - s.values[t / kLanes] : 0;
            multiply<E, R, C>(acc, weights, Scratch<E>::kWeightStride, values, dim, whole, ahead);
            if (E::pair == 2 && tokens - t < kLanes && (tokens & 1)) {
                // the last pair's second token does not exist yet: its bytes may be anything, and 0 * NaN is NaN
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int c = 0; c < C; c++) {
                        vu value = load<vu>(values[c] + (int64_t)whole * dim) & 0xffffu;
                        acc[r][c] = E::multiply_add(acc[r][c], vu{} + weights[r * Scratch<E>::kWeightStride + whole], value);
                    }
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++) store(out + r * kMaxHeadDim + first + c * kLanes, acc[r][c]);
    };
    int first = 0;
    for (; first + kMaxCols * kLanes <= dim; first += kMaxCols * kLanes) tile(first, Size<kMaxCols>{});
    if (first < dim) with_size<kMaxCols>((dim - first) / kLanes, [&](auto size) { tile(first, size); });
}

// Of the tile's keys from `start` on, those that any of `size` rows from `row` on sees.
inline int keys_seen(const Item& item, int row, int size, int start, int num_keys) {
    return std::min(num_keys, item.first_position + (row + size - 1) / item.num_heads + 1 - start);
}

// From scores to weights of `size` rows; shrink[r]: what the row's sums so far shrink by.
template <class E> void weigh_rows(Scratch<E>& s, const Shape& shape, const Item& item, int row, int size, int start,
                                   int num_keys, float* shrink) {
    const int columns = (num_keys + kLanes - 1) / kLanes;
    for (int r = 0; r < size; r++) {
        const int position = item.first_position + (row + r) / item.num_heads;
        const int high = std::min(num_keys, position + 1 - start);
        const int low = shape.window ? std::max(0, position + 1 - shape.window - start) : 0;
        float* scores = s.scores + r * kTileKeys;
        if (low > 0 || high < columns * kLanes) hide(scores, columns, low, high);
        shrink[r] = weigh_row<E>(scores, columns, shape.scale_log2, s.weights + r * Scratch<E>::kWeightStride, s.running[row + r]);
    }
}

// R rows from `row` on, against the tile's keys [start, start + num_keys).
template <class E, int R> void attend_rows(Scratch<E>& s, const Shape& shape, const Item& item, int row, int start,
                                           int num_keys) {
    num_keys = keys_seen(item, row, R, start, num_keys);
    if (num_keys <= 0) return;
    score_rows<E, R>(s, shape, s.queries + row * Scratch<E>::kQueryStride, (num_keys + kLanes - 1) / kLanes);
    float shrink[R];
    weigh_rows(s, shape, item, row, R, start, num_keys, shrink);
    mix_rows<E, R>(s, shape, s.out + row * kMaxHeadDim, shrink, num_keys);
}

#if defined(KVASIR_AMX)
// As score_rows, of R times 16 rows. Scores of columns beyond are written, too, and mean nothing.
template <int R> void score_amx(Scratch<Amx>& s, const Shape& shape, const unit* queries, int columns) {
    constexpr int C = 4 / R;
    amx_reads(queries);
    for (int column = 0; column < columns; column += C) {
        amx_zero<R, C>();
        for (int u = 0; u < shape.kv.head_dim / 2; u += kAmxDepth / 2) {
            const unit* keys[C];
            UNROLL for (int c = 0; c < C; c++)
                keys[c] = s.keys[std::min(column + c, columns - 1)] + (int64_t)u * s.key_stride;
            amx_multiply<R, C>(queries + u, Scratch<Amx>::kQueryStride, keys, s.key_stride);
        }
        amx_store_sums<R, C>(s.scores + column * kLanes, kTileKeys);
    }
}

// sums += weights . V for C times 16 dimensions; `last` are the values of the last tokens, where they are no whole tile.
template <int R, int C> void mix_dims(Scratch<Amx>& s, const Shape& shape, float* out, int first, int tokens,
                                      const unit* last) {
    amx_load_sums<R, C>(out + first, kMaxHeadDim);
    for (int t = 0; t < tokens; t += kAmxDepth) {
        const unit* from = (t + kAmxDepth <= tokens ? s.values[t / kLanes] : last) + first;
        const unit* values[C];
        UNROLL for (int c = 0; c < C; c++) values[c] = from + c * kLanes;
        amx_multiply<R, C>(s.weights + t / 2, Scratch<Amx>::kWeightStride, values, shape.kv.head_dim);
    }
    amx_store_sums<R, C>(out + first, kMaxHeadDim);
}

// As mix_rows, of R times 16 rows, `size` of which exist.
template <int R> void mix_amx(Scratch<Amx>& s, const Shape& shape, float* out, int size, const float* shrink, int tokens) {
    const int dim = shape.kv.head_dim;
    for (int r = 0; r < size; r++)
        if (shrink[r] != 1.0f)
            for (int d = 0; d < dim; d += kLanes)
                store(out + r * kMaxHeadDim + d, load<vf>(out + r * kMaxHeadDim + d) * shrink[r]);
    alignas(64) unit last[kAmxDepth / 2 * kMaxHeadDim];
    if (const int rest = tokens % kAmxDepth) {  // what is not there yet may be anything, and 0 * NaN is NaN
        const int pairs = (rest + 1) / 2, column = (tokens - rest) / kLanes;
        memcpy(last, s.values[column], (size_t)pairs * dim * sizeof(unit));
        memset(last + pairs * dim, 0, (size_t)(kAmxDepth / 2 - pairs) * dim * sizeof(unit));
        if (rest & 1)
            for (int d = 0; d < dim; d++) last[(pairs - 1) * dim + d] &= 0xffffu;
        if (rest <= kLanes)
            for (int r = 0; r < size; r++)
                memset(s.weights + r * Scratch<Amx>::kWeightStride + (column + 1) * kLanes / 2, 0, kLanes / 2 * sizeof(unit));
    }
    amx_reads(last);
    constexpr int C = 4 / R;
    int first = 0;
    for (; first + C * kLanes <= dim; first += C * kLanes) mix_dims<R, C>(s, shape, out, first, tokens, last);
    if (first < dim) mix_dims<R, 2>(s, shape, out, first, tokens, last);
}

// Up to R times 16 rows from `row` on. What is computed for rows that do not exist is not used.
template <int R> void attend_amx(Scratch<Amx>& s, const Shape& shape, const Item& item, int row, int size, int start,
                                 int num_keys) {
    num_keys = keys_seen(item, row, size, start, num_keys);
    if (num_keys <= 0) return;
    score_amx<R>(s, shape, s.queries + row * Scratch<Amx>::kQueryStride, (num_keys + kLanes - 1) / kLanes);
    float shrink[R * kAmxRows];
    weigh_rows(s, shape, item, row, size, start, num_keys, shrink);
    mix_amx<R>(s, shape, s.out + row * kMaxHeadDim, size, shrink, num_keys);
}
#endif

template <class S, class E> void read_row(unit* to, const typename S::scalar* from, int dim) {
    if constexpr (S::pair == E::pair) {
        memcpy(to, from, dim * sizeof *from);
    } else {
        for (int d = 0; d < dim; d += kLanes) store(to + d, S::load16(from + d));
    }
}

template <class S, class E> void read_queries(Scratch<E>& s, const Shape& shape, const Item& item,
                                              const typename S::scalar* q) {
    const int rows = item.num_queries * item.num_heads, dim = shape.kv.head_dim;
    for (int r = 0; r < rows; r++) {
        const int64_t token = item.first_query + r / item.num_heads;
        const int head = item.kv_head * shape.group + item.first_head + r % item.num_heads;
        read_row<S, E>(s.queries + r * Scratch<E>::kQueryStride, q + (token * shape.heads + head) * dim, dim);
        memset(s.out + r * kMaxHeadDim, 0, dim * sizeof(float));
        s.running[r] = {kHidden, 0.0f};
    }
}

// The tile's keys and values are these from here on, in float32.
void widen(Scratch<Wide>& s, Widened& tile, const Shape& shape, int columns) {
    const int dim = shape.kv.head_dim;
    for (int c = 0; c < columns; c++) {
        float *keys = tile.keys + (int64_t)c * kLanes * dim, *values = tile.values + (int64_t)c * kLanes * dim;
        for (int u = 0; u < dim / 2; u++) {
            vu pair = load<vu>(s.keys[c] + (int64_t)u * s.key_stride);
            store(keys + (2 * u) * kLanes, low_half(pair));
            store(keys + (2 * u + 1) * kLanes, high_half(pair));
        }
        for (int t = 0; t < kLanes / 2; t++)
            for (int d = 0; d < dim; d += kLanes) {
                vu pair = load<vu>(s.values[c] + (int64_t)t * dim + d);
                store(values + (2 * t) * dim + d, low_half(pair));
                store(values + (2 * t + 1) * dim + d, high_half(pair));
            }
        s.keys[c] = (const unit*)keys;
        s.values[c] = (const unit*)values;
    }
    s.key_stride = kLanes;
}

template <class S, class E> void attend(Scratch<E>& s, const Shape& shape, const Batch& batch, const Item& item,
                                        const typename S::scalar* q) {
    const int rows = item.num_queries * item.num_heads, block_tokens = shape.kv.block_tokens;
    const int32_t* table = batch.table + batch.table_start[item.seq];
    read_queries<S, E>(s, shape, item, q);
    for (int start = item.begin; start < item.end; start += kTileKeys) {
        const int num_keys = std::min(kTileKeys, item.end - start);
        const int num_columns = (std::min(kTileKeys + kAhead * kLanes, item.end - start) + kLanes - 1) / kLanes;
        s.num_ahead = rows <= kFewRows ? num_columns : 0;
        s.key_stride = block_tokens;
        for (int c = 0; c < num_columns; c++) {
            const int token = start + c * kLanes, slot = table[token / block_tokens], offset = token % block_tokens;
            s.keys[c] = (const unit*)shape.kv.keys(slot, item.kv_head) + offset;
            s.values[c] = (const unit*)shape.kv.values(slot, item.kv_head) + offset / S::pair * shape.kv.head_dim;
        }
        if constexpr (S::pair != E::pair) {
            static thread_local Widened tile;
            widen(s, tile, shape, (num_keys + kLanes - 1) / kLanes);
        }
#if defined(KVASIR_AMX)
        if constexpr (std::is_same_v<E, Amx>) {
            const AmxTiles tiles;
            for (int row = 0; row < rows; row += 2 * kAmxRows) {
                const int size = std::min(2 * kAmxRows, rows - row);
                (size > kAmxRows ? attend_amx<2> : attend_amx<1>)(s, shape, item, row, size, start, num_keys);
            }
            continue;
        }
#endif
        for (int row = 0, groups = (rows + kMaxRows - 1) / kMaxRows; row < rows; groups--) {
            const int size = (rows - row + groups - 1) / groups;  // 7 rows are 4 and 3, not 6 and 1
            with_size<kMaxRows>(size, [&](auto n) {
                attend_rows<E, decltype(n)::value>(s, shape, item, row, start, num_keys);
            });
            row += size;
        }
    }
}

// [heads of the batch's tokens][head_dim] of the output where this row belongs
inline int64_t output_row(const Shape& shape, const Item& item, int row) {
    const int64_t token = item.first_query + row / item.num_heads;
    return token * shape.heads + item.kv_head * shape.group + item.first_head + row % item.num_heads;
}

template <class E> void write_output(const Shape& shape, const Item& item, int row, const float* sums, float total,
                                     typename E::scalar* out) {
    const int dim = shape.kv.head_dim;
    typename E::scalar* place = out + output_row(shape, item, row) * dim;
    for (int d = 0; d < dim; d += kLanes) E::store16(place + d, load<vf>(sums + d) * (1.0f / total));
}

// A partial item's sums: [rows][head_dim] and, behind them, [rows] of Running.
struct Partials {
    std::vector<float> floats;
    int64_t stride;
    int dim;
    float* sums(int partial) { return floats.data() + partial * stride; }
    Running* running(int partial, int rows) { return (Running*)(sums(partial) + (int64_t)rows * dim); }
};

template <class S, class E> void finish(Scratch<E>& s, const Shape& shape, const Item& item, Partials& partials,
                                        typename S::scalar* out) {
    const int rows = item.num_queries * item.num_heads, dim = shape.kv.head_dim;
    for (int r = 0; r < rows; r++) {
        if (item.partial < 0) {
            write_output<S>(shape, item, r, s.out + r * kMaxHeadDim, s.running[r].sum, out);
        } else {
            memcpy(partials.sums(item.partial) + (int64_t)r * dim, s.out + r * kMaxHeadDim, dim * sizeof(float));
            partials.running(item.partial, rows)[r] = s.running[r];
        }
    }
}

template <class E> void merge(const Shape& shape, const Merge& merge, Partials& partials, typename E::scalar* out) {
    const int rows = merge.whole.num_queries * merge.whole.num_heads, dim = shape.kv.head_dim;
    for (int r = 0; r < rows; r++) {
        alignas(64) float sums[kMaxHeadDim] = {};
        float top = kHidden, total = 0;
        for (int p = 0; p < merge.num_partials; p++)
            top = std::max(top, partials.running(merge.first_partial + p, rows)[r].max);
        for (int p = 0; p < merge.num_partials; p++) {
            const Running& part = partials.running(merge.first_partial + p, rows)[r];
            const float* part_sums = partials.sums(merge.first_partial + p) + (int64_t)r * dim;
            const float factor = exp2<6>(splat(part.max - top))[0];
            total += part.sum * factor;
            for (int d = 0; d < dim; d++) sums[d] += part_sums[d] * factor;
        }
        write_output<E>(shape, merge.whole, r, sums, total, out);
    }
}

struct Plan {
    std::vector<Item> items;
    std::vector<Merge> merges;
    int num_partials = 0, max_rows = 0;
};

// Items of one KV head's heads [first_head, first_head + num_heads) of one sequence, last queries first.
void plan_heads(Plan& plan, const Shape& shape, const Batch& batch, int seq, int kv_head, int first_head,
                int num_heads) {
    const int num_queries = batch.query_start[seq + 1] - batch.query_start[seq];
    const int cached = batch.context_len[seq] - num_queries, block_tokens = shape.kv.block_tokens;
    const int tile = std::max(1, kTileRows / num_heads);
    const int split = (kSplitKeys + block_tokens - 1) / block_tokens * block_tokens;
    for (int query = (num_queries - 1) / tile * tile; query >= 0; query -= tile) {
        const int size = std::min(tile, num_queries - query), position = cached + query, end = position + size;
        const int seen_from = shape.window ? std::max(0, position + 1 - shape.window) : 0;
        const int begin = seen_from / block_tokens * block_tokens;
        Item item{seq, kv_head, first_head, num_heads, batch.query_start[seq] + query, size, position, begin, end, -1};
        if (num_queries > tile || end - begin <= split) {
            plan.items.push_back(item);
            continue;
        }
        plan.max_rows = std::max(plan.max_rows, size * num_heads);
        plan.merges.push_back({item, plan.num_partials, (end - begin + split - 1) / split});
        for (int from = begin; from < end; from += split) {
            item.begin = from;
            item.end = std::min(end, from + split);
            item.partial = plan.num_partials++;
            plan.items.push_back(item);
        }
    }
}

Plan make_plan(const Shape& shape, const Batch& batch) {
    Plan plan;
    for (int seq = 0; seq < batch.num_seqs; seq++)
        for (int kv_head = 0; kv_head < shape.kv.kv_heads; kv_head++)
            for (int head = 0; head < shape.group; head += kTileRows)
                plan_heads(plan, shape, batch, seq, kv_head, head, std::min(kTileRows, shape.group - head));
    auto work = [](const Item& i) { return (int64_t)(i.end - i.begin) * i.num_queries * i.num_heads; };
    std::stable_sort(plan.items.begin(), plan.items.end(),
                     [&](const Item& a, const Item& b) { return work(a) > work(b); });
    return plan;
}

template <class S, class E> void compute(const Shape& shape, const Batch& batch, const Item& item, Partials& partials,
                                         const void* q, void* out) {
    static thread_local Scratch<E> scratch;
    attend<S, E>(scratch, shape, batch, item, (const typename S::scalar*)q);
    finish<S, E>(scratch, shape, item, partials, (typename S::scalar*)out);
}

// W is what items of many rows are computed in.
template <class S, class W> void attention(const void* q, void* out, const Shape& shape, const Batch& batch, int threads) {
    typedef typename S::scalar scalar;
    Plan plan = make_plan(shape, batch);
    const int num_items = plan.items.size(), num_merges = plan.merges.size(), dim = shape.kv.head_dim;
    Partials partials{{}, (int64_t)plan.max_rows * (dim + 2), dim};
    partials.floats.resize(plan.num_partials * partials.stride);
    parallel_for(num_items, threads, [&](int i) {
        const Item& item = plan.items[i];
        const bool is_few = item.num_queries * item.num_heads <= kFewRows;
        (is_few ? compute<S, S> : compute<S, W>)(shape, batch, item, partials, q, out);
    });
    parallel_for(num_merges, threads, [&](int i) { merge<S>(shape, plan.merges[i], partials, (scalar*)out); });
}

}  // namespace
}  // namespace kvasir

using namespace kvasir;

// Whether this machine and its kernel have AMX.
extern "C" int kvasir_has_amx() { return has_amx(); }

// `how` bf16 of many rows is multiplied: 0 by its dot product, 1 in float32, 2 by AMX, if the shapes are of whole tiles.
// Returns 0, or 1 when a block table names a slot outside the arena (nothing is computed then).
extern "C" int kvasir_attention(int is_bf16, const void* q, void* out, const int32_t* ints, int num_seqs, int num_tokens,
                                char* kv_base, int64_t slot_stride, int num_slots, int heads, int kv_heads, int head_dim,
                                int block_tokens, float scale, int window, int how, int threads) {
    Batch batch(ints, num_seqs, num_tokens);
    for (int i = 0; i < batch.table_start[num_seqs]; i++)
        if ((unsigned)batch.table[i] >= (unsigned)num_slots) return 1;
    int64_t head_bytes = (int64_t)head_dim * block_tokens * (is_bf16 ? 2 : 4);
    LayerKv kv{kv_base, slot_stride, head_bytes, num_slots, kv_heads, head_dim, block_tokens};
    Shape shape{kv, heads, heads / kv_heads, window, scale * 1.44269504f};
    auto run = is_bf16 ? (how == 1 ? attention<Bf16, Wide> : attention<Bf16, Bf16>) : attention<F32, F32>;
#if defined(KVASIR_AMX)
    if (is_bf16 && how == 2 && has_amx() && head_dim % kAmxDepth == 0 && block_tokens % kAmxDepth == 0)
        run = attention<Bf16, Amx>;
#endif
    run(q, out, shape, batch, threads);
    return 0;
}
