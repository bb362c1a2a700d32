// Scores of a transform coded head: y[b][token] = gain_row * sum_j (scale_tj q_row,j + offset_tj) x[b][j] + base[b].
//
// A tier's columns come in planes of equal width, in tiles of tiles.hpp, all planes of a tile one after another: memory
// is read once and in order. Each plane rounds its own columns of scale_t * x, so that fine columns keep their precision.

#include <optional>
#include <utility>
#include <vector>

#include "threads.hpp"
#include "tiles.hpp"

namespace {

struct Plane {
    int64_t width, shift, columns;
    const int32_t* column;
    int64_t words() const { return (columns * width + 31) / 32; }
};

struct Tier {
    int64_t start, rows;
    const uint8_t* tiles;
    int64_t begin, end;        // of its planes
    int64_t size;              // bytes of a tile
    std::vector<float> shift;  // sum_j offset_tj x[b][j]
};

}  // namespace

extern "C" const char* instructions() { return instructions_of_tiles(); }

// tiers: [n][start row, rows, offset into tiles]; planes: [n][tier, width, shift, columns], in the order of the tiles,
// their columns one after another in `columns`; x: [batch][dim]; scale, offset: [tier][dim]; gain: of each row;
// row: of each token; scores: room for those of the rows.
extern "C" void transform_coded_scores(const uint8_t* tiles, const int64_t* tiers, int64_t n_tiers, const int64_t* planes,
                                       int64_t n_planes, const int32_t* columns, const float* x, int64_t dim,
                                       int64_t batch, const float* scale, const float* offset, const float* gain,
                                       const int32_t* row, const float* base, int64_t vocab, float* scores, float* out,
                                       int64_t threads) {
    std::vector<Tier> all;
    std::vector<Plane> every;
    for (int64_t t = 0, i = 0; t < n_tiers; ++t) {
        Tier tier{tiers[3 * t], tiers[3 * t + 1], tiles + tiers[3 * t + 2], i, i, 0, {}};
        for (; i < n_planes && planes[4 * i] == t; tier.end = ++i) {
            every.push_back({planes[4 * i + 1], planes[4 * i + 2], planes[4 * i + 3], columns});
            columns += planes[4 * i + 3];
            tier.size += every.back().words() * TILE * 4;
        }
        all.push_back(std::move(tier));
    }
    std::vector<std::optional<States>> states(n_planes);
    share(n_tiers + n_planes, 1, threads, [&](int64_t job, int64_t) {
        if (job >= n_planes) {
            const int64_t t = job - n_planes;
            for (int64_t b = 0; b < batch; ++b) {
                double sum = 0;
                for (int64_t j = 0; j < dim; ++j) sum += double(offset[t * dim + j]) * x[b * dim + j];
                all[t].shift.push_back(static_cast<float>(sum));
            }
            return;
        }
        const Plane& p = every[job];
        const float* own = scale + planes[4 * job] * dim;
        states[job].emplace(batch, p.columns, p.words(), p.width, 0.0f,
                            [&](int64_t b, int64_t j) { return own[p.column[j]] * x[b * dim + p.column[j]]; });
        for (float& step : states[job]->step) step *= static_cast<float>(1 << p.shift);
    });
    std::vector<std::pair<const Tier*, int64_t>> jobs;                // a tile each
    for (const Tier& tier : all)
        for (int64_t k = 0; k * TILE < tier.rows; ++k) jobs.emplace_back(&tier, k);
    share(static_cast<int64_t>(jobs.size()), 8, threads, [&](int64_t begin, int64_t end) {
        const Registers registers(batch);
        std::vector<float> sum(batch * TILE);
        const std::vector<float> ones(TILE, 1.0f);
        for (int64_t job = begin; job < end; ++job) {
            const Tier& tier = *jobs[job].first;
            const uint8_t* tile = tier.tiles + jobs[job].second * tier.size;
            for (int64_t b = 0; b < batch; ++b) std::fill_n(sum.data() + b * TILE, TILE, tier.shift[b]);
            for (int64_t i = tier.begin; i < tier.end; ++i) {
                products(every[i].width, tile, *states[i], ones.data(), sum.data());
                tile += states[i]->words * TILE * 4;
            }
            const int64_t first = tier.start + jobs[job].second * TILE;
            const int64_t count = std::min(TILE, tier.start + tier.rows - first);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t r = 0; r < count; ++r)
                    scores[b * vocab + first + r] = gain[first + r] * sum[b * TILE + r] + base[b];
        }
    });
    // tokens in their order: were they written above, the threads would take lines of `out` from each other
    share(vocab, 4096, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t v = begin; v < end; ++v) out[b * vocab + v] = scores[b * vocab + row[v]];
    });
}
