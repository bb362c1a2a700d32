// Scores of a transform coded head: y[b][token] = gain_row * sum_j (scale_tj q_row,j + offset_tj) x[b][j] + base[b].
//
// A tier's columns come in planes of equal width, in tiles of tiles.hpp, all planes of a tile one after another: memory
// is read once and in order. Each plane rounds its own columns of scale_t * x, so that fine columns keep their precision.

#include <utility>
#include <vector>

#include "threads.hpp"
#include "tiles.hpp"

namespace {

struct Plane {
    int64_t tier, width, shift, columns;
    const int32_t* column;
    int64_t words() const { return (columns * width + 31) / 32; }
};

struct Tier {
    int64_t start, rows;
    const uint8_t* tiles;
    int64_t size = 0;  // bytes of a tile
    std::vector<Plane> planes;
    std::vector<States> states;
    std::vector<float> factors;  // [plane][b]
    std::vector<float> shift;    // sum_j offset_tj x[b][j]
};

}  // namespace

extern "C" const char* instructions() { return INSTRUCTIONS; }

// tiers: [n][start row, rows, offset into tiles]; planes: [n][tier, width, shift, columns], in the order of the tiles,
// their columns one after another in `columns`; x: [batch][dim]; scale, offset: [tier][dim]; gain: of each row;
// token: of each row.
extern "C" void transform_coded_scores(const uint8_t* tiles, const int64_t* tiers, int64_t n_tiers, const int64_t* planes,
                                       int64_t n_planes, const int32_t* columns, const float* x, int64_t dim,
                                       int64_t batch, const float* scale, const float* offset, const float* gain,
                                       const int32_t* token, const float* base, int64_t vocab, float* out,
                                       int64_t threads) {
    std::vector<Tier> all;
    for (int64_t t = 0; t < n_tiers; ++t) all.push_back({tiers[3 * t], tiers[3 * t + 1], tiles + tiers[3 * t + 2]});
    for (int64_t i = 0; i < n_planes; ++i) {
        all[planes[4 * i]].planes.push_back({planes[4 * i], planes[4 * i + 1], planes[4 * i + 2], planes[4 * i + 3], columns});
        columns += planes[4 * i + 3];
    }
    share(n_tiers, 1, threads, [&](int64_t t, int64_t) {
        Tier& tier = all[t];
        for (int64_t b = 0; b < batch; ++b) {
            double sum = 0;
            for (int64_t j = 0; j < dim; ++j) sum += double(offset[t * dim + j]) * x[b * dim + j];
            tier.shift.push_back(static_cast<float>(sum));
        }
        for (const Plane& p : tier.planes) {
            const Rounded rounded(batch, p.columns, [&](int64_t b, int64_t j) {
                return scale[t * dim + p.column[j]] * x[b * dim + p.column[j]];
            });
            tier.states.emplace_back(rounded, p.words(), p.width);
            for (int64_t b = 0; b < batch; ++b)
                tier.factors.push_back(rounded.step[b] * static_cast<float>(1 << p.shift));
            tier.size += p.words() * TILE * 4;
        }
    });
    std::vector<std::pair<const Tier*, int64_t>> jobs;  // a tile each
    for (const Tier& tier : all)
        for (int64_t k = 0; k * TILE < tier.rows; ++k) jobs.emplace_back(&tier, k);
    share(static_cast<int64_t>(jobs.size()), 8, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> sum(batch * TILE), part(batch * TILE);
        for (int64_t job = begin; job < end; ++job) {
            const Tier& tier = *jobs[job].first;
            const uint8_t* tile = tier.tiles + jobs[job].second * tier.size;
            for (int64_t b = 0; b < batch; ++b) std::fill_n(sum.data() + b * TILE, TILE, tier.shift[b]);
            for (size_t i = 0; i < tier.states.size(); ++i) {
                products(tier.planes[i].width, tile, tier.states[i], part.data());
                for (int64_t b = 0; b < batch; ++b) {
                    const float factor = tier.factors[i * batch + b];
                    for (int64_t r = 0; r < TILE; ++r) sum[b * TILE + r] += factor * part[b * TILE + r];
                }
                tile += tier.states[i].words * TILE * 4;
            }
            const int64_t first = tier.start + jobs[job].second * TILE;
            const int64_t count = std::min(TILE, tier.start + tier.rows - first);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t r = 0; r < count; ++r)
                    out[b * vocab + token[first + r]] = gain[first + r] * sum[b * TILE + r] + base[b];
        }
    });
}
