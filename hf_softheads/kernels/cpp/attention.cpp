// Attention with any row map: out = weights(scaling * query key^T) value, and its gradients, a block of queries at a time.
//
// A block's scores lie in the cache. Every row of them is handed to the row map as the scores of the keys that its query
// sees, so that masks, windows, slopes and the soft cap are dealt with outside the maps.

#include <vector>

#include "attention_blocks.hpp"
#include "threads.hpp"

namespace {

template <class F>
void in_parallel(int64_t tasks, int64_t threads, int64_t keys, F f) {
    share(tasks, 1, threads, [&](int64_t task, int64_t) { f(task, Scratch(keys)); });
}

// Blocks of queries of all heads that share their keys; some tasks each take every so manieth of them.
struct Plan {
    int64_t most, blocks, group, parts;
    explicit Plan(const Call& c) {
        most = std::max<int64_t>(ROWS / 2, std::min(ROWS, SCORES / c.keys / M * M));
        most = std::min(most, up(c.queries, M));
        blocks = (c.queries + most - 1) / most;
        group = c.heads / c.kv_heads;
        const int64_t shared = c.batch * c.kv_heads, wanted = c.threads > 1 ? 2 * c.threads : 1;
        parts = std::min(blocks * group, (wanted + shared - 1) / shared);
    }
};

template <class T>
const T* at(const void* base, const int64_t* strides, int64_t b, int64_t h) {
    return static_cast<const T*>(base) + b * strides[0] + h * strides[1];
}

template <class Op>
void forward(const Call& c) {
    typedef typename Op::Number T;
    const Plan plan(c);
    const int64_t words = (c.dim + Op::numbers - 1) / Op::numbers, width = up(c.value_dim, W);
    const int64_t stride = up(c.keys, PANEL) + 16;
    in_parallel(c.batch * c.kv_heads * plan.parts, c.threads, c.keys, [&](int64_t task, const Scratch& scratch) {
        const int64_t part = task % plan.parts, kv = task / plan.parts % c.kv_heads;
        const int64_t b = task / plan.parts / c.kv_heads;
        const Buffer panels(up(c.keys, PANEL) * words), values(up(c.keys, 2) * width);
        const Buffer scores(plan.most * stride), queries(plan.most * words), sums(plan.most * width);
        pack_panels(at<T>(c.key, c.key_strides, b, kv), c.key_strides[2], c.keys, c.dim, words, panels);
        pack_columns(at<T>(c.value, c.value_strides, b, kv), c.value_strides[2], c.keys, c.value_dim, width, values);
        for (int64_t i = part; i < plan.blocks * plan.group; i += plan.parts) {
            const int64_t h = kv * plan.group + i / plan.blocks, first = i % plan.blocks * plan.most;
            const Block block(c, b, h, first, plan.most);
            const T* query = at<T>(c.query, c.query_strides, b, h) + first * c.query_strides[2];
            pack_rows(query, c.query_strides[2], block.rows, c.dim, words, up(block.rows, M), queries);
            block.products<Op>(queries, words, panels, words, scores, stride, c.scaling);
            float factors[ROWS];
            for (int64_t r = 0; r < block.rows; ++r) {
                const int64_t low = block.lows[r / M], high = block.highs[r / M];
                float* row = scores + r * stride;
                factors[r] = weigh(c, h, block.spans[r], row, low, high, scratch);
                Op::split(row, low, high);
            }
            std::fill(sums + 0, sums + up(block.rows, M) * width, 0.0f);
            block.mean<Op>(scores, stride, values, width, sums);
            float* out = c.out + ((b * c.heads + h) * c.queries + first) * c.value_dim;
            for (int64_t r = 0; r < block.rows; ++r)
                for (int64_t j = 0; j < c.value_dim; ++j)
                    out[r * c.value_dim + j] = sums[r * width + j] * factors[r];
        }
    });
}

template <int n, class T>
void sum_values(const Call& c, const Span& span, const float* weights, const T* values, float factor, float* out) {
    vf sums[n] = {};
    for (int64_t k = span.first; k < span.last; ++k)
        for (int j = 0; j < n; ++j)
            sums[j] = fma(all(weights[k]), numbers_at(values + k * c.value_strides[2] + j * W), sums[j]);
    for (int j = 0; j < n; ++j) store(out + j * W, sums[j] * factor);
}

// A query or two, as in decoding: packing the keys would cost more than it saves. Needs full vectors.
template <class T>
void decode(const Call& c) {
    in_parallel(c.batch * c.heads * c.queries, c.threads, c.keys, [&](int64_t task, const Scratch& scratch) {
        const int64_t q = task % c.queries, h = task / c.queries % c.heads, b = task / c.queries / c.heads;
        const int64_t kv = h / (c.heads / c.kv_heads);
        const Span span = span_of(c, b, h, q);
        const T* query = at<T>(c.query, c.query_strides, b, h) + q * c.query_strides[2];
        const T* keys = at<T>(c.key, c.key_strides, b, kv);
        const T* values = at<T>(c.value, c.value_strides, b, kv);
        const Buffer row(c.keys + 2 * W);
        for (int64_t k = span.first; k < span.last; ++k) {
            vf sums{};
            for (int64_t j = 0; j < c.dim; j += W)
                sums = fma(numbers_at(query + j), numbers_at(keys + k * c.key_strides[2] + j), sums);
            row[k] = c.scaling * total(sums);
        }
        const float factor = weigh(c, h, span, row, span.first, span.last, scratch);
        float* out = c.out + task * c.value_dim;
        int64_t j = 0;
        for (; j + 4 * W <= c.value_dim; j += 4 * W) sum_values<4>(c, span, row, values + j, factor, out + j);
        for (; j < c.value_dim; j += W) sum_values<1>(c, span, row, values + j, factor, out + j);
    });
}

void add_rows(const float* from, int64_t width, int64_t rows, int64_t n, float scale, float* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < n; ++k) to[r * n + k] += scale * from[r * width + k];
}

// Gradients of fp32 queries, keys and values; those of the keys and values are added to what is there.
void backward(const Call& c) {
    const Plan plan(c);
    const int64_t width = up(c.dim, W), value_width = up(c.value_dim, W), shared = c.batch * c.kv_heads;
    const int64_t stride = up(c.keys, PANEL) + 16;
    std::vector<Buffer> dkeys, dvalues;  // of each task: added up in one order, whichever task is done first
    for (int64_t task = 0; task < shared * plan.parts; ++task) {
        dkeys.emplace_back((c.keys + M) * width);
        dvalues.emplace_back((c.keys + M) * value_width);
    }
    in_parallel(shared * plan.parts, c.threads, c.keys, [&](int64_t task, const Scratch& scratch) {
        const int64_t part = task % plan.parts, kv = task / plan.parts % c.kv_heads;
        const int64_t b = task / plan.parts / c.kv_heads;
        float *dkey = dkeys[task], *dvalue = dvalues[task];
        std::fill(dkey, dkey + (c.keys + M) * width, 0.0f);
        std::fill(dvalue, dvalue + (c.keys + M) * value_width, 0.0f);
        const Buffer keys(up(c.keys, 2) * width);
        const Buffer key_panels(up(c.keys, PANEL) * width), value_panels(up(c.keys, PANEL) * value_width);
        const Buffer scores(plan.most * stride), grads(plan.most * stride), capped(c.softcap != 0 ? stride : 0);
        const Buffer queries(plan.most * width), outs(plan.most * value_width), sums(plan.most * width);
        const float* key = at<float>(c.key, c.key_strides, b, kv);
        const float* value = at<float>(c.value, c.value_strides, b, kv);
        pack_rows(key, c.key_strides[2], c.keys, c.dim, width, up(c.keys, 2), keys);
        pack_panels(key, c.key_strides[2], c.keys, c.dim, width, key_panels);
        pack_panels(value, c.value_strides[2], c.keys, c.value_dim, value_width, value_panels);
        for (int64_t i = part; i < plan.blocks * plan.group; i += plan.parts) {
            const int64_t h = kv * plan.group + i / plan.blocks, first = i % plan.blocks * plan.most;
            const int64_t start = (b * c.heads + h) * c.queries + first;  // among all queries
            const Block block(c, b, h, first, plan.most);
            const int64_t padded = up(block.rows, M), until = block.low + up(block.high - block.low, M);
            const float* query = at<float>(c.query, c.query_strides, b, h) + first * c.query_strides[2];
            pack_rows(query, c.query_strides[2], block.rows, c.dim, width, padded, queries);
            pack_rows(c.grad + start * c.value_dim, c.value_dim, block.rows, c.value_dim, value_width, padded, outs);
            block.products<Full>(queries, width, key_panels, width, scores, stride, c.scaling);
            block.products<Full>(outs, value_width, value_panels, value_width, grads, stride, 1);
            for (int64_t r = 0; r < block.rows; ++r)
                weigh_back(c, h, block.spans[r], scores + r * stride, grads + r * stride, c.softcap != 0 ? +capped : nullptr,
                           block.low, until, scratch);
            block.transposed(scores, stride, outs, value_width, dvalue);
            block.transposed(grads, stride, queries, width, dkey);
            std::fill(sums + 0, sums + padded * width, 0.0f);
            block.mean<Full>(grads, stride, keys, width, sums);
            float* dquery = c.dquery + start * c.dim;
            std::fill(dquery, dquery + block.rows * c.dim, 0.0f);
            add_rows(sums, width, block.rows, c.dim, c.scaling, dquery);
        }
    });
    for (int64_t task = 0; task < shared * plan.parts; ++task) {
        const int64_t pair = task / plan.parts;  // sample and key head
        add_rows(dkeys[task], width, c.keys, c.dim, c.scaling, c.dkey + pair * c.keys * c.dim);
        add_rows(dvalues[task], value_width, c.keys, c.value_dim, 1, c.dvalue + pair * c.keys * c.value_dim);
    }
}

}  // namespace

extern "C" {

// Index of a row map, -1 for none of that name.
int64_t attention_map(const char* name) {
    for (size_t i = 0; i < sizeof MAPS / sizeof *MAPS; ++i)
        if (!std::strcmp(MAPS[i].name, name)) return static_cast<int64_t>(i);
    return -1;
}

// Are products of bf16 numbers fast here? If not, give fp32.
int64_t attention_half() { return HALF; }

const char* instructions() { return HALF ? "AVX-512 BF16" : W == 16 ? "AVX-512" : W == 8 ? "AVX2" : "128 bits"; }

void attention_forward(const Call* call) {
    const Call& c = *call;
    const bool few = c.queries <= 2 && c.dim % W == 0 && c.value_dim % W == 0;
    if (few && c.half)
        decode<uint16_t>(c);
    else if (few)
        decode<float>(c);
    else if (c.half)
        forward<Half>(c);
    else
        forward<Full>(c);
}

void attention_backward(const Call* call) { backward(*call); }
}
